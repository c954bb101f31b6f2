"""LabelMe: a JSON file for each image, with its rectangles and polygons."""

import json
import os
from collections import Counter, defaultdict
from pathlib import Path

from ...errors import DataError
from ...utils.files import load_json
from .common import Found, Place, ReadSize, extent, find_splits, is_around, locate_files

WHAT = "LabelMe annotations"
IMAGES = "{split}"
FIRST_CLASS = 1
_MIN_NUMBERS = {"rectangle": 4, "polygon": 6}


def locate(source: Path, image_root: Path) -> Place:
    """The annotations are those of the folder ``source``."""
    return locate_files(source, ".json")


def parse(path: str, read_size: ReadSize, names: list[str]) -> tuple[tuple[int, int], list[dict]]:
    """Size of an image, and its objects: shapes of one label and ``group_id`` are one.

    An object's box is that around its rectangle, else its polygons; these are its mask.
    """
    content = load_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise DataError(f"'{path}' has no list 'shapes', so it is no LabelMe file; remove it.")
    groups, objects = defaultdict(list), []
    for number, shape in enumerate(content["shapes"], 1):
        try:
            kind, label = shape.get("shape_type", "polygon"), shape["label"]
            points = [float(value) for x, y in shape["points"] for value in (x, y)]
            ignore = shape.get("difficult") or (shape.get("flags") or {}).get("difficult")
            if not isinstance(label, str) or len(points) < _MIN_NUMBERS.get(kind, 0):
                raise ValueError
            group = number if shape.get("group_id") is None else str(shape["group_id"])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise DataError(
                f"'{path}' shape {number} lacks a label or points (x, y) of its shape_type; "
                "correct or remove it."
            ) from None
        groups[label, group].append((kind, points, bool(ignore), number))
    for (label, _), shapes in groups.items():
        rectangles, polygons = ([s[1] for s in shapes if s[0] == kind] for kind in _MIN_NUMBERS)
        around, (kind, _, _, number) = rectangles or polygons, shapes[0]
        row = {"class": label, "where": f"shape {number}", "segmentation": polygons}
        row["ignore"] = any(ignore for _, _, ignore, _ in shapes)
        objects.append(row | ({"bbox": extent(*around)} if around else {"left out": f"{kind}s"}))
    size = content.get("imageWidth"), content.get("imageHeight")
    return size if all(size) else read_size(), objects


def find(folder: Path) -> Found:
    """The data sets of a folder."""
    return find_splits(folder, ("annotations", "labels", ""))


def encode(image: dict, objects: list[dict], lost: Counter) -> tuple[str, str]:
    """Path and content of the annotation file of an image; see ``convert_dataset``."""
    shapes = []
    for number, row in enumerate(objects, 1):
        x, y, w, h = row["bbox"]
        parts = [("polygon", polygon) for polygon in row["segmentation"]]
        if not is_around(row["bbox"], row["segmentation"], 0.01):
            parts.append(("rectangle", [x, y, x + w, y + h]))
        shapes += [
            {
                "label": row["name"],
                "points": [values[i : i + 2] for i in range(0, len(values), 2)],
                "group_id": number if len(parts) > 1 else None,
                "shape_type": kind,
                "flags": {"difficult": True} if row["iscrowd"] or row["ignore"] else {},
            }
            for kind, values in parts
        ]
    content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imageData": None}
    content["imagePath"] = os.path.basename(image["file_name"])
    content |= {"imageHeight": image["height"], "imageWidth": image["width"]}
    return f"{image['split']}/{image['stem']}.json", json.dumps(content, indent=1)


def finish(splits: dict[str, list[str]], names: list[str]) -> dict[str, str]:
    """Content of the files of the data set by path."""
    return {"classes.txt": "".join(f"{name}\n" for name in names)}
