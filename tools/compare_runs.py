#!/usr/bin/env python
"""What changed from one evaluated run to another: AP of each class, of each bin, and who wins."""

import argparse
import sys
from pathlib import Path

import numpy as np
from tabulate import tabulate

from bags_d2 import ConfigError
from bags_d2.analysis.grouping import bin_names
from bags_d2.analysis.plots import plot_ap_bins, plot_class_ap_change, plot_winning_groups
from bags_d2.analysis.report import all_winning_groups
from bags_d2.analysis.runs import EvaluatedRun, configured_thresholds, read_runs
from bags_d2.errors import exit_on_user_error
from bags_d2.utils.files import write_csv
from bags_d2.utils.text import printable

LISTED = 5  # classes with the largest gains, and losses


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs=2, type=Path, metavar="OUTPUT_DIR")
    parser.add_argument("--labels", nargs=2, help="default: the folders' names")
    parser.add_argument("--dataset", help="if several were evaluated")
    parser.add_argument("--task", choices=("bbox", "segm"), default="bbox")
    parser.add_argument("--thresholds", type=int, nargs="*", help="default: the runs' configs'")
    parser.add_argument("--output", type=Path, default=Path("output/comparison"), help="folder")
    parser.add_argument(
        "--config-file", help="registers the data set; default: config.yaml of the first run"
    )
    return parser.parse_args()


def describe(first: EvaluatedRun, second: EvaluatedRun) -> str:
    change = second.ap - first.ap
    order = [i for i in np.argsort(-change, kind="stable") if not np.isnan(change[i])]
    chosen = order if len(order) <= 2 * LISTED else [*order[:LISTED], *order[-LISTED:]]
    rows = [
        (
            *(printable(first.names[i]), f"{first.training_instances[i]:,}"),
            *(f"{first.ap[i]:.1f}", f"{second.ap[i]:.1f}", f"{change[i]:+.1f}"),
        )
        for i in chosen
    ]
    headers = ("class", "training instances", first.label, second.label, "change")
    alignment = ("left", *["right"] * 4)
    return tabulate(rows, headers, disable_numparse=True, colalign=alignment if rows else None)


def main() -> None:
    args = parse_args()
    runs = read_runs(args.runs, args.labels, args.dataset, args.task, args.config_file)
    first, second = runs
    if not first.is_counted:
        raise ConfigError(
            f"'{first.folder}' has no training counts; evaluate again where the training "
            "annotations are, or from a checkpoint that remembers them."
        )
    counts, out = first.training_instances, args.output
    thresholds = configured_thresholds(runs) if args.thresholds is None else args.thresholds
    matrices = all_winning_groups(runs, thresholds)
    # A name may have letters that the terminal lacks.
    sys.stdout.reconfigure(errors="backslashreplace")
    print(describe(first, second))
    labels = (first.label, second.label)
    plot_class_ap_change(counts, first.ap, second.ap, labels, out / "class_ap.png", thresholds)
    header = ("category_id", "name", "training_instances", *labels)
    columns = (first.category_ids, first.names, counts, first.ap, second.ap)
    write_csv(out / "class_ap.csv", header, zip(*columns, strict=True))
    bins = {run.label: run.bin_measures(thresholds) for run in runs}
    title = f"AP on {first.dataset}"
    plot_ap_bins(bins, out / "ap_per_bin.png", thresholds, title, first.task)
    plot_winning_groups(matrices, thresholds, out / "winning_groups.png")
    names = bin_names(thresholds)
    write_csv(
        out / "winning_groups.csv",
        ("run", "group", "right", *(f"wrong, {name}" for name in names), "missed"),
        (
            (label, name, *row)
            for label, matrix in matrices.items()
            for name, row in zip(names, matrix, strict=True)
        ),
    )
    print(f"Pictures and tables are in {out}.")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
