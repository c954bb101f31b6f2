"""Training counts of the classes as a part of the model."""

import logging

import torch
from torch import nn

from ..errors import ConfigError

__all__ = ["ClassCounts"]

logger = logging.getLogger(__name__)


class ClassCounts(nn.Module):
    """Training count of each class, for classifiers whose loss or scores depend on it.

    A module rather than a plain tensor for the same reason as ``ClassGroups``: what the counts
    are must travel with the weights that were trained under them, so that evaluation, and
    calibration by counts, need no training annotations.

    Attributes:
        num_classes: K.
        class_counts: long tensor (K,), training instances (or images) of each class; -1 unknown.
    """

    def __init__(self, class_counts: torch.Tensor, undetermined_because: str = "") -> None:
        """
        Args:
            class_counts: K whole numbers of 0 or more.
            undetermined_because: see :meth:`undetermined`.

        Raises:
            ConfigError: if a known count is negative or not a whole number.
        """
        super().__init__()
        counts = torch.as_tensor(class_counts).detach().cpu()
        whole = counts.dim() == 1 and bool((counts == counts.long()).all())
        if not whole or (not undetermined_because and bool((counts < 0).any())):
            raise ConfigError("Class counts must be one whole number of 0 or more for each class.")
        self.num_classes = len(counts)
        self.register_buffer("class_counts", counts.long())
        self.undetermined_because = undetermined_because

    @classmethod
    def undetermined(cls, num_classes: int, because: str) -> "ClassCounts":
        """A placeholder to be filled from a checkpoint.

        Args:
            num_classes: K.
            because: one sentence that says why counts are missing; raised on use.
        """
        return cls(torch.full((num_classes,), -1), because)

    @property
    def is_determined(self) -> bool:
        """False for a placeholder whose counts have yet to be loaded."""
        return not self.undetermined_because

    def require_determined(self) -> None:
        """Raise ConfigError if this is a placeholder that no checkpoint has filled."""
        if not self.is_determined:
            raise ConfigError(
                f"The class counts are unknown: {self.undetermined_because} Load a checkpoint that "
                "has them (MODEL.WEIGHTS), or set MODEL.BAGS.CLASS_COUNTS_FILE."
            )

    def extra_repr(self) -> str:
        known = f"{int(self.class_counts.sum()):,} counted" if self.is_determined else "unknown"
        return f"{self.num_classes} classes, {known}"

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Take the checkpoint's counts, and say so where they differ from the present ones."""
        loaded = state_dict.get(prefix + "class_counts")
        if loaded is not None and loaded.shape == self.class_counts.shape:
            changed = int((loaded.cpu() != self.class_counts.cpu()).sum())
            if changed and self.is_determined:
                logger.warning(
                    "The checkpoint's training counts of %d of %d classes differ from those of "
                    "the configuration (MODEL.BAGS.COUNT_BY, CLASS_COUNTS_FILE and the training "
                    "set): its own are used, since its weights were trained under them.",
                    changed,
                    self.num_classes,
                )
            if bool((loaded >= 0).all()):
                self.undetermined_because = ""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
