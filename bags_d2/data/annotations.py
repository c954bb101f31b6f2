"""The one reader of annotations: files in COCO and LVIS format, and what is brought into theirs.

Counting, training, evaluation and the report take their data from here, so what is counted is what
is trained on and what is evaluated. A file is read once in a process. Whatever has one meaning is
normalized; whatever has none is refused in one sentence, before training. docs/datasets.md lists
both. Folders of other formats (data/formats) come here as what such a file would hold.

Shapes in this file: N annotations, I images, K categories.
"""

import functools
import hashlib
import json
import logging
import math
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from detectron2.structures import BoxMode

from ..errors import DataError
from ..utils.files import load_json, require_file
from .masks import Masks

__all__ = ["AnnotationSet", "Ids", "check_annotations", "read_annotations"]

logger = logging.getLogger(__name__)

Id = int | str

# In pixels; COCO's and LVIS's evaluations set aside what is larger, which is also the one way to
# have a region ignored that both follow.
MAX_AREA = 1e10
AREA_OF_IGNORED = 10 * MAX_AREA

# Sides in pixels, within the image, under which a box encloses nothing: Detectron2's mapper drops
# such boxes, and float32 coordinates of large images are not much finer.
MIN_SIDE = 0.01

_FLAGS = {None: False, 0: False, 1: True}  # the keys False and True are equal to 0 and 1
_LVIS_LISTS = ("neg_category_ids", "not_exhaustive_category_ids")
_FREQUENCIES = ("r", "c", "f")


class Ids:
    """Ids of one kind as the file has them (*outside*), and the numbers that stand for them inside.

    Whole numbers from 0 to 2^53 stand for themselves. If there is any other id, as text or a number
    that float64 would round, all are numbered, from beyond those that could stand for themselves,
    so that no number means two things.

    Attributes:
        outside: the file's ids, ascending, text after numbers. Positions refer to this order.
        inside: the number that stands for each.
    """

    def __init__(self, ids: Iterable[Id]) -> None:
        self.outside = sorted(ids, key=lambda i: (isinstance(i, str), i))
        plain = [i for i in self.outside if isinstance(i, int) and 0 <= i < 2**53]
        self.are_plain = len(plain) == len(self.outside)
        first = 1 + max((i for i in plain if i < 2**52), default=0)
        numbered = list(range(first, first + len(self.outside)))
        self.inside: list[int] = plain if self.are_plain else numbered
        self._position = {i: p for ids in (self.inside, self.outside) for p, i in enumerate(ids)}

    def __len__(self) -> int:
        return len(self.outside)

    def position(self, any_id: Id) -> int | None:
        """Position of an id of the file, or of the number that stands for one; None if unknown."""
        return self._position.get(any_id)

    def outside_of(self, inside: int) -> Id:
        """The id that a number stands for."""
        return self.outside[self._position[inside]]


