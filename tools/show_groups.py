#!/usr/bin/env python
"""Show the class groups of a data set, what is odd about them, and which would fit."""

import argparse
import itertools
from pathlib import Path

import numpy as np
from tabulate import tabulate

from bags_d2 import ConfigError
from bags_d2.analysis.grouping import grouping_faults, propose_thresholds, summarize_groups
from bags_d2.analysis.plots import plot_class_counts
from bags_d2.config import long_tail
from bags_d2.data.class_statistics import (
    count_annotation_file,
    read_class_counts,
    training_class_counts,
    training_class_names,
)
from bags_d2.engine import setup_cfg
from bags_d2.errors import exit_on_user_error

DEFAULT_THRESHOLDS = (10, 100, 1000)
SHOWN = 8  # classes listed of a kind


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config-file", help="groups of its training set and thresholds")
    source.add_argument("--json", help="an annotation file in COCO or LVIS format")
    source.add_argument("--counts", help="a JSON list of counts, or {class name: count}")
    parser.add_argument("--method", help="what to lay over the config, as for train_net.py")
    parser.add_argument("--thresholds", type=int, nargs="*", help="edges; default: the config's")
    parser.add_argument("--by", choices=("instances", "images"), help="default: the config's")
    parser.add_argument("--output", type=Path, help="draw the curve of counts to this .png or .svg")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config KEY VALUE")
    return parser.parse_args()


def load(args) -> tuple[list[int], list[str], tuple[int, ...], str]:
    """Counts, class names, thresholds and what is counted."""
    by, thresholds, names = args.by or "instances", DEFAULT_THRESHOLDS, None
    if args.config_file:
        cfg = setup_cfg(args)
        by, thresholds = args.by or long_tail(cfg).COUNT_BY, cfg.MODEL.BAGS.GROUP_THRESHOLDS
        counts, names = training_class_counts(cfg, by=args.by), training_class_names(cfg)
    elif args.json:
        counts, names = count_annotation_file(args.json, by)
    else:
        counts = read_class_counts(args.counts)
    counts = counts.tolist()
    if args.thresholds is not None:
        thresholds = tuple(args.thresholds)
    if not counts:
        raise ConfigError("There are no classes to group.")
    return counts, list(names or (f"class {i}" for i in range(len(counts)))), thresholds, by


def describe(counts, names, thresholds, by) -> str:
    groups = summarize_groups(counts, thresholds)
    rows = [
        (i, g.name, len(g.classes), g.instances, f"{g.share:.1%}")
        for i, g in enumerate(groups, start=1)
    ]
    headers = ("group", f"training {by}", "classes", by, "share")
    parts = [tabulate(rows, headers, intfmt=",")]

    filled = [g for g in groups if g.classes]
    boundaries = [
        f"  {names[a.classes[-1]]} ({counts[a.classes[-1]]:,}) | "
        f"{names[b.classes[0]]} ({counts[b.classes[0]]:,})"
        for a, b in itertools.pairwise(filled)
    ]
    if boundaries:
        parts.append("At the edges (largest of a group | smallest of the next):")
        parts += boundaries
    empty = [n for n, c in zip(names, counts, strict=True) if c == 0]
    if empty:
        more = f", and {len(empty) - SHOWN} more" if len(empty) > SHOWN else ""
        have = "class has" if len(empty) == 1 else "classes have"
        parts.append(
            f"{len(empty)} {have} none and cannot be learned: {', '.join(empty[:SHOWN])}{more}"
        )
    faults = grouping_faults(counts, thresholds)
    parts += [f"Warning: {fault}" for fault in faults]
    proposed = propose_thresholds(counts)
    if faults and proposed != tuple(thresholds):
        sizes = [len(g.classes) for g in summarize_groups(counts, proposed)]
        parts.append(
            f"Proposed: MODEL.BAGS.GROUP_THRESHOLDS {str(proposed)!r}  "
            f"(groups of {', '.join(map(str, sizes))} classes)"
        )
    return "\n".join(parts)


def main() -> None:
    args = parse_args()
    counts, names, thresholds, by = load(args)
    print(describe(counts, names, thresholds, by))
    if args.output:
        if args.output.suffix not in (".pdf", ".png", ".svg"):
            raise ConfigError(f"--output '{args.output}' must end in .png, .svg or .pdf.")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        plot_class_counts(np.array(counts), thresholds, args.output, by)
        print(f"The curve is in {args.output}.")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
