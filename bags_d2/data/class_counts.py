"""Training instances (or images) of each class, for any registered data set.

Counts are in contiguous class order, the order of Detectron2's ``gt_classes``. What is counted is
what training sees: crowd annotations are left out, as Detectron2's dataset mapper does.
"""

import functools
import os
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..config import long_tail
from ..errors import ConfigError, DataError, MissingFileError
from ..utils.files import load_json
from .annotations import AnnotationSet, read_annotations
from .datasets import class_names, dataset_annotations

__all__ = [
    "count_annotation_file",
    "count_classes",
    "read_class_counts",
    "training_class_counts",
    "training_class_names",
    "training_image_count",
]

COUNTABLE = ("instances", "images")


def training_class_counts(cfg: CfgNode, by: str | None = None) -> torch.Tensor:
    """Counts that a config asks for: of its counts file, or of its training sets.

    Args:
        cfg: config with the keys of ``add_bags_config``.
        by: "instances" or "images"; None takes ``MODEL.LONG_TAIL.COUNT_BY``.

    Returns:
        Long tensor (K,).

    Raises:
        MissingFileError: if the counts file or the annotations do not exist.
        ConfigError, DataError: if classes disagree between training sets or with
            ``MODEL.ROI_HEADS.NUM_CLASSES``, or the counts file is faulty.
    """
    by = by or long_tail(cfg).COUNT_BY
    if by not in COUNTABLE:
        raise ConfigError(f"MODEL.LONG_TAIL.COUNT_BY must be one of {COUNTABLE}, found '{by}'")
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    names = cfg.DATASETS.TRAIN
    path = long_tail(cfg).CLASS_COUNTS_FILE
    if path:
        content = _load_counts_file(path)
        # Only a file keyed by name needs the names, for which a data set may have to be loaded.
        known = _by_name(content) and names and names[0] in DatasetCatalog
        counts = _counts_from(path, content, class_names(names[0]) if known else None)
        source = f"MODEL.LONG_TAIL.CLASS_COUNTS_FILE '{path}'"
    elif names:
        counts = functools.reduce(torch.add, _counts_of_same_classes(names, by))
        source = f"DATASETS.TRAIN {tuple(names)}"
    else:
        raise MissingFileError(
            "No class counts: DATASETS.TRAIN and MODEL.LONG_TAIL.CLASS_COUNTS_FILE are both empty."
        )
    if len(counts) != num_classes:
        raise ConfigError(
            f"{source} has {len(counts)} classes but MODEL.ROI_HEADS.NUM_CLASSES is "
            f"{num_classes}; set it to {len(counts)}."
        )
    return counts


def training_class_names(cfg: CfgNode) -> list[str] | None:
    """Names of the classes of ``DATASETS.TRAIN`` in contiguous order; None if it has none.

    Raises:
        MissingFileError: if the annotations do not exist.
        DataError: if the annotation file is faulty.
    """
    return class_names(_registered(cfg.DATASETS.TRAIN[0])) if cfg.DATASETS.TRAIN else None


def training_image_count(cfg: CfgNode) -> int:
    """Number of images of ``DATASETS.TRAIN``, those without annotations included.

    Raises:
        MissingFileError: if there is no training set, or its annotations do not exist.
        DataError: if the annotation file is faulty.
    """
    if not cfg.DATASETS.TRAIN:
        raise MissingFileError("No training images: DATASETS.TRAIN is empty.")
    return sum(_num_images(_registered(name)) for name in cfg.DATASETS.TRAIN)


def count_classes(dataset_name: str, by: str = "instances") -> torch.Tensor:
    """Count the classes of one registered data set.

    Uses the counts in its metadata where there are some (``class_instance_count``,
    ``class_image_count``), else its annotation file, else, where the loader is the user's own, the
    records that it returns.

    Args:
        dataset_name: a name registered in ``DatasetCatalog``.
        by: "instances" or "images" (images with at least one instance of the class).

    Returns:
        Long tensor (K,).

    Raises:
        MissingFileError: if the annotation file does not exist, or there is no such data set.
        DataError: if the annotation file is faulty, or the classes have no names.
    """
    metadata = MetadataCatalog.get(dataset_name)
    known = metadata.get({"instances": "class_instance_count", "images": "class_image_count"}[by])
    if known is not None:
        counts = [row["image_count"] if isinstance(row, dict) else row for row in known]
        return torch.tensor(counts)
    annotations = dataset_annotations(_registered(dataset_name))
    if annotations is None:
        records = DatasetCatalog.get(dataset_name)
        return _count_records(records, len(class_names(dataset_name)), by)
    return torch.from_numpy(_counts_of(annotations, by))


