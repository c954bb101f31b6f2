"""Grouping of classes by training frequency, and the logit layout that follows from it.

Shapes in this file: K foreground classes, G foreground groups, C = K + G + 2 logits.

Columns of a grouped classifier: ``[background, foreground | others, classes.. | others, ..]``,
group 0 first, then every foreground group with its classes in class-id order (BAGS, section 4.2).
"""

import itertools
import logging
from collections.abc import Sequence

import torch
from torch import nn

from ..errors import ConfigError

__all__ = ["ClassGroups"]

logger = logging.getLogger(__name__)


class ClassGroups(nn.Module):
    """Which group each class belongs to, and where its logit stands.

    A module rather than a plain record because the map must travel with the weights: the logit
    width is K + G + 2 whatever the assignment, so a classifier loaded next to another map would
    be silently scrambled. As buffers, the map moves with the model and is saved in its
    checkpoint; on loading, the checkpoint's map replaces this one.

    Attributes:
        num_classes: K.
        num_groups: G, group 0 (background / foreground) not counted.
        class_to_group: long tensor (K,), values 1..G.
        class_counts: long tensor (K,), training instances (or images) of each class; -1 unknown.
        thresholds: long tensor (G - 1,), the half-open bin edges.
    """

    def __init__(
        self, class_to_group: torch.Tensor, class_counts: torch.Tensor, thresholds: Sequence[int]
    ) -> None:
        """Use :meth:`from_counts`, or :meth:`undetermined` where the counts cannot be had.

        Args:
            class_to_group: long tensor (K,), values 1..G; all zero while undetermined.
            class_counts: long tensor (K,).
            thresholds: G - 1 strictly increasing positive integers.
        """
        super().__init__()
        self.num_classes = len(class_to_group)
        self.num_groups = len(thresholds) + 1
        self.register_buffer("class_to_group", class_to_group.long())
        self.register_buffer("class_counts", class_counts.long())
        self.register_buffer("thresholds", torch.tensor(list(thresholds), dtype=torch.long))
        # Derived from class_to_group, so never saved: a checkpoint cannot contradict itself.
        self.register_buffer("class_to_slot", torch.empty(0, dtype=torch.long), persistent=False)
        self.register_buffer("class_to_column", torch.empty(0, dtype=torch.long), persistent=False)
        self.register_buffer("label_to_slots", torch.empty(0, dtype=torch.long), persistent=False)
        self.undetermined_because = ""
        self._lay_out()

    @classmethod
    def from_counts(
        cls, counts: Sequence[int] | torch.Tensor, thresholds: Sequence[int] = (10, 100, 1000)
    ) -> "ClassGroups":
        """Group classes into the half-open bins [0, t1) [t1, t2) ... [tn, inf).

        Args:
            counts: K training instances (or images) per class, in contiguous class order.
            thresholds: strictly increasing positive integers; empty for one single group.

        Returns:
            The grouping. Groups may be empty.

        Raises:
            ConfigError: (a ValueError) if counts are empty, negative or not whole numbers, or if
                thresholds are not strictly increasing positive whole numbers.
        """
        thresholds = _checked_thresholds(thresholds)
        counts = torch.as_tensor(counts).detach().cpu()
        if counts.dim() != 1 or counts.numel() == 0:
            raise ConfigError(
                f"Class counts must be one number for each class, found shape {tuple(counts.shape)}"
            )
        if not bool((counts == counts.long()).all()) or bool((counts < 0).any()):
            raise ConfigError("Class counts must be whole numbers of 0 or more")
        counts = counts.long()
        edges = torch.tensor(thresholds, dtype=torch.long)
        return cls(torch.bucketize(counts, edges, right=True) + 1, counts, thresholds)

    @classmethod
    def undetermined(
        cls, num_classes: int, thresholds: Sequence[int], because: str
    ) -> "ClassGroups":
        """A placeholder of the right size, to be filled from a checkpoint.

        Evaluation needs no training annotations, since the grouping comes with the weights; the
        width of the classifier is known without them.

        Args:
            num_classes: K.
            thresholds: as in :meth:`from_counts`.
            because: one sentence that says why counts are missing; raised on use.
        """
        thresholds = _checked_thresholds(thresholds)
        zeros = torch.zeros(num_classes, dtype=torch.long)
        groups = cls(zeros, torch.full_like(zeros, -1), thresholds)
        groups.undetermined_because = because
        return groups

    @property
    def num_logits(self) -> int:
        """C = K + G + 2."""
        return self.num_classes + self.num_groups + 2

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of classes of each foreground group, length G."""
        return self._sizes

    @property
    def group_slices(self) -> tuple[slice, ...]:
        """Columns of group 0 and of every foreground group, length G + 1."""
        stops = itertools.accumulate(self.widths)
        return tuple(slice(b - w, b) for b, w in zip(stops, self.widths, strict=True))

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of columns of group 0 and of every foreground group, length G + 1."""
        return (2, *(size + 1 for size in self._sizes))

    @property
    def is_determined(self) -> bool:
        """False for a placeholder whose grouping has yet to be loaded."""
        return not self.undetermined_because

    def require_determined(self) -> None:
        """Raise ConfigError if this is a placeholder that no checkpoint has filled."""
        if not self.is_determined:
            raise ConfigError(
                f"The class groups are unknown: {self.undetermined_because} Load a BAGS checkpoint "
                "(MODEL.WEIGHTS), or set MODEL.BAGS.CLASS_COUNTS_FILE."
            )

    def extra_repr(self) -> str:
        names = ", ".join(self.describe()) if self.is_determined else "undetermined"
        return f"{self.num_classes} classes, {self.num_logits} logits: {names}"

    def describe(self) -> list[str]:
        """One string for each foreground group, such as ``'[10, 100): 412'``."""
        edges = [0, *self.thresholds.tolist(), "inf"]
        pairs = itertools.pairwise(edges)
        return [f"[{a}, {b}): {n}" for (a, b), n in zip(pairs, self.sizes, strict=True)]

    def _lay_out(self) -> None:
        """Derive slots, columns and sizes from ``class_to_group``."""
        groups = self.class_to_group.cpu()
        columns = torch.zeros_like(groups)
        # Slot that each label is the target of, in every group: classes of other groups are
        # "others" of a group, slot 0, as is background, the last label.
        targets = torch.zeros(self.num_groups + 1, self.num_classes + 1, dtype=torch.long)
        targets[0, :-1] = 1
        start, sizes = 2, []
        for g in range(1, self.num_groups + 1):
            members = (groups == g).nonzero().flatten()
            targets[g, members] = torch.arange(1, len(members) + 1)
            columns[members] = start + targets[g, members]
            sizes.append(len(members))
            start += 1 + len(members)
        device = self.class_to_group.device
        self.class_to_column = columns.to(device)
        self.label_to_slots = targets.to(device)
        self.class_to_slot = self.label_to_slots[1:, :-1].sum(dim=0)
        self._sizes = tuple(sizes)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Take the checkpoint's grouping, and say so where it differs from the present one."""
        key = prefix + "class_to_group"
        loaded = state_dict.get(key)
        if loaded is not None:
            problem = self._fault_of(loaded, state_dict.get(prefix + "thresholds"))
            if problem:
                error_msgs.append(f"{key}: {problem}")
                return
            if self.is_determined and not torch.equal(loaded.cpu(), self.class_to_group.cpu()):
                changed = int((loaded.cpu() != self.class_to_group.cpu()).sum())
                logger.warning(
                    "The checkpoint groups %d of %d classes otherwise than the configuration "
                    "(MODEL.BAGS.GROUP_THRESHOLDS, COUNT_BY and the training set): its own groups "
                    "are used, since they are what its weights mean.",
                    changed,
                    self.num_classes,
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if loaded is not None:
            self.undetermined_because = ""
            self._lay_out()

    def _fault_of(self, class_to_group: torch.Tensor, thresholds: torch.Tensor | None) -> str:
        """Why a checkpoint's grouping cannot be taken, or an empty string."""
        if class_to_group.shape != self.class_to_group.shape:
            return (
                f"the checkpoint has {class_to_group.numel()} classes and the model "
                f"{self.num_classes}; set MODEL.ROI_HEADS.NUM_CLASSES to match."
            )
        if thresholds is not None and len(thresholds) + 1 != self.num_groups:
            return (
                f"the checkpoint was trained with group thresholds {tuple(thresholds.tolist())} "
                f"and the model has {tuple(self.thresholds.tolist())}; set "
                "MODEL.BAGS.GROUP_THRESHOLDS to the checkpoint's."
            )
        low, high = int(class_to_group.min()), int(class_to_group.max())
        if low < 1 or high > self.num_groups:
            return f"groups must lie in 1..{self.num_groups}, the checkpoint has {low}..{high}."
        return ""


def _checked_thresholds(thresholds: Sequence[int]) -> tuple[int, ...]:
    values = tuple(thresholds)
    whole = all(float(t).is_integer() and t > 0 for t in values)
    if not whole or any(a >= b for a, b in itertools.pairwise(values)):
        raise ConfigError(
            "Group thresholds (MODEL.BAGS.GROUP_THRESHOLDS) must be strictly increasing positive "
            f"whole numbers, found {values}"
        )
    return tuple(int(t) for t in values)
