"""The one reader of annotations: files in COCO and LVIS format, and what is brought into theirs.

Counting, training, evaluation and the report take their data from here, so what is counted is what
is trained on and what is evaluated. A file is read once in a process. Whatever has one meaning is
normalized; whatever has none is a DataError of one sentence, before training. docs/datasets.md
lists both. Folders of other formats (data/formats) come here as what such a file would hold.

Shapes in this file: N annotations, I images, K categories.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from detectron2.structures import BoxMode

from ..errors import DataError
from ..utils.files import file_version, load_json, require_file
from .masks import Masks

logger = logging.getLogger(__name__)

Id = int | str

# In pixels; COCO's and LVIS's evaluations set aside what is larger, which is also the one way to
# have a region ignored that both follow.
MAX_AREA = 1e10
AREA_OF_IGNORED = 10 * MAX_AREA

# Sides in pixels, within the image, under which a box encloses nothing: Detectron2's mapper drops
# such boxes, and float32 coordinates of large images are not much finer.
MIN_SIDE = 0.01

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

    def lists(self, value: Any) -> bool:
        """Whether a value is an id of the file; True, which is equal to 1, is none."""
        position = self.position(value) if type(value) in (int, str) else None
        return position is not None and self.outside[position] == value

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
            lvis: give LVIS's lists of categories, and find images by :meth:`file_name` of LVIS.
            masks: give masks, polygons as arrays of float64.
        """
        boxes, classes, is_object = (x.tolist() for x in (self.boxes, self.classes, self.is_object))
        records = []
        for position, image in enumerate(self.image_rows):
            annotations = []
            for row in self.rows_of_image(position):
                # Detectron2's mapper leaves out what is marked as a crowd.
                annotation = {"bbox": boxes[row], "bbox_mode": BoxMode.XYWH_ABS}
                annotation |= {"category_id": classes[row], "iscrowd": int(not is_object[row])}
                if masks and (mask := self.masks.get(row)) is not None:
                    annotation["segmentation"] = mask
                annotations.append(annotation)
            record = {
                "file_name": os.path.join(image_root, self.file_name(position, lvis)),
                "image_id": self.images.inside[position],
                "height": image["height"],
                "width": image["width"],
                "annotations": annotations,
            }
            for key in _LVIS_LISTS if lvis else ():
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
        truths = []
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
            mask = None if task == "bbox" else self.masks.get(row, as_json=True)
            if mask is not None:
                truth["segmentation"] = mask
            elif task == "segm":
                if crowd or ignored:
                    continue
                self._refuse(row, "has no mask; to evaluate boxes alone set MODEL.MASK_ON to False")
            truths.append(truth)
        return truths

    def file_name(self, position: int, lvis: bool) -> str:
        """Path of an image below the folder of images; a DataError if it has none.

        With ``lvis`` it is the last two parts of the ``coco_url`` (split folder and file, as in
        LVIS v1) if there is one.
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
            missing = "its 'annotations' are missing or empty"
            raise DataError(
                f"'{self.path}' has no objects to train on "
                f"({self.summary if self.has_annotations else missing}); correct the file, or name "
                "another data set in DATASETS.TRAIN."
            )

    def require_file_names(self, lvis: bool) -> None:
        """Raise DataError unless every image has a file name."""
        for position in range(len(self.images)):
            self.file_name(position, lvis)

    def require_masks(self, mask_format: str) -> None:
        """Raise DataError unless every object has a mask that ``INPUT.MASK_FORMAT`` can be of."""
        remedy = "correct it, leave the object out of the file, or set MODEL.MASK_ON to False"
        masks = self.masks
        is_wrong = (masks.areas <= 0) | (masks.is_code & (mask_format == "polygon"))
        for row in np.flatnonzero(self.is_object & is_wrong)[:1].tolist():
            if fault := masks.fault(row):
                self._refuse(row, f"has {fault}, which is no mask; {remedy}")
            if masks.is_code[row] and mask_format == "polygon":
                self._refuse(
                    row,
                    "has a mask in run-length code but INPUT.MASK_FORMAT is 'polygon'; set "
                    "INPUT.MASK_FORMAT to 'bitmask'",
                )
            kind = "no mask" if masks.get(row) is None else "a mask without area"
            self._refuse(row, f"has {kind} but MODEL.MASK_ON is True; {remedy}")
        small = int((masks.areas[self.is_object] < 1).sum())
        if mask_format == "bitmask" and small:
            logger.warning(
                "'%s': %d masks are smaller than a pixel; as bitmaps they may be empty, and "
                "training then leaves their objects out.",
                *(self.path, small),
            )

    def require_federated(self) -> None:
        """Raise DataError unless LVIS's evaluation has the lists and frequencies that it needs."""
        needed = [
            ("image", self.images, f"'{key}'", [row[key] for row in self.image_rows])
            for key in _LVIS_LISTS
        ]
        key = "'frequency' among 'r', 'c' and 'f'"
        needed.append(("category", self.categories, key, self.frequencies))
        for kind, ids, key, values in needed:
            if None in values:
                first = ids.outside[values.index(None)]
                raise DataError(
                    f"'{self.path}': {kind} {first!r} has no {key}, which LVIS's measures need; "
                    f"add it to every {kind}, or, to evaluate with COCO's measures, register the "
                    "data set as 'coco' (DATASETS.REGISTER, docs/datasets.md)."
                )

    def _refuse(self, row: int, what: str) -> NoReturn:
        raise DataError(f"'{self.path}': annotation {self.annotation_ids[row]!r} {what}.")


