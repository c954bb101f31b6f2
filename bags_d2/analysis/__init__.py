"""Pictures and tables that show what a long tail does to a classifier."""

from .classifier import class_weight_norms
from .detections import draw_comparison, label_detections
from .plots import plot_ap_bins, plot_weight_norms

__all__ = [
    "class_weight_norms",
    "draw_comparison",
    "label_detections",
    "plot_ap_bins",
    "plot_weight_norms",
]
