"""What a checkpoint remembers of the classes it was trained on, so that it serves alone."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode

from ..errors import DataError
from .class_counts import training_class_counts, training_class_names

__all__ = ["ClassRecord"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassRecord:
    """Names and training counts of K classes, in contiguous order.

    Attributes:
        names: K names; None if unknown.
        training_instances: K counts; None if unknown.
    """

    names: tuple[str, ...] | None = None
    training_instances: tuple[int, ...] | None = None

    @classmethod
    def of_training_set(cls, cfg: CfgNode) -> "ClassRecord":
        """The record of ``DATASETS.TRAIN``; of files that are not there it is left empty.

        Args:
            cfg: config with the keys of ``add_bags_config``.

        Raises:
            ConfigError, DataError: if the files contradict each other or the config.
        """
        try:
            counts = training_class_counts(cfg, by="instances").tolist()
        except FileNotFoundError as error:
            logger.info("Checkpoints will not tell training counts: %s", error)
            counts = None
        try:
            names = training_class_names(cfg)
        except FileNotFoundError:
            names = None
        return cls(_optional(tuple, names), _optional(tuple, counts))

    @classmethod
    def of_checkpoint(cls, checkpoint: Mapping[str, Any]) -> "ClassRecord":
        """The record that a checkpoint carries; an empty one if it carries none.

        Args:
            checkpoint: content of a checkpoint file, or what loading it has left over.

        Raises:
            DataError: if there is one of another form.
        """
        content = checkpoint.get("classes")
        if content is None:
            return cls()
        try:
            names, counts = content["names"], content["training_instances"]
            valid = _is_list_of(names, str) and _is_list_of(counts, int)
        except (TypeError, KeyError):
            valid = False
        if not valid:
            raise DataError(
                "The checkpoint's 'classes' must hold lists 'names' and 'training_instances' (or "
                "null); publish it again with tools/publish_checkpoint.py."
            )
        return cls(_optional(tuple, names), _optional(tuple, counts))

    def for_checkpoint(self) -> dict[str, Any]:
        """What to put into a checkpoint: ``{"classes": ...}``, or nothing if nothing is known."""
        if self == ClassRecord():
            return {}
        return {
            "classes": {
                "names": _optional(list, self.names),
                "training_instances": _optional(list, self.training_instances),
            }
        }


def _is_list_of(values: Any, kind: type) -> bool:
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    return values is None or (is_list and all(type(v) is kind for v in values))


def _optional(kind: Callable, values: Sequence | None):
    return None if values is None else kind(values)
