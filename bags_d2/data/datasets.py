"""Registration of data sets of annotation files and folders, and of the built-in ones.

A data set or file that is not there raises MissingFileError; one that has no meaning, or is not
what the data set is registered with, raises DataError.
"""

import functools
import os
from collections.abc import Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import ConfigError, DataError, MissingFileError
from ..utils.files import local_path
from .annotations import AnnotationSet, read_annotations
from .formats import FOLDER_KINDS, read_row
from .lvis_v1 import lvis_v1_counts

# What datasets/prepare_glyphs.py draws.
GLYPH_SETS = ("glyphs", "glyphs_lvis", "glyphs_tiny")

KINDS = ("coco", "lvis", *FOLDER_KINDS)

# Where Detectron2's own loaders of annotation files are defined, which register_coco_instances,
# register_lvis_instances and the built-in data sets use.
_DETECTRON2_LOADERS = {
    "detectron2.data.datasets.coco": "coco",
    "detectron2.data.datasets.lvis": "lvis",
}

# Where to get the annotations of the data sets that Detectron2 registers, by name prefix.
_SOURCES = {
    "lvis": "download it from https://www.lvisdataset.org/dataset",
    "coco": "download it from https://cocodataset.org/#download",
    "glyphs": "build it with 'bags-d2 prepare glyphs {preset}'",
}


def register_annotation_file(name: str, kind: str, json_file: str, image_root: str) -> None:
    """Register a data set of an annotation file, to be read when the data set is used.

    Args:
        name: the name for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        kind: "coco" or "lvis": where images are found, and by which measures they are evaluated;
            or "yolo", "voc" or "labelme", evaluated as COCO.
        json_file: the annotation file, with classes of any kind and ids of any numbering; for other
            kinds what ``formats.read_row`` takes.
        image_root: folder that the images' paths start from.
    """
    DatasetCatalog.register(
        name, functools.partial(load_annotation_file, json_file, image_root, name, kind)
    )
    metadata = MetadataCatalog.get(name)
    metadata.set(image_root=image_root)
    if kind in FOLDER_KINDS:
        kind = "coco"
    else:
        metadata.set(json_file=json_file)
    if metadata.get("evaluator_type") is None:
        metadata.set(evaluator_type=kind)


def register_lvis_format(name: str, json_file: str, image_root: str) -> None:
    """:func:`register_annotation_file` in LVIS (v0.5 or v1) format, with classes of any kind.

    Detectron2's own ``register_lvis_instances`` knows the classes of LVIS alone.
    """
    register_annotation_file(name, "lvis", json_file, image_root)


def load_annotation_file(
    json_file: str, image_root: str, dataset_name: str, kind: str
) -> list[dict]:
    """Load an annotation file as Detectron2's records, and set the class names in the metadata.

    Args:
        json_file, image_root, dataset_name, kind: see :func:`register_annotation_file`.

    Returns:
        One record for each image, in the order of image ids.
    """
    annotations = _read(json_file, image_root, dataset_name, kind)
    metadata = MetadataCatalog.get(dataset_name)
    if metadata.get("thing_classes") is None:
        metadata.set(thing_classes=list(annotations.names))
    if metadata.get("thing_dataset_id_to_contiguous_id") is None:
        classes = {i: c for c, i in enumerate(annotations.categories.outside)}
        metadata.set(thing_dataset_id_to_contiguous_id=classes)
    return annotations.records(image_root, lvis=kind == "lvis")


def load_lvis_format(json_file: str, image_root: str, dataset_name: str) -> list[dict]:
    """:func:`load_annotation_file` of a file in LVIS format."""
    return load_annotation_file(json_file, image_root, dataset_name, "lvis")


def adopt(name: str) -> None:
    """Let a data set whose annotation file Detectron2 would read be read by this package.

    Detectron2's loaders check little, and numbers of objects would differ from those counted.
    Data sets with a loading function of their own are left alone, as are unknown names.
    """
    module = getattr(DatasetCatalog[name], "__module__", "") if name in DatasetCatalog else ""
    if module in _DETECTRON2_LOADERS:
        metadata = MetadataCatalog.get(name)
        DatasetCatalog.remove(name)
        kind = _DETECTRON2_LOADERS[module]
        register_annotation_file(name, kind, metadata.json_file, metadata.image_root)


