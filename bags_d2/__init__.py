"""Long-tailed object detection on Detectron2: Balanced Group Softmax and its peers.

Importing this package registers its RoI heads, box predictors and data sets with Detectron2.
"""

import os

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "bags_d2 needs detectron2: install the official build, or ./third_party/detectron2 of "
        "this project (README, section Installation)."
    ) from error

from .config import add_bags_config
from .data.datasets import register_builtin_datasets
from .engine import BAGSTrainer, LongTailPredictor
from .errors import BagsError, ConfigError, DataError, MissingFileError
from .modeling import (
    ROI_BOX_PREDICTOR_REGISTRY,
    BAGSOutputLayers,
    ClassGroups,
    LongTailCascadeROIHeads,
    LongTailROIHeads,
    build_box_predictor,
    group_softmax_loss,
    merge_group_probs,
    sample_others,
)

__version__ = "0.5.0"

__all__ = [
    "ROI_BOX_PREDICTOR_REGISTRY",
    "BAGSOutputLayers",
    "BAGSTrainer",
    "BagsError",
    "ClassGroups",
    "ConfigError",
    "DataError",
    "LongTailCascadeROIHeads",
    "LongTailPredictor",
    "LongTailROIHeads",
    "MissingFileError",
    "add_bags_config",
    "build_box_predictor",
    "group_softmax_loss",
    "merge_group_probs",
    "sample_others",
]

register_builtin_datasets(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
