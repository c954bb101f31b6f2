#!/usr/bin/env python
"""Classifier weight norm of each class against its training count, for one or more checkpoints."""

import argparse
from pathlib import Path

from tabulate import tabulate

from bags_d2 import ConfigError
from bags_d2.analysis.classifier import class_weight_norms, rank_correlation, remembered_counts
from bags_d2.analysis.grouping import bin_names
from bags_d2.analysis.plots import plot_weight_norms
from bags_d2.checkpoint.files import read_checkpoint
from bags_d2.data.class_statistics import (
    ClassStatistics,
    read_class_counts,
    training_class_counts,
    training_class_names,
)
from bags_d2.engine import setup_cfg
from bags_d2.errors import exit_on_user_error
from bags_d2.evaluation.bins import bin_index
from bags_d2.utils.files import write_csv


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        required=True,
        metavar="[LABEL=]PATH",
        help=".pth, or .pkl of Detectron2's model zoo",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--config-file", help="counts of its training set")
    source.add_argument("--counts", help="a JSON list of counts, or {class name: count}")
    parser.add_argument("--thresholds", type=int, nargs="*", default=[10, 100, 1000])
    parser.add_argument("--output", type=Path, default=Path("output/classifier"), help="folder")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config KEY VALUE")
    return parser.parse_args()


def read_checkpoints(arguments: list[str]) -> dict[str, dict]:
    checkpoints = {}
    for argument in arguments:
        label, _, path = argument.rpartition("=")
        label = label or "/".join(Path(path).parts[-2:])
        if label in checkpoints:
            raise ConfigError(f"--checkpoint: two are named '{label}'; write LABEL=PATH.")
        checkpoints[label] = read_checkpoint(path)
    return checkpoints


def class_counts(args, checkpoints: dict[str, dict]) -> tuple[list[int], list[str] | None]:
    """Training counts, and names where known: as given, else those stored in a checkpoint."""
    names = next(
        (r.names for c in checkpoints.values() if (r := ClassStatistics.from_checkpoint(c))), None
    )
    if args.config_file:
        cfg = setup_cfg(args)
        return training_class_counts(cfg, by="instances").tolist(), training_class_names(cfg)
    if args.counts:
        return read_class_counts(args.counts).tolist(), names
    for checkpoint in checkpoints.values():
        counts = remembered_counts(checkpoint)
        if counts is not None:
            return counts, names
    raise ConfigError(
        "No checkpoint has training counts; add --config-file (its training set is counted) "
        "or --counts."
    )


def main() -> None:
    args = parse_args()
    checkpoints = read_checkpoints(args.checkpoint)
    counts, names = class_counts(args, checkpoints)
    norms = {
        label: class_weight_norms(checkpoint["model"], len(counts)).tolist()
        for label, checkpoint in checkpoints.items()
    }
    plot_weight_norms(
        norms,
        counts,
        args.output / "weight_norms.png",
        args.thresholds,
        "Classifier weight of each class",
    )
    groups = [bin_names(args.thresholds)[g] for g in bin_index(counts, args.thresholds)]
    names = names or [f"class {i}" for i in range(len(counts))]
    columns = (range(len(counts)), names, counts, groups, *norms.values())
    header = ("class", "name", "training_instances", "group", *norms)
    write_csv(args.output / "weight_norms.csv", header, zip(*columns, strict=True))
    rows = [
        (label, rank_correlation(counts, values), max(values) / max(min(values), 1e-12))
        for label, values in norms.items()
    ]
    headers = ("", "rank correlation with count", "largest / smallest norm")
    print(tabulate(rows, headers, floatfmt=".2f"))
    print(f"weight_norms.png and .csv are in {args.output}.")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