def dataset_annotations(name: str) -> AnnotationSet | None:
    """The annotations that a data set is loaded from; None if its loader is the user's own."""
    if name not in DatasetCatalog:
        raise MissingFileError(f"Data set '{name}' (DATASETS) is not registered.")
    adopt(name)
    loader = DatasetCatalog[name]
    if getattr(loader, "func", None) is not load_annotation_file:
        return None
    return _read(*loader.args)


def evaluated_annotations(name: str) -> AnnotationSet:
    """What a data set is evaluated on: its metadata's json_file, else what it is loaded from."""
    json_file = MetadataCatalog.get(name).get("json_file")
    if json_file is not None:
        return read_annotations(json_file)
    annotations = dataset_annotations(name) if name in DatasetCatalog else None
    if annotations is None:
        raise DataError(
            f"Data set '{name}' has no json_file in its metadata; register it with its annotation "
            "file."
        )
    return annotations


def class_names(name: str) -> list[str]:
    """Names of a registered data set's classes, in contiguous order."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None:
        annotations = dataset_annotations(name)
        if annotations is not None:
            return list(annotations.names)
        DatasetCatalog.get(name)  # which may set them
    if metadata.get("thing_classes") is None:
        raise DataError(
            f"Data set '{name}' has no class names; set 'thing_classes' in its metadata."
        )
    return list(metadata.thing_classes)


def missing_dataset_message(dataset_name: str, path: str) -> str:
    """One sentence that names a missing data file and where to get it."""
    remedy = "correct the path under which the data set is registered"
    for prefix, source in _SOURCES.items():
        if dataset_name.startswith(prefix):
            preset = dataset_name.rpartition("_")[0]
            remedy = f"{source.format(preset=preset)}, or set DETECTRON2_DATASETS to its folder"
    return f"'{path}' of data set '{dataset_name}' does not exist; {remedy}."


def _read(json_file: str, image_root: str, dataset_name: str, kind: str) -> AnnotationSet:
    if not os.path.exists(local_path(json_file)):
        raise MissingFileError(missing_dataset_message(dataset_name, json_file))
    annotations = read_row(kind, json_file, image_root)
    registered = MetadataCatalog.get(dataset_name).get("thing_classes")
    if registered is not None and len(registered) != len(annotations.names):
        raise DataError(
            f"'{json_file}' has {len(annotations.names)} categories but data set '{dataset_name}' "
            f"is registered with {len(registered)} names ('thing_classes'); correct either."
        )
    return annotations


def register_from_config(rows: Sequence[Sequence[str]]) -> None:
    """Register the data sets that a config asks for (``DATASETS.REGISTER``).

    Each row has a data set's name and kind, the annotation file and the folder of images; see
    :func:`register_annotation_file`. The files need not exist before the data set is used.

    Raises:
        ConfigError: if a row is of another form, or its name is taken by another data set.
    """
    for row in rows:
        strings = isinstance(row, list | tuple) and all(isinstance(x, str) for x in row)
        if not strings or len(row) != 4 or row[1] not in KINDS:
            raise ConfigError(
                f"DATASETS.REGISTER must hold rows of (name, one of {KINDS}, annotation file, "
                f"folder of images), found {row!r}."
            )
        name, kind, json_file, image_root = row
        if name in DatasetCatalog:
            adopt(name)
            if getattr(DatasetCatalog[name], "args", None) != (json_file, image_root, name, kind):
                raise ConfigError(
                    f"DATASETS.REGISTER: a data set '{name}' of other files is registered already; "
                    "choose another name."
                )
        else:
            register_annotation_file(name, kind, json_file, image_root)


def register_builtin_datasets(root: str) -> None:
    """Register the glyphs below a folder, and complete the metadata of Detectron2's LVIS v1."""
    for preset in GLYPH_SETS:
        folder = os.path.join(root, preset)
        for split in ("train", "val"):
            name = f"{preset}_{split}"
            file = os.path.join(folder, "annotations", f"{name}.json")
            register_lvis_format(name, file, folder)
    # Detectron2 carries the image counts of LVIS v1 alone. With the instance counts, neither
    # training nor evaluation has to read a 1 GB file for them.
    MetadataCatalog.get("lvis_v1_train").set(
        class_instance_count=lvis_v1_counts()["instance_count"]
    )
