"""AP by the number of training instances of a class, and what evaluators report of classes.

Shapes: K classes of the model, C evaluated categories, T IoU thresholds, R recall thresholds, A
ranges of object sizes, M limits of detections per image. n count thresholds make n + 1 bins.
"""

import logging
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from tabulate import tabulate

from ..errors import ConfigError, DataError
from ..utils.files import write_csv
from .ground_truth import GroundTruth

logger = logging.getLogger(__name__)

DEFAULT_COUNT_THRESHOLDS = (10, 100, 1000)

Counts = Sequence[int] | np.ndarray | torch.Tensor

_COLUMNS = (
    *("category_id", "name", "frequency", "training_instances", "validation_instances"),
    *("AP", "AP50"),
)


def bin_index(counts: Counts, thresholds: Sequence[int] = DEFAULT_COUNT_THRESHOLDS) -> np.ndarray:
    """Find the bin of each count (K,) among half-open bins, 0 for the smallest counts.

    Thresholds (10, 100, 1000) make the bins [0, 10), [10, 100), [100, 1000) and [1000, inf), for
    which the Balanced Group Softmax paper reports AP.

    Raises:
        ConfigError: if the thresholds are not positive or do not ascend.
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
    class_counts: Counts,
    thresholds: Sequence[int] = DEFAULT_COUNT_THRESHOLDS,
) -> dict[str, float]:
    """Average AP over the classes of each bin of training instances.

    Args:
        per_class_ap: (K,) NaN for a class without ground truth, which says nothing about the
            detector and is left out.
        class_counts, thresholds: (K,) training instances, and bounds of the bins; see `bin_index`.

    Returns:
        {"AP1": ..., "AP2": ...} from the fewest training instances to the most, in the unit of
        `per_class_ap`; NaN for a bin without an evaluated class.

    Raises:
        ConfigError, DataError: if the two sequences differ in length, and as `bin_index` does.
    """
    ap = np.asarray(per_class_ap, dtype=np.float64)
    bins = bin_index(_count_array(class_counts, len(ap)), thresholds)
    return {f"AP{i + 1}": defined_mean(ap[bins == i]) for i in range(len(thresholds) + 1)}


def balanced_ap(bin_aps: Mapping[str, float]) -> float:
    """Average the defined values of `ap_per_bin`, so that each bin weighs the same; NaN if none."""
    return defined_mean(np.array(list(bin_aps.values()), dtype=np.float64))


def _as_array(counts: Counts) -> np.ndarray:
    return np.asarray(counts.cpu() if isinstance(counts, torch.Tensor) else counts)


def _count_array(class_counts: Counts, num_classes: int) -> np.ndarray:
    """The counts as a (K,) array; DataError if there is not exactly one per class."""
    counts = _as_array(class_counts)
    if counts.shape != (num_classes,):
        raise DataError(
            f"class_counts has shape {counts.shape}, but the evaluated model has {num_classes} "
            "classes: pass one training instance count per class, in contiguous class order."
        )
    return counts


class ClassReport:
    """AP by training instances (AP1, AP2, ..., bAP), and a table of all classes on disk."""

    def __init__(
        self,
        truth: GroundTruth,
        class_counts: Counts | None = None,
        count_thresholds: Sequence[int] = DEFAULT_COUNT_THRESHOLDS,
        output_dir: str | None = None,
    ) -> None:
        """See `LongTailLVISEvaluator`; faulty counts and thresholds are errors from the start."""
        self._truth = truth
        self._output_dir = output_dir
        self._thresholds = tuple(count_thresholds)
        self._counts = None
        if class_counts is None:
            logger.info(
                "AP1, AP2, ... and bAP are left out: they need class_counts, the training "
                "instances of each class."
            )
        else:
            self._counts = _count_array(class_counts, truth.num_classes)[truth.classes]
            bin_index(self._counts, self._thresholds)

    def complete(
        self, task: str, metrics: dict[str, float], precision: np.ndarray | None
    ) -> dict[str, float]:
        """Add the bins' AP to a task's measures (in percent), and write the table of classes.

        Args:
            task: names the file, ``per_class_{task}.csv``.
            metrics: measures of the evaluation.
            precision: (T, R, C, A, M) as COCO-style evaluation accumulates it, with IoU 0.5 and all
                sizes first; -1 where a class has no ground truth. None if nothing was detected.
        """
        truth = self._truth
        ap = ap50 = np.full(len(truth.classes), np.nan)
        if precision is not None:
            precision = precision[..., 0, -1]
            ap, ap50 = _percent_ap(precision), _percent_ap(precision[:1])
        if self._counts is not None:
            bin_aps = ap_per_bin(ap, self._counts, self._thresholds)
            metrics = {**metrics, **bin_aps, "bAP": balanced_ap(bin_aps)}
            logger.info("AP by training instances for %s:\n%s", task, self._bin_table(ap, bin_aps))
        if self._output_dir:
            # Empty cells, for what is unknown or undefined, are missing values to table readers.
            file_id = truth.annotations.categories.outside_of
            training = [""] * len(ap) if self._counts is None else self._counts
            measured = (["" if np.isnan(v) else f"{v:.4f}" for v in aps] for aps in (ap, ap50))
            rows = [
                (file_id(category["id"]), category["name"], category["frequency"], *cells)
                for category, *cells in zip(
                    truth.categories, training, truth.instances, *measured, strict=True
                )
            ]
            write_csv(os.path.join(self._output_dir, f"per_class_{task}.csv"), _COLUMNS, rows)
        return metrics

    def _bin_table(self, ap: np.ndarray, bin_aps: dict[str, float]) -> str:
        bins = bin_index(self._counts, self._thresholds)
        bounds = [0, *self._thresholds, math.inf]
        rows = []
        for i, (name, bin_ap) in enumerate(bin_aps.items()):
            found = ap[bins == i]
            span = f"[{bounds[i]}, {bounds[i + 1]})"
            rows.append((name, span, len(found), (~np.isnan(found)).sum(), bin_ap))
        rows.append(("bAP", "", "", "", balanced_ap(bin_aps)))
        rows = [(*cells, None if math.isnan(value) else value) for *cells, value in rows]
        headers = ("", "training instances", "classes", "evaluated", "AP")
        return tabulate(rows, headers, "pipe", ".3f", missingval="-")


def defined_mean(values: np.ndarray) -> float:
    """Mean of what is not NaN; NaN if nothing is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")


def _percent_ap(precision: np.ndarray) -> np.ndarray:
    """(C,) AP in percent from precision (T, R, C), NaN for classes without ground truth."""
    no_ground_truth = (precision < 0).any(axis=(0, 1))
    return np.where(no_ground_truth, np.nan, 100 * precision.mean(axis=(0, 1)))
