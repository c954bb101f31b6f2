"""Train a part of a model: chosen by names, with the rest frozen and left out where it can be."""

import fnmatch
import logging
from collections.abc import Sequence

from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from torch import nn

from ..errors import ConfigError
from ..modeling.box_predictors import FastRCNNOutputLayers
from ..modeling.roi_heads import FrozenBranches

__all__ = ["freeze_norm_statistics", "select_trainable_params", "skip_frozen_parts"]

logger = logging.getLogger(__name__)


def select_trainable_params(model: nn.Module, globs: Sequence[str]) -> list[str]:
    """Freeze every parameter whose name no glob matches; () leaves the model alone.

    What the model itself has frozen (``MODEL.BACKBONE.FREEZE_AT``) stays frozen.

    Returns:
        Names of the parameters that train.

    Raises:
        ConfigError: if a glob matches nothing that can be trained.
    """
    parameters = dict(model.named_parameters())
    names = [name for name, p in parameters.items() if p.requires_grad]
    if not globs:
        return names
    selected = set()
    for glob in globs:
        if not isinstance(glob, str):
            raise ConfigError(
                f"MODEL.TRAINABLE_PARAMS must hold names with wildcards, found {glob!r}."
            )
        matches = fnmatch.filter(names, glob)
        if not matches:
            raise ConfigError(
                f"MODEL.TRAINABLE_PARAMS: '{glob}' matches no trainable parameter; names look like "
                f"'{names[-1] if names else '(the model has none)'}'."
            )
        selected.update(matches)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in selected)
    trainable = [name for name in names if name in selected]
    logger.info(
        "Training %s of %s parameters (MODEL.TRAINABLE_PARAMS): %s",
        f"{sum(parameters[n].numel() for n in trainable):,}",
        f"{sum(p.numel() for p in parameters.values()):,}",
        ", ".join(f"{n} ({parameters[n].numel():,})" for n in trainable),
    )
    return trainable


def freeze_norm_statistics(model: nn.Module) -> None:
    """Turn BatchNorm layers without a trainable parameter into ``FrozenBatchNorm2d``, in place.

    Otherwise their running statistics would follow the training data, and a frozen trunk would
    drift. Names in the checkpoint stay the same.
    """
    for name, child in model.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and not _trains(child):
            setattr(model, name, FrozenBatchNorm2d.convert_frozen_batchnorm(child))
        else:
            freeze_norm_statistics(child)


def skip_frozen_parts(model: nn.Module) -> list[str]:
    """Let a model in training mode skip the parts whose losses have no gradient, in place.

    When the classifier alone trains, Detectron2 still runs the mask head and computes the losses of
    RPN, boxes and masks. What is skipped draws no random numbers, so the trainable parameters go
    the same way without it. Parts of unknown classes are left alone, and so is all of a model whose
    backbone trains, since every loss reaches that.

    Returns:
        What is skipped, in words.
    """
    if not isinstance(model, GeneralizedRCNN) or _trains(model.backbone):
        return []
    rpn, heads = model.proposal_generator, model.roi_heads
    skipped = []
    if isinstance(rpn, RPN) and not _trains(rpn):
        # Labelling and sampling of anchors stay: they draw random numbers, and cost little.
        rpn.losses = _no_losses
        skipped.append("RPN losses")
    if isinstance(heads, StandardROIHeads) and _regression_is_frozen(heads):
        heads.box_predictor.classification_only = True
        skipped.append("box regression")
    if isinstance(heads, FrozenBranches):
        for branch in ("mask", "keypoint"):
            if getattr(heads, f"{branch}_on") and not _trains(getattr(heads, f"{branch}_head")):
                heads.frozen_branches |= {branch}
                skipped.append(f"{branch} head")
    if skipped:
        logger.info(
            "Skipped in training, since no trainable parameter depends on it: %s "
            "(MODEL.SKIP_FROZEN)",
            ", ".join(skipped),
        )
    return skipped


def _regression_is_frozen(heads: StandardROIHeads) -> bool:
    # A cascade's stages refine the boxes of the next, and some heads train on predicted boxes.
    if isinstance(heads, CascadeROIHeads) or heads.train_on_pred_boxes:
        return False
    predictor = heads.box_predictor
    known = isinstance(predictor, FastRCNNOutputLayers)
    return known and not (_trains(heads.box_head) or _trains(predictor.bbox_pred))


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _no_losses(*_) -> dict:
    return {}  # a function of the module, so that the model can be copied and pickled
