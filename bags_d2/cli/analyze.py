"""Show each class's classifier weight norm against its count.

For one or more checkpoints (docs/analysis.md).

Example:
    bags-d2 analyze --checkpoint softmax=output/mine_baseline/model_final.pth \\
        BAGS=output/mine_bags/model_final.pth
"""

import argparse
from pathlib import Path

from .flags import add_options_flag


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        required=True,
        metavar="[LABEL=]PATH",
        help=".pth, or .pkl of Detectron2's model zoo",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--config-file",
        metavar="FILE",
        help="counts of its training set; default: those that a checkpoint remembers",
    )
    source.add_argument(
        "--counts", metavar="FILE", help="a JSON list of counts, or {class name: count}"
    )
    parser.add_argument(
        "--thresholds", type=int, nargs="*", default=[10, 100, 1000], help="bin edges"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("output/classifier"), help="folder to write to"
    )
    add_options_flag(parser)


def run(args: argparse.Namespace) -> None:
    from ..analysis.classifier import (
        known_classes,
        read_labelled_checkpoints,
        write_weight_norms,
    )
    from ..data.class_statistics import ClassStatistics, read_class_counts
    from ..engine import setup_cfg

    checkpoints = read_labelled_checkpoints(args.checkpoint)
    if args.config_file:
        classes = ClassStatistics.from_training_set(setup_cfg(args), tolerated=())
    else:
        counts = read_class_counts(args.counts).tolist() if args.counts else None
        classes = known_classes(checkpoints.values(), counts)
    table = write_weight_norms(checkpoints, classes, args.thresholds, args.output)
    print(f"{table}\nweight_norms.png and .csv are in {args.output}.")
