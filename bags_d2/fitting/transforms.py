"""Tau-normalisation of a trained softmax classifier: no training, a transform of its weights."""

import math
import re
from collections.abc import Mapping

import torch

from ..errors import ConfigError, DataError

__all__ = ["tau_normalize"]

_WEIGHT = re.compile(r"roi_heads\.box_predictor(\.\d+)?\.cls_score\.weight")


def tau_normalize(
    state_dict: Mapping[str, torch.Tensor], tau: float, classes: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Divide the weights of classes by a power of their norm: ``w_c / ||w_c||^tau``.

    Kang et al., ICLR 2020, section 4, on classification. BAGS reports it for detection (11.01 AP
    for all classes and 21.61 for those of the tail, against 20.98) and does not say what happens to
    background and biases. Here both are left alone, and norms are not rescaled to their former
    mean: with tau 1 every chosen class has the norm 1, whatever that of background.

    Args:
        state_dict: the "model" entry of a checkpoint, of any number of cascade stages.
        tau: 0 changes nothing, 1 makes all norms equal.
        classes: bool tensor (K,), the classes to normalise; None is all.

    Returns:
        A copy with other classifier weights.

    Raises:
        ConfigError: if tau is negative or so large that weights overflow, or ``classes`` are of
            another number of classes.
        DataError: if there is no softmax classifier in the checkpoint.
    """
    if not 0 <= tau < math.inf:
        raise ConfigError(f"--tau must be 0 or more, and finite, found {tau}.")
    names = [name for name in state_dict if _WEIGHT.fullmatch(name)]
    if not names:
        raise DataError("The checkpoint has no 'roi_heads.box_predictor*.cls_score.weight'.")
    result = dict(state_dict)
    for name in names:
        if name.replace("cls_score.weight", "groups.class_to_group") in state_dict:
            raise DataError(
                f"'{name}' is a grouped classifier; tau-normalisation is for a softmax checkpoint."
            )
        weight = torch.as_tensor(state_dict[name])
        num_classes = len(weight) - 1  # background is Detectron2's last row
        chosen = torch.ones(num_classes, dtype=torch.bool) if classes is None else classes
        if len(chosen) != num_classes:
            raise ConfigError(
                f"The class counts are of {len(chosen)} classes and the checkpoint's '{name}' of "
                f"{num_classes}; name the config of the checkpoint."
            )
        norms = weight[:-1].float().norm(dim=1, keepdim=True).clamp(min=1e-12)
        scaled = (weight[:-1] / norms**tau).to(weight.dtype)
        if not bool(torch.isfinite(scaled).all()):
            raise ConfigError(f"'{name}' overflows, or is not finite before, with --tau {tau}.")
        result[name] = torch.cat([torch.where(chosen[:, None], scaled, weight[:-1]), weight[-1:]])
    return result
