"""Strip a checkpoint to its weights and classes, to publish it.

Example:
    bags-d2 publish output/mine_bags/model_final.pth mine_bags.pth
"""

import argparse
from pathlib import Path

from .flags import add_options_flag


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a model_*.pth that training wrote")
    parser.add_argument("output", type=Path, help="the file to write")
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help="add names and counts of its training set, if the checkpoint has none",
    )
    add_options_flag(parser)


def run(args: argparse.Namespace) -> None:
    import torch

    from ..checkpoint.files import read_checkpoint
    from ..data.class_statistics import ClassStatistics
    from ..engine import setup_cfg
    from ..utils.files import write_atomically

    checkpoint = read_checkpoint(args.checkpoint)
    classes = ClassStatistics.from_checkpoint(checkpoint)
    if classes == ClassStatistics() and args.config_file:
        classes = ClassStatistics.from_training_set(setup_cfg(args))
    published = {
        "model": checkpoint["model"],
        **classes.for_checkpoint(),
        "__author__": "bags_d2",
    }
    with write_atomically(args.output, "wb") as file:
        torch.save(published, file)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")
