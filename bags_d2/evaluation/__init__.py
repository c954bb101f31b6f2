"""Evaluation of long-tailed detection: LVIS and COCO measures, AP by training instances."""

from .bins import ap_per_bin, balanced_ap, bin_index
from .coco_evaluation import LongTailCOCOEvaluator
from .ground_truth import PredictionError
from .label_check import LabelCheck
from .lvis_evaluation import AnnotationError, LongTailLVISEvaluator, evaluate_lvis_predictions

__all__ = [
    "AnnotationError",
    "LabelCheck",
    "LongTailCOCOEvaluator",
    "LongTailLVISEvaluator",
    "PredictionError",
    "ap_per_bin",
    "balanced_ap",
    "bin_index",
    "evaluate_lvis_predictions",
]
