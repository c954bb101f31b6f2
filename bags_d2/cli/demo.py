"""Compare softmax with Balanced Group Softmax on drawn data.

Draws the data set "glyphs" (in DETECTRON2_DATASETS, or else datasets/), runs "bags-d2 train" and
"bags-d2 fit" on it, and writes a table, charts and pictures.

Example:
    bags-d2 demo --output output/demo
"""

import argparse
from pathlib import Path

INTERRUPTED = "Run the same command again; finished parts of the training are not repeated."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder")
    parser.add_argument("--seed", type=int, default=1, help="seed of stage 2")
    parser.add_argument(
        "--from-scratch", action="store_true", help="train the softmax baseline as well (~6 min)"
    )
    parser.add_argument(
        "--online", action="store_true", help="train stage 2 from images, not cached features"
    )


def run(args: argparse.Namespace) -> None:
    import sys

    from ..analysis.demo import run_demo

    sys.stdout.reconfigure(errors="replace")
    print(f"\n{run_demo(args.output, args.seed, args.from_scratch, args.online)}")
