"""Show what changed from one evaluated run to another.

AP of each class and of each bin, and which group wins where an object is.

Example:
    bags-d2 runs output/mine_baseline output/mine_bags --labels softmax BAGS
"""

import argparse
import sys
from pathlib import Path

from .flags import add_run_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs=2, type=Path, metavar="OUTPUT_DIR", help="folder of an evaluated run"
    )
    parser.add_argument("--labels", nargs=2, help="their names; default: the folders'")
    add_run_flags(parser)
    parser.add_argument(
        "--output", type=Path, default=Path("output/comparison"), help="folder to write to"
    )


def run(args: argparse.Namespace) -> None:
    from ..analysis.run_pair import write_run_pair
    from ..analysis.runs import read_runs

    runs = read_runs(args.runs, args.labels, args.dataset, args.task, args.config_file)
    table = write_run_pair(*runs, args.output, args.thresholds)
    # A name may have letters that the terminal lacks.
    sys.stdout.reconfigure(errors="backslashreplace")
    print(f"{table}\nPictures and tables are in {args.output}.")
