#!/usr/bin/env python
"""What changed from one evaluated run to another: AP of each class, of each bin, and who wins."""

import argparse
import csv
from pathlib import Path

import numpy as np
from tabulate import tabulate

from bags_d2 import ConfigError
from bags_d2.analysis.groups import bin_names
from bags_d2.analysis.plots import plot_ap_bins, plot_class_ap_change, plot_winning_groups
from bags_d2.analysis.runs import Run, read_run, register_data_sets, winning_groups
from bags_d2.errors import exit_with_one_sentence

LISTED = 5  # classes with the largest gains, and losses


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs=2, type=Path, metavar="OUTPUT_DIR")
    parser.add_argument("--labels", nargs=2, help="default: the folders' names")
    parser.add_argument("--dataset", help="if several were evaluated")
    parser.add_argument("--task", choices=("bbox", "segm"), default="bbox")
    parser.add_argument("--thresholds", type=int, nargs="*", default=[10, 100, 1000])
    parser.add_argument("--output", type=Path, default=Path("output/comparison"), help="folder")
    parser.add_argument(
        "--config-file", help="registers the data set; default: config.yaml of the first run"
    )
    return parser.parse_args()


def check_comparable(first: Run, second: Run) -> None:
    if (first.dataset, first.category_ids) != (second.dataset, second.category_ids):
        raise ConfigError(
            f"'{first.folder}' ({first.dataset}) and '{second.folder}' ({second.dataset}) were not "
            "evaluated on the same classes."
        )
    if (first.training_instances < 0).any():
        raise ConfigError(
            f"'{first.folder}' knows no training counts; evaluate again where the training "
            "annotations are, or from a checkpoint that remembers them."
        )


def describe(first: Run, second: Run) -> str:
    change = second.ap - first.ap
    order = [i for i in np.argsort(-change, kind="stable") if not np.isnan(change[i])]
    chosen = order if len(order) <= 2 * LISTED else [*order[:LISTED], *order[-LISTED:]]
    rows = [
        (first.names[i], first.training_instances[i], first.ap[i], second.ap[i], change[i])
        for i in chosen
    ]
    headers = ("class", "training instances", first.label, second.label, "change")
    return tabulate(rows, headers, floatfmt=".1f", intfmt=",")


def main() -> None:
    args = parse_args()
    register_data_sets(args.runs[0], args.config_file)
    labels = args.labels or [None, None]
    first, second = (
        read_run(folder, label, args.dataset, args.task)
        for folder, label in zip(args.runs, labels, strict=True)
    )
    if first.label == second.label:
        raise ConfigError(f"Both runs are named '{first.label}'; add --labels.")
    check_comparable(first, second)
    args.output.mkdir(parents=True, exist_ok=True)
    counts, thresholds = first.training_instances, args.thresholds
    print(describe(first, second))
    plot_class_ap_change(
        counts,
        first.ap,
        second.ap,
        (first.label, second.label),
        args.output / "class_ap.png",
        thresholds,
    )
    with open(args.output / "class_ap.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("category_id", "name", "training_instances", first.label, second.label))
        writer.writerows(
            zip(first.category_ids, first.names, counts, first.ap, second.ap, strict=True)
        )
    if "AP1" in first.measures and "AP1" in second.measures:
        measures = {run.label: run.measures for run in (first, second)}
        plot_ap_bins(measures, args.output / "ap_per_bin.png", title=f"AP on {first.dataset}")
    truth = first.ground_truth()["annotations"]
    count_of = dict(zip(first.category_ids, counts.tolist(), strict=True))
    matrices = {
        run.label: winning_groups(truth, run.detections(), count_of, thresholds)
        for run in (first, second)
    }
    plot_winning_groups(matrices, thresholds, args.output / "winning_groups.png")
    names = bin_names(thresholds)
    with open(args.output / "winning_groups.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("run", "group", "right", *(f"wrong, {n}" for n in names), "missed"))
        for label, matrix in matrices.items():
            writer.writerows((label, n, *row) for n, row in zip(names, matrix, strict=True))
    print(f"Pictures and tables are in {args.output}.")


if __name__ == "__main__":
    with exit_with_one_sentence():
        main()
