"""Softmax with re-weighted classes, the plainest treatment of a long tail."""

import torch
from detectron2.config import configurable
from torch.nn import functional as F

from ...errors import ConfigError
from ..losses import at_least_float32
from .build import ROI_BOX_PREDICTOR_REGISTRY
from .classifier import CountedOutputLayers

__all__ = ["ReweightedOutputLayers", "class_weights", "reweighted_softmax_loss"]

SCHEMES = ("inverse", "effective_number")


@ROI_BOX_PREDICTOR_REGISTRY.register()
class ReweightedOutputLayers(CountedOutputLayers):
    """Softmax cross-entropy in which rare classes weigh more than frequent ones.

    The two schemes are those of :func:`class_weights`. At test time it is a plain softmax.
    """

    @configurable
    def __init__(
        self,
        input_shape,
        *,
        scheme: str = "inverse",
        beta: float = 0.999,
        clip: tuple[float, float] = (0.1, 5.0),
        **kwargs,
    ) -> None:
        """``scheme``, ``beta`` and ``clip`` are those of :func:`class_weights`."""
        super().__init__(input_shape, **kwargs)
        self.options = (scheme, beta, clip)
        class_weights(torch.ones(1), *self.options)  # raises ConfigError for faulty ones

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        options = cfg.MODEL.REWEIGHT
        ret.update(scheme=options.SCHEME, beta=options.BETA, clip=tuple(options.CLIP))
        return ret

    def classification_loss(self, logits: torch.Tensor, gt_classes: torch.Tensor) -> torch.Tensor:
        """:func:`reweighted_softmax_loss`."""
        # Not kept: a checkpoint may bring other counts, and K numbers are quickly computed.
        weights = class_weights(self.class_counts, *self.options)
        return reweighted_softmax_loss(logits, gt_classes, weights)


def class_weights(
    counts: torch.Tensor,
    scheme: str = "inverse",
    beta: float = 0.999,
    clip: tuple[float, float] = (0.1, 5.0),
) -> torch.Tensor:
    """Weight of each class in the loss, from its training count n.

    - "inverse": ``w = 1 / n``, the re-weighting that BAGS was compared with (Li et al., CVPR
      2020).
    - "effective_number": ``w = (1 - beta) / (1 - beta^n)``, one over the effective number of
      samples (Cui et al., CVPR 2019, section 4). It is flat for beta = 0 and "inverse" for
      beta -> 1.

    The K weights are scaled to a mean of 1 and then clipped, and background, which has no count,
    weighs 1; so the authors of BAGS do for both schemes. A class that training does not have
    (n = 0) is given the weight of n = 1: it has no RoI to use it for, but takes part in the mean.

    Args:
        counts: (K,), whole numbers of 0 or more.
        scheme: "inverse" or "effective_number".
        beta: of the effective number, 0 <= beta < 1.
        clip: least and largest weight.

    Returns:
        float64 tensor (K + 1,) on the counts' device, background last.

    Raises:
        ConfigError: if an option has no meaning.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"MODEL.REWEIGHT.SCHEME must be one of {SCHEMES}, found '{scheme}'.")
    if not 0 <= beta < 1:
        raise ConfigError(f"MODEL.REWEIGHT.BETA must be 0 or more and below 1, found {beta}.")
    if len(clip) != 2 or not 0 <= clip[0] <= clip[1]:
        raise ConfigError(
            "MODEL.REWEIGHT.CLIP must be a least and a largest weight of 0 or more, found "
            f"{tuple(clip)}."
        )
    # In float64, since 1 - beta^n cancels where beta^n is close to 1.
    counts = counts.double().clamp(min=1)
    weights = 1 / counts if scheme == "inverse" else (1 - beta) / (1 - beta**counts)
    return F.pad((weights / weights.mean()).clamp(*clip), (0, 1), value=1.0)


def reweighted_softmax_loss(
    logits: torch.Tensor, gt_classes: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """``sum_r w[y_r] * CE(logits_r, y_r) / R``.

    Divided by the number of RoIs, as the authors of BAGS do, and not by the sum of their weights
    as ``F.cross_entropy`` would: that would undo the re-weighting between batches. A batch of one
    class would count the same whatever its weight, and a rare object among many of background
    would shrink the gradients of those.

    Logits (R, K + 1) are computed in float32 at least; weights are (K + 1,).
    """
    logits = at_least_float32(logits)
    total = F.cross_entropy(logits, gt_classes, weights.to(logits), reduction="sum")
    return total / max(len(gt_classes), 1)
