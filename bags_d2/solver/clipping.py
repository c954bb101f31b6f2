"""Clipping of one norm over all gradients."""

import torch
from torch import nn

__all__ = ["clip_full_model"]


def clip_full_model(
    optimizer: torch.optim.Optimizer, max_norm: float, norm_type: float = 2.0
) -> None:
    """Clip the norm of all gradients taken together before each step of an optimizer.

    Detectron2's own "norm" clips each parameter by itself.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def clip(*_) -> None:  # what a hook returns would replace the step's arguments
        nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

    # A hook on the optimizer comes after GradScaler has unscaled the gradients.
    optimizer.register_step_pre_hook(clip)
