"""What changed from one evaluated run to another."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tabulate import tabulate

from ..errors import ConfigError
from ..utils.files import write_csv
from ..utils.text import printable
from .detections import winning_classes, winning_groups
from .grouping import bin_names
from .plots import plot_ap_bins, plot_class_ap_change, plot_winning_groups
from .runs import EvaluatedRun, configured_thresholds, objects_of, read_ground_truth

__all__ = ["write_run_pair"]

_LISTED = 5  # classes with the largest gains, and losses


def write_run_pair(
    first: EvaluatedRun, second: EvaluatedRun, output: Path, thresholds: Sequence[int] | None
) -> str:
    """Write charts and tables of two runs; the classes that changed most, as a table.

    Args:
        first, second: runs on the same data set.
        output: folder for ``class_ap``, ``ap_per_bin`` and ``winning_groups`` (.png, .csv).
        thresholds: edges of the bins; None takes those of the runs' configs.

    Raises:
        ConfigError: if the training counts are unknown.
    """
    runs = (first, second)
    if not first.is_counted:
        raise ConfigError(
            f"'{first.folder}' has no training counts; evaluate again where the training "
            "annotations are, or from a checkpoint that remembers them."
        )
    counts, labels = first.training_instances, (first.label, second.label)
    thresholds = configured_thresholds(runs) if thresholds is None else thresholds
    objects = objects_of(read_ground_truth(first))
    matrices = {}
    for run in runs:
        winners = winning_classes(objects, run.detections())
        matrices[run.label] = winning_groups(objects, winners, run.count_of, thresholds)
    plot_class_ap_change(counts, first.ap, second.ap, labels, output / "class_ap.png", thresholds)
    header = ("category_id", "name", "training_instances", *labels)
    columns = (first.category_ids, first.names, counts, first.ap, second.ap)
    write_csv(output / "class_ap.csv", header, zip(*columns, strict=True))
    bins = {run.label: run.bin_measures(thresholds) for run in runs}
    title = f"AP on {first.dataset}"
    plot_ap_bins(bins, output / "ap_per_bin.png", thresholds, title, first.task)
    plot_winning_groups(matrices, thresholds, output / "winning_groups.png")
    names = bin_names(thresholds)
    write_csv(
        output / "winning_groups.csv",
        ("run", "group", "right", *(f"wrong, {name}" for name in names), "missed"),
        (
            (label, name, *row)
            for label, matrix in matrices.items()
            for name, row in zip(names, matrix, strict=True)
        ),
    )
    return _largest_changes(first, second)


def _largest_changes(first: EvaluatedRun, second: EvaluatedRun) -> str:
    change = second.ap - first.ap
    order = [i for i in np.argsort(-change, kind="stable") if not np.isnan(change[i])]
    rows = [
        (
            *(printable(first.names[i]), f"{first.training_instances[i]:,}"),
            *(f"{first.ap[i]:.1f}", f"{second.ap[i]:.1f}", f"{change[i]:+.1f}"),
        )
        for i in dict.fromkeys([*order[:_LISTED], *order[-_LISTED:]])
    ]
    headers = ("class", "training instances", first.label, second.label, "change")
    alignment = ("left", *["right"] * 4) if rows else None
    return tabulate(rows, headers, disable_numparse=True, colalign=alignment)
