"""Balanced Group Softmax as pure functions (Li et al., CVPR 2020, sections 4.2 and 4.3).

Shapes in this file: R RoIs of the whole per-device batch, K foreground classes, G foreground
groups, C = K + G + 2 logits. ``gt_classes`` hold 0..K-1 for foreground and K for background.

Nothing here waits for the device: quantities that depend on the data (how many RoIs lie in a
group, how many "others" to draw) stay tensors, so sampling is done by ranking random keys
instead of by picking a data-dependent number of indices.
"""

import math

import torch
from torch.nn import functional as F

from .groups import ClassGroups

__all__ = ["group_softmax_loss", "group_targets", "merge_group_probs", "sample_others"]


def sample_others(
    in_group: torch.Tensor,
    others_sample_ratio: float,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draw the "others" RoIs of every group, uniformly and without replacement.

    For a group with n foreground RoIs in the batch, ``int(ratio * n)`` RoIs are drawn from those
    outside it (background RoIs and foreground RoIs of other groups alike), or all of them if they
    are fewer; each group draws for itself. A group without foreground RoIs draws none.

    Args:
        in_group: bool tensor (G, R), whether the label of a RoI lies in a group.
        others_sample_ratio: beta of the paper; ``inf`` draws all, 0 none.
        generator: source of randomness on the tensors' device; None is the global one.

    Returns:
        Bool tensor (G, R): the RoIs drawn as "others".

    Raises:
        ValueError: if the ratio is negative or not a number.
    """
    if not others_sample_ratio >= 0:
        raise ValueError(
            "The sampling ratio of 'others' (MODEL.BAGS.OTHERS_SAMPLE_RATIO) must be 0 or more, "
            f"found {others_sample_ratio}"
        )
    num_in = in_group.sum(dim=1, keepdim=True)  # (G, 1)
    if math.isinf(others_sample_ratio):
        return ~in_group & (num_in > 0)
    # In float64, as Python computes int(ratio * n); clamped, as a product may not fit an integer.
    num_rois = in_group.shape[1]
    wanted = (num_in.double() * others_sample_ratio).clamp(max=num_rois).long()
    keys = torch.rand(in_group.shape, generator=generator, device=in_group.device)
    # RoIs of the group itself go to the end of the ranking and are masked out afterwards, which
    # also covers the case that fewer "others" exist than are wanted.
    order = keys.masked_fill(in_group, 2.0).argsort(dim=1)
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(num_rois, device=order.device).expand_as(order))
    return (rank < wanted) & ~in_group


def group_targets(gt_classes: torch.Tensor, groups: ClassGroups) -> torch.Tensor:
    """Slot of each RoI within every group: 0 is background in group 0 and "others" elsewhere.

    Args:
        gt_classes: long tensor (R,), 0..K.
        groups: the class groups.

    Returns:
        Long tensor (G + 1, R).

    Raises:
        ValueError: for labels outside 0..K (on CUDA: a device-side assertion, which does not
            wait for the device).
    """
    num_classes = groups.num_classes
    in_range = ((gt_classes >= 0) & (gt_classes <= num_classes)).all()
    if gt_classes.device.type == "cpu":
        if not in_range:
            raise ValueError(
                f"gt_classes must lie in 0..{num_classes} ({num_classes} is background), found "
                f"{int(gt_classes.min())}..{int(gt_classes.max())}"
            )
    else:
        torch._assert_async(in_range)
    # Background gets group 0 and slot 0, so that it lies in no foreground group.
    group_of = F.pad(groups.class_to_group.to(gt_classes.device), (0, 1))[gt_classes]  # (R,)
    slot_of = F.pad(groups.class_to_slot.to(gt_classes.device), (0, 1))[gt_classes]
    group_ids = torch.arange(1, groups.num_groups + 1, device=gt_classes.device)
    in_group = group_of == group_ids[:, None]  # (G, R)
    is_foreground = (gt_classes < num_classes).long()
    return torch.cat([is_foreground[None], in_group * slot_of])


def group_softmax_loss(
    logits: torch.Tensor,
    gt_classes: torch.Tensor,
    groups: ClassGroups,
    others_sample_ratio: float = 8.0,
    generator: torch.Generator | None = None,
    return_used: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of each group's own softmax; their plain sum is the loss (paper, eq. 5).

    Group 0 uses all RoIs. A foreground group uses every RoI labelled with one of its classes and
    a sample of "others" (:func:`sample_others`). Each group is normalised by the number of RoIs
    that it *used*: normalising by R would shrink the tail groups' gradients by the very imbalance
    that the groups are there to remove.

    Args:
        logits: (R, C), any floating dtype; computed in float32 at least, also under autocast.
        gt_classes: long tensor (R,), 0..K.
        groups: the class groups, C = ``groups.num_logits``.
        others_sample_ratio: beta; ``inf`` uses every RoI, 0 no "others".
        generator: source of randomness on the tensors' device.
        return_used: also return which RoIs took part.

    Returns:
        Tensor (G + 1,): the loss of group 0 and of every foreground group; 0 (with the graph
        connected) for a group that no RoI of the batch belongs to. With ``return_used`` also a
        bool tensor (G + 1, R).

    Raises:
        ValueError: for labels outside 0..K, logits of the wrong width, a negative ratio, or
            groups that are not determined.
    """
    groups.require_determined()
    _check_width(logits, groups)
    logits = _at_least_float32(logits)
    targets = group_targets(gt_classes, groups)
    in_group = targets[1:] > 0
    others = sample_others(in_group, others_sample_ratio, generator)
    used = torch.cat([torch.ones_like(targets[:1], dtype=torch.bool), in_group | others])
    with torch.autocast(logits.device.type, enabled=False):
        losses = torch.stack(
            [
                F.cross_entropy(part, target, reduction="none")
                # split() rather than slices: its backward pass joins the parts' gradients once.
                for part, target in zip(logits.split(groups.widths, dim=1), targets, strict=True)
            ]
        )  # (G + 1, R)
    # where() rather than a product: an infinite loss of an unused RoI must not turn into NaN.
    total = torch.where(used, losses, losses.new_zeros(())).sum(dim=1)
    losses = total / used.sum(dim=1).clamp(min=1)
    return (losses, used) if return_used else losses


def merge_group_probs(logits: torch.Tensor, groups: ClassGroups) -> torch.Tensor:
    """Class probabilities from grouped logits (paper, section 4.3).

    Softmax within each group, "others" dropped, scaled by P(foreground) of group 0, and mapped
    back to class ids. Not renormalised, so the sum of a row may lie below or above 1.

    Args:
        logits: (R, C).
        groups: the class groups.

    Returns:
        Tensor (R, K + 1), float32 at least; the last column is P(background).

    Raises:
        ValueError: for logits of the wrong width or groups that are not determined.
    """
    groups.require_determined()
    _check_width(logits, groups)
    logits = _at_least_float32(logits)
    with torch.autocast(logits.device.type, enabled=False):
        probs = torch.cat([part.softmax(dim=1) for part in logits.split(groups.widths, 1)], dim=1)
    foreground = probs[:, 1:2]
    class_probs = probs.index_select(1, groups.class_to_column.to(logits.device)) * foreground
    return torch.cat([class_probs, probs[:, :1]], dim=1)


def _check_width(logits: torch.Tensor, groups: ClassGroups) -> None:
    if logits.dim() != 2 or logits.shape[1] != groups.num_logits:
        raise ValueError(
            f"Logits must have shape (R, {groups.num_logits}) for {groups.num_classes} classes in "
            f"{groups.num_groups} groups, found {tuple(logits.shape)}"
        )


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