@dataclass(frozen=True)
class AnnotationSet:
    """One annotation file, checked and normalized.

    Annotations are columns, in the order of image ids and, within an image, in that of the file.
    *Objects* are counted, trained on and evaluated. Crowds and ignored regions are not: evaluation
    sets them aside. Boxes that enclose nothing of their image are left out altogether.

    Attributes:
        path: the file, for messages.
        images: ids of the images.
        categories: ids of the categories. Detectron2's contiguous classes follow their order.
        names: K class names.
        frequencies: K of LVIS's "r", "c", "f"; None where the file has none.
        image_rows: I dicts "file_name" and "coco_url" (None if absent), "height", "width", and
            LVIS's two lists as contiguous classes (None if absent).
        image_index: (N,) position of the image.
        classes: (N,) contiguous class.
        boxes: (N, 4) float64, XYWH in pixels.
        areas: (N,) float64, in pixels; of the mask, else the box, where the file has none above 0.
        crowd: (N,) bool.
        ignored: (N,) bool.
        masks: of the N annotations.
        annotation_ids: N ids as in the file, for messages.
        has_annotations: whether the file lists any; a test set need not.
        summary: what was read, left out and computed, in one line.
        lists_all_classes: whether ``names`` are all classes, and not just those of some object.
    """

    path: str
    images: Ids
    categories: Ids
    names: tuple[str, ...]
    frequencies: tuple[str | None, ...]
    image_rows: list[dict]
    image_index: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    ignored: np.ndarray
    masks: Masks
    annotation_ids: Sequence[Id]
    has_annotations: bool
    summary: str
    lists_all_classes: bool = True

    @functools.cached_property
    def is_object(self) -> np.ndarray:
        """(N,) bool."""
        return ~(self.crowd | self.ignored)

    @functools.cached_property
    def _first_rows(self) -> list[int]:
        return np.searchsorted(self.image_index, np.arange(len(self.images) + 1)).tolist()

    def rows_of_image(self, position: int) -> range:
        """The annotations of an image."""
        return range(self._first_rows[position], self._first_rows[position + 1])

    def instance_counts(self) -> np.ndarray:
        """Objects of each class, (K,)."""
        return np.bincount(self.classes[self.is_object], minlength=len(self.names))

    def image_counts(self) -> np.ndarray:
        """Images that show an object of each class, (K,)."""
        pairs = self.image_index[self.is_object] * len(self.names) + self.classes[self.is_object]
        return np.bincount(np.unique(pairs) % len(self.names), minlength=len(self.names))

    def digest(self) -> str:
        """What distinguishes the content from an edited one."""
        content = json.dumps([self.names, self.records("")], default=list)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def records(self, image_root: str, *, lvis: bool = False, masks: bool = True) -> list[dict]:
        """The images as Detectron2's standard records, in the order of their ids.

        Args:
            image_root: folder that the images' paths start from.
            lvis: give LVIS's lists of categories, and take an image to stand at the last two parts
                of its ``coco_url`` (split folder and file, as in LVIS v1) if it has one.
            masks: give masks, polygons as arrays of float64.

        Raises:
            DataError: if an image has no file name.
        """
        boxes, classes = self.boxes.tolist(), self.classes.tolist()
        is_object = self.is_object.tolist()
        records = []
        for position, image in enumerate(self.image_rows):
            annotations = []
            for row in self.rows_of_image(position):
                annotation = {
                    "bbox": boxes[row],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": classes[row],
                    # Detectron2's mapper leaves out what is marked so.
                    "iscrowd": int(not is_object[row]),
                }
                if masks and (mask := self.masks.get(row, image)) is not None:
                    annotation["segmentation"] = mask
                annotations.append(annotation)
            record = {
                "file_name": os.path.join(image_root, self.file_name(position, lvis)),
                "image_id": self.images.inside[position],
                "height": image["height"],
                "width": image["width"],
                "annotations": annotations,
            }
            if lvis:
                for key in _LVIS_LISTS:
                    record[key] = [self.categories.inside[c] for c in image[key] or ()]
            records.append(record)
        return records

    def ground_truth(self, position: int, task: str | None, *, lvis: bool) -> list[dict]:
        """What an image is evaluated against, in COCO's format with the ids of inside.

        Args:
            position: of the image.
            task: "bbox" or "segm"; None gives masks where there are any.
            lvis: LVIS knows no crowds; there, they are ignored like other ignored regions.

        Raises:
            DataError: if an object has no mask and ``task`` is "segm".
        """
        image, truths = self.image_rows[position], []
        for row in self.rows_of_image(position):
            crowd, ignored = bool(self.crowd[row]), bool(self.ignored[row])
            truth = {
                "id": row + 1,  # COCO's evaluation takes 0 for "no match"
                "image_id": self.images.inside[position],
                "category_id": self.categories.inside[self.classes[row]],
                "bbox": self.boxes[row].tolist(),
                "area": AREA_OF_IGNORED if ignored or (crowd and lvis) else float(self.areas[row]),
                "iscrowd": int(crowd and not lvis),
            }
            mask = None if task == "bbox" else self.masks.get(row, image, as_json=True)
            if mask is not None:
                truth["segmentation"] = mask
            elif task == "segm":
                if crowd or ignored:
                    continue
                self._refuse(row, "has no mask; to evaluate boxes alone set MODEL.MASK_ON to False")
            truths.append(truth)
        return truths

    def file_name(self, position: int, lvis: bool) -> str:
        """Path of an image below the folder of images.

        Raises:
            DataError: if it has none.
        """
        image = self.image_rows[position]
        if lvis and image["coco_url"]:
            return "/".join(image["coco_url"].split("/")[-2:])
        if not image["file_name"]:
            hint = " (coco_url counts in LVIS format alone)" if image["coco_url"] else ""
            raise DataError(
                f"'{self.path}': image {self.images.outside[position]!r} has no file_name{hint}; "
                "add it."
            )
        return image["file_name"]

    def require_objects(self) -> None:
        """Raise DataError unless there is something to train on."""
        if not self.is_object.any():
            found = (
                self.summary if self.has_annotations else "its 'annotations' are missing or empty"
            )
            raise DataError(
                f"'{self.path}' has no objects to train on ({found}); correct the file, or name "
                "another data set in DATASETS.TRAIN."
            )

    def require_file_names(self, lvis: bool) -> None:
        """Raise DataError unless every image has a file name."""
        for position in range(len(self.images)):
            self.file_name(position, lvis)

    def require_masks(self, mask_format: str) -> None:
        """Raise DataError unless every object has a mask that training can use.

        Args:
            mask_format: ``INPUT.MASK_FORMAT``, "polygon" or "bitmask".
        """
        remedy = "correct it, leave the object out of the file, or set MODEL.MASK_ON to False"
        for row in np.flatnonzero(self.is_object & ~(self.masks.polygon_areas > 0)).tolist():
            image = self.image_rows[self.image_index[row]]
            if fault := self.masks.fault(row, image):
                self._refuse(row, f"has {fault}, which is no mask; {remedy}")
            if self.masks.is_code(row) and mask_format == "polygon":
                self._refuse(
                    row,
                    "has a mask in run-length code but INPUT.MASK_FORMAT is 'polygon'; set "
                    "INPUT.MASK_FORMAT to 'bitmask'",
                )
            if self.masks.area(row, image) <= 0:
                kind = "no mask" if self.masks.get(row, image) is None else "a mask without area"
                self._refuse(row, f"has {kind} but MODEL.MASK_ON is True; {remedy}")
        small = int((self.masks.polygon_areas[self.is_object] < 1).sum())
        if mask_format == "bitmask" and small:
            logger.warning(
                "'%s': %d masks are smaller than a pixel; as bitmaps they may be empty, and "
                "training then leaves their objects out.",
                *(self.path, small),
            )

    def require_federated(self) -> None:
        """Raise DataError unless LVIS's evaluation has the lists and frequencies that it needs."""
        remedy = (
            "or, to evaluate with COCO's measures, register the data set as 'coco' "
            "(DATASETS.REGISTER, docs/datasets.md)"
        )
        for key in _LVIS_LISTS:
            for image_id, image in zip(self.images.outside, self.image_rows, strict=True):
                if image[key] is None:
                    raise DataError(
                        f"'{self.path}': image {image_id!r} has no '{key}', which LVIS's measures "
                        f"need; add it to every image, {remedy}."
                    )
        for category_id, frequency in zip(self.categories.outside, self.frequencies, strict=True):
            if frequency is None:
                raise DataError(
                    f"'{self.path}': category {category_id!r} has no 'frequency' among 'r', 'c' "
                    f"and 'f', which LVIS's measures need; add it to every category, {remedy}."
                )

    def _refuse(self, row: int, what: str) -> NoReturn:
        raise DataError(f"'{self.path}': annotation {self.annotation_ids[row]!r} {what}.")


