#!/usr/bin/env python
"""Strip a training checkpoint to its weights, as model zoos publish them."""

import argparse
from pathlib import Path

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a model_*.pth written by train_net.py")
    parser.add_argument("output", type=Path, help="the file to write")
    args = parser.parse_args()
    weights = torch.load(args.checkpoint, map_location="cpu", weights_only=True)["model"]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": weights, "__author__": "bags_d2"}, args.output)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
