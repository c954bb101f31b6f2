"""Leave out of training steps what reaches no trainable parameter.

When the classifier alone trains, Detectron2 still runs the mask head and computes the losses of
RPN, boxes and masks, none of which has a gradient. What is left out draws no random numbers, so
the trainable parameters go the same way as with it.
"""

import logging

from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from torch import nn

from ..modeling.box_predictors import FastRCNNOutputLayers
from ..modeling.roi_heads import FrozenBranches

__all__ = ["skip_frozen_parts"]

logger = logging.getLogger(__name__)


def skip_frozen_parts(model: nn.Module) -> list[str]:
    """Let a model in training mode skip the parts whose losses have no gradient.

    Evaluation, the parameters and their names stay as they are. Parts of unknown classes are left
    alone, and so is all of a model whose backbone trains, since every loss reaches that.

    Args:
        model: the model, with ``requires_grad`` set; changed in place.

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
    return {}
