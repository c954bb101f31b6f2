"""Nearest class mean: foreground classes told apart by their mean features."""

import torch
from detectron2.config import configurable
from torch.nn import functional as F

from ...errors import ConfigError, DataError
from ..losses import at_least_float32
from .build import ROI_BOX_PREDICTOR_REGISTRY
from .classifier import ClassifierOutputLayers

__all__ = ["NearestMeanOutputLayers"]


@ROI_BOX_PREDICTOR_REGISTRY.register()
class NearestMeanOutputLayers(ClassifierOutputLayers):
    """A softmax detector's P(foreground) times a softmax over cosines with class means.

    ``p_c = (1 - softmax(z)_bg) * softmax_c(t cos(x, m_c))`` with ``m_c`` the mean of the box
    features of the training RoIs of class c (nearest class mean; Kang et al., ICLR 2020, section
    4). Kang et al. classify; BAGS reports it for detection (published: 16.02 AP with the box
    head's features, against 20.98) without saying how background is distinguished, or how
    distances become scores. Here the detector's own softmax distinguishes it, distances are
    cosines, and t is ``MODEL.ROI_BOX_PREDICTOR.TEMPERATURE``. A class without training RoIs
    scores 0.

    The means come from cached features (``bags-d2 fit``), not from training.
    ``forward`` returns K + 1 softmax logits followed by K scaled cosines.
    """

    @configurable
    def __init__(self, input_shape, *, mean_temperature: float = 20.0, **kwargs) -> None:
        """
        Args:
            mean_temperature: t, above 0.
        """
        super().__init__(input_shape, **kwargs)
        self.mean_temperature = mean_temperature
        shape = (self.num_classes, self.cls_score.in_features)
        self.register_buffer("class_means", torch.zeros(shape))

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        ret["mean_temperature"] = cfg.MODEL.ROI_BOX_PREDICTOR.TEMPERATURE
        return ret

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (R, 2 K + 1) and box deltas of features (R, D)."""
        logits, proposal_deltas = super().forward(x)
        features = F.normalize(x.flatten(start_dim=1), dim=1)
        means = F.normalize(self.class_means, dim=1)
        cosines = features @ means.t().to(features.dtype)
        return torch.cat([logits, self.mean_temperature * cosines], dim=1), proposal_deltas

    def classification_loss(self, logits: torch.Tensor, gt_classes: torch.Tensor) -> torch.Tensor:
        """Raises ConfigError: there is nothing to train."""
        raise ConfigError(
            "NearestMeanOutputLayers is not trained: fit it with bags-d2 fit, or "
            "choose another MODEL.ROI_BOX_PREDICTOR.NAME."
        )

    def class_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """P(foreground) times the softmax over cosines; the last column is P(background)."""
        known = self.class_means.abs().amax(dim=1) > 0  # any() exports to ONNX wrongly
        if not known.any():
            raise ConfigError(
                "The checkpoint (MODEL.WEIGHTS) has no class means; fit them with bags-d2 fit."
            )
        softmax, cosines = at_least_float32(logits).split(
            [self.num_classes + 1, self.num_classes], dim=1
        )
        background = softmax.softmax(dim=1)[:, -1:]
        nearest = cosines.masked_fill(~known, -torch.inf).softmax(dim=1)
        return torch.cat([nearest * (1 - background), background], dim=1)

    @torch.no_grad()
    def fit_features(self, batches) -> None:
        """Take the class means of cached features.

        Args:
            batches: features (R, D) and labels (R,) of all training RoIs, a part at a time.

        Raises:
            DataError: if no RoI is foreground.
        """
        sums = torch.zeros(self.class_means.shape, dtype=torch.float64)  # of millions of RoIs
        counts = torch.zeros(self.num_classes, dtype=torch.long)
        for features, labels in batches:
            # Without background, most of the RoIs: their copy in float64 would take gigabytes.
            foreground = labels < self.num_classes
            labels = labels[foreground]
            sums.index_add_(0, labels, features[foreground].double())
            counts += labels.bincount(minlength=self.num_classes)
        if not counts.any():
            raise DataError("The feature cache has no foreground RoI to take class means of.")
        self.class_means.copy_(sums / counts[:, None].clamp(min=1))
