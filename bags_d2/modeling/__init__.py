"""Class groups, losses, box predictors and RoI heads.

Groups and losses need torch alone; the first use of another name registers what this package adds
to Detectron2's registries.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

_TORCH_ONLY = (".class_groups", ".losses")
_OTHERS = (".box_predictors", ".roi_heads", "..layers")


def __getattr__(name: str):
    for homes in (_TORCH_ONLY, _OTHERS) if name in __all__ else ():
        for module in [importlib.import_module(home, __name__) for home in homes]:
            globals().update({n: getattr(module, n) for n in __all__ if hasattr(module, n)})
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