def read_annotations(path: str | os.PathLike) -> AnnotationSet:
    """Read, check and normalize an annotation file; again only if it has changed.

    Args:
        path: a file in COCO or LVIS format, or a URL that Detectron2's PathManager knows.

    Raises:
        MissingFileError: if there is no such file.
        DataError: for the first thing in it that has no meaning.
    """
    local = require_file(path)
    found = os.stat(local)
    version = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return _read_version(os.fspath(path), local, version)


@functools.lru_cache(maxsize=8)
def _read_version(path: str, local: str, version: tuple[int, ...]) -> AnnotationSet:
    if version[1] > 100_000_000:
        logger.info("Reading '%s' ...", path)
    return check_annotations(path, load_json(local))


def check_annotations(
    path: str, content: Any, notes: Sequence[str] = (), lists_all_classes: bool = True
) -> AnnotationSet:
    """Check and normalize what an annotation file holds, or a folder of another format.

    Args:
        path: for messages.
        content: in COCO's or LVIS's format; its annotations are taken out.
        notes: what the summary says besides.
        lists_all_classes: see :class:`AnnotationSet`.

    Raises:
        DataError: for the first thing that has no meaning.
    """
    if not isinstance(content, dict):
        raise DataError(f"'{path}' has no list 'images': not a COCO or LVIS annotation file.")
    category_rows = _section(path, content, "categories")
    image_rows = _section(path, content, "images")
    has_list = content.get("annotations") is not None
    annotations = _section(path, content, "annotations") if has_list else []
    for rows, what in ((category_rows, "categories"), (image_rows, "images")):
        if not rows:
            raise DataError(f"'{path}' has no {what}; list at least one.")
    categories = Ids(_check_ids(path, "category", category_rows))
    images = Ids(_check_ids(path, "image", image_rows))
    category_rows = sorted(category_rows, key=lambda row: categories.position(row["id"]))
    image_rows = sorted(image_rows, key=lambda row: images.position(row["id"]))
    image_rows = [_image(path, row, categories) for row in image_rows]
    frequencies = [row.get("frequency") for row in category_rows]
    columns = _columns(path, annotations, image_rows, images, categories)
    columns["summary"] = "; ".join([columns["summary"], *notes])
    return AnnotationSet(
        path=path,
        images=images,
        categories=categories,
        names=tuple(_name(path, row) for row in category_rows),
        frequencies=tuple(f if f in _FREQUENCIES else None for f in frequencies),
        image_rows=image_rows,
        has_annotations=bool(annotations),
        lists_all_classes=lists_all_classes,
        **columns,
    )


