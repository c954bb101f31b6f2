"""Balanced Group Softmax as pure functions (Li et al., CVPR 2020, sections 4.2 and 4.3).

Shapes in this file: R RoIs of the whole per-device batch, K foreground classes, G foreground
groups, C = K + G + 2 logits. ``gt_classes`` hold 0..K-1 for foreground and K for background.

Nothing here waits for the device: quantities that depend on the data (how many RoIs lie in a
group, how many "others" to draw) stay tensors, so sampling masks a random order of all RoIs
instead of picking a data-dependent number of indices.

Passes over memory of the logits' size take the time, arithmetic hardly any. Hence one buffer of
that size, in which each group owns some columns, and work in place, group after group: a softmax
for each group would first copy its columns, and autograd would keep several such buffers. A CPU can
also afford to look which RoIs a group uses, and leave out the rest: few use the groups of the tail.
"""

import dataclasses
import math

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .class_groups import ClassGroups

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
    # All RoIs queue up in random order, and the first ones from outside are drawn. The product is
    # taken in float64 as in Python, and a whole number is at most x just if it is at most int(x).
    queue = torch.stack(
        [
            torch.randperm(in_group.shape[1], generator=generator, device=in_group.device)
            for _ in range(in_group.shape[0])
        ]
    )
    outside = ~in_group.gather(1, queue)
    drawn = outside & (outside.cumsum(dim=1) <= num_in.double() * others_sample_ratio)
    return torch.zeros_like(in_group).scatter_(1, queue, drawn)


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
    slots = group_targets(gt_classes, groups)
    in_group = slots[1:] > 0
    others = sample_others(in_group, others_sample_ratio, generator)
    used = torch.cat([torch.ones_like(others[:1]), in_group | others])
    losses = _GroupCrossEntropy.apply(at_least_float32(logits), slots, used, groups)
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
    logits = at_least_float32(logits)
    objectness = logits[:, :2].softmax(dim=1)
    probs = logits.clone()
    for columns in groups.group_slices:
        part = probs[:, columns]
        part -= _greatest(part)
    probs = _exp_(probs)
    if probs.requires_grad:
        probs = probs.clone()  # autograd keeps the exponentials; they must not be scaled in place
    probs[:, :2] = objectness
    for columns in groups.group_slices[1:]:
        part = probs[:, columns]
        part *= objectness[:, 1:] / part.sum(dim=1, keepdim=True)
    columns = F.pad(groups.class_to_column.to(logits.device), (0, 1))  # background is column 0
    # gather() rather than index_select(), which does not gain from several CPU threads.
    return probs.gather(1, columns.expand(logits.shape[0], -1))


class _GroupCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of each group's softmax over the RoIs that it uses: (G + 1,).

    The backward pass turns the exponentials of the forward pass into the gradient, in place. Should
    the graph be retained and gone through once more, they are computed anew.
    """

    @staticmethod
    def forward(ctx, logits, slots, used, groups):
        # slots, used: (G + 1, R)
        num_used = used.sum(dim=1).clamp(min=1)
        ctx.save_for_backward(logits, slots, used, num_used)
        ctx.groups = groups
        ctx.gradient, ctx.softmaxes = _group_softmaxes(logits, slots, used, groups)
        losses = [softmax.loss() for softmax in ctx.softmaxes]
        return torch.stack(losses) / num_used

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses):
        logits, slots, used, num_used = ctx.saved_tensors
        gradient, softmaxes = ctx.gradient, ctx.softmaxes
        if gradient is None:
            gradient, softmaxes = _group_softmaxes(logits, slots, used, ctx.groups)
        ctx.gradient = ctx.softmaxes = None
        parts = gradient.split(ctx.groups.widths, dim=1)
        for softmax, part, scale in zip(softmaxes, parts, grad_losses / num_used, strict=True):
            softmax.write_gradient(part, scale)
        return gradient, None, None, None


# Share of used RoIs above which copying them out does not pay.
_SHARE_WORTH_COPYING = 0.75


@dataclasses.dataclass
class _Softmax:
    """Exponentials of one group's logits, for the N RoIs that it computes.

    Attributes:
        exponentials: (N, C of the group), of the logits less the greatest.
        totals: (N, 1) their sums.
        target: (N, 1) the target's slot.
        target_exponents: (N, 1) the target's logit less the greatest.
        used: (N, 1) bool, whether a RoI counts; None if all do.
        rows: (N,) the RoIs among all, None if they are all and the exponentials stand where the
            gradient will.
    """

    exponentials: torch.Tensor
    totals: torch.Tensor
    target: torch.Tensor
    target_exponents: torch.Tensor
    used: torch.Tensor | None
    rows: torch.Tensor | None

    def loss(self) -> torch.Tensor:
        """Sum of the cross-entropies of the RoIs that count."""
        losses = self.totals.log() - self.target_exponents
        if self.used is not None:
            # Not a product: an infinite loss of an unused RoI must not turn into NaN.
            losses = losses.where(self.used, 0.0)
        return losses.sum()

    def write_gradient(self, out: torch.Tensor, scale: torch.Tensor) -> None:
        """Turn the exponentials into the gradient of ``scale`` times the loss, in ``out``."""
        weights = scale.expand_as(self.totals) if self.used is None else self.used * scale
        gradient = self.exponentials.mul_(weights / self.totals)
        gradient.scatter_add_(1, self.target, -weights)
        if self.rows is not None:
            out.index_copy_(0, self.rows, gradient)


def _group_softmaxes(
    logits: torch.Tensor, slots: torch.Tensor, used: torch.Tensor, groups: ClassGroups
) -> tuple[torch.Tensor, list[_Softmax]]:
    """The softmaxes of all groups, and the buffer of their gradient (R, C), 0 where none writes."""
    gradient = torch.zeros_like(logits)
    parts = (x.split(groups.widths, dim=1) for x in (logits, gradient))
    softmaxes = []
    for part, out, slot, mask in zip(*parts, slots, used, strict=True):
        rows = None
        if logits.device.type == "cpu":  # elsewhere the host would have to wait for their number
            rows = mask.nonzero().flatten()
            if len(rows) > _SHARE_WORTH_COPYING * len(logits):
                rows = None
            else:
                part, slot, mask, out = part.index_select(0, rows), slot[rows], None, None
        target = slot.unsqueeze(1)
        exponents = torch.sub(part, _greatest(part), out=out)
        target_exponents = exponents.gather(1, target)
        exponentials = _exp_(exponents)
        softmaxes.append(
            _Softmax(
                exponentials=exponentials,
                totals=exponentials.sum(dim=1, keepdim=True),
                target=target,
                target_exponents=target_exponents,
                used=None if mask is None else mask.unsqueeze(1),
                rows=rows,
            )
        )
    return gradient, softmaxes


def _greatest(logits: torch.Tensor) -> torch.Tensor:
    """The greatest logit of each RoI (R, 1); less that, no logit's exponential overflows."""
    return logits.detach().amax(dim=1, keepdim=True)


def _exp_(tensor: torch.Tensor) -> torch.Tensor:
    """exp() in place. torch.exp() is left to MKL, which takes four times as long on AMD's CPUs."""
    return tensor.mul_(math.log2(math.e)).exp2_()


def _check_width(logits: torch.Tensor, groups: ClassGroups) -> None:
    if logits.dim() != 2 or logits.shape[1] != groups.num_logits:
        raise ValueError(
            f"Logits must have shape (R, {groups.num_logits}) for {groups.num_classes} classes in "
            f"{groups.num_groups} groups, found {tuple(logits.shape)}"
        )


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """A half-precision tensor as float32, others as they are."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
