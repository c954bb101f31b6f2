"""What LazyConfigs call: optimizers, stage 2, and what follows from the counts of a data set.

Detectron2's ``lazyconfig_train_net.py`` gives ``cfg.optimizer.params.model`` the model and builds
the optimizer before it wraps the model for parallel training, so what trains is chosen there.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from detectron2.config import LazyCall
from detectron2.solver.build import get_default_optimizer_params
from omegaconf import DictConfig
from torch import nn

from ..data.class_statistics import count_classes
from ..engine.freezing import (
    freeze_norm_statistics,
    select_trainable_params,
    skip_frozen_parts,
)
from ..errors import ConfigError, MissingFileError
from ..modeling.box_predictors import BAGSOutputLayers
from ..modeling.class_groups import ClassGroups
from ..solver import clip_full_model

__all__ = [
    "clipped_sgd",
    "federated_weights",
    "groups_of",
    "known_class_counts",
    "to_bags",
    "trainable_params",
]


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


def to_bags(model: DictConfig, optimizer: DictConfig, train: DictConfig, stage2: dict) -> None:
    """Make a LazyConfig stage 2 of BAGS, in place: a grouped classifier, which alone is trained.

    Args:
        model, optimizer, train: of the baseline; the optimizer's are :func:`trainable_params`.
        stage2: {"weights": checkpoint to start from, "max_iter": steps}.
    """
    heads = model.roi_heads
    for predictor in heads.get("box_predictors") or [heads.box_predictor]:
        for option in [option for option in predictor if "sigmoid" in option or "fed" in option]:
            predictor.pop(option)
        predictor._target_ = BAGSOutputLayers
        predictor.groups = LazyCall(groups_of)(
            dataset_name="${dataloader.train.dataset.names}",
            num_classes="${model.roi_heads.num_classes}",
            thresholds=(10, 100, 1000),
            by="instances",
        )
        predictor.others_sample_ratio = 8.0
    optimizer.params.globs = ("roi_heads.box_predictor*cls_score.*",)
    train.update(init_checkpoint=stage2["weights"], max_iter=stage2["max_iter"])


def federated_weights(
    dataset_name: str | Sequence[str], num_classes: int, power: float = 0.5
) -> Callable[[], torch.Tensor]:
    """``get_fed_loss_cls_weights`` for any data set: image counts to a power; (K,).

    Without the annotations, where there is nothing to train on, all classes weigh the same.
    """

    def weights() -> torch.Tensor:
        counts = known_class_counts(dataset_name, num_classes, "images")
        return torch.ones(num_classes) if counts is None else counts.float() ** power

    return weights


def known_class_counts(
    dataset_name: str | Sequence[str], num_classes: int, by: str = "instances"
) -> torch.Tensor | None:
    """Training "instances" or "images" of each class of registered data sets, long (K,).

    None if its annotations are missing; ConfigError if it does not have ``num_classes`` classes.
    """
    try:
        return _counts(dataset_name, num_classes, by)
    except FileNotFoundError:
        return None


def groups_of(
    dataset_name: str | Sequence[str],
    num_classes: int,
    thresholds: Sequence[int] = (10, 100, 1000),
    by: str = "instances",
) -> ClassGroups:
    """Class groups of a data set, for ``BAGSOutputLayers`` in a LazyConfig.

    Without the annotations the groups are left to a checkpoint.
    """
    read_counts = functools.partial(_counts, dataset_name, num_classes, by)
    return ClassGroups.from_source(read_counts, num_classes, tuple(thresholds))


def _counts(dataset_name: str | Sequence[str], num_classes: int, by: str) -> torch.Tensor:
    names = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name)
    if not names:
        raise MissingFileError("No class counts: there is no training set.")
    counts = sum(count_classes(name, by) for name in names)
    if len(counts) != num_classes:
        raise ConfigError(
            f"Data set '{names[0]}' has {len(counts)} classes but num_classes is {num_classes}; "
            f"set model.roi_heads.num_classes and the groups' num_classes to {len(counts)}."
        )
    return counts