def read_annotations(path: str | os.PathLike) -> AnnotationSet:
    """Read, check and normalize an annotation file; again only if it has changed.

    Args:
        path: a file in COCO or LVIS format, or a URL that Detectron2's PathManager knows.
    """
    local = require_file(path)
    return _read_version(os.fspath(path), local, file_version(local))


@functools.lru_cache(maxsize=8)
def _read_version(path: str, local: str, version: tuple[int, ...]) -> AnnotationSet:
    if os.path.getsize(local) > 100_000_000:
        logger.info("Reading '%s' ...", path)
    return check_annotations(path, load_json(local))


def check_annotations(
    path: str, content: Any, notes: Sequence[str] = (), lists_all_classes: bool = True
) -> AnnotationSet:
    """Check and normalize the content of an annotation file, or of a folder of another format.

    Args:
        path: for messages.
        content: in COCO's or LVIS's format; masks are taken out of it.
        notes: what the summary says besides.
        lists_all_classes: see :class:`AnnotationSet`.
    """
    sections, is_object = {}, isinstance(content, dict)
    for name in ("categories", "images", "annotations") if is_object else ("images",):
        rows = content.get(name) if is_object else None
        sections[name] = [] if rows is None and name == "annotations" else rows
        if not isinstance(sections[name], list):
            raise DataError(f"'{path}' has no list '{name}': not a COCO or LVIS annotation file.")
    for name in ("categories", "images"):
        if not sections[name]:
            raise DataError(f"'{path}' has no {name}; list at least one.")
    category_rows, image_rows, annotations = sections.values()
    categories = Ids(_check_rows(path, "category", category_rows, _CATEGORY_CHECKS))
    listed = "{} {{{}}}; it must list ids of the file's categories"
    lists = {listed.format(k, k): functools.partial(_lists_ids, k, categories) for k in _LVIS_LISTS}
    images = Ids(_check_rows(path, "image", image_rows, _IMAGE_CHECKS | lists))
    unknown = "{} {{{}}}, which is not among the file's; correct or remove it"
    ids = {
        unknown.format(key, key): lambda row, key=key, known=known: known.lists(row.get(key))
        for key, known in (("image_id", images), ("category_id", categories))
    }
    _check_rows(path, "annotation", annotations, ids | _ANNOTATION_CHECKS)

    category_rows = sorted(category_rows, key=lambda row: categories.position(row["id"]))
    frequencies = [row.get("frequency") for row in category_rows]
    image_rows = sorted(image_rows, key=lambda row: images.position(row["id"]))
    image_rows = [_normalized_image(row, categories) for row in image_rows]
    columns = _columns(annotations, image_rows, images, categories)
    columns["summary"] = "; ".join([columns["summary"], *notes])
    return AnnotationSet(
        path=path,
        images=images,
        categories=categories,
        names=tuple(row["name"] for row in category_rows),
        frequencies=tuple(f if f in _FREQUENCIES else None for f in frequencies),
        image_rows=image_rows,
        has_annotations=bool(annotations),
        lists_all_classes=lists_all_classes,
        **columns,
    )


def _normalized_image(image: dict, categories: Ids) -> dict:
    row = {"height": image["height"], "width": image["width"]}
    row |= {key: image.get(key) or None for key in ("file_name", "coco_url")}
    for key in _LVIS_LISTS:
        ids = image.get(key)
        row[key] = None if ids is None else [categories.position(i) for i in ids]
    return row


def _is_text(value: Any) -> bool:
    """Whether a value can be written as UTF-8, as lone surrogates cannot, and has no null byte."""
    try:
        return "\0" not in value and bool(value.encode())
    except (AttributeError, TypeError, UnicodeEncodeError):
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and -1e150 < value < 1e150  # areas of boxes are finite


def _is_side(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_box(value: Any) -> bool:
    is_box = isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))
    return is_box and value[2] >= 0 and value[3] >= 0


def _lists_ids(key: str, known: Ids, row: dict) -> bool:
    listed = row.get(key)
    return listed is None or (isinstance(listed, list) and all(map(known.lists, listed)))


# What a message says that a row has, if this does not hold of it.
Checks = dict[str, Callable[[dict], bool]]

