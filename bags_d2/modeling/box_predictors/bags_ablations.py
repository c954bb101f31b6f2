"""What Balanced Group Softmax is without each of its parts (Li et al., CVPR 2020, section 5.4).

The logit layout is that of the whole method, so that its checkpoints and tools serve these too;
columns that a variant does without are there and unused.
"""

import torch
from detectron2.config import configurable

from ..class_groups import ClassGroups
from ..losses import at_least_float32, group_cross_entropy, group_targets
from .bags import BAGSOutputLayers
from .build import ROI_BOX_PREDICTOR_REGISTRY

__all__ = [
    "BAGSWithoutBackgroundGroupOutputLayers",
    "BAGSWithoutOthersOutputLayers",
    "ReweightedBAGSOutputLayers",
]


@ROI_BOX_PREDICTOR_REGISTRY.register()
class BAGSWithoutBackgroundGroupOutputLayers(BAGSOutputLayers):
    """BAGS without group 0: only each group's "others" distinguishes background.

    Scores are each group's softmax, unscaled: ``p_c = softmax(z_g)_c``. The background's, which
    only statistics look at, is the smallest P("others") of any group.
    """

    merges = ("paper",)

    def group_losses(self, logits, gt_classes):
        losses, used = super().group_losses(logits, gt_classes)
        return torch.cat([losses[:1] * 0.0, losses[1:]]), used

    def class_probs(self, logits):
        parts = [p.softmax(dim=1) for p in at_least_float32(logits).split(self.groups.widths, 1)]
        class_probs = torch.cat(parts, dim=1).index_select(1, self.groups.class_to_column)
        others = torch.stack([part[:, 0] for part in parts[1:]]).amin(dim=0)
        return torch.cat([class_probs, others[:, None]], dim=1)


@ROI_BOX_PREDICTOR_REGISTRY.register()
class BAGSWithoutOthersOutputLayers(BAGSOutputLayers):
    """BAGS without "others": a group's softmax goes over its classes, and sees only their RoIs.

    So a group has to prefer one of its classes for any RoI, and P(foreground) alone tells whether
    it is an object. ``MODEL.BAGS.OTHERS_SAMPLE_RATIO`` has no effect.
    """

    merges = ("paper",)

    @configurable
    def __init__(self, input_shape, *, others_sample_ratio: float = 0.0, **kwargs) -> None:
        super().__init__(input_shape, others_sample_ratio=0.0, **kwargs)

    def group_losses(self, logits, gt_classes):
        return super().group_losses(_without_others(logits, self.groups), gt_classes)

    def class_probs(self, logits):
        return super().class_probs(_without_others(logits, self.groups))


@ROI_BOX_PREDICTOR_REGISTRY.register()
class ReweightedBAGSOutputLayers(BAGSOutputLayers):
    """BAGS whose groups weigh their classes inversely to the training counts.

    Within a group, class c has the weight ``1 / n_c``, scaled to a mean of 1 over the group and
    clipped as in ``ReweightedOutputLayers``; "others" and group 0 have the weight 1. The paper
    does not say how its in-group re-weighting is normalised; this is the rule of its softmax with
    re-weighting, applied to each group.
    """

    @configurable
    def __init__(self, input_shape, *, clip: tuple[float, float] = (0.1, 5.0), **kwargs) -> None:
        """
        Args:
            clip: least and largest weight.
        """
        super().__init__(input_shape, **kwargs)
        self.clip = clip

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        ret["clip"] = tuple(cfg.MODEL.REWEIGHT.CLIP)
        return ret

    def group_losses(self, logits, gt_classes):
        _, used = super().group_losses(logits.detach(), gt_classes)
        targets = group_targets(gt_classes, self.groups)
        weights = group_weights(self.groups, self.clip)
        logits = at_least_float32(logits)
        return group_cross_entropy(logits, targets, used, self.groups.widths, weights), used


def group_weights(groups: ClassGroups, clip: tuple[float, float]) -> tuple[torch.Tensor, ...]:
    """Weights of the columns of group 0 and of every foreground group, G + 1 tensors.

    Args:
        groups: the class groups, with training counts.
        clip: least and largest weight.
    """
    inverse = 1 / groups.class_counts.double().clamp(min=1)  # (K,)
    zeros, group_of = inverse.new_zeros(groups.num_groups + 1), groups.class_to_group
    sizes = zeros.index_add(0, group_of, torch.ones_like(inverse))
    means = zeros.index_add(0, group_of, inverse) / sizes
    weights = (inverse / means.index_select(0, group_of)).clamp(*clip)
    columns = inverse.new_ones(groups.num_logits).index_copy(0, groups.class_to_column, weights)
    return columns.split(groups.widths)


def _without_others(logits: torch.Tensor, groups: ClassGroups) -> torch.Tensor:
    """Logits that give "others" no probability, in groups that have classes."""
    is_others = torch.zeros(groups.num_logits, dtype=torch.bool)
    for columns, size in zip(groups.group_slices[1:], groups.sizes, strict=True):
        is_others[columns.start] = size > 0
    return logits.masked_fill(is_others.to(logits.device, non_blocking=True), -torch.inf)
