"""Train or evaluate a detector.

Flags are those of Detectron2's train_net.py, and --method. As for every command, a config that ends
in .py is a LazyConfig, whose options may also be key=value: it is a Python program, which is run,
so use none that you have not read (docs/lazyconfigs.md). YAMLs are data.

Example:
    bags-d2 train --config-file configs/lvis_baseline_R50.yaml --method seesaw --num-gpus 8
    bags-d2 train --config-file configs/lvis_bags_R50.yaml --eval-only
"""

import argparse

from .flags import add_config_flags, add_launch_flags, add_trailing_options

INTERRUPTED = "Run the same command with --resume to go on from the last checkpoint."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_flags(parser)
    parser.add_argument("--resume", action="store_true", help="go on where OUTPUT_DIR stopped")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS")
    add_launch_flags(parser)
    add_trailing_options(parser)


def run(args: argparse.Namespace) -> None:
    from ..engine.training import train

    train(args)
