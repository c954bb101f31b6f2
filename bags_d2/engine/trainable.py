"""Which parameters train: name globs instead of the integer switches of the authors' code."""

import fnmatch
import logging
from collections.abc import Sequence

from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from ..errors import ConfigError

__all__ = ["freeze_norm_statistics", "select_trainable_params"]

logger = logging.getLogger(__name__)


def select_trainable_params(model: nn.Module, globs: Sequence[str]) -> list[str]:
    """Freeze every parameter whose name no glob matches.

    A parameter that the model itself has frozen (``MODEL.BACKBONE.FREEZE_AT``) stays frozen.

    Args:
        model: the model, changed in place.
        globs: shell-style patterns against the names of ``model.named_parameters()``; empty
            leaves the model alone.

    Returns:
        Names of the parameters that train.

    Raises:
        ConfigError: if a glob matches nothing that can be trained.
    """
    parameters = dict(model.named_parameters())
    names = [name for name, p in parameters.items() if p.requires_grad]
    if not globs:
        return names
    selected = set()
    for glob in globs:
        if not isinstance(glob, str):
            raise ConfigError(
                f"MODEL.TRAINABLE_PARAMS must hold names with wildcards, found {glob!r}."
            )
        matches = fnmatch.filter(names, glob)
        if not matches:
            raise ConfigError(
                f"MODEL.TRAINABLE_PARAMS: '{glob}' matches no trainable parameter; names look like "
                f"'{names[-1] if names else '(the model has none)'}'."
            )
        selected.update(matches)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in selected)
    trainable = [name for name in names if name in selected]
    logger.info(
        "Training %s of %s parameters (MODEL.TRAINABLE_PARAMS): %s",
        f"{sum(parameters[n].numel() for n in trainable):,}",
        f"{sum(p.numel() for p in parameters.values()):,}",
        ", ".join(f"{n} ({parameters[n].numel():,})" for n in trainable),
    )
    return trainable


def freeze_norm_statistics(model: nn.Module) -> nn.Module:
    """Turn BatchNorm layers without a trainable parameter into ``FrozenBatchNorm2d``.

    Otherwise their running statistics would still follow the training data, and a frozen trunk
    would drift. The conversion holds whoever calls ``model.train()`` afterwards, and the layers'
    names in the checkpoint stay the same.

    The model is changed in place, unless it is itself such a layer, and returned.
    """
    for name, child in model.named_children():
        is_norm = isinstance(child, nn.modules.batchnorm._BatchNorm)
        if is_norm and not any(p.requires_grad for p in child.parameters()):
            setattr(model, name, FrozenBatchNorm2d.convert_frozen_batchnorm(child))
        else:
            freeze_norm_statistics(child)
    return model
