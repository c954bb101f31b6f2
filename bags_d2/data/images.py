"""Image files: what can be read as 8 bits a channel, and errors that name the file.

All raise what :func:`check_image` does.
"""

import contextlib
import os
from collections.abc import Iterator

import numpy as np
from detectron2.data import detection_utils
from PIL import Image

from ..errors import DataError
from ..utils.files import require_file

_ORIENTATION = 274  # of EXIF data; 5 to 8 are turned by a right angle


def check_image(path: str | os.PathLike) -> None:
    """Look at the header of an image, whatever its suffix.

    Raises:
        MissingFileError: if it does not exist.
        DataError: if it is not a regular file, no image, too large to be one, or of more than 8
            bits a channel, which Pillow would clip to white without a word.
    """
    with _opened(path) as image:
        mode = image.mode
    # Grey values of 16 or 32 bits ("I", "I;16", ...) and floats; colours come as 8 bits.
    if mode[0] in "IF":
        raise DataError(
            f"Image '{os.fspath(path)}' has more than 8 bits a channel (mode {mode}); convert it "
            "to 8."
        )


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """Width and height of an image as it is shown, turned by its EXIF data, from its header."""
    with _opened(path) as image:
        # PNG's own getexif would decode the pixels.
        turned = Image.Image.getexif(image).get(_ORIENTATION) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size


def read_image(path: str | os.PathLike, format: str = "BGR") -> np.ndarray:
    """Detectron2's ``read_image``, with errors that name the file: uint8 (H, W, C)."""
    check_image(path)
    try:
        return detection_utils.read_image(os.fspath(path), format=format)
    except Exception as error:  # damaged pixels raise nearly anything
        raise unreadable(path, error) from None


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    local = require_file(path)
    try:
        with Image.open(local) as image:
            yield image
    except Exception as error:  # damaged headers raise nearly anything
        raise unreadable(path, error) from None


def unreadable(path: str | os.PathLike, error: Exception) -> DataError:
    """The error for an image that cannot be read."""
    detail = " ".join(str(error).split()) or type(error).__name__
    return DataError(
        f"Image '{os.fspath(path)}' cannot be read ({detail}); restore it, or leave it out."
    )
