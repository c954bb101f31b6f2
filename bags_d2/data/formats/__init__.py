"""Data sets in YOLO, Pascal VOC and LabelMe format, found in folders and read as annotations.

A folder is brought into the form of a COCO file in memory and then goes through the one reader
(``data/annotations.py``). Nothing is written beside it and every process reads it anew, so nothing
of it can be stale. Libraries that read them are not used: docs/datasets.md says why.

A module of a format has ``locate``, ``parse`` and ``find`` for reading, ``encode`` and ``finish``
for writing.
"""

import functools
import hashlib
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ...errors import BagsError, DataError, MissingFileError
from ...utils.files import file_version
from ..annotations import AnnotationSet, check_annotations, read_annotations
from ..images import image_size
from . import labelme, voc, yolo
from .common import IMAGE_SUFFIXES, SPLITS, Place, list_files, walk

__all__ = ["FOLDER_KINDS", "Row", "find_dataset", "is_validation", "read_row"]

logger = logging.getLogger(__name__)

# Name, kind, annotations and folder of images, as in DATASETS.REGISTER.
Row = tuple[str, str, str, str]

FOLDER_KINDS = {"yolo": yolo, "voc": voc, "labelme": labelme}


def is_validation(name: str) -> bool:
    """Whether a row of this name, as :func:`find_dataset` gives it, is of a validation set."""
    return name.rstrip("0123456789").endswith("_val")


def read_row(kind: str, source: str, image_root: str) -> AnnotationSet:
    """Read, check and normalize the annotations of a data set; again only if they have changed.

    In a folder the id of an image is its path below the folder of images, that of an annotation its
    file and line, object or shape.

    Args:
        kind: "coco", "lvis" or of ``FOLDER_KINDS``.
        source, image_root: the annotation file (for the others see ``locate`` in the module of the
            format), and the folder of images.

    Raises:
        MissingFileError, DataError: if a folder or file that is named does not exist, for the first
            thing that has no meaning, or for a source of another kind.
    """
    try:
        if kind not in FOLDER_KINDS:
            return read_annotations(source)
        place, images = _locate(kind, source, image_root)
        paths = [os.path.join(image_root, file) for file in images.values()]
        paths += [os.path.join(place.folder, file) for file in place.files.values()]
        digest = hashlib.sha256()
        for path in (*paths, *place.lists):
            version = file_version(path) if os.path.exists(path) else None
            digest.update(os.fsencode(f"{path}\0{version}\n"))
        return _read_version(kind, source, image_root, digest.digest())
    except BagsError as error:
        raise _wrong_kind(kind, source) or error from None


@functools.lru_cache(maxsize=8)
def _read_version(kind: str, source: str, image_root: str, version: bytes) -> AnnotationSet:
    module = FOLDER_KINDS[kind]
    place, images = _locate(kind, source, image_root)
    if len(images) > 5000:
        logger.info("Reading %d images' annotations of '%s' ...", len(images), source)
    orphans = sorted(place.files.keys() - images)
    if place.is_listed and orphans:
        raise MissingFileError(
            f"'{source}' lists '{orphans[0]}', of which there is no image in '{image_root}'; "
            "restore it, or take it from the list."
        )
    if len(orphans) == len(place.files):
        raise DataError(
            f"No image of '{image_root}' has {module.WHAT} in '{place.folder}', in a file of its "
            f"name but for the suffix; correct the folders of '{source}'."
        )
    # In YOLO format an image without a file shows no object; in others it has not been looked at.
    keeps_unlabelled = kind == "yolo"
    rows, objects, odd = [], [], Counter()
    for stem in sorted(images if keeps_unlabelled else images.keys() & place.files):
        read_size = functools.partial(image_size, os.path.join(image_root, images[stem]))
        if stem in place.files:
            path = os.path.join(place.folder, place.files[stem])
            (width, height), found = module.parse(path, read_size, place.names)
        else:
            (width, height), found = read_size(), []
        image = {"id": images[stem], "file_name": images[stem]}
        rows.append({**image, "width": width, "height": height})
        for row in found:
            row.update(id=f"{place.files[stem]} {row.pop('where')}", image_id=images[stem])
            if "left out" in row:
                odd[f"{row['left out']} left out"] += 1
            else:
                objects.append(row)
    names = place.names
    if names is None:
        names = sorted({row["class"] for row in objects})
    # Of a YOLO file the classes are numbers already.
    numbers = {name: number for number, name in enumerate(names, module.FIRST_CLASS)}
    numbers = {number: number for number in range(len(names))} if kind == "yolo" else numbers
    for row in objects:
        row["category_id"] = numbers.get(found := row.pop("class"))
        if row["category_id"] is None:
            raise DataError(
                f"'{source}': {row['id']} is of class {found!r}, which '{place.lists[-1]}' does "
                "not list; correct either."
            )
    if not place.is_listed:
        unlabelled = len(images) - len(place.files) + len(orphans)
        left_out = "" if keeps_unlabelled else " left out"
        odd[f"images without annotation file{left_out}"] += unlabelled
        odd[f"annotation files without image left out (as {orphans[:1]})"] += len(orphans)
    categories = [{"id": n, "name": name} for n, name in enumerate(names, module.FIRST_CLASS)]
    content = {"images": rows, "annotations": objects, "categories": categories}
    notes = [f"{what}: {number}" for what, number in odd.items() if number]
    return check_annotations(source, content, notes, place.names is not None)


