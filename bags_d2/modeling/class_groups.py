"""Training counts of the classes as part of a model, and the class groups that follow from them.

Shapes in this file: K foreground classes, G foreground groups, C = K + G + 2 logits.

Columns of a grouped classifier: ``[background, foreground | others, classes.. | others, ..]``,
group 0 first, then every foreground group with its classes in class-id order (BAGS, section 4.2).
"""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from ..errors import ConfigError

__all__ = ["ClassCounts", "ClassGroups"]

logger = logging.getLogger(__name__)

Counts = Sequence[int] | Mapping[str, int] | torch.Tensor


class ClassCounts(nn.Module):
    """Training count of each class, saved with the weights that were trained under it.

    As a buffer they travel with the weights, so that evaluation needs no training annotations;
    on loading, the checkpoint's replace the present ones.

    Attributes:
        num_classes: K.
        class_counts: long tensor (K,), training instances (or images) of each class; -1 unknown.
    """

    # The buffer that says what the weights were trained under, and what it is called in messages.
    _decisive, _subject = "class_counts", "class counts"

    def __init__(self, class_counts: torch.Tensor, undetermined_because: str = "") -> None:
        """Use :meth:`from_counts`, or :meth:`undetermined` where the counts cannot be had."""
        super().__init__()
        self.num_classes = len(class_counts)
        self.register_buffer("class_counts", class_counts.long())
        self.undetermined_because = undetermined_because

    @classmethod
    def from_counts(cls, counts: Counts) -> "ClassCounts":
        """From K whole numbers of 0 or more, in class order (else ConfigError, a ValueError)."""
        return cls(_checked_counts(counts))

    @classmethod
    def undetermined(cls, num_classes: int, because: str) -> "ClassCounts":
        """A placeholder for a checkpoint to fill; ``because``, one sentence, is raised on use."""
        return cls(torch.full((num_classes,), -1), because)

    @classmethod
    def from_source(cls, read_counts: Callable[[], Counts], num_classes: int, *args):
        """From counts, or a placeholder where ``read_counts`` raises FileNotFoundError.

        Args:
            read_counts: returns K counts.
            num_classes: K.
            *args: what else :meth:`from_counts` takes.
        """
        try:
            counts = read_counts()
        except FileNotFoundError as error:
            return cls.undetermined(num_classes, *args, str(error))
        return cls.from_counts(counts, *args)

    @property
    def is_determined(self) -> bool:
        """False for a placeholder that no checkpoint has filled."""
        return not self.undetermined_because

    def require_determined(self) -> None:
        """Raise ConfigError if this is a placeholder that no checkpoint has filled."""
        if not self.is_determined:
            raise ConfigError(
                f"The {self._subject} are unknown: {self.undetermined_because} Load a checkpoint "
                "that has them (MODEL.WEIGHTS), or set MODEL.LONG_TAIL.CLASS_COUNTS_FILE."
            )

    def require_classes(self, num_classes: int) -> None:
        """Raise ConfigError if the counts are of another number of classes."""
        if self.num_classes != num_classes:
            raise ConfigError(
                f"The class counts are of {self.num_classes} classes but "
                f"MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}; make them agree."
            )

    def extra_repr(self) -> str:
        known = f"{int(self.class_counts.sum()):,} counted" if self.is_determined else "unknown"
        return f"{self.num_classes} classes, {known}"

    def _fault_of(self, state: dict[str, torch.Tensor]) -> str:
        """Why a checkpoint's state cannot be taken, or an empty string."""
        found = state[self._decisive]
        if found.shape != (self.num_classes,):
            return (
                f"the checkpoint has {found.numel()} classes and the model {self.num_classes}; "
                "set MODEL.ROI_HEADS.NUM_CLASSES to match."
            )
        return ""

    # nn.Module has no public hook that runs before loading and can refuse what is loaded.
    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Take the checkpoint's state, and say so where it differs from the present one."""
        state = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        loaded = state.get(self._decisive)
        if loaded is not None:
            fault = self._fault_of(state)
            if fault:
                error_msgs.append(f"{prefix}{self._decisive}: {fault}")
                return
            changed = int((loaded.cpu() != getattr(self, self._decisive).cpu()).sum())
            if changed and self.is_determined:
                logger.warning(
                    "The checkpoint's %s of %d of %d classes differ from those of the "
                    "configuration (MODEL.BAGS.GROUP_THRESHOLDS, MODEL.LONG_TAIL and "
                    "the training set): its own are used, since its weights were trained under "
                    "them.",
                    self._subject,
                    changed,
                    self.num_classes,
                )
            if bool((loaded >= 0).all()):
                self.undetermined_because = ""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class ClassGroups(ClassCounts):
    """Which group each class belongs to, and where its logit stands.

    The width of the logits is K + G + 2 whatever the assignment, so a classifier loaded next to
    another map would be silently scrambled. Hence the map, too, is saved with the weights.

    Attributes:
        num_groups: G, group 0 (background / foreground) not counted.
        sizes: number of classes of each foreground group, length G.
        class_to_group: long tensor (K,), values 1..G.
        thresholds: long tensor (G - 1,), the half-open bin edges.
        class_to_column: long tensor (K,), the logit of each class.
        label_to_slots: long tensor (G + 1, K + 1), the target of each label in every group: of its
            own group 1, 2, ..; of others 0, "others". In group 0 background, the last label, is 0
            and foreground 1.
        output_columns: long tensor (K + 1,), the logit of each class, and last background's.
    """

    _decisive, _subject = "class_to_group", "class groups"

    def __init__(
        self,
        class_to_group: torch.Tensor,
        class_counts: torch.Tensor,
        thresholds: Sequence[int],
        undetermined_because: str = "",
    ) -> None:
        """Use :meth:`from_counts`, or :meth:`undetermined` where the counts cannot be had."""
        super().__init__(class_counts, undetermined_because)
        self.num_classes = len(class_to_group)  # which a caller may yet compare with the counts
        self.num_groups = len(thresholds) + 1
        self.register_buffer("class_to_group", class_to_group.long())
        self.register_buffer("thresholds", torch.tensor(list(thresholds), dtype=torch.long))
        # Derived from class_to_group, so never saved: a checkpoint cannot contradict itself.
        for name in ("class_to_column", "label_to_slots", "output_columns"):
            self.register_buffer(name, None, persistent=False)
        self._lay_out()

    @classmethod
    def from_counts(
        cls, counts: Counts, thresholds: Sequence[int] = (10, 100, 1000)
    ) -> "ClassGroups":
        """Group classes into the half-open bins [0, t1) [t1, t2) ... [tn, inf).

        Args:
            counts: K training instances (or images), whole numbers of 0 or more, in class order;
                a mapping {class name: count} likewise.
            thresholds: strictly increasing positive whole numbers; empty for one single group.

        Returns:
            The grouping. Groups may be empty.

        Raises:
            ConfigError: (a ValueError) for other counts or thresholds.
        """
        thresholds, counts = _checked_thresholds(thresholds), _checked_counts(counts)
        edges = torch.tensor(thresholds, dtype=torch.long)
        return cls(torch.bucketize(counts, edges, right=True) + 1, counts, thresholds)

    @classmethod
    def undetermined(
        cls, num_classes: int, thresholds: Sequence[int], because: str
    ) -> "ClassGroups":
        """A placeholder of the right width, which does not depend on the counts."""
        zeros = torch.zeros(num_classes, dtype=torch.long)
        return cls(zeros, zeros - 1, _checked_thresholds(thresholds), because)

    @property
    def num_logits(self) -> int:
        """C = K + G + 2."""
        return self.num_classes + self.num_groups + 2

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of columns of group 0 and of every foreground group, length G + 1."""
        return (2, *(size + 1 for size in self.sizes))

    @property
    def group_slices(self) -> tuple[slice, ...]:
        """Columns of group 0 and of every foreground group, length G + 1."""
        stops = itertools.accumulate(self.widths, initial=0)
        return tuple(slice(a, b) for a, b in itertools.pairwise(stops))

    def extra_repr(self) -> str:
        names = ", ".join(self.describe()) if self.is_determined else "undetermined"
        return f"{self.num_classes} classes, {self.num_logits} logits: {names}"

    def describe(self) -> list[str]:
        """One string for each foreground group, such as ``'[10, 100): 412'``."""
        edges = itertools.pairwise([0, *self.thresholds.tolist(), "inf"])
        return [f"[{a}, {b}): {n}" for (a, b), n in zip(edges, self.sizes, strict=True)]

    def _lay_out(self) -> None:
        """Derive columns, slots and sizes from ``class_to_group``."""
        groups, device = self.class_to_group.cpu(), self.class_to_group.device
        order, classes = groups.argsort(stable=True), torch.arange(self.num_classes)
        columns = torch.empty_like(groups)
        # Before the i-th class in this order, of group g: group 0, i classes and g "others".
        columns[order] = 2 + classes + groups[order]
        self.sizes = tuple(groups.bincount(minlength=self.num_groups + 1)[1:].tolist())
        starts = torch.tensor([part.start for part in self.group_slices])
        slots = torch.zeros(self.num_groups + 1, self.num_classes + 1, dtype=torch.long)
        slots[groups, classes] = columns - starts[groups]
        slots[0, :-1] = 1
        self.class_to_column = columns.to(device)
        self.label_to_slots = slots.to(device)
        self.output_columns = nn.functional.pad(columns, (0, 1)).to(device)

    def _fault_of(self, state: dict[str, torch.Tensor]) -> str:
        fault = super()._fault_of(state)
        if fault:
            return fault
        thresholds = state.get("thresholds")
        if thresholds is not None and thresholds.shape != self.thresholds.shape:
            return (
                f"the checkpoint was trained with group thresholds {tuple(thresholds.tolist())} "
                f"and the model has {tuple(self.thresholds.tolist())}; set "
                "MODEL.BAGS.GROUP_THRESHOLDS to the checkpoint's."
            )
        low, high = (int(x) for x in state[self._decisive].aminmax())
        if low < 1 or high > self.num_groups:
            return f"groups must lie in 1..{self.num_groups}, the checkpoint has {low}..{high}."
        return ""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._lay_out()


def _checked_counts(counts: Counts) -> torch.Tensor:
    if isinstance(counts, Mapping):
        counts = list(counts.values())
    counts = torch.as_tensor(counts).detach().cpu()
    whole = counts.dim() == 1 and counts.numel() and bool((counts == counts.long()).all())
    if not whole or bool((counts < 0).any()):
        raise ConfigError("Class counts must be one whole number of 0 or more for each class.")
    return counts.long()


def _checked_thresholds(thresholds: Sequence[int]) -> tuple[int, ...]:
    values = tuple(thresholds)
    whole = all(float(t).is_integer() and t > 0 for t in values)
    if not whole or any(a >= b for a, b in itertools.pairwise(values)):
        raise ConfigError(
            "Group thresholds (MODEL.BAGS.GROUP_THRESHOLDS) must be strictly increasing positive "
            f"whole numbers, found {values}"
        )
    return tuple(int(t) for t in values)
