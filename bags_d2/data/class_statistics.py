"""The one place of what is known of the classes: their names and their training counts.

Everything is in contiguous class order, that of Detectron2's ``gt_classes``. What is counted is
what is trained on: crowds, ignored regions and boxes that enclose nothing are left out.
A file that is not there raises MissingFileError; one that is faulty, or lacks names, DataError.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn

from ..config import long_tail
from ..errors import BagsError, ConfigError, DataError, MissingFileError
from ..utils.files import load_json
from .annotations import AnnotationSet, read_annotations
from .datasets import class_names, dataset_annotations

logger = logging.getLogger(__name__)

COUNTABLE = ("instances", "images")


@dataclass(frozen=True)
class ClassStatistics:
    """Names and training counts of K classes, as checkpoints carry them to serve alone.

    Attributes:
        names: K names; None if unknown.
        training_instances: K counts; None if unknown.
    """

    names: tuple[str, ...] | None = None
    training_instances: tuple[int, ...] | None = None

    @classmethod
    def from_training_set(
        cls, cfg: CfgNode, tolerated: type[Exception] | tuple[()] = FileNotFoundError
    ) -> "ClassStatistics":
        """Those of ``DATASETS.TRAIN``, unknown where reading them raises what is ``tolerated``.

        Raises:
            ConfigError, DataError: if the files contradict each other or the config.
        """

        def attempt(read: Callable[[], Sequence | None]) -> tuple | None:
            try:
                return _tuple(read())
            except tolerated as error:
                logger.warning("Not everything is known of the training classes: %s", error)
                return None

        counts = attempt(lambda: training_class_counts(cfg, "instances").tolist())
        return cls(attempt(lambda: training_class_names(cfg)), counts)

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Any]) -> "ClassStatistics":
        """Those that a checkpoint's content carries; unknown ones if it carries none."""
        content = checkpoint.get("classes")
        if content is None:
            return cls()
        try:
            names, counts = content["names"], content["training_instances"]
            for values, kind in ((names, str), (counts, int)):
                is_list = isinstance(values, list | tuple) and all(type(v) is kind for v in values)
                if not is_list and values is not None:
                    raise TypeError
        except (TypeError, KeyError):
            raise DataError(
                "The checkpoint's 'classes' must hold lists 'names' and 'training_instances' (or "
                "null); publish it again with bags-d2 publish."
            ) from None
        return cls(_tuple(names), _tuple(counts))

    @classmethod
    def from_model(cls, cfg: CfgNode, model: nn.Module) -> "ClassStatistics":
        """Those of a model: its checkpoint's, else counts in its buffers, else the training set's.

        Names are unknown if they are of another number of classes than the model's.
        """
        carried = [m.class_statistics for m in model.modules() if hasattr(m, "class_statistics")]
        names, counts = vars(carried[0] if carried else cls()).values()
        if counts is None and long_tail(cfg).COUNT_BY == "instances":
            for name, buffer in model.named_buffers():
                if name.endswith("class_counts") and bool((buffer >= 0).all()):
                    counts = tuple(buffer.tolist())
        if None in (names, counts):
            training = cls.from_training_set(cfg, tolerated=BagsError)
            names, counts = names or training.names, counts or training.training_instances
        fits = names is not None and len(names) == cfg.MODEL.ROI_HEADS.NUM_CLASSES
        return cls(names if fits else None, counts)

    def for_checkpoint(self) -> dict[str, Any]:
        """What to put into a checkpoint: {"classes": ...}, or nothing if nothing is known."""
        values = {name: value and list(value) for name, value in vars(self).items()}
        return {} if self == ClassStatistics() else {"classes": values}

    def require_order_of(self, trained_on: "ClassStatistics") -> None:
        """Raise ConfigError if a training set has these classes in another order.

        A checkpoint's weights for each class would then go to other classes.
        """
        if None in (self.names, trained_on.names) or self.names == trained_on.names:
            return
        if sorted(self.names) == sorted(trained_on.names):
            raise ConfigError(
                "The checkpoint (MODEL.WEIGHTS) has the training set's classes in another order, "
                "so its weights would go to other classes; list the categories of DATASETS.TRAIN "
                f"in the checkpoint's order, which begins with {list(self.names[:3])}."
            )
        logger.warning(
            "The checkpoint was trained on other classes than those of DATASETS.TRAIN; what it has "
            "learned for each class goes to the class of the same number."
        )


