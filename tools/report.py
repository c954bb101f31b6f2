#!/usr/bin/env python
"""One self-contained HTML page about one or several evaluated runs."""

import argparse
from pathlib import Path

from bags_d2.analysis.report import write_html_report
from bags_d2.analysis.runs import read_runs
from bags_d2.errors import exit_on_user_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument("--labels", nargs="+", help="default: the folders' names")
    parser.add_argument("--dataset", help="if several were evaluated")
    parser.add_argument("--task", choices=("bbox", "segm"), default="bbox")
    parser.add_argument("--thresholds", type=int, nargs="*", help="default: the runs' configs'")
    parser.add_argument("--output", type=Path, default=Path("output/report.html"))
    parser.add_argument("--max-crops", type=int, default=1500, help="of images, in all")
    parser.add_argument(
        "--config-file", help="registers the data set; default: config.yaml of the first run"
    )
    args = parser.parse_args()
    runs = read_runs(args.runs, args.labels, args.dataset, args.task, args.config_file)
    write_html_report(runs, args.output, args.thresholds, args.max_crops)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
