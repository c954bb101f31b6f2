"""Writing data sets in another format."""

import json
import logging
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePath

from detectron2.utils.visualizer import GenericMask
from tqdm import tqdm

from ...errors import DataError
from ...utils.files import require_file
from ..annotations import AnnotationSet
from . import FOLDER_KINDS, Row, find_dataset, is_validation, read_row
from .common import IMAGE_SUFFIXES

logger = logging.getLogger(__name__)


def convert_dataset(
    rows: Sequence[Row], kind: str, output: str | os.PathLike, copy_images: bool = False
) -> list[Row]:
    """Write data sets in another format, with links to the images or copies of them.

    Boxes, classes (those without objects as well), splits and, where the format has them, polygons
    and what is ignored are kept; what is lost is logged.

    Args:
        rows: as of ``find_dataset``; a name that ends in "_val" is of the validation set.
        kind: "coco" or of ``FOLDER_KINDS``.
        output: a folder that does not exist yet; it appears once it is complete.
        copy_images: rather than link them.

    Returns:
        The rows to register the result with.

    Raises:
        MissingFileError, DataError: if an image is missing, something has no meaning in either
            format, or ``output`` exists.
    """
    output, module = Path(os.path.abspath(output)), FOLDER_KINDS.get(kind)
    if output.exists():
        raise DataError(f"'{output}' exists already; name a new folder.")
    images, names = [], {}
    for name, own_kind, source, root in rows:
        read = read_named(own_kind, source, root)
        names.update(dict.fromkeys(read.names))
        for position, row in enumerate(read.image_rows):
            file = read.file_name(position, own_kind == "lvis")
            # The file may name images by absolute paths, or by "..".
            parts = [part for part in PurePath(file).parts if part not in ("/", "..")]
            split = "val" if is_validation(name) else "train"
            image = {"file_name": "/".join(parts), "split": split, "set": name, "read": read}
            size = {"height": row["height"], "width": row["width"]}
            images.append({**image, **size, "position": position, "path": Path(root, file)})
    folder_of = (module.IMAGES if module else "images/{split}").format
    _set_stems(images, folder_of)
    if module:
        _require_writable(names, images)

    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    lost, splits = Counter(), defaultdict(list)
    number_of = {name: number for number, name in enumerate(names)}
    for image in tqdm(images, desc="images", disable=None):
        target = partial / folder_of(**image) / image["file_name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        local = os.path.realpath(require_file(image["path"]))
        (shutil.copyfile if copy_images else os.symlink)(local, target)
        objects = objects_of(image.pop("read"), image.pop("position"), number_of)
        splits[image["split"]].append((image, objects))
        if module:
            for row in objects:
                if isinstance(row["segmentation"], dict):
                    lost["run-length codes written as outlines, if at all"] += 1
                    mask = GenericMask(row["segmentation"], image["height"], image["width"])
                    row["segmentation"] = [polygon.tolist() for polygon in mask.polygons]
            _write(partial, *module.encode(image, objects, lost))
    stems = {split: [image["stem"] for image, _ in found] for split, found in splits.items()}
    if module:
        files = module.finish(stems, list(names))
    else:
        contents = coco_content(splits, names)
        files = {f"annotations/{split}.json": json.dumps(c) for split, c in contents.items()}
    for path, text in files.items():
        _write(partial, path, text)
    partial.rename(output)
    for what, number in lost.items():
        if number:
            logger.warning("Not everything fits the format: %s: %d.", what, number)
    return find_dataset(output)


def _set_stems(images: list[dict], folder_of: Callable[..., str]) -> None:
    """Give each image its path without suffix, below a folder of its set's name if need be."""
    for is_prefixed in (False, True):
        taken = Counter()
        for image in images:
            if is_prefixed:
                image["file_name"] = f"{image['set']}/{image['file_name']}"
            image["stem"] = os.path.splitext(image["file_name"])[0]
            taken[folder_of(**image), image["stem"]] += 1
        if max(taken.values()) == 1:
            return
    stem = taken.most_common(1)[0][0][1]
    raise DataError(f"Several images are named '{stem}', suffix aside; rename all but one.")


def _require_writable(names: Iterable[str], images: list[dict]) -> None:
    for name in names:
        if name != name.strip() or not name.isprintable():
            raise DataError(f"Class {name!r} cannot be a line of a text file; rename it.")
    for image in images:
        if image["path"].suffix.lower() not in IMAGE_SUFFIXES:
            raise DataError(f"'{image['path']}' has no suffix of an image; rename it.")


def read_named(kind: str, source: str, image_root: str) -> AnnotationSet:
    """:func:`read_row`, and a DataError unless names tell the classes apart."""
    read = read_row(kind, source, image_root)
    if len(set(read.names)) < len(read.names):
        raise DataError(f"'{source}' has two classes of one name; rename one of them.")
    return read


def objects_of(read: AnnotationSet, position: int, number_of: Mapping[str, int]) -> list[dict]:
    """The annotations of an image, with the numbers of their classes as "class"."""
    objects = read.ground_truth(position, None, lvis=False)
    for row in objects:
        number = row["id"] - 1
        name = read.names[read.classes[number]]
        row.update({"name": name, "class": number_of[name], "ignore": int(read.ignored[number])})
        row.update(area=float(read.areas[number]), segmentation=row.get("segmentation") or [])
    return objects


def coco_content(splits: Mapping[str, list], names: Iterable[str]) -> dict[str, dict]:
    """What the annotation file of each split holds; splits are lists of (image, its objects)."""
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    keys = ("bbox", "area", "iscrowd", "ignore", "segmentation")
    contents = {}
    for split, found in splits.items():
        rows, annotations = [], []
        for number, (image, objects) in enumerate(found, 1):
            rows.append({"id": number, **{k: image[k] for k in ("file_name", "height", "width")}})
            for each in objects:
                ids = {"id": len(annotations) + 1, "image_id": number}
                ids["category_id"] = each["class"] + 1
                annotations.append(ids | {key: each[key] for key in keys})
        contents[split] = {"images": rows, "annotations": annotations, "categories": categories}
    return contents


def _write(folder: Path, path: str, text: str) -> None:
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(text, encoding="utf-8")
