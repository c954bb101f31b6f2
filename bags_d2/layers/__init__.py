"""Tensor operations that are not specific to a model."""

from .topk_nms import BoxDeltas, fast_rcnn_inference_topk

__all__ = ["BoxDeltas", "fast_rcnn_inference_topk"]