def _section(path: str, content: Mapping, name: str) -> list:
    if not isinstance(content.get(name), list):
        raise DataError(f"'{path}' has no list '{name}': not a COCO or LVIS annotation file.")
    return content[name]


def _check_ids(path: str, kind: str, rows: Iterable[Any]) -> set[Id]:
    ids = set()
    for row in rows:
        key = row.get("id") if isinstance(row, dict) else None
        if type(key) not in (int, str):
            raise DataError(f"'{path}': {kind} {_short(row)} has no valid id; number it.")
        if key in ids:
            raise DataError(f"'{path}': {kind} id {_short(key)} occurs twice; ids must be unique.")
        ids.add(key)
    return ids


def _name(path: str, category: Mapping) -> str:
    name = category.get("name")
    if name is None:
        raise DataError(f"'{path}': category {category['id']!r} has no name; give it one.")
    if not isinstance(name, str) or not _is_writable(name):
        raise DataError(
            f"'{path}': category {category['id']!r} has the name {_short(name)}; give it one of "
            "Unicode text."
        )
    return name


def _image(path: str, image: Mapping, categories: Ids) -> dict:
    def refuse(what: str) -> NoReturn:
        raise DataError(f"'{path}': image {_short(image['id'])} has {what}.")

    width, height = image.get("width"), image.get("height")
    if not all(type(side) is int and 0 < side < 2**31 for side in (width, height)):
        refuse(
            f"width {_short(width)} and height {_short(height)}; both must be whole numbers above 0"
        )
    row = {"height": height, "width": width}
    for key in ("file_name", "coco_url"):
        text = row[key] = image.get(key) or None
        if text is not None and (not isinstance(text, str) or not _is_writable(text)):
            refuse(f"{key} {_short(text)}; it must be a text")
    for key in _LVIS_LISTS:
        listed = image.get(key)
        try:
            row[key] = None if listed is None else [categories.position(i) for i in listed]
        except TypeError:
            row[key] = [None]
        if row[key] and None in row[key]:
            refuse(f"{key} {_short(listed)}; it must list ids of the file's categories")
    return row


