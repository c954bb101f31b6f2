"""Focal loss over one sigmoid for each class."""

import torch
from detectron2.config import configurable
from fvcore.nn import sigmoid_focal_loss
from torch.nn import functional as F

from ...errors import ConfigError
from .build import ROI_BOX_PREDICTOR_REGISTRY
from .classifier import SigmoidOutputLayers

__all__ = ["FocalOutputLayers", "focal_loss"]


@ROI_BOX_PREDICTOR_REGISTRY.register()
class FocalOutputLayers(SigmoidOutputLayers):
    """K sigmoids trained with the focal loss (Lin et al., ICCV 2017), C = K logits.

    The focal baseline of the authors of BAGS is another one: its background is a class of its own,
    and its loss the mean over all R x (K + 1) elements.
    """

    @configurable
    def __init__(self, input_shape, *, gamma: float = 2.0, alpha: float = 0.25, **kwargs) -> None:
        """
        Args:
            gamma: exponent of the weight of well classified RoIs.
            alpha: weight of positives, that of negatives being ``1 - alpha``; negative for 1 and 1.

        """
        super().__init__(input_shape, **kwargs)
        # Between 0 and 1, d (1 - p)^gamma / dp is infinite at p = 1, which float32 reaches: NaN.
        if not (gamma == 0 or gamma >= 1):
            raise ConfigError(f"MODEL.FOCAL_LOSS.GAMMA must be 0.0 or 1.0 or more, found {gamma}.")
        if not alpha <= 1:
            raise ConfigError(f"MODEL.FOCAL_LOSS.ALPHA must be 1.0 or less, found {alpha}.")
        self.gamma = gamma
        self.alpha = alpha

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        ret.update(gamma=cfg.MODEL.FOCAL_LOSS.GAMMA, alpha=cfg.MODEL.FOCAL_LOSS.ALPHA)
        return ret

    def classification_loss(self, logits: torch.Tensor, gt_classes: torch.Tensor) -> torch.Tensor:
        """:func:`focal_loss`."""
        return focal_loss(logits, gt_classes, self.gamma, self.alpha)


def focal_loss(
    logits: torch.Tensor, gt_classes: torch.Tensor, gamma: float = 2.0, alpha: float = 0.25
) -> torch.Tensor:
    """``-sum_rc alpha_t (1 - p_t)^gamma log(p_t) / max(R+, 1)`` (Lin et al., eq. 5).

    ``p_t`` and ``alpha_t`` are ``p`` and ``alpha`` for the class of a RoI, ``1 - p`` and
    ``1 - alpha`` for all others. The divisor is the number R+ of foreground RoIs of the per-device
    batch (section 4.1, "Focal Loss"), not of all elements: nearly all are easy negatives that
    lose next to nothing.

    Args:
        logits: (R, K), any floating dtype; computed in float32, float64 included.
        gt_classes: long tensor (R,), 0..K.
        gamma: 0, or 1 or more; 0 is binary cross-entropy weighted by ``alpha_t``.
        alpha: 0 to 1; negative does without ``alpha_t``.
    """
    # Background is one column more, which is then dropped.
    targets = F.one_hot(gt_classes, logits.shape[1] + 1)[:, :-1]  # (R, K)
    total = sigmoid_focal_loss(logits, targets, alpha=alpha, gamma=gamma, reduction="sum")
    return total / targets.sum().clamp(min=1)