def training_class_counts(cfg: CfgNode, by: str | None = None) -> torch.Tensor:
    """Counts (K,) that a config asks for: of its counts file, or else of its training sets.

    ``by`` is "instances" or "images"; None takes ``MODEL.LONG_TAIL.COUNT_BY``.

    Raises:
        MissingFileError: if the counts file or the annotations do not exist.
        ConfigError, DataError: if classes disagree between training sets or with
            ``MODEL.ROI_HEADS.NUM_CLASSES``, or a file is faulty.
    """
    by = by or long_tail(cfg).COUNT_BY
    if by not in COUNTABLE:
        raise ConfigError(f"MODEL.LONG_TAIL.COUNT_BY must be one of {COUNTABLE}, found '{by}'")
    names, path = cfg.DATASETS.TRAIN, long_tail(cfg).CLASS_COUNTS_FILE
    if path:
        known = len(names) > 0 and names[0] in DatasetCatalog
        counts = _read_counts(path, functools.partial(class_names, names[0]) if known else None)
        source = f"MODEL.LONG_TAIL.CLASS_COUNTS_FILE '{path}'"
    elif names:
        require_same_classes(names)
        counts = sum(count_classes(name, by) for name in names)
        source = f"DATASETS.TRAIN {tuple(names)}"
    else:
        raise MissingFileError(
            "No class counts: DATASETS.TRAIN and MODEL.LONG_TAIL.CLASS_COUNTS_FILE are both empty."
        )
    if len(counts) != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        raise ConfigError(
            f"{source} has {len(counts)} classes but MODEL.ROI_HEADS.NUM_CLASSES is "
            f"{cfg.MODEL.ROI_HEADS.NUM_CLASSES}; set it to {len(counts)}."
        )
    return counts


def training_class_names(cfg: CfgNode) -> list[str] | None:
    """Names of the classes of ``DATASETS.TRAIN``; None if that is empty."""
    return class_names(cfg.DATASETS.TRAIN[0]) if cfg.DATASETS.TRAIN else None


def training_image_count(cfg: CfgNode) -> int:
    """Images of ``DATASETS.TRAIN``, those without annotations included."""
    if not cfg.DATASETS.TRAIN:
        raise MissingFileError("No training images: DATASETS.TRAIN is empty.")
    found = {name: dataset_annotations(name) for name in cfg.DATASETS.TRAIN}
    return sum(len(DatasetCatalog.get(n) if a is None else a.images) for n, a in found.items())


def count_classes(dataset_name: str, by: str = "instances") -> torch.Tensor:
    """Count the "instances" of each class of a registered data set, or the "images" that show it.

    Uses the counts in its metadata if there are any (``class_instance_count``,
    ``class_image_count``), else its annotation file, else the records of the user's own loader.

    Returns:
        Long tensor (K,).
    """
    metadata = MetadataCatalog.get(dataset_name)
    known = metadata.get({"instances": "class_instance_count", "images": "class_image_count"}[by])
    if known is not None:
        counts = [row["image_count"] if isinstance(row, dict) else row for row in known]
    elif (annotations := dataset_annotations(dataset_name)) is not None:
        counts = _counts_of(annotations, by)
    else:
        counts = np.zeros(len(class_names(dataset_name)), dtype=np.int64)
        for record in DatasetCatalog.get(dataset_name):
            ids = [a["category_id"] for a in record["annotations"] if not a.get("iscrowd")]
            np.add.at(counts, ids if by == "instances" else list(set(ids)), 1)
    return torch.as_tensor(counts)


def count_annotation_file(path: str, by: str = "instances") -> tuple[torch.Tensor, list[str]]:
    """Counts (K,) and K names of the classes of a file that need not be registered."""
    annotations = read_annotations(path)
    return torch.from_numpy(_counts_of(annotations, by)), list(annotations.names)


def read_class_counts(path: str, class_names: Sequence[str] | None = None) -> torch.Tensor:
    """Read a counts file: a JSON list in class order, or {class name: count}.

    A file keyed by name needs the K ``class_names``, in class order.

    Returns:
        Long tensor (K,).
    """
    return _read_counts(path, None if class_names is None else lambda: class_names)


def require_same_classes(names: Sequence[str]) -> None:
    """Raise DataError unless training sets share their classes."""
    for name in names[1:]:
        if class_names(name) != class_names(names[0]):
            raise DataError(
                f"The training sets '{names[0]}' and '{name}' have different classes; list only "
                "data sets that share theirs in DATASETS.TRAIN."
            )


def _counts_of(annotations: AnnotationSet, by: str) -> np.ndarray:
    return annotations.instance_counts() if by == "instances" else annotations.image_counts()


def _read_counts(path: str, names_of_set: Callable[[], Sequence[str]] | None) -> torch.Tensor:
    """A counts file; names, for which a data set may have to be loaded, only if it needs them."""
    source = f"MODEL.LONG_TAIL.CLASS_COUNTS_FILE '{path}'"
    try:
        content = load_json(path)
    except MissingFileError:
        raise MissingFileError(
            f"{source} does not exist; correct the path or set it to ''."
        ) from None
    if isinstance(content, dict):
        if names_of_set is None:
            raise DataError(
                f"{source} is keyed by name, but the class names are unknown; register the data "
                "set of DATASETS.TRAIN, or use a list in class order."
            )
        names = names_of_set()
        if odd := set(content) ^ set(names):
            raise DataError(f"{source} and the data set disagree on the classes {sorted(odd)[:5]}.")
        content = [content[name] for name in names]
    is_list = isinstance(content, list) and content
    if not is_list or not all(type(n) is int and 0 <= n < 2**53 for n in content):
        raise DataError(
            f"{source} must hold a JSON list of whole numbers of 0 or more (below 2^53), one "
            "for each class, or an object {class name: count}."
        )
    return torch.tensor(content)


def _tuple(values: Sequence | None) -> tuple | None:
    return None if values is None else tuple(values)
