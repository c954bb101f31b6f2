"""Classifiers of the RoI heads, one file each."""

import importlib
import pkgutil

from .bags import BAGSOutputLayers
from .bags_ablations import (
    BAGSWithoutBackgroundGroupOutputLayers,
    BAGSWithoutOthersOutputLayers,
    ReweightedBAGSOutputLayers,
)
from .balanced_softmax import BalancedSoftmaxOutputLayers
from .build import ROI_BOX_PREDICTOR_REGISTRY, build_box_predictor
from .classifier import ClassifierOutputLayers, CountedOutputLayers
from .eql import EQLOutputLayers
from .eqlv2 import EQLv2OutputLayers
from .fast_rcnn import FastRCNNOutputLayers, NormalizedLinear
from .focal import FocalOutputLayers
from .lws import LWSOutputLayers
from .nearest_mean import NearestMeanOutputLayers
from .reweighted import ReweightedOutputLayers
from .seesaw import SeesawOutputLayers

__all__ = [
    "ROI_BOX_PREDICTOR_REGISTRY",
    "BAGSOutputLayers",
    "BAGSWithoutBackgroundGroupOutputLayers",
    "BAGSWithoutOthersOutputLayers",
    "BalancedSoftmaxOutputLayers",
    "ClassifierOutputLayers",
    "CountedOutputLayers",
    "EQLOutputLayers",
    "EQLv2OutputLayers",
    "FastRCNNOutputLayers",
    "FocalOutputLayers",
    "LWSOutputLayers",
    "NearestMeanOutputLayers",
    "NormalizedLinear",
    "ReweightedBAGSOutputLayers",
    "ReweightedOutputLayers",
    "SeesawOutputLayers",
    "build_box_predictor",
]

# A new method is its file: importing it registers what is in it.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
