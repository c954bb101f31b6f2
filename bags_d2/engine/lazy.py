"""Optimizers as LazyConfigs build them; for Detectron2's ``lazyconfig_train_net.py`` as well.

That script gives ``cfg.optimizer.params.model`` the model and builds the optimizer before it wraps
the model for parallel training, so what trains is chosen there.
"""

from collections.abc import Sequence

import torch
from detectron2.solver.build import get_default_optimizer_params
from torch import nn

from ..solver import clip_full_model
from .freezing import freeze_norm_statistics, select_trainable_params, skip_frozen_parts

__all__ = ["clipped_sgd", "trainable_params"]


def trainable_params(
    model: nn.Module, globs: Sequence[str] = (), skip_frozen: bool = True, **kwargs
) -> list[dict]:
    """Freeze all but chosen parameters, and return those in groups for an optimizer.

    Args:
        model: the model.
        globs: names of what trains, as in ``MODEL.TRAINABLE_PARAMS``; () is everything.
        skip_frozen: as ``MODEL.SKIP_FROZEN``.
        **kwargs: for Detectron2's ``get_default_optimizer_params``.

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
    """``torch.optim.SGD`` that clips the L2 norm of all gradients taken together."""
    optimizer = torch.optim.SGD(params, **kwargs)
    clip_full_model(optimizer, max_norm)
    return optimizer
