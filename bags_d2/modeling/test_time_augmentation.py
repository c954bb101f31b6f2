"""Test-time augmentation with exact top-k detection."""

import torch
from detectron2 import modeling
from detectron2.structures import Instances

from ..layers import fast_rcnn_inference_topk

__all__ = ["GeneralizedRCNNWithTTA"]

# The value that Detectron2 uses: all that the augmented images yielded takes part.
SCORE_THRESH = 1e-8


class GeneralizedRCNNWithTTA(modeling.GeneralizedRCNNWithTTA):
    """Detectron2's class of this name; only how the views' detections are merged is faster."""

    def _merge_detections(
        self,
        all_boxes: torch.Tensor,
        all_scores: list[torch.Tensor],
        all_classes: list[torch.Tensor],
        shape_hw: tuple[int, int],
    ) -> Instances:
        """One set of detections from those of all views.

        Args:
            all_boxes: (N, 4), XYXY in pixels of the original image.
            all_scores: N scalars.
            all_classes: N scalars.
            shape_hw: height and width of the original image in pixels.
        """
        num_classes = self.cfg.MODEL.ROI_HEADS.NUM_CLASSES
        scores = torch.zeros(len(all_boxes), num_classes + 1, device=all_boxes.device)
        if all_scores:
            rows = torch.arange(len(all_boxes), device=all_boxes.device)
            scores[rows, torch.stack(all_classes)] = torch.stack(all_scores).to(scores.dtype)
        instances, _ = fast_rcnn_inference_topk(
            [all_boxes],
            [scores],
            [shape_hw],
            SCORE_THRESH,
            self.cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
            self.cfg.TEST.DETECTIONS_PER_IMAGE,
        )
        return instances[0]
