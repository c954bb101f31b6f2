"""Show the class groups of a data set, and which would fit.

Example:
    bags-d2 groups --config-file configs/lvis_bags_R50.yaml --output output/groups.png
    bags-d2 groups --json mine/annotations/train.json --thresholds 20 200
"""

import argparse
from pathlib import Path

from .flags import METHOD_HELP, add_options_flag


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--config-file", metavar="FILE", help="groups of its training set and thresholds"
    )
    source.add_argument("--json", metavar="FILE", help="annotations in COCO or LVIS format")
    source.add_argument(
        "--counts", metavar="FILE", help="a JSON list of counts, or {class name: count}"
    )
    parser.add_argument("--method", metavar="NAME", help=METHOD_HELP)
    parser.add_argument(
        "--thresholds", type=int, nargs="*", help="edges; default: the config's, or 10 100 1000"
    )
    parser.add_argument(
        "--by", choices=("instances", "images"), help="default: the config's, or instances"
    )
    parser.add_argument("--output", type=Path, help="draw the curve of counts to this .png or .svg")
    add_options_flag(parser)


def run(args: argparse.Namespace) -> None:
    import numpy as np

    from ..analysis.grouping import describe_groups
    from ..analysis.plots import plot_class_counts
    from ..errors import ConfigError

    counts, names, thresholds, by = _load(args)
    if not counts:
        raise ConfigError("There are no classes to group.")
    print(describe_groups(counts, names, thresholds, by))
    if args.output:
        if args.output.suffix not in (".pdf", ".png", ".svg"):
            raise ConfigError(f"--output '{args.output}' must end in .png, .svg or .pdf.")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        plot_class_counts(np.array(counts), thresholds, args.output, by)
        print(f"The curve is in {args.output}.")


def _load(args) -> tuple[list[int], list[str], tuple[int, ...], str]:
    """Counts, class names, thresholds and what is counted."""
    from ..config import long_tail
    from ..data import class_statistics
    from ..engine import setup_cfg
    from ..evaluation.bins import DEFAULT_COUNT_THRESHOLDS

    by, thresholds, names = args.by or "instances", DEFAULT_COUNT_THRESHOLDS, None
    if args.config_file:
        cfg = setup_cfg(args)
        by, thresholds = args.by or long_tail(cfg).COUNT_BY, cfg.MODEL.BAGS.GROUP_THRESHOLDS
        counts = class_statistics.training_class_counts(cfg, by=args.by)
        names = class_statistics.training_class_names(cfg)
    elif args.json:
        counts, names = class_statistics.count_annotation_file(args.json, by)
    else:
        counts = class_statistics.read_class_counts(args.counts)
    if args.thresholds is not None:
        thresholds = tuple(args.thresholds)
    names = names or (f"class {i}" for i in range(len(counts)))
    return counts.tolist(), list(names), tuple(thresholds), by