def _columns(
    path: str, annotations: list, image_rows: list[dict], images: Ids, categories: Ids
) -> dict[str, Any]:
    """The columns of an :class:`AnnotationSet`; ``annotations`` is emptied to free its memory."""
    _check_ids(path, "annotation", annotations)
    index = np.array([_position(path, a, "image_id", images) for a in annotations], dtype=np.int64)
    boxes, areas, masks = array("d"), array("d"), Masks()
    ids, image_index, classes, crowd, ignored = (array("q") for _ in range(5))
    empty, unmeasured = [], []
    for number in np.argsort(index, kind="stable").tolist():
        annotation, annotations[number] = annotations[number], None
        image = int(index[number])
        category = _position(path, annotation, "category_id", categories)
        try:
            box = x, y, w, h = array("d", annotation["bbox"])
            area = array("d", [annotation.get("area") or 0.0])[0]
            flags = _FLAGS[annotation.get("iscrowd")], _FLAGS[annotation.get("ignore")]
        except (TypeError, KeyError, ValueError, OverflowError):
            _refuse_annotation(path, annotation)
        if not (w >= 0 and h >= 0 and math.isfinite(x + y + w + h)):
            _refuse_annotation(path, annotation)
        width, height = image_rows[image]["width"], image_rows[image]["height"]
        sides = min(x + w, width) - max(x, 0), min(y + h, height) - max(y, 0)
        if min(sides) < MIN_SIDE:
            empty.append(annotation["id"])
            continue
        if not 0 < area <= MAX_AREA:
            unmeasured.append(len(ids))
        try:
            # Numbers by value: an object kept of every annotation would keep Python from giving
            # the memory of the others back.
            ids.append(annotation["id"])
        except (TypeError, OverflowError):
            ids = [*ids, annotation["id"]]
        image_index.append(image)
        classes.append(category)
        boxes.extend(box)
        areas.append(area)
        crowd.append(flags[0])
        ignored.append(flags[1])
        masks.append(annotation.get("segmentation"))
    masks.close()
    for row in unmeasured:
        w, h = boxes[4 * row + 2 : 4 * row + 4]
        areas[row] = min(masks.area(row, image_rows[image_index[row]]) or w * h, MAX_AREA)

    is_crowd, is_ignored = np.array(crowd, dtype=bool), np.array(ignored, dtype=bool)
    num_objects = int((~(is_crowd | is_ignored)).sum())
    summary = [f"{num_objects} objects of {len(categories)} classes in {len(images)} images"]
    for what, count in (
        ("crowds left out", is_crowd.sum()),
        ("ignored regions left out", is_ignored.sum()),
        (f"boxes that enclose nothing of their images left out (as of {empty[:1]})", len(empty)),
        ("areas computed", len(unmeasured)),
    ):
        if count:
            summary.append(f"{what}: {count}")
    return {
        "image_index": np.array(image_index, dtype=np.int64),
        "classes": np.array(classes, dtype=np.int64),
        "boxes": np.array(boxes).reshape(-1, 4),
        "areas": np.array(areas),
        "crowd": is_crowd,
        "ignored": is_ignored,
        "masks": masks,
        "annotation_ids": ids,
        "summary": "; ".join(summary),
    }


def _position(path: str, annotation: Mapping, key: str, ids: Ids) -> int:
    value = annotation.get(key)
    # True is equal to 1, and so is 1.0.
    position = ids.position(value) if type(value) in (int, str) else None
    if position is None or ids.outside[position] != value:
        raise DataError(
            f"'{path}': annotation {annotation['id']!r} has {key} {_short(value)}, which is not "
            "among the file's; correct or remove it."
        )
    return position


def _refuse_annotation(path: str, annotation: Mapping) -> NoReturn:
    """Say which value of an annotation has no meaning; one has none."""
    start = f"'{path}': annotation {_short(annotation['id'])} has"
    for key in ("iscrowd", "ignore"):
        value = annotation.get(key)
        if not isinstance(value, int | float | None) or value not in _FLAGS:
            raise DataError(f"{start} {key} {_short(value)}; it must be the number 0 or 1.")
    if not isinstance(annotation.get("area"), int | float | None):
        raise DataError(
            f"{start} area {_short(annotation['area'])}; it must be a number, or be left out."
        )
    raise DataError(
        f"{start} bbox {_short(annotation.get('bbox'))}; it must be [x, y, width, height] with "
        "numbers, and width and height of 0 or more."
    )


def _is_writable(text: str) -> bool:
    """Whether text can be written as UTF-8, as lone surrogates cannot, and names no null byte."""
    try:
        return "\0" not in text and bool(text.encode())
    except UnicodeEncodeError:
        return False


def _short(value: Any) -> str:
    text = ascii(value) if isinstance(value, str) and not _is_writable(value) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
