"""NorCal: the scores of a softmax detector, calibrated by training counts at test time."""

import torch
from detectron2.config import configurable
from torch.nn import functional as F

from ..losses import at_least_float32
from .build import ROI_BOX_PREDICTOR_REGISTRY
from .classifier import CountedOutputLayers, require_non_negative

__all__ = ["NorCalOutputLayers", "calibrated_probs"]


@ROI_BOX_PREDICTOR_REGISTRY.register()
class NorCalOutputLayers(CountedOutputLayers):
    """A softmax classifier whose test scores are calibrated (:func:`calibrated_probs`).

    It trains as a softmax, and its parameters have the names of Detectron2's, so that any softmax
    checkpoint can be evaluated with it. The paper counts training images; here
    ``MODEL.LONG_TAIL.COUNT_BY`` decides.
    """

    @configurable
    def __init__(self, input_shape, *, gamma: float = 0.6, **kwargs) -> None:
        """
        Args:
            gamma: exponent of the counts, 0 or more; 0 is the softmax.
        """
        super().__init__(input_shape, **kwargs)
        require_non_negative("MODEL.NORCAL.GAMMA", gamma)
        self.gamma = gamma

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        ret["gamma"] = cfg.MODEL.NORCAL.GAMMA
        return ret

    def class_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """:func:`calibrated_probs`."""
        return calibrated_probs(logits, self.class_counts, self.gamma)


def calibrated_probs(
    logits: torch.Tensor, counts: torch.Tensor, gamma: float = 0.6
) -> torch.Tensor:
    """``p_c = e^{z_c} N_c^-gamma / (sum_c' e^{z_c'} N_c'^-gamma + e^{z_bg})``.

    Pan et al., NeurIPS 2021, eq. 4 and 5: the foreground classes are divided by a power of their
    training counts, and normalised together with the unchanged background.

    Args:
        logits: (R, K + 1), any floating dtype; computed in float32 at least.
        counts: N, (K,); 0 counts as 1.
        gamma: exponent.
    """
    shift = F.pad(-gamma * counts.clamp(min=1).double().log(), (0, 1))
    logits = at_least_float32(logits)
    return (logits + shift.to(logits)).softmax(dim=1)
