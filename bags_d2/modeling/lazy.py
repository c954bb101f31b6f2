"""Class groups and counts as LazyConfigs ask for them: by the name of a data set, not a config."""

import functools
from collections.abc import Sequence

import torch

from ..data.class_counts import count_classes
from ..errors import ConfigError
from .class_groups import ClassGroups

__all__ = ["groups_of", "known_class_counts"]


def known_class_counts(
    dataset_name: str, num_classes: int, by: str = "instances"
) -> torch.Tensor | None:
    """Training "instances" or "images" of each class of a registered data set, long (K,).

    None if its annotations are missing; ConfigError if it does not have ``num_classes`` classes.
    """
    try:
        return _counts(dataset_name, num_classes, by)
    except FileNotFoundError:
        return None


def groups_of(
    dataset_name: str,
    num_classes: int,
    thresholds: Sequence[int] = (10, 100, 1000),
    by: str = "instances",
) -> ClassGroups:
    """Class groups of a data set, for ``BAGSOutputLayers`` in a LazyConfig.

    Without the annotations the groups are left to a checkpoint.
    """
    read_counts = functools.partial(_counts, dataset_name, num_classes, by)
    return ClassGroups.from_source(read_counts, num_classes, tuple(thresholds))


def _counts(dataset_name: str, num_classes: int, by: str) -> torch.Tensor:
    counts = count_classes(dataset_name, by)
    if len(counts) != num_classes:
        raise ConfigError(
            f"Data set '{dataset_name}' has {len(counts)} classes but num_classes is "
            f"{num_classes}; set model.roi_heads.num_classes and the groups' num_classes to "
            f"{len(counts)}."
        )
    return counts
