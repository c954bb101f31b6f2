"""Detectron2's softmax (or sigmoid) box predictor, with exact top-k inference."""

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import fast_rcnn
from detectron2.structures import Instances

from ..postprocessing import BoxDeltas, fast_rcnn_inference_topk
from .build import ROI_BOX_PREDICTOR_REGISTRY

__all__ = ["FastRCNNOutputLayers"]


@ROI_BOX_PREDICTOR_REGISTRY.register()
class FastRCNNOutputLayers(fast_rcnn.FastRCNNOutputLayers):
    """Detectron2's class of this name; derive box predictors from it.

    Only ``inference`` differs, in speed and not in its results: it decodes the boxes of the best
    (RoI, class) pairs instead of all, and runs NMS among these.
    """

    def inference(
        self, predictions: tuple[torch.Tensor, torch.Tensor], proposals: list[Instances]
    ) -> tuple[list[Instances], list[torch.Tensor]]:
        """
        Args:
            predictions: the return values of ``forward``.
            proposals: of each image, with ``proposal_boxes``.

        Returns:
            As :func:`bags_d2.modeling.postprocessing.fast_rcnn_inference_topk`.
        """
        return fast_rcnn_inference_topk(
            self._boxes_to_decode(predictions, proposals),
            self.predict_probs(predictions, proposals),
            [p.image_size for p in proposals],
            self.test_score_thresh,
            self.test_nms_thresh,
            self.test_topk_per_image,
        )

    def _boxes_to_decode(self, predictions, proposals) -> list[torch.Tensor | BoxDeltas]:
        # A subclass may decode in its own way, of which only the result can be taken.
        own_way = type(self).predict_boxes is not fast_rcnn.FastRCNNOutputLayers.predict_boxes
        if own_way or not isinstance(self.box2box_transform, Box2BoxTransform):
            return list(self.predict_boxes(predictions, proposals))
        deltas = predictions[1].split([len(p) for p in proposals])
        return [
            BoxDeltas(d, p.proposal_boxes.tensor, self.box2box_transform)
            for d, p in zip(deltas, proposals, strict=True)
        ]
