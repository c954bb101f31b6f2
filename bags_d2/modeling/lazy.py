"""Class groups and counts as LazyConfigs ask for them: by the name of a data set, not a config."""

from collections.abc import Sequence

import torch

from ..data.class_counts import count_classes
from ..errors import ConfigError
from .class_groups import ClassGroups

__all__ = ["groups_of", "known_class_counts"]


def known_class_counts(
    dataset_name: str, num_classes: int, by: str = "instances"
) -> torch.Tensor | None:
    """Training count of each class of a data set; None where its annotations are not there.

    Args:
        dataset_name: a registered data set.
        num_classes: K.
        by: "instances" or "images".

    Returns:
        Long tensor (K,), or None.

    Raises:
        ConfigError: if the data set has another number of classes.
        DataError: if its annotation file is faulty.
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

    Where the annotations are not there, the groups are left to a checkpoint, as with a YAML.

    Args:
        dataset_name: the registered training set.
        num_classes: K.
        thresholds: see ``ClassGroups.from_counts``.
        by: "instances" or "images".

    Raises:
        ConfigError: if the data set has another number of classes, or the thresholds are faulty.
        DataError: if its annotation file is faulty.
    """
    thresholds = tuple(thresholds)
    try:
        counts = _counts(dataset_name, num_classes, by)
    except FileNotFoundError as error:
        return ClassGroups.undetermined(num_classes, thresholds, str(error))
    return ClassGroups.from_counts(counts, thresholds)


def _counts(dataset_name: str, num_classes: int, by: str) -> torch.Tensor:
    counts = count_classes(dataset_name, by)
    if len(counts) != num_classes:
        raise ConfigError(
            f"Data set '{dataset_name}' has {len(counts)} classes but num_classes is "
            f"{num_classes}; set model.roi_heads.num_classes and the groups' num_classes to "
            f"{len(counts)}."
        )
    return counts
