"""Test-time augmentation with fast top-k detection."""

import torch
from detectron2 import modeling
from detectron2.structures import Instances

from ..layers import fast_rcnn_inference_topk

__all__ = ["GeneralizedRCNNWithTTA"]

# Detectron2's value: all that the augmented images yielded takes part.
SCORE_THRESH = 1e-8


class GeneralizedRCNNWithTTA(modeling.GeneralizedRCNNWithTTA):
    """Detectron2's class of this name; only how the views' detections are merged is faster."""

    # Private, but Detectron2 has no other place to choose the NMS.
    def _merge_detections(self, all_boxes, all_scores, all_classes, shape_hw) -> Instances:
        """One set of detections from N boxes (N, 4), scores and classes of all views."""
        num_classes = self.cfg.MODEL.ROI_HEADS.NUM_CLASSES
        scores = torch.zeros(len(all_boxes), num_classes + 1, device=all_boxes.device)
        if all_scores:
            rows = torch.arange(len(all_boxes), device=all_boxes.device)
            scores[rows, torch.stack(all_classes)] = torch.stack(all_scores).to(scores.dtype)
        (instances,), _ = fast_rcnn_inference_topk(
            [all_boxes],
            [scores],
            [shape_hw],
            SCORE_THRESH,
            self.cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
            self.cfg.TEST.DETECTIONS_PER_IMAGE,
        )
        return instances