def _locate(kind: str, source: str, image_root: str) -> tuple[Place, dict[str, str]]:
    if not os.path.exists(source):
        raise MissingFileError(f"'{source}' does not exist; correct the path.")
    place = FOLDER_KINDS[kind].locate(Path(source), Path(image_root))
    return place, list_files(Path(image_root), IMAGE_SUFFIXES)


def _wrong_kind(kind: str, source: str) -> DataError | None:
    """The error for a source of another kind than it is registered as; None if it is of that."""
    kinds = list(itertools.islice(_kinds(Path(source)), 100))
    if not kinds or kind in kinds or (kind == "lvis" and "coco" in kinds):
        return None
    found = kinds[0]
    what = FOLDER_KINDS[found].WHAT if found in FOLDER_KINDS else "annotations in COCO's format"
    return DataError(
        f"'{source}' holds {what}, and is no data set of kind '{kind}'; register it as '{found}' "
        "(DATASETS.REGISTER, docs/datasets.md)."
    )


def _kinds(path: Path) -> Iterator[str]:
    """The kinds of a file, or of the files of a folder, that are of any."""
    paths = (path / file for file in walk(path)) if path.is_dir() else [path]
    return (kind for file in paths if (kind := _kind_of_file(file)))


def _kind_of_file(path: Path) -> str | None:
    if path.suffix not in (".json", ".txt", ".xml", ".yaml", ".yml") or not path.is_file():
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        head = file.read(65_536)
    if path.suffix == ".json":
        key = re.search(r'"(shapes|images|annotations|categories)"\s*:', head)
        return key and ("labelme" if key[1] == "shapes" else "coco")
    if path.suffix == ".xml":
        return "voc" if "<annotation" in head else None
    if path.suffix != ".txt":
        return "yolo" if re.search(r"^names\s*:", head, re.MULTILINE) else None
    if len(path.parents) > 2 and (path.parents[2] / "Annotations").is_dir():
        return "voc"
    return "yolo" if re.match(r"\s*\d+([ \t]+[-+.\de]+){4,}[ \t]*$", head, re.MULTILINE) else None


def find_dataset(path: str | os.PathLike) -> list[Row]:
    """The data sets of a folder, of whichever kind, as rows of ``DATASETS.REGISTER``.

    Args:
        path: a folder, or the ``data.yaml`` or JSON file of a data set.

    Returns:
        A row of the training set and one of the validation set, whose names end in "_train" and
        "_val"; one row if there is no split; more, of names that end in a number, where a split is
        in several folders. A test set takes the place of a validation set that there is not.

    Raises:
        MissingFileError, DataError: if there is no such folder, no data set in it, or no image
            where one is annotated.
    """
    path = Path(path)
    if not path.exists():
        raise MissingFileError(f"'{path}' does not exist; name the folder of a data set.")
    kind, folder = next(_kinds(path), None), path if path.is_dir() else path.parent
    if kind is None:
        raise DataError(
            f"'{path}' has no annotations in COCO, LVIS, YOLO, Pascal VOC or LabelMe format; name "
            "the folder of a data set (docs/datasets.md)."
        )
    find = FOLDER_KINDS[kind].find if kind in FOLDER_KINDS else _find_json
    rows, names = [], Counter()
    stem = re.sub(r"\W+", "_", folder.resolve().name).strip("_") or "data"
    for split, source, images, *own_kind in find(path if kind == "coco" else folder):
        name = f"{stem}_{split}" if split else stem
        names[name] += 1
        name += str(names[name]) if names[name] > 1 else ""
        rows.append((name, *(own_kind or [kind]), os.fspath(source), os.fspath(images)))
    return rows


def _find_json(path: Path) -> Iterator[tuple[str, Path, Path, str]]:
    folder = path if path.is_dir() else path.parent
    everything = [folder / file for file in walk(folder)]
    files = [f for f in everything if f.suffix == ".json" and _kind_of_file(f) == "coco"]
    # COCO's own folder has captions and keypoints of the same images.
    files = [path] if path != folder else sorted(files, key=lambda f: "instances" not in f.name)
    found = {}
    for split, words in SPLITS.items():
        for word in words:
            for file in files:
                if word in f"{file.parent.name}/{file.name}".lower():
                    found.setdefault(split, file)
    for split, file in (found or {"": files[0]}).items():
        annotations = read_annotations(file)
        lists = (row["neg_category_ids"] is not None for row in annotations.image_rows)
        is_lvis = all(lists) and None not in annotations.frequencies
        name = annotations.file_name(0, is_lvis)
        places = [f for f in everything if f"/{f.as_posix()}".endswith(f"/{name}")]
        places.sort(key=lambda f: split not in os.path.relpath(f, folder))
        if not places:
            raise MissingFileError(
                f"Image '{name}' of '{file}' is not in '{folder}'; put the images there."
            )
        root = Path(places[0].as_posix()[: -len(name) - 1])
        yield split, file, root, "lvis" if is_lvis else "coco"
