#!/usr/bin/env python
"""Strip a training checkpoint to its weights and classes, as model zoos publish them."""

import argparse
from pathlib import Path

import torch

from bags_d2.checkpoint.files import read_checkpoint
from bags_d2.data.class_statistics import ClassStatistics
from bags_d2.engine import setup_cfg
from bags_d2.errors import exit_on_user_error
from bags_d2.utils.files import write_atomically


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a model_*.pth written by train_net.py")
    parser.add_argument("output", type=Path, help="the file to write")
    parser.add_argument(
        "--config-file", help="add names and counts of its training set, if the checkpoint has none"
    )
    parser.add_argument("opts", nargs="*", default=[], help="config keys and values")
    args = parser.parse_args()
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


if __name__ == "__main__":
    with exit_on_user_error():
        main()
