"""Class groups, losses, box predictors and RoI heads."""

from .box_predictors import (
    ROI_BOX_PREDICTOR_REGISTRY,
    BAGSOutputLayers,
    FastRCNNOutputLayers,
    build_box_predictor,
)
from .class_counts import ClassCounts
from .groups import ClassGroups
from .losses import group_softmax_loss, merge_group_probs, sample_others
from .postprocessing import fast_rcnn_inference_topk
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
