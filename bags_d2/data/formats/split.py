"""Data sets of any format split by image, in COCO's format, for images that stay where they are."""

import logging
import os
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from ...errors import DataError
from . import Row, read_row
from .convert import coco_content, objects_of, read_named

__all__ = ["choose_val", "split_dataset"]

logger = logging.getLogger(__name__)


def split_dataset(
    train: Sequence[Row], val: Sequence[Row], share: float = 0.2, seed: int = 0
) -> tuple[dict[str, dict], str]:
    """One annotation file for training and one for validation.

    They follow from the paths and objects of the images, whatever format these come in.

    Args:
        train, val: rows of data sets; where there are none of either, those of the other are split.
        share, seed: see :func:`choose_val`.

    Returns:
        The content of the files by "train" and "val", and the folder that the images are below.

    Raises:
        MissingFileError, DataError: if something cannot be read or split.
    """
    rows = [*train, *val]
    names = dict.fromkeys(name for row in rows for name in read_row(*row[1:]).names)
    number_of = {name: number for number, name in enumerate(names)}
    folder = os.path.commonpath([os.path.abspath(root) for *_, root in rows])
    found = {"train": _images(train, folder, number_of), "val": _images(val, folder, number_of)}
    if not (train and val):
        images = sorted(found["train"] + found["val"], key=lambda image: image[0]["file_name"])
        classes = [
            {each["class"] for each in objects if not (each["iscrowd"] or each["ignore"])}
            for _, objects in images
        ]
        in_val = choose_val(classes, share, seed)
        for split, chosen in (("train", False), ("val", True)):
            found[split] = [i for i, own in zip(images, in_val, strict=True) if own == chosen]
    return coco_content(found, names), folder


def choose_val(classes: Sequence[Collection[int]], share: float, seed: int) -> np.ndarray:
    """Choose images for validation so that classes are in it in proportion, if at all possible.

    Classes have their turn from the rarest on. Of n images with a class, ``share`` x n rounded
    down, but at least one of two, are validation's; images are drawn at random, and left out if
    another class has its number already. A class that is left with none then takes an image that
    leaves at least half of those of every class to training. Images of no class are drawn apart.

    Args:
        classes: of each of I images.
        share: of the images, 0..1.
        seed: of the draw.

    Returns:
        (I,) bool.

    Raises:
        DataError: if none can be left out.
    """
    images_of: dict[int, list[int]] = {}
    order = np.random.default_rng(seed).permutation(len(classes)).tolist()
    for image in order:
        for c in classes[image]:
            images_of.setdefault(c, []).append(image)
    total = {c: len(images) for c, images in images_of.items()}
    rarest_first = sorted(total, key=lambda c: (total[c], c))
    target = {c: max(int(share * n), 1) if n > 1 else 0 for c, n in total.items()}
    half = {c: n // 2 for c, n in total.items()}
    taken, in_val = dict.fromkeys(total, 0), np.zeros(len(classes), bool)
    for limit, wanted in ((target, target), (half, dict.fromkeys(total, 1))):
        for c in rarest_first:
            for image in images_of[c]:
                if taken[c] >= wanted[c]:
                    break
                if not in_val[image] and all(taken[o] < limit[o] for o in classes[image]):
                    in_val[image] = True
                    for other in classes[image]:
                        taken[other] += 1
    if not in_val.any():
        raise DataError(
            "No image can be left out for validation: there are no objects, or each image has a "
            "class that no other has; name a validation set."
        )
    empty = [image for image in order if not classes[image]]
    in_val[empty[: int(share * len(empty))]] = True
    return in_val


def _images(
    rows: Sequence[Row], folder: str, number_of: Mapping[str, int]
) -> list[tuple[dict, list[dict]]]:
    """The images of data sets in the order of their paths, each with its objects."""
    images = []
    for _, kind, source, root in rows:
        read = read_named(kind, source, root)
        if kind == "lvis":
            logger.warning("LVIS's lists in '%s' are left out: COCO's measures apply.", source)
        for position, row in enumerate(read.image_rows):
            path = os.path.join(os.path.abspath(root), read.file_name(position, kind == "lvis"))
            image = {"file_name": os.path.relpath(path, folder)}
            objects = objects_of(read, position, number_of)
            for each in objects:  # formats differ in the digits beyond
                each["bbox"] = [round(value, 4) for value in each["bbox"]]
            images.append((image | {key: row[key] for key in ("height", "width")}, objects))
    return sorted(images, key=lambda image: image[0]["file_name"])
