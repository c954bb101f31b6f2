"""AP by the number of training instances of a class, and the per-class table.

Shapes: K classes, T IoU thresholds, R recall thresholds. n count thresholds make n + 1 bins.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from tabulate import tabulate

from ..errors import ConfigError, DataError

__all__ = [
    "ap_per_bin",
    "balanced_ap",
    "bin_index",
    "bin_table",
    "check_class_counts",
    "per_class_ap",
    "write_per_class_csv",
]

DEFAULT_COUNT_THRESHOLDS = (10, 100, 1000)


def bin_index(
    counts: Sequence[int] | np.ndarray | torch.Tensor,
    thresholds: Sequence[int] = DEFAULT_COUNT_THRESHOLDS,
) -> np.ndarray:
    """Find the bin of each count among half-open bins.

    Thresholds (10, 100, 1000) make the bins [0, 10), [10, 100), [100, 1000) and [1000, inf), the
    bins that the Balanced Group Softmax paper reports AP for.

    Args:
        counts: (K,) training instances of each class.
        thresholds: strictly ascending positive bounds.

    Returns:
        (K,) bin of each class, 0 for the smallest counts.

    Raises:
        ConfigError: if the thresholds do not ascend.
        DataError: if a count is negative.
    """
    bounds = np.asarray(thresholds)
    if bounds.ndim != 1 or np.any(bounds <= 0) or np.any(np.diff(bounds) <= 0):
        raise ConfigError(
            f"count_thresholds must be positive and strictly ascending, not {tuple(thresholds)}."
        )
    counts = _as_array(counts)
    if np.any(counts < 0):
        raise DataError(f"class_counts must not be negative, but the smallest is {counts.min()}.")
    return np.searchsorted(bounds, counts, side="right")


def ap_per_bin(
    per_class_ap: Sequence[float] | np.ndarray,
    class_counts: Sequence[int] | np.ndarray | torch.Tensor,
    thresholds: Sequence[int] = DEFAULT_COUNT_THRESHOLDS,
) -> dict[str, float]:
    """Average AP over the classes of each bin that the evaluated split shows.

    Args:
        per_class_ap: (K,) AP of each class, NaN for a class without ground truth. Such a class
            says nothing about the detector, so it counts neither as 0 nor otherwise.
        class_counts: (K,) training instances of each class.
        thresholds: bounds of the bins, see `bin_index`.

    Returns:
        {"AP1": ..., "AP2": ...} from the fewest training instances to the most, in the unit of
        `per_class_ap`; NaN for a bin without an evaluated class.

    Raises:
        DataError: if the two sequences differ in length, or for what `bin_index` rejects.
    """
    ap = np.asarray(per_class_ap, dtype=np.float64)
    counts = check_class_counts(class_counts, len(ap))
    bins = bin_index(counts, thresholds)
    evaluated = ~np.isnan(ap)
    return {
        f"AP{i + 1}": _mean(ap[evaluated & (bins == i)]) for i in range(len(tuple(thresholds)) + 1)
    }


def balanced_ap(bin_aps: Mapping[str, float]) -> float:
    """Average the AP of the bins, so that each bin weighs the same however many classes it has.

    Args:
        bin_aps: what `ap_per_bin` returns.

    Returns:
        Mean over the bins that are not NaN; NaN if all are.
    """
    values = np.array(list(bin_aps.values()), dtype=np.float64)
    return _mean(values[~np.isnan(values)])


def per_class_ap(precision: np.ndarray) -> np.ndarray:
    """Reduce precision at recall to the AP of each class.

    Args:
        precision: (T, R, K) as COCO-style evaluation accumulates it, -1 where a class has no
            ground truth.

    Returns:
        (K,) AP as a fraction, NaN for classes without ground truth.
    """
    no_ground_truth = (precision < 0).any(axis=(0, 1))
    return np.where(no_ground_truth, np.nan, precision.mean(axis=(0, 1)))


def check_class_counts(
    class_counts: Sequence[int] | np.ndarray | torch.Tensor, num_classes: int
) -> np.ndarray:
    """Return the counts as a (K,) array, or say in what they disagree with the classes.

    Raises:
        DataError: if there is not exactly one count per class.
    """
    counts = _as_array(class_counts)
    if counts.shape != (num_classes,):
        raise DataError(
            f"class_counts has shape {counts.shape}, but the evaluated data set has {num_classes} "
            "classes: pass one training instance count per class, in contiguous class order."
        )
    return counts


def bin_table(
    per_class_ap: np.ndarray,
    class_counts: np.ndarray,
    thresholds: Sequence[int] = DEFAULT_COUNT_THRESHOLDS,
) -> str:
    """Draw AP by training instances as a text table, with the classes behind each number."""
    bins = bin_index(class_counts, thresholds)
    bounds = [0, *thresholds, np.inf]
    rows = [
        (
            name,
            f"[{bounds[i]}, {bounds[i + 1]})",
            int((bins == i).sum()),
            int((~np.isnan(per_class_ap[bins == i])).sum()),
            ap,
        )
        for i, (name, ap) in enumerate(ap_per_bin(per_class_ap, class_counts, thresholds).items())
    ]
    headers = ("", "training instances", "classes", "evaluated", "AP")
    return tabulate(rows, headers, tablefmt="pipe", floatfmt=".3f")


def write_per_class_csv(
    path: str,
    *,
    categories: Sequence[Mapping],
    validation_instances: Sequence[int],
    ap: Sequence[float],
    ap50: Sequence[float],
    class_counts: Sequence[int] | None = None,
) -> None:
    """Write one line per class, in category id order.

    Columns: category_id, name, frequency, training_instances, validation_instances, AP, AP50.
    The columns are always the same; what is unknown or undefined is an empty cell, which table
    readers take for a missing value.

    Args:
        path: file to write; its folder must exist.
        categories: K dicts with "id" and, where known, "name" and "frequency".
        validation_instances: (K,) ground truth of the evaluated split.
        ap: (K,) in percent, NaN without ground truth.
        ap50: (K,) AP at IoU 0.5, likewise.
        class_counts: (K,) training instances, None if unknown.
    """
    training_instances = [""] * len(categories) if class_counts is None else class_counts
    with PathManager.open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            (
                "category_id",
                "name",
                "frequency",
                "training_instances",
                "validation_instances",
                "AP",
                "AP50",
            )
        )
        for category, training, validation, class_ap, class_ap50 in zip(
            categories, training_instances, validation_instances, ap, ap50, strict=True
        ):
            writer.writerow(
                (
                    category["id"],
                    category.get("name", ""),
                    category.get("frequency", ""),
                    training,
                    validation,
                    _cell(class_ap),
                    _cell(class_ap50),
                )
            )


def _cell(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.4f}"


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def _as_array(counts: Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
    return counts.cpu().numpy() if isinstance(counts, torch.Tensor) else np.asarray(counts)
