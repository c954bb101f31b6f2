"""Class groups, losses, box predictors and RoI heads."""

from ..layers import fast_rcnn_inference_topk
from .box_predictors import (
    ROI_BOX_PREDICTOR_REGISTRY,
    BAGSOutputLayers,
    FastRCNNOutputLayers,
    build_box_predictor,
)
from .class_groups import ClassCounts, ClassGroups
from .losses import group_softmax_loss, merge_group_probs, sample_others
from .roi_heads import LongTailCascadeROIHeads, LongTailROIHeads

__all__ = [
    "ROI_BOX_PREDICTOR_REGISTRY",
    "BAGSOutputLayers",
    "ClassCounts",
    "ClassGroups",
    "FastRCNNOutputLayers",
    "LongTailCascadeROIHeads",
    "LongTailROIHeads",
    "build_box_predictor",
    "fast_rcnn_inference_topk",
    "group_softmax_loss",
    "merge_group_probs",
    "sample_others",
]
