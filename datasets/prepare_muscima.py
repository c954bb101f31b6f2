#!/usr/bin/env python
"""Build MUSCIMA++ as tiles: handwritten music, a real long-tailed data set small enough for a CPU.

The pages are redrawn from the pixel masks in the annotation files, at half size; no other download
is needed. Get the annotations (MUSCIMA++ 1.0, Hajic jr. and Pecina, ICDAR 2017; CC BY-NC-SA 4.0) by

    git clone --depth 1 https://github.com/OMR-Research/muscima-pp

and give the folder to this script. The result is in COCO format: 107 classes, 2,961 training and
709 validation tiles of 256 pixels, split by page.
"""

import argparse
import functools
import multiprocessing
import os
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from bags_d2.errors import DataError, MissingFileError, exit_on_user_error
from bags_d2.utils.files import write_atomically, write_json
from bags_d2.utils.quiet import silence_dependencies

ANNOTATIONS = Path("v1.0", "data", "cropobjects_withstaff")
# The staff is paper rather than symbols; its lines are drawn all the same.
STAFF = ("staff", "staff_space", "staff_line")
DRAWN_STAFF = "staff_line"

MARGINS = (40, 60)  # pixels of a page before its first object, and after its last
TILE, OVERLAP = 256, 16  # pixels of the page at half size
MIN_INSIDE = 0.6  # share of an object's box that must be in a tile
MIN_SIZE = (2, 1.5)  # width and height of an object's box in a tile, in its pixels
MIN_OBJECTS = 3  # of a tile
OUTLINE_TOLERANCE = 1.5  # pixels of the page at full size

# A fifth of the pages, of 27 of the 50 writers.
VAL_PAGES = """
    W-05_N-19 W-06_N-02 W-06_N-03 W-08_N-10 W-10_N-18 W-12_N-04 W-15_N-15 W-16_N-13 W-19_N-11
    W-19_N-19 W-23_N-06 W-23_N-17 W-24_N-07 W-25_N-09 W-27_N-16 W-28_N-09 W-29_N-14 W-30_N-17
    W-32_N-09 W-33_N-04 W-35_N-05 W-36_N-14 W-39_N-20 W-43_N-10 W-43_N-15 W-45_N-01 W-47_N-12
    W-50_N-08
""".split()  # noqa: SIM905

INFO = {
    "description": "MUSCIMA++ 1.0 (Hajic jr. and Pecina, 2017; pages of CVC-MUSCIMA, Fornes et "
    "al., 2012) as tiles, by datasets/prepare_muscima.py of bags_d2",
    "url": "https://github.com/OMR-Research/muscima-pp",
}
LICENSE = {"id": 1, "name": "CC BY-NC-SA 4.0", "url": ""}


class Symbol(NamedTuple):
    """An object of a page."""

    name: str
    top: int
    left: int
    mask: np.ndarray  # (height, width) uint8, 0 or 1


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder of the repository muscima-pp")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser() / "muscima",
        help="default: %(default)s",
    )
    args = parser.parse_args(argv)
    silence_dependencies()
    build(args.source, args.output)


def build(source: Path, output: Path) -> None:
    """Write ``images/`` and ``annotations/muscima_{train,val}.json`` to a folder.

    Raises:
        MissingFileError: if the source lacks the annotation files.
        DataError: if one of them is damaged.
    """
    pages = sorted((source / ANNOTATIONS).glob("*.xml"))
    if not pages:
        raise MissingFileError(
            f"There is no {ANNOTATIONS}/*.xml in '{source}'; get it with git clone --depth 1 "
            f"{INFO['url']}"
        )
    images = output / "images"
    images.mkdir(parents=True, exist_ok=True)
    splits = {"train": ([], []), "val": ([], [])}
    with multiprocessing.Pool() as pool:
        tiles = pool.imap(functools.partial(cut_page, images), pages)
        image_id = 0
        for path, page in zip(pages, tqdm(tiles, total=len(pages), unit="page"), strict=True):
            kept, objects = splits["val" if _page_name(path) in VAL_PAGES else "train"]
            for file_name, annotations in page:
                image_id += 1
                kept.append({"id": image_id, "file_name": file_name, "width": TILE, "height": TILE})
                objects += [{"image_id": image_id, **a} for a in annotations]
    names = sorted({a["name"] for _, objects in splits.values() for a in objects})
    for split, (kept, objects) in splits.items():
        write_json(
            output / "annotations" / f"muscima_{split}.json",
            {
                "info": INFO,
                "licenses": [LICENSE],
                "images": [{**image, "license": LICENSE["id"]} for image in kept],
                "annotations": _numbered(objects, names),
                "categories": _categories(objects, names),
            },
        )


