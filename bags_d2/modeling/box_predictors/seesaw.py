"""Seesaw loss: negatives that give way to rarer classes, as far as those are not confused."""

import math

import torch
from detectron2.config import configurable
from torch.nn import functional as F

from ..losses import at_least_float32
from .build import ROI_BOX_PREDICTOR_REGISTRY
from .classifier import ClassifierOutputLayers, require_non_negative, sum_over_ranks

__all__ = ["SeesawOutputLayers", "seesaw_loss"]

# Below this a probability of the true class no longer raises the compensation.
MIN_PROB = 0.01


@ROI_BOX_PREDICTOR_REGISTRY.register()
class SeesawOutputLayers(ClassifierOutputLayers):
    """Softmax over the K classes with the Seesaw loss, and a branch of two logits for objectness.

    C = K + 2 logits: the classes, then object and background (Wang et al., CVPR 2021, section
    3.3). A class scores ``softmax(z_1..z_K)_c * P(object)``. The paper's classifier is a
    normalised one, ``MODEL.ROI_BOX_PREDICTOR.NORMALIZED: True``; it normalises all K + 2 logits.

    Of the loss, the classes' part sees foreground RoIs and the branch's part all. Both are divided
    by the number of all RoIs, as in the authors' code, so that a batch with little foreground does
    not weigh its RoIs more. Numbers of samples are counted as they come in training, over all
    ranks (the authors count each rank's own); they start from zero where a checkpoint has none.
    """

    @configurable
    def __init__(
        self, input_shape, *, num_classes: int, p: float = 0.8, q: float = 2.0, **kwargs
    ) -> None:
        """
        Args:
            num_classes: K.
            p: exponent of the mitigation factor, 0 or more.
            q: exponent of the compensation factor, 0 or more.
        """
        super().__init__(input_shape, num_classes=num_classes, num_logits=num_classes + 2, **kwargs)
        require_non_negative("MODEL.SEESAW.P", p)
        require_non_negative("MODEL.SEESAW.Q", q)
        self.p = p
        self.q = q
        self.register_buffer("num_samples", torch.zeros(num_classes, dtype=torch.long))

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        ret.update(p=cfg.MODEL.SEESAW.P, q=cfg.MODEL.SEESAW.Q)
        return ret

    def classification_loss(self, logits: torch.Tensor, gt_classes: torch.Tensor) -> torch.Tensor:
        """Seesaw loss of the classes plus cross-entropy of the objectness branch.

        The batch's own samples are counted first.
        """
        logits = at_least_float32(logits)
        num_rois = max(len(gt_classes), 1)
        is_background = gt_classes == self.num_classes
        batch_counts = torch.zeros(self.num_classes + 1, dtype=torch.long, device=logits.device)
        batch_counts.index_add_(0, gt_classes, torch.ones_like(gt_classes))
        self.num_samples += sum_over_ranks(batch_counts[:-1])
        losses = seesaw_loss(logits[:, :-2], gt_classes, self.num_samples, self.p, self.q)  # (R,)
        objectness = F.cross_entropy(logits[:, -2:], is_background.long(), reduction="sum")
        return (losses.sum() + objectness) / num_rois

    def class_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """Softmax over the classes times P(object); the last column is P(background)."""
        logits = at_least_float32(logits)
        objectness = logits[:, -2:].softmax(dim=1)
        return torch.cat(
            [logits[:, :-2].softmax(dim=1) * objectness[:, :1], objectness[:, 1:]], dim=1
        )


def seesaw_loss(
    logits: torch.Tensor,
    gt_classes: torch.Tensor,
    num_samples: torch.Tensor,
    p: float = 0.8,
    q: float = 2.0,
) -> torch.Tensor:
    """``-log(e^{z_i} / (sum_{j != i} S_ij e^{z_j} + e^{z_i}))`` of each RoI of a class i.

    ``S_ij = M_ij C_ij`` (Wang et al., CVPR 2021, eq. 2 to 6). The mitigation factor
    ``M_ij = min(1, (N_j / N_i)^p)`` spares a class j that has been seen less often than i; the
    compensation factor ``C_ij = max(1, (s_j / s_i)^q)`` takes that back where the softmax s finds
    j likelier than i. Neither has a gradient. A class not seen yet counts as seen once, and s_i as
    at least 0.01, both as in the authors' code.

    Args:
        logits: (R, K), float32 or float64.
        gt_classes: long tensor (R,), 0..K.
        num_samples: (K,), how often each class has been seen in training.
        p: exponent of the mitigation factor.
        q: exponent of the compensation factor.

    Returns:
        Tensor (R,); 0 for background RoIs.
    """
    num_classes = logits.shape[1]
    is_foreground = gt_classes < num_classes
    # Background RoIs are computed as if of class 0 and left out of the sum: no RoI is picked by
    # its label, for which the host would wait.
    labels = torch.where(is_foreground, gt_classes, torch.zeros_like(gt_classes))
    counts = num_samples.clamp(min=1).to(logits)
    mitigation = p * (counts.log() - counts.log()[labels][:, None]).clamp(max=0)
    log_probs = logits.detach().log_softmax(dim=1)
    own = log_probs.gather(1, labels[:, None])
    compensation = q * (log_probs - own.clamp(min=math.log(MIN_PROB))).clamp(min=0)
    factors = mitigation + compensation  # log S, (R, K)
    losses = F.cross_entropy(
        logits + factors.scatter(1, labels[:, None], 0.0), labels, reduction="none"
    )
    return torch.where(is_foreground, losses, losses.new_zeros(()))
