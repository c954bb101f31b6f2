"""Balanced softmax: cross-entropy of logits that the class priors are added to."""

import torch
from detectron2.config import configurable
from detectron2.layers import cross_entropy
from torch.nn import functional as F

from ..losses import at_least_float32
from .build import ROI_BOX_PREDICTOR_REGISTRY
from .classifier import CountedOutputLayers, require_non_negative

__all__ = ["BalancedSoftmaxOutputLayers", "balanced_softmax_loss", "log_priors"]


@ROI_BOX_PREDICTOR_REGISTRY.register()
class BalancedSoftmaxOutputLayers(CountedOutputLayers):
    """Softmax that is trained with the class priors added to its logits, and tested without.

    What the priors explain of the training labels, the logits need not, so that at test time they
    are those of a world in which all classes are equally frequent.
    """

    @configurable
    def __init__(self, input_shape, *, tau: float = 1.0, **kwargs) -> None:
        """
        Args:
            tau: scale of the log priors, 0 or more; 1 is balanced softmax, 0 softmax.
        """
        super().__init__(input_shape, **kwargs)
        require_non_negative("MODEL.BALANCED_SOFTMAX.TAU", tau)
        self.tau = tau

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        ret["tau"] = cfg.MODEL.BALANCED_SOFTMAX.TAU
        return ret

    def classification_loss(self, logits: torch.Tensor, gt_classes: torch.Tensor) -> torch.Tensor:
        """:func:`balanced_softmax_loss`."""
        return balanced_softmax_loss(logits, gt_classes, self.class_counts, self.tau)


def log_priors(counts: torch.Tensor) -> torch.Tensor:
    """Log prior of each class relative to background.

    The papers are about classification, where every class has a count. In detection background
    has none: how many RoIs are background is up to their sampling, and a balanced world without
    background is not what a detector will see. So its logit is left alone, and the prior of class
    c is ``n_c / mean(n)``: background competes with an average class as it does in a softmax.
    A class that training does not have counts as 1, whose prior is finite. In float64, (K + 1,),
    background last with 0.
    """
    counts = counts.double().clamp(min=1)
    return F.pad((counts / counts.mean()).log(), (0, 1))


def balanced_softmax_loss(
    logits: torch.Tensor, gt_classes: torch.Tensor, counts: torch.Tensor, tau: float = 1.0
) -> torch.Tensor:
    """Mean over RoIs of ``-log(pi_y^tau exp(z_y) / sum_c pi_c^tau exp(z_c))``.

    Balanced softmax (Ren et al., NeurIPS 2020, eq. 3 and 4) for tau = 1, the logit-adjusted loss
    (Menon et al., ICLR 2021, eq. 10) in general; ``log pi`` is :func:`log_priors`.

    Logits (R, K + 1) are computed in float32 at least; counts are (K,).
    """
    logits = at_least_float32(logits)
    return cross_entropy(logits + (tau * log_priors(counts)).to(logits), gt_classes)