def read_page(path: Path) -> list[Symbol]:
    """The objects of an annotation file, in its order."""
    symbols = []
    try:
        for node in ElementTree.parse(path).iter("CropObject"):
            top, left, width, height = (
                int(node.findtext(tag)) for tag in ("Top", "Left", "Width", "Height")
            )
            # Runs "value:length", row by row.
            runs = np.array(node.findtext("Mask").replace(":", " ").split(), dtype=np.int64)
            mask = np.repeat(runs[::2].astype(np.uint8), runs[1::2]).reshape(height, width)
            # Both tags occur.
            name = node.findtext("ClassName") or node.findtext("MLClassName")
            symbols.append(Symbol(name, top, left, mask))
    except (ElementTree.ParseError, OSError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"'{path}' is damaged or of another version ({error}); get it again."
        ) from None
    return symbols


def draw_page(symbols: Sequence[Symbol]) -> tuple[np.ndarray, int, int]:
    """A page at half size, dark on white; top and left of its full size in the file's pixels."""
    before, after = MARGINS
    top = min(s.top for s in symbols) - before
    left = min(s.left for s in symbols) - before
    bottom = max(s.top + s.mask.shape[0] for s in symbols) + after
    right = max(s.left + s.mask.shape[1] for s in symbols) + after
    page = np.full((bottom - top, right - left), 255, dtype=np.uint8)
    for s in symbols:
        if s.name not in STAFF or s.name == DRAWN_STAFF:
            y, x = s.top - top, s.left - left
            page[y : y + s.mask.shape[0], x : x + s.mask.shape[1]][s.mask > 0] = 0
    return cv2.resize(page, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA), top, left


def cut_page(folder: Path, path: Path) -> list[tuple[str, list[dict]]]:
    """Write the tiles of a page that show an object; their names and annotations."""
    symbols = read_page(path)
    page, top, left = draw_page(symbols)
    objects = []
    for s in symbols:
        if s.name in STAFF:
            continue
        height, width = s.mask.shape
        y, x = s.top - top, s.left - left
        box = np.array([x, y, x + width, y + height]) / 2
        objects.append((s, box, outline(s.mask, box)))
    tiles = []
    for y in tile_starts(page.shape[0]):
        for x in tile_starts(page.shape[1]):
            annotations = [
                a for s, box, polygons in objects if (a := _annotation(s.name, box, polygons, x, y))
            ]
            if len(annotations) >= MIN_OBJECTS:
                name = f"{_page_name(path)}_{y}_{x}.png"
                with write_atomically(folder / name, "wb") as file:
                    file.write(cv2.imencode(".png", page[y : y + TILE, x : x + TILE])[1].tobytes())
                tiles.append((name, annotations))
    return tiles


def outline(mask: np.ndarray, box: np.ndarray) -> list[np.ndarray]:
    """Simplified outer contours of a mask, (points, 2) at half size; or else the box."""
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    simple = [cv2.approxPolyDP(contour, OUTLINE_TOLERANCE, True)[:, 0] for contour in contours]
    polygons = [box[:2] + contour / 2 for contour in simple if len(contour) >= 3]
    left, top, right, bottom = box
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    return polygons or [np.array(corners)]


def tile_starts(length: int) -> Iterator[int]:
    """Where tiles begin along a side; the last one ends with the side."""
    yield from range(0, length - TILE, TILE - OVERLAP)
    yield length - TILE


def _annotation(
    name: str, box: np.ndarray, polygons: Sequence[np.ndarray], x: int, y: int
) -> dict | None:
    """An object in the tile at (x, y), cut off at its edges; None if too little is inside."""
    start = np.array([x, y])
    first, last = np.clip(box[:2] - start, 0, TILE), np.clip(box[2:] - start, 0, TILE)
    size = last - first
    if (size < MIN_SIZE).any() or size.prod() < MIN_INSIDE * (box[2:] - box[:2]).prod():
        return None
    return {
        "name": name,
        "bbox": [*first.tolist(), *size.tolist()],
        "area": round(float(size.prod()), 1),
        "iscrowd": 0,
        "segmentation": [np.clip(p - start, 0, TILE).ravel().tolist() for p in polygons],
    }


def _numbered(objects: Sequence[dict], names: Sequence[str]) -> list[dict]:
    ids = {name: i for i, name in enumerate(names, 1)}
    return [
        {"id": i, "category_id": ids[a["name"]], **{k: v for k, v in a.items() if k != "name"}}
        for i, a in enumerate(objects, 1)
    ]


def _categories(objects: Sequence[dict], names: Sequence[str]) -> list[dict]:
    instances = Counter(a["name"] for a in objects)
    images = Counter(name for name, _ in {(a["name"], a["image_id"]) for a in objects})
    return [
        {"id": i, "name": name, "image_count": images[name], "instance_count": instances[name]}
        for i, name in enumerate(names, 1)
    ]


def _page_name(path: Path) -> str:
    """ "W-01_N-10" of "CVC-MUSCIMA_W-01_N-10_D-ideal.xml"."""
    return "_".join(path.stem.split("_")[1:3])


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    with exit_on_user_error():
        main()
