"""Evaluate several classifiers of one detector in a single pass.

Backbone, proposals and box features are computed once for all. What each writes to its folder is
what "bags-d2 train --eval-only" writes.

Example:
    bags-d2 evaluate --config-file configs/glyphs_baseline.yaml --num-gpus 0 \\
        --run bags output/demo/bags/model_final.pth output/bags \\
        --run crt+cosine output/demo/crt+cosine/model_final.pth output/crt+cosine
"""

import argparse

from .flags import add_launch_flags, add_trailing_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the baseline's")
    parser.add_argument(
        "--run",
        nargs=3,
        action="append",
        required=True,
        metavar=("METHOD", "WEIGHTS", "OUTPUT_DIR"),
        help='its method ("baseline": none), checkpoint and folder; once for each classifier',
    )
    add_launch_flags(parser)
    add_trailing_options(parser)


def run(args: argparse.Namespace) -> None:
    from ..engine.training import evaluate

    evaluate(args)
