"""Train a classifier (stage 2) from cached box features.

Both passes, computing features and training on them, resume where they stopped if the same command
is run again (docs/fitting.md).

Example:
    bags-d2 fit --config-file configs/lvis_bags_R50.yaml --num-gpus 8
"""

import argparse

from .flags import add_config_flags, add_launch_flags, add_trailing_options

INTERRUPTED = "Run the same command again to go on where it stopped."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_flags(parser)
    parser.add_argument("--views", type=int, default=1, help="augmented views of every image")
    parser.add_argument(
        "--rois-per-image", type=int, help="RoIs to keep of an image; default: all proposals"
    )
    parser.add_argument(
        "--cache-dtype",
        default="uint4",
        choices=("uint2", "uint4", "uint8", "float16"),
        help="how features are stored; default: uint4",
    )
    parser.add_argument(
        "--cache",
        help="folder of the features; default: OUTPUT_DIR/../<folder of WEIGHTS>_features",
    )
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)  # it always does
    add_launch_flags(parser)
    add_trailing_options(parser)


def run(args: argparse.Namespace) -> None:
    from ..fitting.run import fit

    fit(args)
