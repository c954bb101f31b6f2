"""Training instances (or images) of each class, for any registered data set.

Counts are in contiguous class order, the order of Detectron2's ``gt_classes``. What is counted is
what training sees: crowd annotations are left out, as Detectron2's dataset mapper does.
"""

import functools
import logging
import os
from collections.abc import Iterable, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..errors import ConfigError, DataError, MissingFileError
from .json_files import load_json

__all__ = [
    "count_annotation_file",
    "count_classes",
    "missing_dataset_message",
    "read_class_counts",
    "training_class_counts",
    "training_class_names",
    "training_image_count",
]

logger = logging.getLogger(__name__)

COUNTABLE = ("instances", "images")

# Where to get the annotations of the data sets that Detectron2 registers, by name prefix.
_SOURCES = {
    "lvis": "download it from https://www.lvisdataset.org/dataset",
    "coco": "download it from https://cocodataset.org/#download",
    "glyphs": "build it with 'python datasets/prepare_glyphs.py {preset}'",
}


def training_class_counts(cfg: CfgNode, by: str | None = None) -> torch.Tensor:
    """Counts that a config asks for: of its counts file, or of its training sets.

    Args:
        cfg: config with the keys of ``add_bags_config``.
        by: "instances" or "images"; None takes ``MODEL.BAGS.COUNT_BY``.

    Returns:
        Long tensor (K,).

    Raises:
        MissingFileError: if the counts file or the annotations do not exist.
        ConfigError, DataError: if classes disagree between training sets or with
            ``MODEL.ROI_HEADS.NUM_CLASSES``, or the counts file is faulty.
    """
    by = by or cfg.MODEL.BAGS.COUNT_BY
    if by not in COUNTABLE:
        raise ConfigError(f"MODEL.BAGS.COUNT_BY must be one of {COUNTABLE}, found '{by}'")
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    names = cfg.DATASETS.TRAIN
    path = cfg.MODEL.BAGS.CLASS_COUNTS_FILE
    if path:
        content = _load_counts_file(path)
        # Only a file keyed by name needs the names, for which a data set may have to be loaded.
        counts = _counts_from(path, content, _class_names(names) if _by_name(content) else None)
        source = f"MODEL.BAGS.CLASS_COUNTS_FILE '{path}'"
    elif names:
        counts = functools.reduce(torch.add, _counts_of_same_classes(names, by))
        source = f"DATASETS.TRAIN {tuple(names)}"
    else:
        raise MissingFileError(
            "No class counts: DATASETS.TRAIN and MODEL.BAGS.CLASS_COUNTS_FILE are both empty."
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
    if not cfg.DATASETS.TRAIN:
        return None
    name = cfg.DATASETS.TRAIN[0]
    names = MetadataCatalog.get(name).get("thing_classes")
    if names is None:
        names = _counts_and_names(name, "instances")[1]
    return None if names is None or None in names else list(names)


def training_image_count(cfg: CfgNode) -> int:
    """Number of images of ``DATASETS.TRAIN``, those without annotations included.

    Raises:
        MissingFileError: if there is no training set, or its annotations do not exist.
        DataError: if the annotation file is faulty.
    """
    if not cfg.DATASETS.TRAIN:
        raise MissingFileError("No training images: DATASETS.TRAIN is empty.")
    return sum(_count_images(name) for name in cfg.DATASETS.TRAIN)


def count_classes(dataset_name: str, by: str = "instances") -> torch.Tensor:
    """Count the classes of one registered data set.

    Uses the counts in its metadata where there are some (``class_instance_count``,
    ``class_image_count``), else the annotation JSON that the metadata names, else the data set
    itself. The JSON comes first because reading it builds no list of images.

    Args:
        dataset_name: a name registered in ``DatasetCatalog``.
        by: "instances" or "images" (images with at least one instance of the class).

    Returns:
        Long tensor (K,).

    Raises:
        MissingFileError: if the annotation file does not exist, or there is no such data set.
        DataError: if the annotation file is faulty, or the classes have no names.
    """
    return _counts_and_names(dataset_name, by)[0]


def _counts_and_names(dataset_name: str, by: str) -> tuple[torch.Tensor, list[str] | None]:
    """Counts (K,) and, where they can be had without loading the images list, K class names."""
    metadata = MetadataCatalog.get(dataset_name)
    known = metadata.get({"instances": "class_instance_count", "images": "class_image_count"}[by])
    if known is not None:
        counts = [row["image_count"] if isinstance(row, dict) else row for row in known]
        return torch.tensor(counts), metadata.get("thing_classes")
    if dataset_name not in DatasetCatalog:
        raise MissingFileError(f"Data set '{dataset_name}' (DATASETS.TRAIN) is not registered.")
    if metadata.get("json_file") is None:
        records = DatasetCatalog.get(dataset_name)
        if metadata.get("thing_classes") is None:  # asked after loading, which may set it
            raise DataError(
                f"Data set '{dataset_name}' has no class names; set 'thing_classes' in its "
                "metadata."
            )
        return _count_records(records, metadata.thing_classes, by), metadata.thing_classes
    counts, names, _ = _count_annotations(dataset_name)
    return counts[COUNTABLE.index(by)].clone(), list(names)


def count_annotation_file(
    path: str, by: str = "instances"
) -> tuple[torch.Tensor, list[str] | None]:
    """Count the classes of a COCO or LVIS annotation file that need not be registered.

    Args:
        path: the file.
        by: "instances" or "images".

    Returns:
        Long tensor (K,) in the order of category ids, and K names, None if some have none.

    Raises:
        MissingFileError: if there is no such file.
        DataError: if it is faulty.
    """
    local = PathManager.get_local_path(path)
    if not os.path.isfile(local):
        raise MissingFileError(f"Annotation file '{path}' does not exist.")
    counts, names, _ = _count_json(local, _version(local), frozenset())
    return counts[COUNTABLE.index(by)].clone(), None if None in names else list(names)


def _count_images(dataset_name: str) -> int:
    if dataset_name not in DatasetCatalog:
        raise MissingFileError(f"Data set '{dataset_name}' (DATASETS.TRAIN) is not registered.")
    if MetadataCatalog.get(dataset_name).get("json_file") is None:
        return len(DatasetCatalog.get(dataset_name))
    return _count_annotations(dataset_name)[2]


def _count_annotations(dataset_name: str) -> tuple[torch.Tensor, tuple[str | None, ...], int]:
    """What ``_count_json`` finds in the annotation file of a data set."""
    metadata = MetadataCatalog.get(dataset_name)
    path = PathManager.get_local_path(metadata.json_file)
    if not os.path.isfile(path):
        raise MissingFileError(missing_dataset_message(dataset_name, metadata.json_file))
    id_map = metadata.get("thing_dataset_id_to_contiguous_id")
    return _count_json(path, _version(path), frozenset((id_map or {}).items()))


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


def missing_dataset_message(dataset_name: str, path: str) -> str:
    """One sentence that names a missing data file and where to get it."""
    for prefix, source in _SOURCES.items():
        if dataset_name.startswith(prefix):
            preset = dataset_name.rpartition("_")[0]
            remedy = f"{source.format(preset=preset)}, or set DETECTRON2_DATASETS to its folder"
            break
    else:
        remedy = "correct the path under which the data set is registered"
    return f"'{path}' of data set '{dataset_name}' does not exist; {remedy}."


def _load_counts_file(path: str):
    local = PathManager.get_local_path(path)
    if not os.path.isfile(local):
        raise MissingFileError(
            f"MODEL.BAGS.CLASS_COUNTS_FILE '{path}' does not exist; correct the path or set it to "
            "''."
        )
    return load_json(local)


def _by_name(content) -> bool:
    return isinstance(content, dict)


def _counts_from(path: str, content, class_names: Sequence[str] | None) -> torch.Tensor:
    source = f"MODEL.BAGS.CLASS_COUNTS_FILE '{path}'"
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


def _class_names(dataset_names: Sequence[str]) -> list[str] | None:
    """Class names of the first data set, which its loader may have to set first."""
    if not dataset_names or dataset_names[0] not in DatasetCatalog:
        return None
    metadata = MetadataCatalog.get(dataset_names[0])
    if metadata.get("thing_classes") is None:
        DatasetCatalog.get(dataset_names[0])
    return metadata.get("thing_classes")


def _counts_of_same_classes(names: Iterable[str], by: str) -> list[torch.Tensor]:
    """Counts of each data set, once they are known to share their classes."""
    counts, classes = zip(*(_counts_and_names(name, by) for name in names), strict=True)
    for name, own, count in zip(names, classes, counts, strict=True):
        differ = own is not None and classes[0] is not None and list(own) != list(classes[0])
        if differ or len(count) != len(counts[0]):
            raise DataError(
                f"The training sets '{names[0]}' and '{name}' have different classes; list only "
                "data sets that share theirs in DATASETS.TRAIN."
            )
    return list(counts)


def _count_records(records: list[dict], classes: list[str], by: str) -> torch.Tensor:
    counts = torch.zeros(len(classes), dtype=torch.long)
    for record in records:
        ids = [a["category_id"] for a in record["annotations"] if not a.get("iscrowd", 0)]
        for c in ids if by == "instances" else set(ids):
            counts[c] += 1
    return counts


def _version(path: str) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=32)
def _count_json(
    path: str, version: tuple[int, int], id_map: frozenset
) -> tuple[torch.Tensor, tuple[str | None, ...], int]:
    """Instances and images of each class (2, K), K class names, and the number of images.

    Of a COCO or LVIS JSON. ``version`` (its time and size) is there for the cache alone.
    """
    content = load_json(path)
    for section in ("annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(section), list):
            raise DataError(
                f"'{path}' has no list '{section}': not a COCO or LVIS annotation file."
            )
    try:
        name_of = {category["id"]: category.get("name") for category in content["categories"]}
        # Detectron2's loaders number the categories in the order of their ids.
        ids = sorted(name_of)
    except (KeyError, TypeError) as error:
        raise DataError(f"'{path}': a category lacks a valid id ({error!r}).") from None
    to_class = dict(id_map) or {category_id: i for i, category_id in enumerate(ids)}
    counts = torch.zeros(2, max(to_class.values(), default=-1) + 1, dtype=torch.long)
    instances, images = counts[0].numpy(), counts[1].numpy()
    seen = set()
    for annotation in content["annotations"]:
        if annotation.get("iscrowd", 0):
            continue
        category_id, image_id = annotation.get("category_id"), annotation.get("image_id")
        c = to_class.get(category_id)
        if c is None or image_id is None:
            raise DataError(
                f"'{path}': annotation {annotation.get('id')} has category_id {category_id} and "
                f"image_id {image_id}; it needs an image, and one of the file's categories."
            )
        instances[c] += 1
        if (c, image_id) not in seen:
            seen.add((c, image_id))
            images[c] += 1
    logger.info("Counted %d instances of %d classes in %s", instances.sum(), len(instances), path)
    names = tuple(name_of.get(category_id) for category_id in sorted(to_class, key=to_class.get))
    return counts, names, len(content.get("images") or ())
