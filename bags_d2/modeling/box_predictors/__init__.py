"""Classifiers of the RoI heads, one file each."""

from .bags import BAGSOutputLayers
from .build import ROI_BOX_PREDICTOR_REGISTRY, build_box_predictor
from .fast_rcnn import FastRCNNOutputLayers

__all__ = [
    "ROI_BOX_PREDICTOR_REGISTRY",
    "BAGSOutputLayers",
    "FastRCNNOutputLayers",
    "build_box_predictor",
]
