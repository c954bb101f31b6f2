"""Balanced Group Softmax as pure functions (Li et al., CVPR 2020, sections 4.2 and 4.3).

Shapes in this file: R RoIs of the whole per-device batch, K foreground classes, G foreground
groups, C = K + G + 2 logits. ``gt_classes`` hold 0..K-1 for foreground and K for background.

Nothing here waits for the device: quantities that depend on the data (how many RoIs lie in a
group, how many "others" to draw) stay tensors, so sampling masks a random order of all RoIs
instead of picking a data-dependent number of indices.
"""

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from ..errors import ConfigError
from .class_groups import ClassGroups

__all__ = [
    "check_merge",
    "group_cross_entropy",
    "group_softmax_loss",
    "group_targets",
    "merge_group_probs",
    "sample_others",
]

MERGES = ("paper", "joint")


def sample_others(
    in_group: torch.Tensor,
    others_sample_ratio: float,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draw the "others" RoIs of every group, uniformly and without replacement.

    For a group with n foreground RoIs in the batch, ``int(ratio * n)`` RoIs are drawn from those
    outside it (background RoIs and foreground RoIs of other groups alike), or all of them if they
    are fewer; each group draws for itself.

    Args:
        in_group: bool tensor (G, R), whether the label of a RoI lies in a group.
        others_sample_ratio: beta of the paper, 0 or more (else ValueError); ``inf`` draws all.
        generator: source of randomness on the tensors' device; None is the global one.

    Returns:
        Bool tensor (G, R): the RoIs drawn as "others".
    """
    if not others_sample_ratio >= 0:
        raise ValueError(
            "The sampling ratio of 'others' (MODEL.BAGS.OTHERS_SAMPLE_RATIO) must be 0 or more, "
            f"found {others_sample_ratio}"
        )
    num_in = in_group.sum(dim=1, keepdim=True)  # (G, 1)
    if math.isinf(others_sample_ratio):
        return ~in_group & (num_in > 0)
    num_groups, num_rois = in_group.shape
    device = in_group.device
    # All RoIs queue up in random order, and the first ones from outside are drawn. The product is
    # taken in float64 as in Python; a whole number is at most x if and only if it is at most
    # int(x).
    queue = torch.stack(
        [torch.randperm(num_rois, generator=generator, device=device) for _ in range(num_groups)]
    )
    outside = ~in_group.gather(1, queue)
    drawn = outside & (outside.cumsum(dim=1) <= num_in.double() * others_sample_ratio)
    return torch.zeros_like(in_group).scatter_(1, queue, drawn)


def group_targets(gt_classes: torch.Tensor, groups: ClassGroups) -> torch.Tensor:
    """Slot of each RoI within every group, long (G + 1, R), by ``ClassGroups.label_to_slots``.

    Raises:
        ValueError: for ``gt_classes`` (R,) outside 0..K (on CUDA: a device-side assertion, which
            does not wait for the device).
    """
    num_classes = groups.num_classes
    in_range = ((gt_classes >= 0) & (gt_classes <= num_classes)).all()
    if gt_classes.device.type != "cpu":
        torch._assert_async(in_range)
    elif not in_range:
        raise ValueError(
            f"gt_classes must lie in 0..{num_classes} ({num_classes} is background), found "
            f"{int(gt_classes.min())}..{int(gt_classes.max())}"
        )
    return groups.label_to_slots.to(gt_classes.device).index_select(1, gt_classes)


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
    a sample of "others" (:func:`sample_others`).

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
    logits = _checked_logits(logits, groups)
    targets = group_targets(gt_classes, groups)
    in_group = targets[1:] > 0
    others = sample_others(in_group, others_sample_ratio, generator)
    used = torch.cat([torch.ones_like(others[:1]), in_group | others])
    losses = group_cross_entropy(logits, targets, used, groups.widths)
    return (losses, used) if return_used else losses


def group_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    used: torch.Tensor,
    widths: Sequence[int],
    weights: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Mean cross-entropy of each group (G + 1,) over the RoIs that it uses.

    Each group is normalised by the number of RoIs that it *used*: normalising by R would shrink
    the tail groups' gradients by the very imbalance that the groups are there to remove.

    Args:
        logits: (R, C), float32 or float64.
        targets: long tensor (G + 1, R), slots within the groups.
        used: bool tensor (G + 1, R).
        widths: numbers of columns of the groups.
        weights: for each group the weights of its slots as targets; None weighs all 1.
    """
    losses = []
    for g, part in enumerate(logits.split(widths, dim=1)):
        weight = None if weights is None else weights[g].to(part)
        loss = F.cross_entropy(part, targets[g], weight, reduction="none")  # (R,)
        # Not a product: an infinite loss of an unused RoI must not turn into NaN.
        total = torch.where(used[g], loss, 0.0).sum()
        losses.append(total / used[g].sum().clamp(min=1))
    return torch.stack(losses)


def merge_group_probs(
    logits: torch.Tensor, groups: ClassGroups, how: str = "paper"
) -> torch.Tensor:
    """Class probabilities from grouped logits.

    - "paper" (section 4.3): softmax within each group, "others" dropped, scaled by P(foreground)
      of group 0. Groups do not know of each other, so the sum of a row may lie below or above 1.
    - "joint": with ``a_c = z_c - z_others`` of the class's own group, all classes compete in one
      softmax with a "none" of logit 0: ``P(c) = P(fg) exp(a_c) / (1 + sum_k exp(a_k))``. A class
      thus gives way to those of other groups that are surer of the RoI; rows sum to 1 or less.

    With a single group the two are the same.

    Args:
        logits: (R, C), any floating dtype; computed in float32 at least.
        groups: the class groups.
        how: "paper" or "joint".

    Returns:
        Tensor (R, K + 1); the last column is P(background).

    Raises:
        ValueError: for logits of the wrong width, undetermined groups, or another ``how``.
    """
    check_merge(how)
    logits = _checked_logits(logits, groups)
    parts = logits.split(groups.widths, dim=1)
    background, foreground = parts[0].softmax(dim=1).split(1, dim=1)
    if how == "paper":
        parts = [part.softmax(dim=1) for part in parts]
    else:
        parts = [part - part[:, :1] for part in parts]
    scores = torch.cat(parts, dim=1).index_select(1, groups.output_columns.to(logits.device))
    if how == "joint":
        # The last of the K + 1 columns is background's relative to itself: the "none" of logit 0.
        scores = scores.softmax(dim=1)
    return torch.cat([scores[:, :-1] * foreground, background], dim=1)


def check_merge(how: str, merges: tuple[str, ...] = MERGES) -> None:
    """Raise ConfigError if there is no such merge."""
    if how not in merges:
        raise ConfigError(f"MODEL.BAGS.MERGE must be one of {merges}, found {how!r}.")


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """A half-precision tensor as float32, others as they are."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _checked_logits(logits: torch.Tensor, groups: ClassGroups) -> torch.Tensor:
    groups.require_determined()
    if logits.dim() != 2 or logits.shape[1] != groups.num_logits:
        raise ValueError(
            f"Logits must have shape (R, {groups.num_logits}) for {groups.num_classes} classes in "
            f"{groups.num_groups} groups, found {tuple(logits.shape)}"
        )
    return at_least_float32(logits)
