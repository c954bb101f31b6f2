"""Detectron2's softmax (or sigmoid) box predictor, with fast top-k inference."""

import functools

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import fast_rcnn
from detectron2.structures import Instances
from torch import nn
from torch.nn import functional as F

from ...data.class_statistics import training_class_counts
from ...errors import ConfigError
from ...layers import BoxDeltas, fast_rcnn_inference_topk
from .build import ROI_BOX_PREDICTOR_REGISTRY

__all__ = ["FastRCNNOutputLayers", "NormalizedLinear"]


class NormalizedLinear(nn.Linear):
    """Cosine classifier: ``temperature * cos(weight_c, x) + bias_c`` for each class c.

    Without weight norms no class can win by the length of its weights, which the long tail
    distorts (Seesaw Loss, Wang et al., CVPR 2021, section 3.3, which normalises both sides).
    """

    def __init__(self, in_features: int, out_features: int, temperature: float) -> None:
        """As ``nn.Linear``, with bias; ``temperature`` must be above 0 (else ConfigError)."""
        if not temperature > 0:
            raise ConfigError(
                f"MODEL.ROI_BOX_PREDICTOR.TEMPERATURE must be above 0, found {temperature}"
            )
        super().__init__(in_features, out_features)
        self.temperature = temperature

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (R, C) of features (R, D)."""
        cosines = F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))
        return self.temperature * cosines + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature}"


@ROI_BOX_PREDICTOR_REGISTRY.register()
class FastRCNNOutputLayers(fast_rcnn.FastRCNNOutputLayers):
    """Detectron2's class of this name, with a choice of two classifier layers.

    ``inference`` differs in speed alone: it decodes the boxes of the best (RoI, class) pairs
    instead of all, and runs NMS among these.

    Attributes:
        classification_only: leave box regression out in training. For thousands of classes its
            4 K outputs cost several times the classifier, in vain where it is frozen.
    """

    classification_only = False

    @configurable
    def __init__(self, input_shape, *, temperature: float | None = None, **kwargs) -> None:
        """
        Args:
            temperature: None for a linear classifier, else that of a :class:`NormalizedLinear`.
        """
        super().__init__(input_shape, **kwargs)
        self.temperature = temperature
        if temperature is not None:
            self._replace_classifier(self.cls_score.out_features)

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        options = cfg.MODEL.ROI_BOX_PREDICTOR
        ret["temperature"] = options.TEMPERATURE if options.NORMALIZED else None
        ret["get_fed_loss_cls_weights"] = functools.partial(_federated_loss_weights, cfg)
        return ret

    def _replace_classifier(self, num_logits: int) -> None:
        """A new classifier layer of another width, drawn from N(0, 0.01) with bias 0."""
        num_features = self.cls_score.in_features
        if self.temperature is None:
            self.cls_score = nn.Linear(num_features, num_logits)
        else:
            self.cls_score = NormalizedLinear(num_features, num_logits, self.temperature)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.zeros_(self.cls_score.bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (R, C) and box deltas (R, 4 K or 4) of features (R, D) or (R, ...).

        In training with ``classification_only`` the deltas are zeros (R, 4).
        """
        if not (self.training and self.classification_only):
            return super().forward(x)
        x = x.flatten(start_dim=1)
        return self.cls_score(x), x.new_zeros(len(x), 4)

    def losses(
        self, predictions: tuple[torch.Tensor, torch.Tensor], proposals: list[Instances]
    ) -> dict[str, torch.Tensor]:
        """``loss_cls`` and, unless ``classification_only``, ``loss_box_reg``."""
        losses = super().losses(predictions, proposals)
        if self.classification_only:
            del losses["loss_box_reg"]
        return losses

    def get_fed_loss_classes(self, gt_classes, num_fed_loss_classes, num_classes, weight):
        """At most all classes, where the parent fails for fewer than it is to sample."""
        num_fed_loss_classes = min(num_fed_loss_classes, num_classes)
        return super().get_fed_loss_classes(gt_classes, num_fed_loss_classes, num_classes, weight)

    def box_reg_loss(self, proposal_boxes, gt_boxes, pred_deltas, gt_classes):
        """0 with ``classification_only``, which drops it from the losses."""
        if self.classification_only:
            return 0.0
        return super().box_reg_loss(proposal_boxes, gt_boxes, pred_deltas, gt_classes)

    def inference(
        self, predictions: tuple[torch.Tensor, torch.Tensor], proposals: list[Instances]
    ) -> tuple[list[Instances], list[torch.Tensor]]:
        """Detections and their RoIs, see :func:`bags_d2.layers.fast_rcnn_inference_topk`."""
        return fast_rcnn_inference_topk(
            self._boxes_to_decode(predictions, proposals),
            self.predict_probs(predictions, proposals),
            [p.image_size for p in proposals],
            self.test_score_thresh,
            self.test_nms_thresh,
            self.test_topk_per_image,
        )

    def __prepare_scriptable__(self):
        raise ConfigError(
            f"{type(self).__name__} cannot be scripted (scripting_with_instances); trace it: "
            "bags-d2 export, or detectron2.export.TracingAdapter."
        )

    def _boxes_to_decode(self, predictions, proposals) -> list[torch.Tensor | BoxDeltas]:
        # A subclass may decode in its own way, of which only the result is known.
        own_way = type(self).predict_boxes is not fast_rcnn.FastRCNNOutputLayers.predict_boxes
        if own_way or not isinstance(self.box2box_transform, Box2BoxTransform):
            return list(self.predict_boxes(predictions, proposals))
        deltas = predictions[1].split(num_rois(proposals))
        return [
            BoxDeltas(d, p.proposal_boxes.tensor, self.box2box_transform)
            for d, p in zip(deltas, proposals, strict=True)
        ]


def num_rois(proposals: list[Instances]) -> list[int]:
    """Number of proposals of each image; unlike ``len``, not a constant in a trace."""
    return [p.proposal_boxes.tensor.shape[0] for p in proposals]


def _federated_loss_weights(cfg: CfgNode) -> torch.Tensor:
    """How often federated loss samples each class (K,), for any data set.

    Detectron2 reads the image counts from metadata that it has for LVIS alone. Without the
    training set there is nothing to train on, and evaluation has no use for the weights.
    """
    try:
        counts = training_class_counts(cfg, by="images")
    except FileNotFoundError:
        counts = torch.ones(cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    return counts.float() ** cfg.MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER
