"""YOLO: a text file for each image, with a line for each object, in fractions of the image's sides.

A line is a class and a box (centre, width, height), or a class and a polygon.
"""

import os
from collections import Counter
from pathlib import Path
from typing import NoReturn

import numpy as np
import yaml

from ...errors import DataError
from ...utils.files import load_yaml
from .common import (
    Found,
    Place,
    ReadSize,
    extent,
    find_splits,
    is_around,
    list_files,
    read_lines,
    read_text,
)

WHAT = "YOLO labels"
IMAGES = "images/{split}"
FIRST_CLASS = 0
# How far beyond the image's sides, in fractions of them; Ultralytics takes as much.
_TOLERANCE = 0.01


def locate(source: Path, image_root: Path) -> Place:
    """Labels are below "labels" in place of "images", as Ultralytics has them, else beside images.

    Args:
        source: ``data.yaml``, or a file with a class name on each line.
        image_root: the folder of images.
    """
    parts, labels = Path(os.path.abspath(image_root)).parts, image_root
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        swapped = Path(*parts[:last], "labels", *parts[last + 1 :])
        labels = swapped if swapped.is_dir() else image_root
    files = list_files(labels, (".txt",))
    return Place(_class_names(source), labels, files, (source,))


def _class_names(source: Path) -> list[str]:
    if source.is_dir():
        raise DataError(
            f"'{source}' is a folder; name the file of class names (data.yaml or classes.txt), and "
            "the folder of images, whose labels are found."
        )
    if source.suffix not in (".yaml", ".yml"):
        return read_lines(source)
    content = load_yaml(source)
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list):
        raise DataError(f"'{source}' must list 'names' of the classes, from class 0 on; add them.")
    if content.get("kpt_shape"):
        raise DataError(f"'{source}' is of keypoints (kpt_shape), which are not read here.")
    return [str(name) if type(name) is int else name for name in names]


def parse(path: str, read_size: ReadSize, names: list[str]) -> tuple[tuple[int, int], list[dict]]:
    """Size of an image, and its objects."""
    size, objects = read_size(), []
    for number, line in enumerate(read_text(path).splitlines(), 1):

        def refuse(what: str, number: int = number) -> NoReturn:
            raise DataError(f"'{path}' line {number} {what}; correct or remove the line.")

        words = line.split()
        if not words:
            continue
        try:
            class_number, *values = map(float, words)
        except ValueError:
            refuse(f"is {line[:60]!r}, which are not all numbers")
        if len(values) != 4 and (len(values) < 6 or len(values) % 2):
            refuse(
                f"has {len(words)} numbers, where 5 (class, centre, width, height) are a box, and "
                "a class and 3 or more points (x, y) are a polygon"
            )
        if class_number not in range(len(names)):
            refuse(f"is of class {words[0]}, but there are {len(names)} names, from class 0 on")
        for value in values:
            if not -_TOLERANCE <= value <= 1 + _TOLERANCE:
                refuse(f"has {value}, where fractions of the image's sides are from 0 to 1")
        scaled = [value * size[i % 2] for i, value in enumerate(values)]
        if len(values) == 4:
            x, y, w, h = scaled
            shape = {"bbox": [x - w / 2, y - h / 2, w, h]}
        else:
            shape = {"bbox": extent(scaled), "segmentation": [scaled]}
        objects.append({"class": int(class_number), "where": f"line {number}", **shape})
    return size, objects


def find(folder: Path) -> Found:
    """The data sets of a folder: those of a YAML file with "names", else beside "classes.txt"."""
    for source in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
        content = load_yaml(source)
        if isinstance(content, dict) and "names" in content:
            return _find_in_yaml(source, content)
    for source in sorted(folder.rglob("classes.txt"), key=lambda path: len(path.parts)):
        return [(split, source, place) for split, place, _ in find_splits(folder, ("images", ""))]
    raise DataError(
        f"'{folder}' has YOLO labels but no file of class names; add 'data.yaml', or 'classes.txt' "
        "with a name on each line."
    )


def _find_in_yaml(source: Path, content: dict) -> Found:
    found = []
    for split in ("train", "val", "test"):
        listed = content.get(split) or []
        for name in map(str, listed if isinstance(listed, list) else [listed]):
            # Exports of Roboflow begin their paths with one ".." too many.
            places = [source.parent / str(content.get("path") or "") / name, source.parent / name]
            places.append(source.parent / name.replace("../", "", 1))
            images = next(filter(Path.is_dir, places), None)
            if images is None and split == "test":
                continue  # exports without a test set list it all the same
            if images is None:
                raise DataError(
                    f"'{source}': {split} is '{name}', which is no folder; name that of its images."
                )
            found.append((split, source, images))
    if any(split == "val" for split, *_ in found):
        return [row for row in found if row[0] != "test"]
    return [("val" if split == "test" else split, *rest) for split, *rest in found]


def encode(image: dict, objects: list[dict], lost: Counter) -> tuple[str, str]:
    """Path and content of the annotation file of an image; see ``convert_dataset``."""
    size, lines = (image["width"], image["height"]), []
    for row in objects:
        if row["iscrowd"] or row["ignore"]:
            lost["crowds and ignored regions left out"] += 1
            continue
        x, y, w, h = row["bbox"]
        has_mask = is_around(row["bbox"], row["segmentation"], 0.51)
        lost["masks left out whose box is not that around them"] += (
            bool(row["segmentation"]) and not has_mask
        )
        shape = _one_ring(row["segmentation"]) if has_mask else [x, y, x + w, y + h]
        points = np.array(shape).reshape(-1, 2)
        inside = points.clip(0, size)
        lost["shapes cut off at the edges of their images"] += abs(inside - points).max() > 0.5
        if not has_mask:
            inside = np.stack([inside.mean(axis=0), inside[1] - inside[0]])
        numbers = " ".join(f"{value:.15g}" for value in (inside / size).flatten())
        lines.append(f"{row['class']} {numbers}\n")
    return f"labels/{image['split']}/{image['stem']}.txt", "".join(lines)


def _one_ring(polygons: list[list[float]]) -> list[float]:
    """Polygons joined by lines of no width, which leave area and pixels as they are."""
    ring, first = [], polygons[0][:2]
    for polygon in polygons:
        points = np.array(polygon).reshape(-1, 2)
        x, y = points.T
        if x @ np.roll(y, -1) < y @ np.roll(x, -1):  # areas of another sign would be subtracted
            points = points[::-1]
        ring += [*points.flatten().tolist(), *points[0].tolist(), *first]
    return polygons[0] if len(polygons) == 1 else ring


def finish(splits: dict[str, list[str]], names: list[str]) -> dict[str, str]:
    """Content of the files of the data set by path."""
    content = {**{split: f"images/{split}" for split in splits}, "names": dict(enumerate(names))}
    return {"data.yaml": yaml.safe_dump(content, allow_unicode=True, sort_keys=False)}
