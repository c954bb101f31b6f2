"""Equalization loss: rare classes are spared the negatives of other classes."""

import torch
from detectron2.config import configurable
from torch.nn import functional as F

from ...data.class_statistics import training_class_counts, training_image_count
from ...errors import ConfigError
from ..losses import at_least_float32
from .build import ROI_BOX_PREDICTOR_REGISTRY
from .classifier import SigmoidOutputLayers, one_hot_targets

__all__ = ["EQLOutputLayers", "equalization_loss"]


@ROI_BOX_PREDICTOR_REGISTRY.register()
class EQLOutputLayers(SigmoidOutputLayers):
    """K sigmoids with the equalization loss (Tan et al., CVPR 2020), C = K logits."""

    @configurable
    def __init__(
        self,
        input_shape,
        *,
        is_tail: torch.Tensor | None,
        unknown_because: str = "",
        **kwargs,
    ) -> None:
        """
        Args:
            is_tail: bool tensor (K,), the classes to spare; None if unknown, as where a checkpoint
                is evaluated without the training annotations.
            unknown_because: why, for the error in training.
        """
        super().__init__(input_shape, **kwargs)
        # Not saved: it follows from the training set, and only training needs it.
        self.register_buffer("is_tail", is_tail, persistent=False)
        self.unknown_because = unknown_because

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        threshold = cfg.MODEL.EQL.FREQUENCY_THRESHOLD
        if not 0 <= threshold <= 1:
            raise ConfigError(
                f"MODEL.EQL.FREQUENCY_THRESHOLD is a share of the training images and must lie in "
                f"0.0..1.0, found {threshold}."
            )
        try:
            counts = training_class_counts(cfg, by="images")
            ret["is_tail"] = counts < threshold * training_image_count(cfg)
        except FileNotFoundError as error:
            ret.update(is_tail=None, unknown_because=str(error))
        return ret

    def classification_loss(self, logits: torch.Tensor, gt_classes: torch.Tensor) -> torch.Tensor:
        """:func:`equalization_loss`."""
        if self.is_tail is None:
            raise ConfigError(
                f"EQLOutputLayers cannot tell rare classes in training: {self.unknown_because}"
            )
        return equalization_loss(logits, gt_classes, self.is_tail)


def equalization_loss(
    logits: torch.Tensor, gt_classes: torch.Tensor, is_tail: torch.Tensor
) -> torch.Tensor:
    """``sum_rc w_rc BCE(z_rc, y_rc) / R`` with ``w_rc = 1 - E(r) T(c) (1 - y_rc)``.

    Tan et al., CVPR 2020, eq. 4 and 5: E(r) is 1 for foreground RoIs and T(c) for classes whose
    share of the training images is below a threshold. So these get no negatives from foreground
    RoIs of other classes, but all from background.

    Logits (R, K) are computed in float32 at least; ``is_tail`` is a bool tensor (K,).
    """
    logits = at_least_float32(logits)
    num_classes = logits.shape[1]
    targets = one_hot_targets(gt_classes, num_classes)
    is_foreground = (gt_classes < num_classes)[:, None]
    weights = ~(is_foreground & is_tail.to(logits.device) & (targets == 0))
    total = F.binary_cross_entropy_with_logits(
        logits, targets.to(logits), weights.to(logits), reduction="sum"
    )
    return total / max(len(gt_classes), 1)
