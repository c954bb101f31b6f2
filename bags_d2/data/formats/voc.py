"""Pascal VOC: an XML file for each image, boxes alone, and lists of the images of each split."""

import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from xml.sax.saxutils import escape

from ...errors import DataError
from .common import (
    Found,
    Place,
    ReadSize,
    classes_of,
    find_splits,
    images_for,
    locate_files,
    read_lines,
    read_text,
)

WHAT = "Pascal VOC annotations"
IMAGES = "JPEGImages"
FIRST_CLASS = 1
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_FLAGS = {"": 0, "0": 0, "1": 1, "false": 0, "true": 1}


def locate(source: Path, image_root: Path) -> Place:
    """The annotations are those of a folder, or those that a list names.

    Args:
        source: the folder of XML files, or a list like ``ImageSets/Main/train.txt``, whose
            annotations are in ``Annotations`` beside ``ImageSets``.
        image_root: the folder of images.
    """
    if source.is_dir():
        return locate_files(source, ".xml")
    root = Path(os.path.abspath(source)).parents[2]
    folder, files = root / "Annotations", {}
    for line in read_lines(source):
        # Lists of one class have a flag after each image; names may have blanks, too.
        stem = line if (folder / f"{line}.xml").is_file() else line.split()[0]
        files[stem] = f"{stem}.xml"
    names, lists = classes_of(root)
    return Place(names, folder, files, (source, *lists), is_listed=True)


def parse(path: str, read_size: ReadSize, names: list[str]) -> tuple[tuple[int, int], list[dict]]:
    """Size of an image, and its objects. Pixels count from 1, as for Detectron2 and the devkit."""
    root, objects = _parse_xml(path), []
    for number, element in enumerate(root.findall("object"), 1):
        try:
            x0, y0, x1, y1 = (float(element.findtext(f"bndbox/{side}")) for side in _SIDES)
        except (TypeError, ValueError):
            raise DataError(
                f"'{path}' object {number} has no bndbox of the numbers xmin, ymin, xmax and ymax; "
                "correct or remove it."
            ) from None
        difficult = (element.findtext("difficult") or "").strip().lower()
        objects.append(
            {
                "class": (element.findtext("name") or "").strip(),
                "bbox": [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1],
                "ignore": _FLAGS.get(difficult, difficult),
                "where": f"object {number}",
            }
        )
    sides = [(root.findtext(f"size/{side}") or "").strip() for side in ("width", "height")]
    is_given = all(side.isdecimal() and int(side) for side in sides)
    return tuple(map(int, sides)) if is_given else read_size(), objects


def _parse_xml(path: str) -> ElementTree.Element:
    text = read_text(path)
    # Only such a declaration can define entities, which may expand without bound or name files.
    if "<!DOCTYPE" in text:
        raise DataError(f"'{path}' has a DOCTYPE, which is not read for safety; remove it.")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"'{path}' is not valid XML ({error}); restore or remove it.") from None
    if root.tag != "annotation":
        raise DataError(f"'{path}' is no Pascal VOC annotation but a <{root.tag}>; remove it.")
    return root


def find(folder: Path) -> Found:
    """The data sets of a folder: those of ``ImageSets/Main``, else of folders of the splits."""
    lists = {path.stem: path for path in sorted((folder / "ImageSets" / "Main").glob("*.txt"))}
    for train, val in (("train", "val"), ("trainval", "test"), ("train", "test")):
        if train in lists and val in lists:
            lists = {"train": lists[train], "val": lists[val]}
            break
    else:
        lists = dict(zip([""], lists.values(), strict=False))
    images = images_for(folder / "Annotations", folder) if lists else folder
    found = [(split, path, images) for split, path in lists.items()]
    return found or find_splits(folder, ("Annotations", "annotations", "xmls", ""))


def encode(image: dict, objects: list[dict], lost: Counter) -> tuple[str, str]:
    """Path and content of the annotation file of an image; see ``convert_dataset``."""
    size = f"<width>{image['width']}</width><height>{image['height']}</height><depth>3</depth>"
    lines = [f"<filename>{escape(image['file_name'])}</filename>", f"<size>{size}</size>"]
    for row in objects:
        lost["masks left out"] += bool(row["segmentation"])
        x, y, w, h = row["bbox"]
        corners = zip(_SIDES, (x + 1, y + 1, x + w, y + h), strict=True)
        box = "".join(f"<{side}>{value:.15g}</{side}>" for side, value in corners)
        difficult = int(row["iscrowd"] or row["ignore"])
        lines.append(
            f"<object><name>{escape(row['name'])}</name><difficult>{difficult}</difficult>"
            f"<bndbox>{box}</bndbox></object>"
        )
    text = "\n  ".join(["<annotation>", *lines]) + "\n</annotation>\n"
    return f"Annotations/{image['stem']}.xml", text


def finish(splits: dict[str, list[str]], names: list[str]) -> dict[str, str]:
    """Content of the files of the data set by path."""
    files = {f"ImageSets/Main/{split}.txt": stems for split, stems in splits.items()}
    files["classes.txt"] = names
    return {path: "".join(f"{line}\n" for line in lines) for path, lines in files.items()}
