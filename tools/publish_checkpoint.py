#!/usr/bin/env python
"""Strip a training checkpoint to its weights, as model zoos publish them."""

import argparse
import sys
from pathlib import Path

import torch

from bags_d2 import BagsError
from bags_d2.engine.checkpoint_file import read_model_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a model_*.pth written by train_net.py")
    parser.add_argument("output", type=Path, help="the file to write")
    args = parser.parse_args()
    weights = read_model_weights(args.checkpoint)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": weights, "__author__": "bags_d2"}, args.output)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    try:
        main()
    except BagsError as error:
        sys.exit(f"Error: {error}")
