"""Classifiers of the RoI heads, one file each."""

from .bags import BAGSOutputLayers
from .build import ROI_BOX_PREDICTOR_REGISTRY, build_box_predictor
from .classifier import ClassifierOutputLayers, CountedOutputLayers
from .fast_rcnn import FastRCNNOutputLayers, NormalizedLinear

__all__ = [
    "ROI_BOX_PREDICTOR_REGISTRY",
    "BAGSOutputLayers",
    "ClassifierOutputLayers",
    "CountedOutputLayers",
    "FastRCNNOutputLayers",
    "NormalizedLinear",
    "build_box_predictor",
]
