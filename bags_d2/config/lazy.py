"""What LazyConfigs call: optimizers, and class groups by the name of a data set.

Detectron2's ``lazyconfig_train_net.py`` gives ``cfg.optimizer.params.model`` the model and builds
the optimizer before it wraps the model for parallel training, so what trains is chosen there.
"""

import functools
from collections.abc import Sequence

import torch
from detectron2.solver.build import get_default_optimizer_params
from torch import nn

from ..data.class_statistics import count_classes
from ..engine.freezing import (
    freeze_norm_statistics,
    select_trainable_params,
    skip_frozen_parts,
)
from ..errors import ConfigError
from ..modeling.class_groups import ClassGroups
from ..solver import clip_full_model

__all__ = ["clipped_sgd", "groups_of", "known_class_counts", "trainable_params"]


def trainable_params(
    model: nn.Module, globs: Sequence[str] = (), skip_frozen: bool = True, **kwargs
) -> list[dict]:
    """Freeze all but chosen parameters, and return those for an optimizer.

    Args:
        model: the model.
        globs: names of what trains, as in ``MODEL.TRAINABLE_PARAMS``; () is everything.
        skip_frozen: leave out of training what reaches no trainable parameter.
        **kwargs: for Detectron2's ``get_default_optimizer_params``.

    Returns:
        Parameter groups.

    Raises:
        ConfigError: if a glob matches nothing.
    """
    if globs:
        select_trainable_params(model, tuple(globs))
        freeze_norm_statistics(model)
    if skip_frozen:
        skip_frozen_parts(model)
    return get_default_optimizer_params(model, **kwargs)


def clipped_sgd(params, max_norm: float, **kwargs) -> torch.optim.SGD:
    """SGD that clips the norm of all gradients taken together.

    Args:
        params: parameter groups.
        max_norm: largest L2 norm.
        **kwargs: for ``torch.optim.SGD``.
    """
    optimizer = torch.optim.SGD(params, **kwargs)
    clip_full_model(optimizer, max_norm)
    return optimizer


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
