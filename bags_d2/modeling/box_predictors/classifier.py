"""What the long-tail classifiers have in common: everything but the loss and the probabilities.

Shapes in the files of this folder: R RoIs of the whole per-device batch, K foreground classes, C
logits. ``gt_classes`` hold 0..K-1 for foreground and K for background.
"""

from abc import abstractmethod

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import cat
from detectron2.modeling.roi_heads.fast_rcnn import _log_classification_stats
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from ...data.class_counts import training_class_counts
from ...errors import ConfigError
from ..class_counts import ClassCounts
from .fast_rcnn import FastRCNNOutputLayers

__all__ = ["ClassifierOutputLayers", "CountedOutputLayers"]

# Training statistics are logged every this many iterations. Each logging waits for the device,
# and Detectron2's writers look at them no more often than that.
STATISTICS_PERIOD = 20


class ClassifierOutputLayers(FastRCNNOutputLayers):
    """Fast R-CNN output layers with a classifier of a subclass's own.

    A subclass says how many logits there are and overrides :meth:`classification_loss` and
    :meth:`class_probs`. Box regression, inference and everything around them are the parent's.
    """

    @configurable
    def __init__(self, input_shape, *, num_logits: int | None = None, **kwargs) -> None:
        """
        Args:
            input_shape: shape of the box head's output (ShapeSpec).
            num_logits: C; None is K + 1.
            **kwargs: as for ``FastRCNNOutputLayers``.

        Raises:
            ConfigError: for options of the parent's loss, which is not used here.
        """
        for option, key in (
            ("use_sigmoid_ce", "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE"),
            ("use_fed_loss", "MODEL.ROI_BOX_HEAD.USE_FED_LOSS"),
        ):
            if kwargs.get(option):
                raise ConfigError(
                    f"{type(self).__name__} has a loss of its own and does not support {key}=True; "
                    "set it to False or choose another MODEL.ROI_BOX_PREDICTOR.NAME."
                )
        super().__init__(input_shape, **kwargs)
        if num_logits is not None and num_logits != self.cls_score.out_features:
            self._replace_classifier(num_logits)

    @abstractmethod
    def classification_loss(self, logits: torch.Tensor, gt_classes: torch.Tensor) -> torch.Tensor:
        """The loss of the classifier.

        Args:
            logits: (R, C), any floating dtype.
            gt_classes: long tensor (R,), 0..K.

        Returns:
            Scalar, float32 at least; 0 with the graph connected if R is 0.
        """

    @abstractmethod
    def class_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores of the classes.

        Args:
            logits: (R, C), any floating dtype.

        Returns:
            Tensor (R, K + 1), float32 at least, background last.
        """

    def losses(
        self, predictions: tuple[torch.Tensor, torch.Tensor], proposals: list[Instances]
    ) -> dict[str, torch.Tensor]:
        """As the parent's, with ``loss_cls`` from :meth:`classification_loss`.

        Args:
            predictions: logits (R, C) and box deltas, the return values of ``forward``.
            proposals: sampled proposals of each image with ``gt_classes`` and ``gt_boxes``.

        Returns:
            ``loss_cls`` and, unless ``classification_only``, ``loss_box_reg``, scalars.
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
        """
        Args:
            predictions: logits (R, C) and box deltas.
            proposals: the proposals of each image, Ri of image i.

        Returns:
            For each image a tensor (Ri, K + 1), background last.
        """
        logits, _ = predictions
        return list(self.class_probs(logits).split([len(p) for p in proposals]))


class CountedOutputLayers(ClassifierOutputLayers):
    """A classifier whose loss or scores depend on the training counts of the classes.

    Subclasses read ``self.counts.class_counts``, long (K,), after
    ``self.counts.require_determined()``.
    """

    @configurable
    def __init__(self, input_shape, *, counts: ClassCounts, **kwargs) -> None:
        """
        Args:
            input_shape: shape of the box head's output (ShapeSpec).
            counts: training counts; becomes a submodule, so that the checkpoint holds it.
            **kwargs: as for ``ClassifierOutputLayers``.

        Raises:
            ConfigError: if the counts are of another number of classes.
        """
        super().__init__(input_shape, **kwargs)
        if counts.num_classes != self.num_classes:
            raise ConfigError(
                f"The class counts are of {counts.num_classes} classes but "
                f"MODEL.ROI_HEADS.NUM_CLASSES is {self.num_classes}; make them agree."
            )
        self.counts = counts

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        ret["counts"] = cls.counts_from_config(cfg)
        return ret

    @classmethod
    def counts_from_config(cls, cfg: CfgNode, by: str | None = None) -> ClassCounts:
        """Counts by ``MODEL.BAGS.COUNT_BY`` or, where a method prescribes it, by one of the two.

        Where the annotations do not exist they may come with a checkpoint; so that is an error
        for training and not here.
        """
        try:
            return ClassCounts(training_class_counts(cfg, by))
        except FileNotFoundError as error:
            return ClassCounts.undetermined(cfg.MODEL.ROI_HEADS.NUM_CLASSES, str(error))


def one_hot_targets(gt_classes: torch.Tensor, num_columns: int) -> torch.Tensor:
    """Targets of one sigmoid for each column.

    Args:
        gt_classes: long tensor (R,), 0..K.
        num_columns: K, where background is negative for all, or K + 1, where it has the last.

    Returns:
        Long tensor (R, num_columns).
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
