"""AP by the number of training instances of a class.

Shapes: K classes; n count thresholds make n + 1 bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..errors import ConfigError, DataError

__all__ = ["DEFAULT_COUNT_THRESHOLDS", "ap_per_bin", "balanced_ap", "bin_index", "count_array"]

DEFAULT_COUNT_THRESHOLDS = (10, 100, 1000)


def bin_index(
    counts: Sequence[int] | np.ndarray | torch.Tensor,
    thresholds: Sequence[int] = DEFAULT_COUNT_THRESHOLDS,
) -> np.ndarray:
    """Find the bin of each count among half-open bins.

    Thresholds (10, 100, 1000) make the bins [0, 10), [10, 100), [100, 1000) and [1000, inf), for
    which the Balanced Group Softmax paper reports AP.

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
    counts = torch.as_tensor(counts).cpu().numpy()
    if np.any(counts < 0):
        raise DataError(f"class_counts must not be negative, but the smallest is {counts.min()}.")
    return np.searchsorted(bounds, counts, side="right")


def ap_per_bin(
    per_class_ap: Sequence[float] | np.ndarray,
    class_counts: Sequence[int] | np.ndarray | torch.Tensor,
    thresholds: Sequence[int] = DEFAULT_COUNT_THRESHOLDS,
) -> dict[str, float]:
    """Average AP over the classes of each bin.

    Args:
        per_class_ap: (K,) AP of each class, NaN for a class without ground truth, which says
            nothing about the detector and is left out.
        class_counts: (K,) training instances of each class.
        thresholds: bounds of the bins, see `bin_index`.

    Returns:
        {"AP1": ..., "AP2": ...} from the fewest training instances to the most, in the unit of
        `per_class_ap`; NaN for a bin without an evaluated class.

    Raises:
        ConfigError, DataError: if the two sequences differ in length, and as `bin_index` does.
    """
    ap = np.asarray(per_class_ap, dtype=np.float64)
    bins = bin_index(count_array(class_counts, len(ap)), thresholds)
    return {f"AP{i + 1}": _defined_mean(ap[bins == i]) for i in range(len(thresholds) + 1)}


def balanced_ap(bin_aps: Mapping[str, float]) -> float:
    """Average what `ap_per_bin` returns, each bin weighing the same however many classes it has.

    Returns:
        Mean over the bins that are not NaN; NaN if all are.
    """
    return _defined_mean(np.array(list(bin_aps.values()), dtype=np.float64))


def count_array(
    class_counts: Sequence[int] | np.ndarray | torch.Tensor, num_classes: int
) -> np.ndarray:
    """The counts as a (K,) array.

    Raises:
        DataError: if there is not exactly one count per class.
    """
    counts = torch.as_tensor(class_counts).cpu().numpy()
    if counts.shape != (num_classes,):
        raise DataError(
            f"class_counts has shape {counts.shape}, but the evaluated model has {num_classes} "
            "classes: pass one training instance count per class, in contiguous class order."
        )
    return counts


def _defined_mean(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")
