"""Registration of data sets in LVIS format, and of the built-in ones."""

import functools
import os
from collections.abc import Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..errors import ConfigError, DataError, MissingFileError
from .class_counts import missing_dataset_message
from .json_files import load_json
from .lvis_v1 import lvis_v1_counts

# What datasets/prepare_glyphs.py draws.
GLYPH_SETS = ("glyphs", "glyphs_lvis", "glyphs_tiny")

__all__ = [
    "load_lvis_format",
    "register_builtin_datasets",
    "register_from_config",
    "register_lvis_format",
]


def register_lvis_format(name: str, json_file: str, image_root: str) -> None:
    """Register a data set with annotations in LVIS (v0.5 or v1) format, with classes of any kind.

    Detectron2's own ``register_lvis_instances`` knows the classes of LVIS alone; this one takes
    them from the file, with category ids of any numbering.

    Args:
        name: the name for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        json_file: the annotation file; need not exist before the data set is used.
        image_root: folder that the images' paths start from.
    """
    DatasetCatalog.register(
        name, functools.partial(load_lvis_format, json_file, image_root, dataset_name=name)
    )
    MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root, evaluator_type="lvis")


def register_from_config(rows: Sequence[Sequence[str]]) -> None:
    """Register the data sets that a config asks for (``DATASETS.REGISTER``).

    Args:
        rows: for each data set its name, "coco" or "lvis", the annotation file and the folder of
            images. The files need not exist before the data set is used.

    Raises:
        ConfigError: if a row is of another form, or its name is taken by another data set.
    """
    for row in rows:
        strings = isinstance(row, list | tuple) and all(isinstance(x, str) for x in row)
        if not strings or len(row) != 4 or row[1] not in ("coco", "lvis"):
            raise ConfigError(
                "DATASETS.REGISTER must hold rows of (name, 'coco' or 'lvis', annotation file, "
                f"folder of images), found {row!r}."
            )
        name, kind, json_file, image_root = row
        if name in DatasetCatalog:
            known = MetadataCatalog.get(name)
            if (known.get("json_file"), known.get("image_root")) != (json_file, image_root):
                raise ConfigError(
                    f"DATASETS.REGISTER: a data set '{name}' of other files is registered already; "
                    "choose another name."
                )
        elif kind == "coco":
            register_coco_instances(name, {}, json_file, image_root)
        else:
            register_lvis_format(name, json_file, image_root)


def load_lvis_format(json_file: str, image_root: str, dataset_name: str) -> list[dict]:
    """Load an LVIS-format JSON as Detectron2 records, and set the class names in the metadata.

    Args:
        json_file: the annotation file.
        image_root: folder that the images' paths start from. An image stands at the last two
            parts of its ``coco_url`` (split folder and file, as in LVIS v1), or at its
            ``file_name`` where there is no URL.
        dataset_name: name of the data set, for the metadata.

    Returns:
        One record for each image, in the order of image ids.

    Raises:
        MissingFileError: if there is no such file.
        DataError: if it is not valid, or an annotation names an unknown image or category.
    """
    path = PathManager.get_local_path(json_file)
    if not os.path.isfile(path):
        raise MissingFileError(missing_dataset_message(dataset_name, json_file))
    content = load_json(path)
    try:
        categories = sorted(content["categories"], key=lambda category: category["id"])
        classes = [category["name"] for category in categories]
        images = sorted(content["images"], key=lambda image: image["id"])
        records = {image["id"]: _record(image, image_root) for image in images}
    except (KeyError, TypeError) as error:
        raise DataError(
            f"'{json_file}' is not an LVIS annotation file: 'categories' need id and name, "
            f"'images' need id, height, width and coco_url or file_name ({error!r})."
        ) from None

    to_class = {category["id"]: i for i, category in enumerate(categories)}
    MetadataCatalog.get(dataset_name).set(
        thing_classes=classes, thing_dataset_id_to_contiguous_id=to_class
    )
    annotations = content.get("annotations", [])
    for annotation in annotations:
        try:
            record = records[annotation["image_id"]]
            instance = {
                "bbox": annotation["bbox"],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": to_class[annotation["category_id"]],
                "iscrowd": annotation.get("iscrowd", 0),
            }
        except KeyError as error:
            raise DataError(
                f"'{json_file}': annotation {annotation.get('id')} lacks a key or names an unknown "
                f"image or category ({error})."
            ) from None
        if annotation.get("segmentation"):
            instance["segmentation"] = annotation["segmentation"]
        record["annotations"].append(instance)
    return list(records.values())


def register_builtin_datasets(root: str) -> None:
    """Register the glyph data sets, and complete the metadata of Detectron2's LVIS v1.

    Args:
        root: the folder of data sets, Detectron2's ``DETECTRON2_DATASETS``.
    """
    for preset in GLYPH_SETS:
        folder = os.path.join(root, preset)
        for split in ("train", "val"):
            register_lvis_format(
                f"{preset}_{split}",
                os.path.join(folder, "annotations", f"{preset}_{split}.json"),
                folder,
            )
    # Detectron2 carries the image counts of LVIS v1 alone. With the instance counts, neither
    # training nor evaluation has to read a 1 GB file for them.
    MetadataCatalog.get("lvis_v1_train").set(
        class_instance_count=lvis_v1_counts()["instance_count"]
    )


def _record(image: dict, image_root: str) -> dict:
    if "coco_url" in image:
        file_name = "/".join(image["coco_url"].split("/")[-2:])
    else:
        file_name = image["file_name"]
    return {
        "file_name": os.path.join(image_root, file_name),
        "image_id": image["id"],
        "height": image["height"],
        "width": image["width"],
        "neg_category_ids": image.get("neg_category_ids", []),
        "not_exhaustive_category_ids": image.get("not_exhaustive_category_ids", []),
        "annotations": [],
    }
