"""Tau-normalise the softmax classifier of a checkpoint.

See docs/methods.md.

Example:
    bags-d2 normalize --input output/lvis_baseline_R50/model_final.pth --output tau.pth --tau 1
"""

import argparse
from pathlib import Path

from .flags import add_trailing_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, required=True, help="a softmax checkpoint (.pth)")
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    parser.add_argument(
        "--tau", type=float, default=1.0, help="0 changes nothing, 1 makes all norms equal"
    )
    parser.add_argument("--max-count", type=int, help="only classes with fewer training instances")
    parser.add_argument(
        "--config-file", default="", metavar="FILE", help="whose training set is counted for that"
    )
    add_trailing_options(parser)


def run(args: argparse.Namespace) -> None:
    import torch

    from ..checkpoint.files import read_checkpoint, read_model_weights
    from ..data.class_statistics import ClassStatistics, training_class_counts
    from ..engine import setup_cfg
    from ..errors import ConfigError
    from ..fitting.transforms import tau_normalize
    from ..utils.files import write_atomically

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
