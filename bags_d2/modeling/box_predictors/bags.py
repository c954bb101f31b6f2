"""Balanced Group Softmax as a Detectron2 box predictor."""

import torch
from detectron2.config import configurable
from detectron2.utils.events import get_event_storage

from ...data.class_counts import training_class_counts
from ...errors import ConfigError
from ..class_groups import ClassGroups
from ..losses import group_softmax_loss, group_targets, merge_group_probs
from .build import ROI_BOX_PREDICTOR_REGISTRY
from .classifier import ClassifierOutputLayers, is_logging_step

__all__ = ["BAGSOutputLayers"]


@ROI_BOX_PREDICTOR_REGISTRY.register()
class BAGSOutputLayers(ClassifierOutputLayers):
    """Fast R-CNN output layers whose classifier is a softmax for each group of classes.

    ``forward`` returns grouped logits (R, C), C = K + G + 2, where Detectron2's class returns
    (R, K + 1).
    """

    @configurable
    def __init__(
        self, input_shape, *, groups: ClassGroups, others_sample_ratio: float = 8.0, **kwargs
    ) -> None:
        """
        Args:
            input_shape: shape of the box head's output (ShapeSpec).
            groups: the class groups; becomes a submodule, so that the checkpoint holds it.
            others_sample_ratio: beta, "others" RoIs for each foreground RoI of a group.
            **kwargs: as for ``ClassifierOutputLayers``.

        Raises:
            ConfigError: for options of Detectron2's class that have no meaning here, or if the
                groups are of another number of classes.
        """
        super().__init__(input_shape, num_logits=groups.num_logits, **kwargs)
        if groups.num_classes != self.num_classes:
            raise ConfigError(
                f"The class counts are of {groups.num_classes} classes but "
                f"MODEL.ROI_HEADS.NUM_CLASSES is {self.num_classes}; make them agree."
            )
        if not others_sample_ratio >= 0:
            raise ConfigError(
                f"MODEL.BAGS.OTHERS_SAMPLE_RATIO must be 0 or more, found {others_sample_ratio}"
            )
        self.groups = groups
        self.others_sample_ratio = others_sample_ratio
        # Of the last training step (G + 1,), to tell which group went wrong.
        self.last_group_losses: torch.Tensor | None = None

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        ret["groups"] = _groups_from_config(cfg)
        ret["others_sample_ratio"] = cfg.MODEL.BAGS.OTHERS_SAMPLE_RATIO
        return ret

    def classification_loss(self, logits: torch.Tensor, gt_classes: torch.Tensor) -> torch.Tensor:
        """Sum of the groups' losses (:func:`bags_d2.group_softmax_loss`)."""
        group_losses, used = self.group_losses(logits, gt_classes)
        self.last_group_losses = group_losses.detach()
        if is_logging_step() and gt_classes.numel():
            self._log_group_statistics(logits.detach(), gt_classes, group_losses.detach(), used)
        return group_losses.sum()

    def group_losses(
        self, logits: torch.Tensor, gt_classes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each group (G + 1,), and the RoIs that each used (G + 1, R)."""
        return group_softmax_loss(
            logits, gt_classes, self.groups, self.others_sample_ratio, return_used=True
        )

    def class_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """Merged class probabilities (:func:`bags_d2.merge_group_probs`)."""
        return merge_group_probs(logits, self.groups)

    @torch.no_grad()
    def _log_group_statistics(self, logits, gt_classes, group_losses, used) -> None:
        storage = get_event_storage()
        targets = group_targets(gt_classes, self.groups)
        predicted = torch.stack([p.argmax(dim=1) for p in logits.split(self.groups.widths, dim=1)])
        num_used = used.sum(dim=1)
        accuracy = ((predicted == targets) & used).sum(dim=1) / num_used.clamp(min=1)
        rows = torch.stack([group_losses.float(), accuracy, num_used.float()], dim=1).tolist()
        for i, (loss, correct, count) in enumerate(rows):
            storage.put_scalar(f"bags/loss_group{i}", loss)
            storage.put_scalar(f"bags/num_used_group{i}", count)
            if count > 0:  # an unused group has no accuracy, and 0 would read as a bad one
                storage.put_scalar(f"bags/accuracy_group{i}", correct)


def _groups_from_config(cfg) -> ClassGroups:
    thresholds = cfg.MODEL.BAGS.GROUP_THRESHOLDS
    try:
        counts = training_class_counts(cfg)
    except FileNotFoundError as error:
        # Not fatal here: the grouping may come with a checkpoint. Training and inference without
        # one raise with this reason.
        return ClassGroups.undetermined(cfg.MODEL.ROI_HEADS.NUM_CLASSES, thresholds, str(error))
    return ClassGroups.from_counts(counts, thresholds)
