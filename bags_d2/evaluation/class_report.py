"""What the LVIS and COCO evaluators report of single classes.

Shapes: C evaluated categories, T IoU thresholds, R recall thresholds, A ranges of object sizes, M
limits of detections per image.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from tabulate import tabulate

from ..utils.files import write_csv
from .bins import DEFAULT_COUNT_THRESHOLDS, ap_per_bin, balanced_ap, bin_index, count_array
from .ground_truth import GroundTruth

__all__ = ["ClassReport"]

logger = logging.getLogger(__name__)

_COLUMNS = (
    *("category_id", "name", "frequency", "training_instances", "validation_instances"),
    *("AP", "AP50"),
)


class ClassReport:
    """AP by training instances (AP1, AP2, ..., bAP), and a table of all classes on disk."""

    def __init__(
        self,
        truth: GroundTruth,
        class_counts: Sequence[int] | np.ndarray | torch.Tensor | None = None,
        count_thresholds: Sequence[int] = DEFAULT_COUNT_THRESHOLDS,
        output_dir: str | None = None,
    ) -> None:
        """
        Args:
            truth: the evaluated data set.
            class_counts: (K,) training instances of the model's classes; None leaves out AP1, AP2,
                ... and bAP.
            count_thresholds: bounds of the bins of AP1, AP2, ...
            output_dir: folder of the tables; None writes none.

        Raises:
            ConfigError, DataError: if the counts or thresholds are faulty.
        """
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
            self._counts = count_array(class_counts, truth.num_classes)[truth.classes]
            bin_index(self._counts, self._thresholds)  # refuses bad values before evaluation

    def complete(
        self, task: str, metrics: dict[str, float], precision: np.ndarray | None
    ) -> dict[str, float]:
        """Add the bins' AP to an evaluation's measures, log them, and write the table of classes.

        Args:
            task: names the file, ``per_class_{task}.csv``.
            metrics: measure -> percent.
            precision: (T, R, C, A, M) as COCO-style evaluation accumulates it, with IoU 0.5 and all
                sizes first; -1 where a class has no ground truth. None if nothing was detected.

        Returns:
            The measures, and AP1, AP2, ... and bAP if training instances are known.
        """
        ap = ap50 = np.full(len(self._truth.classes), np.nan)
        if precision is not None:
            precision = precision[..., 0, -1]
            ap, ap50 = _percent_ap(precision), _percent_ap(precision[:1])
        if self._counts is not None:
            bin_aps = ap_per_bin(ap, self._counts, self._thresholds)
            metrics = {**metrics, **bin_aps, "bAP": balanced_ap(bin_aps)}
            logger.info("AP by training instances for %s:\n%s", task, self._bin_table(ap))
        if self._output_dir:
            # Empty cells, for what is unknown or undefined, are missing values to table readers.
            path = os.path.join(self._output_dir, f"per_class_{task}.csv")
            categories = self._truth.category_rows()
            outside = self._truth.annotations.categories.outside_of
            rows = zip(
                [outside(category["id"]) for category in categories],
                [category["name"] for category in categories],
                [category["frequency"] for category in categories],
                [""] * len(ap) if self._counts is None else self._counts,
                self._truth.instances,
                *(["" if np.isnan(v) else f"{v:.4f}" for v in values] for values in (ap, ap50)),
                strict=True,
            )
            write_csv(path, _COLUMNS, rows)
        return metrics

    def _bin_table(self, ap: np.ndarray) -> str:
        bin_aps = ap_per_bin(ap, self._counts, self._thresholds)
        bins = bin_index(self._counts, self._thresholds)
        bounds = [0, *self._thresholds, math.inf]
        rows = zip(
            bin_aps,
            [f"[{low}, {high})" for low, high in itertools.pairwise(bounds)],
            np.bincount(bins, minlength=len(bin_aps)),
            np.bincount(bins[~np.isnan(ap)], minlength=len(bin_aps)),
            bin_aps.values(),
            strict=True,
        )
        headers = ("", "training instances", "classes", "evaluated", "AP")
        return tabulate([*rows, ("bAP", "", "", "", balanced_ap(bin_aps))], headers, "pipe", ".3f")


def _percent_ap(precision: np.ndarray) -> np.ndarray:
    """(C,) AP in percent from precision (T, R, C), NaN for classes without ground truth."""
    no_ground_truth = (precision < 0).any(axis=(0, 1))
    return np.where(no_ground_truth, np.nan, 100 * precision.mean(axis=(0, 1)))
