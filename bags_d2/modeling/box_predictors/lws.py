"""Learnable weight scaling of a softmax classifier that is otherwise kept."""

import torch
from detectron2.config import configurable
from torch import nn

from .build import ROI_BOX_PREDICTOR_REGISTRY
from .classifier import ClassifierOutputLayers

__all__ = ["LWSOutputLayers"]


@ROI_BOX_PREDICTOR_REGISTRY.register()
class LWSOutputLayers(ClassifierOutputLayers):
    """Softmax over ``f_c (w_c . x + b_c)``, of which only the scales f are to be learned.

    Learnable weight scaling (LWS; Kang et al., ICLR 2020, section 4): the directions of a trained
    softmax classifier are taken to be right and their lengths to be distorted by the long tail.
    The paper's formula ``f_c w_c`` has no bias; as in its authors' code, f scales the whole logit.
    Background has a scale like any class.

    To be initialised from a softmax detector and trained with ``MODEL.TRAINABLE_PARAMS:
    ("roi_heads.box_predictor*scale",)``, which keeps ``cls_score`` fixed. The scales start at 1,
    where this is the softmax detector itself. The authors learn them from class-balanced samples;
    a detector has the images of ``DATALOADER.SAMPLER_TRAIN`` and their RoIs instead.
    """

    @configurable
    def __init__(self, input_shape, **kwargs) -> None:
        super().__init__(input_shape, **kwargs)
        self.scale = nn.Parameter(torch.ones(self.cls_score.out_features))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled logits (R, K + 1) and box deltas of features (R, D)."""
        logits, proposal_deltas = super().forward(x)
        return self.scale * logits, proposal_deltas