def count_annotation_file(path: str, by: str = "instances") -> tuple[torch.Tensor, list[str]]:
    """Count the classes of a COCO or LVIS annotation file that need not be registered.

    Args:
        path: the file.
        by: "instances" or "images".

    Returns:
        Long tensor (K,) in the order of category ids, and K names.

    Raises:
        MissingFileError: if there is no such file.
        DataError: if it is faulty.
    """
    annotations = read_annotations(path)
    return torch.from_numpy(_counts_of(annotations, by)), list(annotations.names)


def _counts_of(annotations: AnnotationSet, by: str) -> np.ndarray:
    return annotations.instance_counts() if by == "instances" else annotations.image_counts()


def _num_images(dataset_name: str) -> int:
    annotations = dataset_annotations(dataset_name)
    return len(annotations.images if annotations is not None else DatasetCatalog.get(dataset_name))


def _registered(dataset_name: str) -> str:
    if dataset_name not in DatasetCatalog:
        raise MissingFileError(f"Data set '{dataset_name}' (DATASETS.TRAIN) is not registered.")
    return dataset_name


def read_class_counts(path: str, class_names: Sequence[str] | None = None) -> torch.Tensor:
    """Read a counts file: a JSON list in contiguous class order, or {class name: count}.

    Args:
        path: the file.
        class_names: K names in contiguous order; needed for a file keyed by name.

    Returns:
        Long tensor (K,).

    Raises:
        MissingFileError: if there is no such file.
        DataError: if it is not such a JSON, or its classes are not those of the data set.
    """
    return _counts_from(path, _load_counts_file(path), class_names)


def _load_counts_file(path: str):
    local = PathManager.get_local_path(path)
    if not os.path.isfile(local):
        raise MissingFileError(
            f"MODEL.LONG_TAIL.CLASS_COUNTS_FILE '{path}' does not exist; correct the path or set "
            "it to ''."
        )
    return load_json(local)


def _by_name(content) -> bool:
    return isinstance(content, dict)


def _counts_from(path: str, content, class_names: Sequence[str] | None) -> torch.Tensor:
    source = f"MODEL.LONG_TAIL.CLASS_COUNTS_FILE '{path}'"
    if _by_name(content):
        if class_names is None:
            raise DataError(
                f"{source} is keyed by name, but the class names are unknown; register the data "
                "set of DATASETS.TRAIN, or use a list in class order."
            )
        if set(content) != set(class_names):
            odd = sorted(set(content) ^ set(class_names))[:5]
            raise DataError(f"{source} and the data set disagree on the classes {odd}.")
        content = [content[name] for name in class_names]
    valid = isinstance(content, list) and all(type(n) is int and n >= 0 for n in content)
    if not valid or not content:
        raise DataError(
            f"{source} must hold a JSON list of whole numbers of 0 or more, one for each class, "
            "or an object {class name: count}."
        )
    return torch.tensor(content)


def _counts_of_same_classes(names: Sequence[str], by: str) -> list[torch.Tensor]:
    """Counts of each data set, once they are known to share their classes."""
    counts = [count_classes(name, by) for name in names]
    for name, count in zip(names[1:], counts[1:], strict=True):
        if len(count) != len(counts[0]) or class_names(name) != class_names(names[0]):
            raise DataError(
                f"The training sets '{names[0]}' and '{name}' have different classes; list only "
                "data sets that share theirs in DATASETS.TRAIN."
            )
    return counts


def _count_records(records: list[dict], num_classes: int, by: str) -> torch.Tensor:
    counts = torch.zeros(num_classes, dtype=torch.long)
    for record in records:
        ids = [a["category_id"] for a in record["annotations"] if not a.get("iscrowd", 0)]
        for c in ids if by == "instances" else set(ids):
            counts[c] += 1
    return counts
