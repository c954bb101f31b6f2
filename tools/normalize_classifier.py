#!/usr/bin/env python
"""Tau-normalise the softmax classifier of a checkpoint (no training); see docs/methods.md."""

import argparse
from pathlib import Path

import torch

from bags_d2 import ConfigError
from bags_d2.checkpoint.files import read_checkpoint, read_model_weights
from bags_d2.data.class_statistics import ClassStatistics, training_class_counts
from bags_d2.engine import setup_cfg
from bags_d2.errors import exit_on_user_error
from bags_d2.fitting.transforms import tau_normalize
from bags_d2.utils.files import write_atomically


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="a softmax checkpoint (.pth)")
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    parser.add_argument("--tau", type=float, default=1.0)
    parser.add_argument("--max-count", type=int, help="only classes with fewer training instances")
    parser.add_argument("--config-file", default="", help="whose training set is counted for that")
    parser.add_argument("opts", nargs="*", default=[], help="config keys and values")
    args = parser.parse_args()
    classes = None
    if args.max_count is not None:
        if not args.config_file:
            raise ConfigError("--max-count needs --config-file, whose training set is counted.")
        classes = training_class_counts(setup_cfg(args), by="instances") < args.max_count
    weights = read_model_weights(args.input)
    record = ClassStatistics.from_checkpoint(read_checkpoint(args.input)).for_checkpoint()
    normalized = {"model": tau_normalize(weights, args.tau, classes), **record}
    with write_atomically(args.output, "wb") as file:
        torch.save(normalized, file)
    print(f"'{args.output}' is '{args.input}' with tau {args.tau}.")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
