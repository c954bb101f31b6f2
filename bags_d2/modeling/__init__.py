"""Class groups, losses, box predictors and RoI heads."""

from .box_predictors import ROI_BOX_PREDICTOR_REGISTRY, BAGSOutputLayers, build_box_predictor
from .groups import ClassGroups
from .losses import group_softmax_loss, merge_group_probs, sample_others
from .roi_heads import LongTailCascadeROIHeads, LongTailROIHeads

__all__ = [
    "ROI_BOX_PREDICTOR_REGISTRY",
    "BAGSOutputLayers",
    "ClassGroups",
    "LongTailCascadeROIHeads",
    "LongTailROIHeads",
    "build_box_predictor",
    "group_softmax_loss",
    "merge_group_probs",
    "sample_others",
]
