"""Equalization loss v2: classes are balanced by the gradients that they have received."""

import torch
from detectron2.config import configurable
from torch.nn import functional as F

from ..losses import at_least_float32
from .build import ROI_BOX_PREDICTOR_REGISTRY
from .classifier import (
    SigmoidOutputLayers,
    one_hot_targets,
    require_non_negative,
    sum_over_ranks,
)

__all__ = ["EQLv2OutputLayers", "gradient_weights"]


@ROI_BOX_PREDICTOR_REGISTRY.register()
class EQLv2OutputLayers(SigmoidOutputLayers):
    """K + 1 sigmoids whose positives and negatives are weighted by accumulated gradients.

    With ``g_c`` the ratio of the positive to the negative gradients that class c has accumulated
    (Tan et al., CVPR 2021, section 3.2), positives of c weigh ``1 + alpha (1 - f(g_c))`` and
    negatives ``f(g_c)``, ``f(x) = 1 / (1 + exp(-gamma (x - mu)))``. The loss is the weighted
    binary cross-entropy, summed over the classes, mean over the RoIs. What is accumulated is
    ``w |sigmoid(z) - y|``, over all ranks, after each loss; before the first one, and for a class
    without gradients, weights are neutral.

    Logit K is background against all objects, always weighted 1. A class scores
    ``sigmoid(z_c) (1 - sigmoid(z_K))``, as in the authors' code.
    """

    @configurable
    def __init__(
        self,
        input_shape,
        *,
        num_classes: int,
        gamma: float = 12.0,
        mu: float = 0.8,
        alpha: float = 4.0,
        **kwargs,
    ) -> None:
        """
        Args:
            num_classes: K.
            gamma: steepness of f, 0 or more.
            mu: ratio at which f is 1/2.
            alpha: what positives gain at most, 0 or more.
        """
        super().__init__(input_shape, num_classes=num_classes, num_logits=num_classes + 1, **kwargs)
        require_non_negative("MODEL.EQLV2.GAMMA", gamma)
        require_non_negative("MODEL.EQLV2.ALPHA", alpha)
        self.gamma = gamma
        self.mu = mu
        self.alpha = alpha
        # Positive and negative gradients of each class. float64: small steps on large sums.
        zeros = torch.zeros(2, num_classes, dtype=torch.float64)
        self.register_buffer("accumulated_gradients", zeros)

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        options = cfg.MODEL.EQLV2
        ret.update(gamma=options.GAMMA, mu=options.MU, alpha=options.ALPHA)
        return ret

    def classification_loss(self, logits: torch.Tensor, gt_classes: torch.Tensor) -> torch.Tensor:
        """The weighted binary cross-entropy; its gradients are then accumulated."""
        logits = at_least_float32(logits)
        targets = one_hot_targets(gt_classes, self.num_classes + 1).to(logits)
        positive, negative = gradient_weights(
            self.accumulated_gradients, self.gamma, self.mu, self.alpha
        ).to(logits)
        weights = torch.where(targets > 0, positive, negative)
        loss = F.binary_cross_entropy_with_logits(logits, targets, weights, reduction="sum")
        with torch.no_grad():
            gradients = weights * (logits.sigmoid() - targets).abs()
            of_batch = torch.stack([gradients * targets, gradients * (1 - targets)]).sum(dim=1)
            self.accumulated_gradients += sum_over_ranks(of_batch[:, :-1].double())
        return loss / max(len(gt_classes), 1)

    def class_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """Sigmoids of the classes times that of "no background", which comes last."""
        probs = at_least_float32(logits).sigmoid()
        background = probs[:, -1:]
        return torch.cat([probs[:, :-1] * (1 - background), background], dim=1)


def gradient_weights(
    accumulated: torch.Tensor, gamma: float, mu: float, alpha: float
) -> torch.Tensor:
    """Weights of positives and negatives (2, K + 1), of background 1.

    Tan et al., CVPR 2021, eq. 4 to 6, from the accumulated positive and negative gradients (2, K).
    """
    positive, negative = accumulated
    # Without gradients the ratio is as good as infinite: f is 1 and weights are neutral.
    ratio = torch.where(negative > 0, positive / negative.clamp(min=1e-10), torch.inf)
    f = torch.sigmoid(gamma * (ratio - mu)) if gamma > 0 else torch.full_like(ratio, 0.5)
    return F.pad(torch.stack([1 + alpha * (1 - f), f]), (0, 1), value=1.0)
