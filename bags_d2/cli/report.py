"""Write one HTML page about evaluated runs.

Example:
    bags-d2 report output/mine_baseline output/mine_bags --output output/report.html
"""

import argparse
from pathlib import Path

from .flags import add_run_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="OUTPUT_DIR", help="folders of evaluated runs"
    )
    parser.add_argument("--labels", nargs="+", help="their names; default: the folders'")
    add_run_flags(parser)
    parser.add_argument(
        "--output", type=Path, default=Path("output/report.html"), help="the file to write"
    )
    parser.add_argument("--max-crops", type=int, default=1500, help="of images, in all")


def run(args: argparse.Namespace) -> None:
    from ..analysis.report import write_html_report
    from ..analysis.runs import read_runs

    runs = read_runs(args.runs, args.labels, args.dataset, args.task, args.config_file)
    write_html_report(runs, args.output, args.thresholds, args.max_crops)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")
