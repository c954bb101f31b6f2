"""Balanced Group Softmax as a Detectron2 box predictor."""

import functools

import torch
from detectron2.config import configurable
from detectron2.utils.events import get_event_storage

from ...data.class_statistics import training_class_counts
from ..class_groups import ClassGroups
from ..losses import MERGES, check_merge, group_softmax_loss, group_targets, merge_group_probs
from .build import ROI_BOX_PREDICTOR_REGISTRY
from .classifier import ClassifierOutputLayers, is_logging_step, require_non_negative

__all__ = ["BAGSOutputLayers"]


@ROI_BOX_PREDICTOR_REGISTRY.register()
class BAGSOutputLayers(ClassifierOutputLayers):
    """Fast R-CNN output layers whose classifier is a softmax for each group of classes.

    ``forward`` returns grouped logits (R, C), C = K + G + 2, where Detectron2's class returns
    (R, K + 1).
    """

    # Ways of merging the groups that make sense for this classifier.
    merges = MERGES

    @configurable
    def __init__(
        self,
        input_shape,
        *,
        groups: ClassGroups,
        others_sample_ratio: float = 8.0,
        merge: str = "paper",
        **kwargs,
    ) -> None:
        """
        Args:
            groups: the class groups; becomes a submodule, so that the checkpoint holds it.
            others_sample_ratio: beta, "others" RoIs for each foreground RoI of a group.
            merge: how probabilities are merged, see :func:`bags_d2.merge_group_probs`.
        """
        super().__init__(input_shape, num_logits=groups.num_logits, **kwargs)
        groups.require_classes(self.num_classes)
        require_non_negative("MODEL.BAGS.OTHERS_SAMPLE_RATIO", others_sample_ratio)
        check_merge(merge, self.merges)
        self.groups = groups
        self.others_sample_ratio = others_sample_ratio
        self.merge = merge
        # Of the last training step (G + 1,), to tell which group went wrong.
        self.last_group_losses: torch.Tensor | None = None

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        options = cfg.MODEL.BAGS
        ret["groups"] = ClassGroups.from_source(
            functools.partial(training_class_counts, cfg),
            cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            options.GROUP_THRESHOLDS,
        )
        ret.update(others_sample_ratio=options.OTHERS_SAMPLE_RATIO, merge=options.MERGE)
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
        return merge_group_probs(logits, self.groups, self.merge)

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