_CATEGORY_CHECKS: Checks = {
    "no name; give it one": lambda row: row.get("name") is not None,
    "the name {name}; give it one of Unicode text": lambda row: _is_text(row["name"]),
}
_IMAGE_CHECKS: Checks = {
    "width {width} and height {height}; both must be whole numbers above 0": lambda row: (
        _is_side(row.get("width")) and _is_side(row.get("height"))
    ),
    **{
        f"{key} {{{key}}}; it must be a text": lambda row, key=key: (
            not row.get(key) or _is_text(row[key])
        )
        for key in ("file_name", "coco_url")
    },
}
_ANNOTATION_CHECKS: Checks = {
    "iscrowd {iscrowd}; it must be the number 0 or 1": lambda a: a.get("iscrowd") in (None, 0, 1),
    "ignore {ignore}; it must be the number 0 or 1": lambda a: a.get("ignore") in (None, 0, 1),
    "area {area}; it must be a number, or be left out": lambda a: (
        isinstance(a.get("area"), float | None) or _is_number(a["area"])
    ),
    "bbox {bbox}; it must be [x, y, width, height] with numbers, and width and height of 0 or "
    "more": lambda a: _is_box(a.get("bbox")),
}


def _check_rows(path: str, kind: str, rows: list, checks: Checks) -> set[Id]:
    """The ids of rows; a DataError for the first that lacks one, or does not pass the checks."""
    ids = set()
    for row in rows:
        row_id = row.get("id") if isinstance(row, dict) else None
        if type(row_id) not in (int, str):
            raise DataError(f"'{path}': {kind} {_short(row)} has no valid id; number it.")
        if row_id in ids:
            what = f"{kind} id {_short(row_id)} occurs twice; ids must be unique"
            raise DataError(f"'{path}': {what}.")
        ids.add(row_id)
        for what, holds in checks.items():
            if not holds(row):
                values = defaultdict(lambda: "None", {k: _short(v) for k, v in row.items()})
                what = what.format_map(values)
                raise DataError(f"'{path}': {kind} {_short(row_id)} has {what}.")
    return ids


def _columns(
    annotations: list[dict], image_rows: list[dict], images: Ids, categories: Ids
) -> dict[str, Any]:
    """The columns of an :class:`AnnotationSet`."""

    def column(key: str, kind: type) -> np.ndarray:
        return np.array([a.get(key) or 0 for a in annotations], dtype=kind)

    image_index = np.array([images.position(a["image_id"]) for a in annotations], dtype=np.int64)
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    size = np.array([(row["width"], row["height"]) for row in image_rows])[image_index]
    sides = np.minimum(boxes[:, :2] + boxes[:, 2:], size) - boxes[:, :2].clip(0)
    is_empty = (sides < MIN_SIDE).any(axis=1)
    rows = np.argsort(image_index, kind="stable")
    rows = rows[~is_empty[rows]]
    image_index, boxes, areas = image_index[rows], boxes[rows], column("area", np.float64)[rows]
    crowd, ignored = (column(key, bool)[rows] for key in ("iscrowd", "ignore"))
    classes = [categories.position(annotations[row]["category_id"]) for row in rows]
    empty = [annotations[row]["id"] for row in np.flatnonzero(is_empty)[:1]]
    ids = [annotations[row]["id"] for row in rows]
    with contextlib.suppress(TypeError, OverflowError):
        # Numbers by value: an object kept of every annotation would keep Python from giving the
        # memory of the others back.
        ids = array("q", ids)
    masks = Masks()
    for row, image in zip(rows.tolist(), image_index.tolist(), strict=True):
        masks.append(annotations[row].pop("segmentation", None), image_rows[image])
    masks.close()
    unmeasured = ~((areas > 0) & (areas <= MAX_AREA))
    if unmeasured.any():
        own = np.where(masks.areas > 0, masks.areas, boxes[:, 2] * boxes[:, 3]).clip(max=MAX_AREA)
        areas = np.where(unmeasured, own, areas)

    num_objects = (~(crowd | ignored)).sum()
    summary = [f"{num_objects} objects of {len(categories)} classes in {len(images)} images"]
    noted = {
        "crowds left out": crowd,
        "ignored regions left out": ignored,
        f"boxes that enclose nothing of their images left out (as of {empty})": is_empty,
        "areas computed": unmeasured,
    }
    summary += [f"{what}: {found.sum()}" for what, found in noted.items() if found.any()]
    return {
        "image_index": image_index,
        "classes": np.array(classes, dtype=np.int64),
        "boxes": boxes,
        "areas": areas,
        "crowd": crowd,
        "ignored": ignored,
        "masks": masks,
        "annotation_ids": ids,
        "summary": "; ".join(summary),
    }


def _short(value: Any) -> str:
    text = ascii(value) if isinstance(value, str) and not _is_text(value) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
