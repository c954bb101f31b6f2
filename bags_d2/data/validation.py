"""Faults of annotation files, found before a training starts instead of in its middle.

What cannot mean anything is an error. What well-known data sets contain and Detectron2 leaves out
of training (boxes without area, degenerate polygons) is a warning that counts it.
"""

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..errors import ConfigError, DataError
from .json_files import load_json

__all__ = ["check_annotations", "check_dataset"]

logger = logging.getLogger(__name__)


def check_dataset(name: str, num_classes: int, needs_annotations: bool = True) -> None:
    """Check the annotation file of a registered data set, if it has one.

    Args:
        name: the data set.
        num_classes: ``MODEL.ROI_HEADS.NUM_CLASSES``.
        needs_annotations: whether a file without any (of a test set) is an error.

    Raises:
        DataError: for the first fault of the file.
        ConfigError: if it has another number of classes.
    """
    path = MetadataCatalog.get(name).get("json_file")
    if path is None:
        return
    local = PathManager.get_local_path(path)
    if os.path.getsize(local) > 100_000_000:
        logger.info("Checking '%s' (DATASETS.CHECK_ANNOTATIONS) ...", path)
    content = load_json(local)
    check_annotations(path, content, needs_annotations)
    # A registration may map several categories to one class.
    id_map = MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id")
    found = len(set(id_map.values())) if id_map else len(content["categories"])
    if found != num_classes:
        raise ConfigError(
            f"Data set '{name}' has {found} classes but MODEL.ROI_HEADS.NUM_CLASSES is "
            f"{num_classes}; set it to {found}."
        )


def check_annotations(path: str, content: Any, needs_annotations: bool = True) -> None:
    """Check the content of an annotation file in COCO or LVIS format.

    Args:
        path: the file, for messages.
        content: what it holds.
        needs_annotations: whether it must have a list of annotations.

    Raises:
        DataError: for the first fault.
    """
    sections = ("images", "categories", "annotations")[: 3 if needs_annotations else 2]
    for section in sections:
        if not isinstance(content, Mapping) or not isinstance(content.get(section), list):
            raise DataError(
                f"'{path}' has no list '{section}': not a COCO or LVIS annotation file."
            )
    categories = _unique_ids(path, "category", content["categories"])
    if not categories:
        raise DataError(f"'{path}' has no categories; list at least one.")
    for category in content["categories"]:
        if not isinstance(category.get("name"), str):
            raise DataError(f"'{path}': category {category['id']} has no name; give it one.")
    images = _unique_ids(path, "image", content["images"])
    for image in content["images"]:
        sides = image.get("width"), image.get("height")
        if not all(_is_number(side) and side > 0 for side in sides):
            raise DataError(
                f"'{path}': image {image['id']} has width {sides[0]} and height {sides[1]}; both "
                "must be above 0."
            )
        if not any(isinstance(image.get(key), str) for key in ("file_name", "coco_url")):
            raise DataError(f"'{path}': image {image['id']} has no file_name; add it.")
    annotations = content.get("annotations") or []
    _unique_ids(path, "annotation", annotations)
    for annotation in annotations:
        for key, known in (("image_id", images), ("category_id", categories)):
            if not _is_known(annotation.get(key), known):
                raise DataError(
                    f"'{path}': annotation {annotation['id']} has {key} {annotation.get(key)!r}, "
                    f"which is not among the file's; correct or remove it."
                )
    _check_boxes(path, annotations, content["images"])
    _warn_of_polygons(path, annotations)


def _unique_ids(path: str, kind: str, rows: Iterable[Any]) -> set:
    ids = set()
    for row in rows:
        key = row.get("id") if isinstance(row, Mapping) else None
        if isinstance(key, bool) or not isinstance(key, int | str):
            raise DataError(f"'{path}': {kind} {str(row)[:80]} has no valid id; number it.")
        if key in ids:
            raise DataError(f"'{path}': {kind} id {key} occurs twice; ids must be unique.")
        ids.add(key)
    return ids


def _is_known(key: Any, known: set) -> bool:
    return isinstance(key, int | str) and not isinstance(key, bool) and key in known


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_boxes(path: str, annotations: Sequence[Mapping], images: Sequence[Mapping]) -> None:
    for annotation in annotations:
        box = annotation.get("bbox")
        numbers = isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))
        if not numbers or min(box[2:]) < 0:
            raise DataError(
                f"'{path}': annotation {annotation['id']} has bbox {box}; it must be [x, y, width, "
                "height] with numbers, and width and height of 0 or more."
            )
    if not annotations:
        return
    boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64)
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    canvas = np.array([sizes[a["image_id"]] for a in annotations], dtype=np.float64)
    empty = (boxes[:, 2:] == 0).any(axis=1)
    outside = ((boxes[:, :2] >= canvas) | (boxes[:, :2] + boxes[:, 2:] <= 0)).any(axis=1) & ~empty
    for is_odd, what in ((empty, "have no area"), (outside, "lie outside their images")):
        if is_odd.any():
            first = annotations[int(is_odd.argmax())]["id"]
            logger.warning(
                "'%s': %d of %d boxes %s, the first of annotation %s; training leaves them out.",
                path,
                is_odd.sum(),
                len(boxes),
                what,
                first,
            )


def _warn_of_polygons(path: str, annotations: Sequence[Mapping]) -> None:
    odd = [a["id"] for a in annotations if _is_degenerate(a.get("segmentation"))]
    if odd:
        logger.warning(
            "'%s': %d annotations have polygons of fewer than three corners, the first annotation "
            "%s; training leaves such polygons out.",
            path,
            len(odd),
            odd[0],
        )


def _is_degenerate(segmentation: Any) -> bool:
    if not isinstance(segmentation, list):
        return False  # run-length encoding, or none
    return any(not isinstance(p, list) or len(p) < 6 or len(p) % 2 for p in segmentation)
