"""Long-tailed object detection on Detectron2: Balanced Group Softmax and its peers.

The groups and their loss need torch alone. The first use of any other name of this package imports
the rest, which registers its RoI heads, box predictors and data sets with Detectron2.
"""

import importlib
from typing import TYPE_CHECKING

from .errors import BagsError, ConfigError, DataError, MissingFileError

if TYPE_CHECKING:
    from .config import add_bags_config
    from .engine import BAGSTrainer, LongTailPredictor
    from .modeling.box_predictors import (
        ROI_BOX_PREDICTOR_REGISTRY,
        BAGSOutputLayers,
        build_box_predictor,
    )
    from .modeling.class_groups import ClassGroups
    from .modeling.losses import group_softmax_loss, merge_group_probs, sample_others
    from .modeling.roi_heads import LongTailCascadeROIHeads, LongTailROIHeads

__version__ = "0.7.0"

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

_TORCH_ONLY = {"ClassGroups", "group_softmax_loss", "merge_group_probs", "sample_others"}
_HOMES = {"add_bags_config": ".config", "BAGSTrainer": ".engine", "LongTailPredictor": ".engine"}


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _TORCH_ONLY:
        _register()
    home = importlib.import_module(_HOMES.get(name, ".modeling"), __name__)
    globals()[name] = getattr(home, name)
    return globals()[name]


def _register() -> None:
    """Import all that registers itself with Detectron2."""
    try:
        importlib.import_module(".engine", __name__)
    except ModuleNotFoundError as error:
        if error.name != "detectron2":
            raise
        raise ModuleNotFoundError(
            "bags_d2 needs detectron2: install the official build, or ./third_party/detectron2 of "
            "this project (README, section Installation).",
            name="detectron2",
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
