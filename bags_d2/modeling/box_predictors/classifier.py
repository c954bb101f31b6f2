"""What the long-tail classifiers have in common: everything but the loss and the probabilities.

Shapes in the files of this folder: R RoIs of the whole per-device batch, K foreground classes, C
logits. ``gt_classes`` hold 0..K-1 for foreground and K for background. Constructors take
``input_shape``, the ShapeSpec of the box head's output, and pass on ``**kwargs`` to the parent.
"""

import functools
import math

import torch
from detectron2.config import configurable
from detectron2.layers import cat, cross_entropy

# Private, but there is no other way to log what Detectron2 logs.
from detectron2.modeling.roi_heads.fast_rcnn import _log_classification_stats
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from ...data.class_statistics import training_class_counts
from ...errors import ConfigError
from ..class_groups import ClassCounts
from ..losses import at_least_float32
from .fast_rcnn import FastRCNNOutputLayers, num_rois

__all__ = ["ClassifierOutputLayers", "CountedOutputLayers", "SigmoidOutputLayers"]

# Training statistics are logged every this many iterations. Each logging waits for the device,
# and Detectron2's writers look at them no more often than that.
STATISTICS_PERIOD = 20


class ClassifierOutputLayers(FastRCNNOutputLayers):
    """Fast R-CNN output layers with a classifier of a subclass's own.

    A subclass says how many logits there are and overrides :meth:`classification_loss`,
    :meth:`class_probs` or both; as they are here, they are those of a softmax. Box regression,
    inference and everything around them are the parent's.
    """

    @configurable
    def __init__(self, input_shape, *, num_logits: int | None = None, **kwargs) -> None:
        """
        Args:
            num_logits: C; None is K + 1.

        Raises:
            ConfigError: for options of the parent's loss.
        """
        for option in ("use_sigmoid_ce", "use_fed_loss"):
            if kwargs.get(option):
                raise ConfigError(
                    f"{type(self).__name__} has a loss of its own and does not support "
                    f"MODEL.ROI_BOX_HEAD.{option.upper()}=True; set it to False or choose another "
                    "MODEL.ROI_BOX_PREDICTOR.NAME."
                )
        super().__init__(input_shape, **kwargs)
        if num_logits is not None and num_logits != self.cls_score.out_features:
            self._replace_classifier(num_logits)

    def classification_loss(self, logits: torch.Tensor, gt_classes: torch.Tensor) -> torch.Tensor:
        """The classifier's loss; here cross-entropy, mean over RoIs.

        Of logits (R, C) of any floating dtype and long labels (R,): a scalar, float32 at least; 0
        with the graph connected if R is 0.
        """
        return cross_entropy(at_least_float32(logits), gt_classes)

    def class_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """The scores (R, K + 1), float32 at least, background last; here a softmax."""
        return at_least_float32(logits).softmax(dim=1)

    def losses(
        self, predictions: tuple[torch.Tensor, torch.Tensor], proposals: list[Instances]
    ) -> dict[str, torch.Tensor]:
        """``loss_cls`` and, unless ``classification_only``, ``loss_box_reg``.

        Args:
            predictions: logits (R, C) and box deltas, the return values of ``forward``.
            proposals: sampled proposals of each image with ``gt_classes`` and ``gt_boxes``.
        """
        logits, proposal_deltas = predictions
        if len(proposals):
            gt_classes = cat([p.gt_classes for p in proposals], dim=0)
            proposal_boxes = cat([p.proposal_boxes.tensor for p in proposals], dim=0)
            # A proposal without gt_boxes is background, whose box takes no part in the loss.
            gt_boxes = cat(
                [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals],
                dim=0,
            )
        else:
            gt_classes = torch.empty(0, dtype=torch.long, device=logits.device)
            proposal_boxes = gt_boxes = logits.new_empty((0, 4))

        if is_logging_step() and gt_classes.numel():
            with torch.no_grad():
                _log_classification_stats(self.class_probs(logits), gt_classes)
        losses = {"loss_cls": self.classification_loss(logits, gt_classes)}
        if not self.classification_only:
            losses["loss_box_reg"] = self.box_reg_loss(
                proposal_boxes, gt_boxes, proposal_deltas, gt_classes
            )
        return {k: v * self.loss_weight.get(k, 1.0) for k, v in losses.items()}

    def predict_probs(
        self, predictions: tuple[torch.Tensor, torch.Tensor], proposals: list[Instances]
    ) -> list[torch.Tensor]:
        """Scores (Ri, K + 1) of each image, background last."""
        logits, _ = predictions
        return list(self.class_probs(logits).split(num_rois(proposals)))


class SigmoidOutputLayers(ClassifierOutputLayers):
    """One sigmoid for each logit. As it is, C = K: a background RoI is negative for every class."""

    # Probability of each class for a new classifier (focal loss, Lin et al., section 4.1,
    # "Initialization"; others do not give theirs). Without it the R x K negatives of the first
    # batches would drown the few positives.
    PRIOR = 0.01

    @configurable
    def __init__(self, input_shape, *, num_classes: int, num_logits: int | None = None, **kwargs):
        num_logits = num_classes if num_logits is None else num_logits
        super().__init__(input_shape, num_classes=num_classes, num_logits=num_logits, **kwargs)
        nn.init.constant_(self.cls_score.bias, -math.log((1 - self.PRIOR) / self.PRIOR))

    def class_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """A sigmoid for each class.

        Background is given what the best class leaves, ``1 - max_c p_c``. Training statistics look
        at it; inference drops it.
        """
        probs = at_least_float32(logits).sigmoid()
        return torch.cat([probs, 1 - probs.amax(dim=1, keepdim=True)], dim=1)


class CountedOutputLayers(ClassifierOutputLayers):
    """A classifier whose loss or scores depend on the training counts of the classes."""

    @configurable
    def __init__(self, input_shape, *, counts: ClassCounts, **kwargs) -> None:
        """
        Args:
            counts: of K classes; becomes a submodule, so that the checkpoint holds it.
        """
        super().__init__(input_shape, **kwargs)
        counts.require_classes(self.num_classes)
        self.counts = counts

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        read_counts = functools.partial(training_class_counts, cfg)
        ret["counts"] = ClassCounts.from_source(read_counts, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
        return ret

    @property
    def class_counts(self) -> torch.Tensor:
        """Long tensor (K,); ConfigError if neither the data nor a checkpoint had the counts."""
        self.counts.require_determined()
        return self.counts.class_counts


def require_non_negative(key: str, value: float) -> None:
    """Raise ConfigError for a number below 0, or none."""
    if not value >= 0:
        raise ConfigError(f"{key} must be 0 or more, found {value}.")


def one_hot_targets(gt_classes: torch.Tensor, num_columns: int) -> torch.Tensor:
    """Targets of one sigmoid for each column, long (R, num_columns).

    Of K columns background is negative for all; of K + 1 it has the last.
    """
    columns = torch.arange(num_columns, device=gt_classes.device)
    return (gt_classes[:, None] == columns).long()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all processes, so that what a loss accumulates is the same in each."""
    if comm.get_world_size() > 1:
        tensor = tensor.clone(memory_format=torch.contiguous_format)  # all_reduce ignores strides
        torch.distributed.all_reduce(tensor)
    return tensor


def is_logging_step() -> bool:
    """Whether training statistics are to be logged now; needs an EventStorage."""
    return get_event_storage().iter % STATISTICS_PERIOD == 0
