"""Detectron2's RoI heads with the classifier taken from a registry.

Both classes are their parent in everything but the box predictor, so that any classifier of
:data:`ROI_BOX_PREDICTOR_REGISTRY` serves Faster, Mask and Cascade R-CNN alike. As with the
parents, each can be built from a config or from explicit keyword arguments.

The private methods overridden here are where Detectron2's own heads differ from each other: the
public ``from_config`` and ``forward`` could only be replaced by copies.
"""

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, CascadeROIHeads, StandardROIHeads
from detectron2.structures import Instances
from torch import nn

from ..config import long_tail
from ..errors import ConfigError
from ..layers import fast_rcnn_inference_topk
from .box_predictors import build_box_predictor

__all__ = [
    "FrozenBranches",
    "LongTailCascadeROIHeads",
    "LongTailROIHeads",
    "box_stages",
    "class_probs_of_boxes",
]


class FrozenBranches:
    """RoI heads that can leave out, in training, branches that do not train.

    Attributes:
        frozen_branches: any of "mask" and "keypoint".
    """

    frozen_branches: frozenset[str] = frozenset()

    def _forward_mask(self, features, instances):
        if self.training and "mask" in self.frozen_branches:
            return {}
        return super()._forward_mask(features, instances)

    def _forward_keypoint(self, features, instances):
        if self.training and "keypoint" in self.frozen_branches:
            return {}
        return super()._forward_keypoint(features, instances)


@ROI_HEADS_REGISTRY.register()
class LongTailROIHeads(FrozenBranches, StandardROIHeads):
    """``StandardROIHeads`` with the box predictor of ``MODEL.ROI_BOX_PREDICTOR.NAME``."""

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(_with_minimal_predictor(cfg), input_shape)
        ret["box_predictor"] = build_box_predictor(cfg, ret["box_head"].output_shape)
        return ret


@ROI_HEADS_REGISTRY.register()
class LongTailCascadeROIHeads(FrozenBranches, CascadeROIHeads):
    """``CascadeROIHeads`` with the box predictors of ``MODEL.ROI_BOX_PREDICTOR.NAME``.

    At inference the stages are merged by averaging either their raw logits, which are then turned
    into probabilities once (as the authors of BAGS do), or their probabilities (as Detectron2
    does).
    """

    @configurable
    def __init__(self, *, average: str = "logits", **kwargs) -> None:
        """
        Args:
            average: "logits" or "probs"; ConfigError for another value.
            **kwargs: as for ``CascadeROIHeads``.
        """
        if average not in ("logits", "probs"):
            raise ConfigError(
                f"MODEL.LONG_TAIL.CASCADE_AVERAGE must be 'logits' or 'probs', found '{average}'"
            )
        super().__init__(**kwargs)
        self.average = average

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        ret["average"] = long_tail(cfg).CASCADE_AVERAGE
        return ret

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
            raise ConfigError(
                "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG is False, but a cascade's stages pass on "
                "one box of a RoI, whatever its class; set it to True."
            )
        ret = super()._init_box_head(_with_minimal_predictor(cfg), input_shape)
        weights_of_stages = cfg.MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS
        ret["box_predictors"] = [
            build_box_predictor(
                cfg, head.output_shape, box2box_transform=Box2BoxTransform(weights=weights)
            )
            for head, weights in zip(ret["box_heads"], weights_of_stages, strict=True)
        ]
        return ret

    def _forward_box(self, features, proposals, targets=None):
        if self.training:
            return super()._forward_box(features, proposals, targets)
        features = [features[f] for f in self.box_in_features]
        image_sizes = [p.image_size for p in proposals]
        outputs, boxes = [], None
        for stage, predictor in enumerate(self.box_predictor):
            if stage > 0:
                proposals = self._create_proposals_from_boxes(boxes, image_sizes)
            predictions = self._run_stage(features, proposals, stage)
            boxes = predictor.predict_boxes(predictions, proposals)
            outputs.append((predictor, predictions, proposals))
        instances, _ = fast_rcnn_inference_topk(
            boxes,
            self._average_scores(outputs),
            image_sizes,
            predictor.test_score_thresh,
            predictor.test_nms_thresh,
            predictor.test_topk_per_image,
        )
        return instances

    def _average_scores(self, outputs):
        """Scores (Ri, K + 1) of each image; a stage is (predictor, predictions, proposals)."""
        if self.average == "probs":
            probs = [predictor.predict_probs(*rest) for predictor, *rest in outputs]
            return [sum(p) * (1.0 / self.num_cascade_stages) for p in zip(*probs, strict=True)]
        mean_logits = sum(logits / self.num_cascade_stages for _, (logits, _), _ in outputs)
        predictor, (_, deltas), proposals = outputs[-1]
        return predictor.predict_probs((mean_logits, deltas), proposals)


def box_stages(heads: StandardROIHeads) -> list[tuple[nn.Module, nn.Module]]:
    """Box head and box predictor of each stage of a cascade, or the ones of other heads."""
    if isinstance(heads, CascadeROIHeads):
        return list(zip(heads.box_head, heads.box_predictor, strict=True))
    return [(heads.box_head, heads.box_predictor)]


def class_probs_of_boxes(
    heads: StandardROIHeads, features: dict[str, torch.Tensor], proposals: list[Instances]
) -> list[torch.Tensor]:
    """Scores (Ri, K or more), as at inference, of the very ``proposal_boxes`` of each image.

    A cascade looks at the same box in all stages.
    """
    features = [features[name] for name in heads.box_in_features]
    pooled = heads.box_pooler(features, [p.proposal_boxes for p in proposals])
    outputs = [
        (predictor, predictor(box_head(pooled)), proposals)
        for box_head, predictor in box_stages(heads)
    ]
    if isinstance(heads, LongTailCascadeROIHeads):
        return heads._average_scores(outputs)
    probs = [predictor.predict_probs(*rest) for predictor, *rest in outputs]
    return [sum(p) / len(outputs) for p in zip(*probs, strict=True)]


def _with_minimal_predictor(cfg: CfgNode) -> CfgNode:
    """A config whose stock box predictor, which the parent builds and this discards, costs nothing.

    Nor may it fail: federated loss would read the training set for it.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS = False
    cfg.MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE = False
    return cfg
