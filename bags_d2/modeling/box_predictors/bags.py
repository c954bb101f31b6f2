"""Balanced Group Softmax as a Detectron2 box predictor."""

import torch
from detectron2.config import configurable
from detectron2.layers import cat
from detectron2.modeling.roi_heads.fast_rcnn import _log_classification_stats
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import nn

from ...data.class_counts import training_class_counts
from ...errors import ConfigError
from ..groups import ClassGroups
from ..losses import group_softmax_loss, group_targets, merge_group_probs
from .build import ROI_BOX_PREDICTOR_REGISTRY
from .fast_rcnn import FastRCNNOutputLayers

__all__ = ["BAGSOutputLayers"]

# Training statistics are logged every this many iterations. Each logging waits for the device,
# and Detectron2's writers look at them no more often than that.
STATISTICS_PERIOD = 20


@ROI_BOX_PREDICTOR_REGISTRY.register()
class BAGSOutputLayers(FastRCNNOutputLayers):
    """Fast R-CNN output layers whose classifier is a softmax for each group of classes.

    Box regression, inference and everything around them are the parent's; ``forward`` returns
    grouped logits (R, C) where the parent returns (R, K + 1).
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
            **kwargs: as for ``FastRCNNOutputLayers``.

        Raises:
            ConfigError: for options of the parent that have no meaning here, or if the groups
                are of another number of classes.
        """
        for option, key in (
            ("use_sigmoid_ce", "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE"),
            ("use_fed_loss", "MODEL.ROI_BOX_HEAD.USE_FED_LOSS"),
        ):
            if kwargs.get(option):
                raise ConfigError(
                    f"BAGSOutputLayers is a softmax classifier and does not support {key}=True; "
                    "set it to False or choose another MODEL.ROI_BOX_PREDICTOR.NAME."
                )
        super().__init__(input_shape, **kwargs)
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
        self.cls_score = nn.Linear(self.cls_score.in_features, groups.num_logits)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.zeros_(self.cls_score.bias)

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        ret["groups"] = _groups_from_config(cfg)
        ret["others_sample_ratio"] = cfg.MODEL.BAGS.OTHERS_SAMPLE_RATIO
        return ret

    def losses(
        self, predictions: tuple[torch.Tensor, torch.Tensor], proposals: list[Instances]
    ) -> dict[str, torch.Tensor]:
        """As the parent's; ``loss_cls`` is the sum of the groups' losses.

        Args:
            predictions: logits (R, C) and box deltas, the return values of ``forward``.
            proposals: sampled proposals of each image with ``gt_classes`` and ``gt_boxes``.

        Returns:
            ``loss_cls`` and ``loss_box_reg``, scalars.
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

        group_losses, used = group_softmax_loss(
            logits, gt_classes, self.groups, self.others_sample_ratio, return_used=True
        )
        self._log_statistics(logits.detach(), gt_classes, group_losses.detach(), used)
        losses = {
            "loss_cls": group_losses.sum(),
            "loss_box_reg": self.box_reg_loss(
                proposal_boxes, gt_boxes, proposal_deltas, gt_classes
            ),
        }
        return {k: v * self.loss_weight.get(k, 1.0) for k, v in losses.items()}

    def predict_probs(
        self, predictions: tuple[torch.Tensor, torch.Tensor], proposals: list[Instances]
    ) -> list[torch.Tensor]:
        """Merged class probabilities.

        Args:
            predictions: logits (R, C) and box deltas.
            proposals: the proposals of each image, Ri of image i.

        Returns:
            For each image a tensor (Ri, K + 1), background last.
        """
        logits, _ = predictions
        return list(merge_group_probs(logits, self.groups).split([len(p) for p in proposals]))

    @torch.no_grad()
    def _log_statistics(self, logits, gt_classes, group_losses, used) -> None:
        storage = get_event_storage()
        if storage.iter % STATISTICS_PERIOD != 0 or gt_classes.numel() == 0:
            return
        # The parent's statistics want class scores with background last, not grouped logits.
        _log_classification_stats(merge_group_probs(logits, self.groups), gt_classes)
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
