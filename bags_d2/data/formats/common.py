"""What the formats of folders share: where their files are, and shapes."""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import DataError, MissingFileError
from ...utils.files import require_file

IMAGE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".jpeg", ".jpg", ".mpo", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
# Names of folders and files of each split, the preferred first.
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}

_MAX_BYTES = 64_000_000  # of the annotations of an image

ReadSize = Callable[[], tuple[int, int]]
# Split ("" if there is none), annotations or names, folder of images.
Found = list[tuple[str, Path, Path]]


@dataclass
class Place:
    """Where the annotations of a data set are.

    Attributes:
        names: its classes; None if they are those of its objects.
        folder: of the annotation files.
        files: path of each below it, by that path without suffix, which is also its image's.
        lists: further files that were read.
        is_listed: whether the images are those of a list, so that none may be missing.
    """

    names: list[str] | None
    folder: Path
    files: dict[str, str]
    lists: tuple[Path, ...] = ()
    is_listed: bool = False


def locate_files(source: Path, suffix: str) -> Place:
    """The annotations in a folder; ``classes.txt``, in it or beside it, may list the classes."""
    names, lists = classes_of(source, source.parent)
    return Place(names, source, list_files(source, (suffix,)), lists)


def classes_of(*folders: Path) -> tuple[list[str] | None, tuple[Path, ...]]:
    """The classes that the first ``classes.txt`` lists, and that file; None and () without one."""
    files = (folder / "classes.txt" for folder in folders)
    file = next(filter(Path.is_file, files), None)
    return (None, ()) if file is None else (read_lines(file), (file,))


def list_files(folder: Path, suffixes: Collection[str]) -> dict[str, str]:
    """Files below a folder, as of :func:`walk`: path by path without suffix.

    Raises:
        MissingFileError: if there is no such folder, or one in it cannot be listed.
        DataError: if two files differ in their suffix alone.
    """
    found = {}
    for path in walk(folder):
        stem, suffix = os.path.splitext(path)
        if suffix.lower() in suffixes and found.setdefault(stem, path) != path:
            raise DataError(
                f"'{found[stem]}' and '{path}' in '{folder}' differ in their suffix alone, so that "
                "one annotation file would serve both; rename one."
            )
    return found


def walk(folder: Path) -> Iterator[str]:
    """Paths below a folder, relative to it and in order, of all files that are not hidden."""

    def fail(error: OSError) -> None:
        raise MissingFileError(
            f"Folder '{error.filename}' cannot be read ({error.strerror}); correct the path."
        )

    seen = set()
    for where, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        found = os.stat(where)
        is_new = (found.st_dev, found.st_ino) not in seen  # not a link to a folder above
        seen.add((found.st_dev, found.st_ino))
        folders[:] = sorted(name for name in folders if is_new and not name.startswith("."))
        prefix = os.path.join(os.path.relpath(where, folder), "").removeprefix("./")
        yield from (prefix + name for name in sorted(names) if is_new and not name.startswith("."))


def read_text(path: str | os.PathLike) -> str:
    """The content of a small file in UTF-8; MissingFileError or DataError if it is none."""
    local = require_file(path)
    if os.path.getsize(local) > _MAX_BYTES:
        raise DataError(f"'{path}' is too large for the annotations of an image; leave it out.")
    try:
        return Path(local).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{path}' is not text in UTF-8 ({error}); save it as such.") from None


def read_lines(path: Path) -> list[str]:
    """The lines of a small file that are not blank, without blanks around them."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def find_splits(folder: Path, parts: Sequence[str]) -> Found:
    """The folders of annotations of the splits, and their images.

    Args:
        folder: of the data set.
        parts: names of a folder below or above those of the splits, the preferred first.
    """
    for part in parts:
        found = {}
        for split, names in SPLITS.items():
            places = (place for n in names for place in (folder / part / n, folder / n / part))
            if place := next(filter(Path.is_dir, places), None):
                found[split] = place
        if found:
            break
    else:
        found = {"": next(filter(Path.is_dir, (folder / part for part in parts)))}
    return [(split, place, images_for(place, folder)) for split, place in found.items()]


def images_for(annotations: Path, folder: Path) -> Path:
    """Where the images of a folder of annotation files are: in it, or in one named images."""
    if list_files(annotations, IMAGE_SUFFIXES):
        return annotations
    places = (
        place
        for name in ("images", "Images", "JPEGImages")
        for place in (folder / name / annotations.name, annotations.parent / name, folder / name)
    )
    return next(filter(Path.is_dir, places), annotations)


def extent(*polygons: list[float]) -> list[float]:
    """Box [x, y, width, height] around polygons x, y, x, y, ..."""
    xs = [x for polygon in polygons for x in polygon[::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def is_around(box: Sequence[float], polygons: list[list[float]], tolerance: float) -> bool:
    """Whether a box is that around polygons, each side to so many pixels; False if none are."""
    if not polygons:
        return False
    (x, y, w, h), (x2, y2, w2, h2) = box, extent(*polygons)
    return max(map(abs, (x - x2, y - y2, x + w - x2 - w2, y + h - y2 - h2))) <= tolerance
