"""Classifiers of the RoI heads, one file each."""

from .bags import BAGSOutputLayers
from .bags_ablations import (
    BAGSWithoutBackgroundGroupOutputLayers,
    BAGSWithoutOthersOutputLayers,
    ReweightedBAGSOutputLayers,
)
from .balanced_softmax import BalancedSoftmaxOutputLayers
from .build import ROI_BOX_PREDICTOR_REGISTRY, build_box_predictor
from .classifier import ClassifierOutputLayers, CountedOutputLayers
from .fast_rcnn import FastRCNNOutputLayers, NormalizedLinear
from .focal import FocalOutputLayers
from .lws import LWSOutputLayers
from .reweighted import ReweightedOutputLayers

__all__ = [
    "ROI_BOX_PREDICTOR_REGISTRY",
    "BAGSOutputLayers",
    "BAGSWithoutBackgroundGroupOutputLayers",
    "BAGSWithoutOthersOutputLayers",
    "BalancedSoftmaxOutputLayers",
    "ClassifierOutputLayers",
    "CountedOutputLayers",
    "FastRCNNOutputLayers",
    "FocalOutputLayers",
    "LWSOutputLayers",
    "NormalizedLinear",
    "ReweightedBAGSOutputLayers",
    "ReweightedOutputLayers",
    "build_box_predictor",
]
