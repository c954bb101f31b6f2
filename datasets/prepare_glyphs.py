#!/usr/bin/env python
"""A long-tailed detection data set that needs no download: characters drawn on calm pictures.

Every class is one character, drawn in the type faces that matplotlib ships. The files written are
plain LVIS v1 JSON and JPEG, so that whatever reads LVIS reads these sets as well. How often each
class is drawn follows a plan that is met exactly, which makes the imbalance itself an input rather
than an accident of sampling. Everything is a function of the preset and a seed: each picture has
its own random stream, so the number of workers never changes the result.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from bags_d2.data.lvis_v1 import lvis_v1_counts
from bags_d2.errors import ConfigError, DataError, exit_with_one_sentence

__all__ = [
    "INSTANCE_BINS",
    "MIN_DISTANCE",
    "PRESETS",
    "GlyphPreset",
    "build_glyphs",
    "glyph_characters",
    "glyph_distances",
    "train_counts",
]

logger = logging.getLogger(__name__)

# Part of the stamp: raise it whenever the pictures or the annotations of any preset change.
GENERATOR_VERSION = 1

#: Lower edges of the bins by training instances: [0, 10), [10, 100), [100, 1000), [1000, inf).
INSTANCE_BINS = (0, 10, 100, 1000)

#: Two characters whose `glyph_distances` entry is below this are too much alike to be two classes.
MIN_DISTANCE = 0.035

# Characters chosen automatically keep further apart, as nobody looks at every pair: this much in
# the face each is best covered by, and this much in any face that they share.
_CLEAR_DISTANCE = 0.2
_CLEAR_DISTANCE_ANY_FACE = 0.12

_STAMP = "glyphs.json"
_PHOTO_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_JPEG_QUALITY = 92

# Heavier faces are in the majority on purpose: at 20 pixels a hairline stroke of a light face is
# narrower than one pixel and disappears in the JPEG.
_FACES = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-BoldOblique.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-BoldItalic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
)
# Computer Modern's fonts map many code points to other characters; letters and digits are right.
_ASCII_FACES = ("cmb10.ttf", "cmss10.ttf")

_CANONICAL_EM = 160  # pixels per em of the stored shapes, from which every size is resampled
_OVERSAMPLE = 4  # outlines are traced at this multiple of the picture's resolution
_MAX_BOX_OVERLAP = 0.15  # shared area over the smaller of two boxes
_MIN_VISIBLE = 0.8  # share of an object's mask that must stay inside the picture and uncovered
_FEATURE_SIDE = 32
_FEATURE_MARGIN = 4
_FEATURE_LENGTH = (_FEATURE_SIDE // 2 + _FEATURE_MARGIN) ** 2


@dataclass(frozen=True)
class GlyphPreset:
    """What one built-in data set consists of.

    Attributes:
        name: the preset's name; also the folder's and the JSON files' stem.
        num_classes: number of classes.
        counts: training instances per class before they are dealt out to the classes at random,
            or None for LVIS v1's own counts, capped at `count_cap`.
        count_cap: upper limit on the training instances of one class.
        characters: the classes' characters, or None to choose them from the fonts.
        val_per_class: validation instances of every class.
        image_size: side of the square pictures in pixels.
        objects_per_image: smallest and largest number of objects planned for a picture.
        glyph_size: smallest and largest longer side of an upright glyph in pixels.
        negatives: how many absent classes a picture lists as verified absent; None lists all.
    """

    name: str
    num_classes: int
    counts: tuple[int, ...] | None
    count_cap: int
    characters: str | None
    val_per_class: int
    image_size: int
    objects_per_image: tuple[int, int]
    glyph_size: tuple[int, int]
    negatives: int | None


def _log_spaced(low: int, high: int, num: int) -> tuple[int, ...]:
    return tuple(round(float(v)) for v in np.geomspace(low, high, num))


PRESETS: dict[str, GlyphPreset] = {
    preset.name: preset
    for preset in (
        GlyphPreset(
            name="glyphs",
            num_classes=40,
            counts=(
                *_log_spaced(2, 9, 12),
                *_log_spaced(12, 90, 12),
                *_log_spaced(110, 800, 12),
                *_log_spaced(1500, 4000, 4),
            ),
            count_cap=4000,
            characters="AEFGHKMQRSTXZΓΔΘΞΣΦΨΩБДЖИЦШЮЯ24578★♣♥♪☂&",
            val_per_class=40,
            image_size=160,
            objects_per_image=(5, 11),
            glyph_size=(20, 52),
            negatives=None,
        ),
        GlyphPreset(
            name="glyphs_lvis",
            num_classes=1203,
            counts=None,
            count_cap=1500,
            characters=None,
            val_per_class=20,
            image_size=320,
            objects_per_image=(18, 30),
            glyph_size=(22, 56),
            negatives=20,
        ),
        GlyphPreset(
            name="glyphs_tiny",
            num_classes=6,
            counts=(3, 12, 150, 5, 40, 110),
            count_cap=150,
            characters="AΩЖ5★♥",
            val_per_class=14,
            image_size=112,
            objects_per_image=(7, 11),
            glyph_size=(14, 30),
            negatives=None,
        ),
    )
}


# ---------------------------------------------------------------------------------------------
# Characters
# ---------------------------------------------------------------------------------------------


def _font_path(face: str) -> str:
    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf", face)


@cache
def _coverage(face: str) -> frozenset[int]:
    """Code points for which a face has a glyph of its own."""
    return frozenset(FT2Font(_font_path(face)).get_charmap())


@cache
def _font(face: str) -> ImageFont.FreeTypeFont:
    # The basic layout engine is always there; the complex one may or may not be, and would give
    # different shapes on different machines.
    return ImageFont.truetype(_font_path(face), _CANONICAL_EM, layout_engine=ImageFont.Layout.BASIC)


def _faces_of(character: str) -> tuple[str, ...]:
    """The faces in which a character is drawn, best-covered face first."""
    faces = _FACES
    if character.isascii() and character.isalnum():
        faces += _ASCII_FACES
    return tuple(face for face in faces if ord(character) in _coverage(face))


@lru_cache(maxsize=4096)
def _shape(character: str, face: str) -> np.ndarray:
    """The upright glyph, cropped to its ink.

    Returns:
        uint8 array (h, w), 255 where there is ink; (0, 0) if the glyph is blank.
    """
    font = _font(face)
    left, top, right, bottom = font.getbbox(character)
    canvas = Image.new("L", (max(1, right - left) + 8, max(1, bottom - top) + 8))
    ImageDraw.Draw(canvas).text((4 - left, 4 - top), character, fill=255, font=font)
    ink = np.asarray(canvas)
    rows, cols = np.flatnonzero(ink.max(1) > 127), np.flatnonzero(ink.max(0) > 127)
    if not rows.size or not cols.size:
        return np.zeros((0, 0), np.uint8)
    return np.ascontiguousarray(ink[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1])


def _feature(shape: np.ndarray) -> np.ndarray:
    """A glyph's ink in a square of fixed size, blurred, as a vector of mean 0 and length 1.

    The longer side always fills the square, because pictures vary the size: o and O are alike here.

    Args:
        shape: uint8 array (h, w) with some ink.

    Returns:
        float32 array (_FEATURE_LENGTH,).
    """
    scale = _FEATURE_SIDE / max(shape.shape)
    height, width = (max(1, round(side * scale)) for side in shape.shape)
    small = cv2.resize(shape, (width, height), interpolation=cv2.INTER_AREA)
    square = np.zeros((_FEATURE_SIDE + 2 * _FEATURE_MARGIN,) * 2, np.float32)
    top, left = (square.shape[0] - height) // 2, (square.shape[1] - width) // 2
    square[top : top + height, left : left + width] = small
    # The blur lets strokes that are a pixel apart still count as the same stroke.
    # Once blurred, every other pixel tells as much, and comparing thousands takes a quarter.
    vector = cv2.GaussianBlur(square, (0, 0), 1.0)[::2, ::2].ravel()
    vector -= vector.mean()
    return vector / np.linalg.norm(vector)


def glyph_distances(characters: Sequence[str]) -> np.ndarray:
    """How different characters look: 1 - correlation of their size-normalised, blurred renderings.

    For a pair the smallest distance over the faces that have both characters is taken, or, where
    no face has both, over each character's first face.

    Args:
        characters: n characters, each in at least one face.

    Returns:
        float32 array (n, n), symmetric, 0 on the diagonal.
    """
    number = len(characters)
    best = np.full((number, number), np.inf, np.float32)
    for face in (*_FACES, None):
        rows, features = [], []
        for row, character in enumerate(characters):
            faces = _faces_of(character)
            chosen = faces[0] if face is None else face
            if chosen in faces:
                rows.append(row)
                features.append(_feature(_shape(character, chosen)))
        if not rows:
            continue
        stacked = np.stack(features)
        block = np.ix_(rows, rows)
        distances = 1 - stacked @ stacked.T
        best[block] = np.minimum(best[block], distances)
    np.fill_diagonal(best, 0)
    return np.maximum(best, 0)


def _sturdy(shape: np.ndarray) -> bool:
    """Whether a glyph has enough ink and bulk to be seen at 20 pixels, without being a block."""
    if not shape.size or max(shape.shape) < _CANONICAL_EM // 4:
        return False
    longer, shorter = max(shape.shape), min(shape.shape)
    ink = float((shape > 127).sum()) / longer**2
    return shorter / longer >= 0.4 and 0.12 <= ink <= 0.75


def _candidates() -> list[str]:
    """Letters, numbers, symbols and punctuation of the faces that are sturdy enough to draw.

    Code-point order puts the familiar alphabets first, so that of two look-alikes the familiar one
    is met, and kept, first.
    """
    points = sorted(set().union(*(_coverage(face) for face in _FACES)))
    found = []
    for character in map(chr, points):
        if unicodedata.category(character) not in {"Lu", "Ll", "Lo", "Nd", "No", "Sm", "So", "Po"}:
            continue
        # An accented letter differs from the bare one by a few pixels only, and a letter in another
        # style or position is one that a different face may draw just the same.
        kind = unicodedata.decomposition(character).partition(" ")[0]
        if kind and kind not in {"<compat>", "<circle>", "<fraction>", "<square>"}:
            continue
        name = unicodedata.name(character, "")
        # Groups of dots are what the clutter consists of.
        if not name or name.startswith("BRAILLE"):
            continue
        if _sturdy(_shape(character, _faces_of(character)[0])):
            found.append(character)
    return found


@lru_cache(maxsize=4)
def _distinct_characters(number: int) -> tuple[str, ...]:
    """`number` sturdy characters no two of which look alike, from all alphabets.

    Comparing every pair in every face would take minutes, so one face thins them out first.
    """
    kept: list[str] = []
    candidates = _candidates()
    features = np.zeros((len(candidates), _FEATURE_LENGTH), np.float32)
    for character in candidates:
        feature = _feature(_shape(character, _faces_of(character)[0]))
        if kept and float((features[: len(kept)] @ feature).max()) > 1 - _CLEAR_DISTANCE:
            continue
        features[len(kept)] = feature
        kept.append(character)

    distances = glyph_distances(kept)
    chosen: list[int] = []
    for index in range(len(kept)):
        if not chosen or distances[index, chosen].min() >= _CLEAR_DISTANCE_ANY_FACE:
            chosen.append(index)
    if len(chosen) < number:
        raise RuntimeError(
            f"Matplotlib's fonts have only {len(chosen)} characters that can be told apart, "
            f"not the {number} asked for."
        )
    # Evenly from the whole list, or the symbols at its end would never be drawn.
    return tuple(kept[chosen[i * len(chosen) // number]] for i in range(number))


def glyph_characters(preset: str) -> tuple[str, ...]:
    """The characters of a preset's classes, in the order of their category ids.

    Args:
        preset: a key of `PRESETS`.

    Returns:
        One character per class; the class with category id i is entry i - 1.

    Raises:
        ConfigError: the preset does not exist.
    """
    spec = _preset(preset)
    if spec.characters is not None:
        return tuple(spec.characters)
    return _distinct_characters(spec.num_classes)


# ---------------------------------------------------------------------------------------------
# Plan
# ---------------------------------------------------------------------------------------------


def _preset(name: str) -> GlyphPreset:
    if name not in PRESETS:
        raise ConfigError(f"Unknown glyph preset {name!r}; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def train_counts(preset: str, seed: int = 0) -> np.ndarray:
    """Training instances of every class: the plan that a built set meets exactly.

    Which class is rare is drawn at random, so that rarity says nothing about how hard a character
    is; another seed makes other characters rare.

    Args:
        preset: a key of `PRESETS`.
        seed: the seed of the set.

    Returns:
        int64 array (num_classes,); entry i - 1 belongs to category id i.

    Raises:
        ConfigError: the preset does not exist.
    """
    spec = _preset(preset)
    counts = lvis_v1_counts()["instance_count"] if spec.counts is None else spec.counts
    capped = np.minimum(np.asarray(counts, np.int64), spec.count_cap)
    return np.random.default_rng([seed, 0]).permutation(capped)


def _deal(
    counts: np.ndarray, per_image: tuple[int, int], rng: np.random.Generator
) -> list[list[int]]:
    """Shuffle all instances and cut them into pictures.

    Args:
        counts: (num_classes,) instances per class.
        per_image: smallest and largest number of objects of a picture; the last may have fewer.
        rng: random stream.

    Returns:
        For every picture its category ids, from 1, with repeats.
    """
    everything = rng.permutation(np.repeat(np.arange(1, len(counts) + 1), counts)).tolist()
    pictures, start = [], 0
    while start < len(everything):
        size = int(rng.integers(per_image[0], per_image[1] + 1))
        pictures.append(everything[start : start + size])
        start += size
    return pictures


# ---------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------


def _random_colour(
    rng: np.random.Generator, value: tuple[float, float], saturation: tuple[float, float]
) -> np.ndarray:
    """A colour of any hue; float32 (3,) in BGR, 0 to 255, HSV value and saturation in ranges."""
    hsv = np.array(
        [[[rng.uniform(0, 360), rng.uniform(*saturation), rng.uniform(*value)]]], np.float32
    )
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0] * 255


def _luminance(colour: np.ndarray) -> float:
    return float(colour @ np.array([0.114, 0.587, 0.299], np.float32))


def _contrasting_colour(
    rng: np.random.Generator, behind: np.ndarray, contrast: float
) -> np.ndarray:
    """A random colour whose luminance differs from `behind` (BGR, (3,)) by at least `contrast`."""
    reference = _luminance(behind)
    for _ in range(24):
        colour = _random_colour(rng, (0.12, 1.0), (0.15, 0.9))
        if abs(_luminance(colour) - reference) >= contrast:
            return colour
    return np.full(3, 245 if reference < 128 else 15, np.float32)


def _smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Low-frequency noise of unit variance on the coarse grid; float32 (size, size)."""
    coarse = rng.standard_normal((cells, cells)).astype(np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def _paper(rng: np.random.Generator, size: int) -> np.ndarray:
    """A calm background: a gradient between two neighbouring colours, mottling, and fine grain.

    Returns:
        float32 array (size, size, 3), BGR.
    """
    # Mostly light, as paper is, and sometimes dark, as a slate is.
    value = (0.78, 0.98) if rng.random() < 0.72 else (0.16, 0.42)
    first = _random_colour(rng, value, (0.02, 0.24))
    second = np.clip(first + rng.normal(0, 14, 3), 10, 250).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    mix = 0.5 + ramp[None, :] * np.cos(angle) + ramp[:, None] * np.sin(angle)
    picture = first + np.clip(mix, 0, 1)[..., None].astype(np.float32) * (second - first)
    tint = rng.normal(1, 0.25, 3).astype(np.float32)
    mottling = rng.uniform(2, 6) * _smooth_noise(rng, size, int(rng.integers(3, 7)))
    mottling += rng.uniform(1, 3) * _smooth_noise(rng, size, int(rng.integers(10, 20)))
    return picture + mottling[..., None] * tint


def _photo(rng: np.random.Generator, size: int, path: str) -> np.ndarray:
    """A random square crop of a photograph, softened so that glyphs stay legible on it.

    Raises:
        DataError: the file cannot be read as an image.
    """
    photo = cv2.imread(path, cv2.IMREAD_COLOR)
    if photo is None:
        raise DataError(f"The background picture {path} cannot be read as an image.")
    height, width = photo.shape[:2]
    side = max(1, int(min(height, width) * rng.uniform(0.6, 1.0)))
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    crop = photo[top : top + side, left : left + side]
    crop = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32)
    crop = cv2.GaussianBlur(crop, (0, 0), 1.0)
    mean = crop.mean((0, 1))
    return mean + 0.7 * (crop - mean)


def _draw_clutter(rng: np.random.Generator, picture: np.ndarray, number: int) -> None:
    """Paint faint strokes, rings and dots, none of which is a class, onto `picture` in place.

    Args:
        rng: random stream.
        picture: float32 array (size, size, 3), BGR.
        number: how many to paint.
    """
    size = picture.shape[0]
    for _ in range(number):
        centre = rng.uniform(0, size, 2)
        y, x = np.clip(centre, 0, size - 1).astype(int)
        colour = _contrasting_colour(rng, picture[y, x], rng.uniform(12, 45))
        veil = np.zeros((size, size), np.uint8)
        thickness = int(rng.integers(1, 4))
        kind = rng.integers(4)
        if kind == 0:  # a bent stroke
            points = centre + np.cumsum(rng.normal(0, size / 9, (4, 2)), 0)
            t = np.linspace(0, 1, 24)[:, None]
            weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
            curve = sum(w * p for w, p in zip(weights, points, strict=True))
            trace = np.round(curve * 16).astype(np.int32).reshape(-1, 1, 2)
            cv2.polylines(veil, [trace], False, 255, thickness, cv2.LINE_AA, 4)
        elif kind == 1:  # a straight rule
            reach = rng.normal(0, size / 4, 2)
            ends = np.round((np.stack([centre - reach, centre + reach])) * 16).astype(np.int32)
            cv2.line(veil, tuple(ends[0].tolist()), tuple(ends[1].tolist()), 255, thickness, 16, 4)
        elif kind == 2:  # an arc of a ring, never closed, as a ring would be a letter
            radius = int(rng.uniform(6, size / 6))
            start = int(rng.uniform(0, 360))
            middle = tuple(np.round(centre).astype(int).tolist())
            stop = start + int(rng.uniform(60, 200))
            cv2.ellipse(veil, middle, (radius, radius), 0, start, stop, 255, thickness, 16)
        else:  # a few specks
            for speck in centre + rng.normal(0, size / 16, (int(rng.integers(2, 6)), 2)):
                spot = tuple(np.round(speck).astype(int).tolist())
                cv2.circle(veil, spot, int(rng.integers(1, 4)), 255, -1, cv2.LINE_AA)
        opacity = veil[..., None].astype(np.float32) * (rng.uniform(0.35, 0.8) / 255)
        picture += opacity * (colour - picture)


def _pose_glyph(rng: np.random.Generator, character: str, longest: float) -> np.ndarray:
    """Draw one glyph in a random face, at a random moderate angle and aspect.

    Args:
        rng: random stream.
        character: what to draw.
        longest: longer side of the upright glyph in pixels of the picture.

    Returns:
        uint8 array (h, w) at `_OVERSAMPLE` times the picture's resolution; h and w are multiples
        of `_OVERSAMPLE`.
    """
    faces = _faces_of(character)
    shape = _shape(character, faces[int(rng.integers(len(faces)))])
    angle = float(np.clip(rng.normal(0, 9), -22, 22))
    stretch = float(np.exp(rng.normal(0, 0.07)))
    return _pose_shape(shape, angle, stretch, longest)


def _pose_shape(shape: np.ndarray, angle: float, stretch: float, longest: float) -> np.ndarray:
    """Scale, stretch and rotate (degrees) a shape; see `_pose_glyph` for the rest."""
    height, width = shape.shape
    scale = longest * _OVERSAMPLE / max(height, width)
    radians = np.deg2rad(angle)
    rotation = np.array([[np.cos(radians), -np.sin(radians)], [np.sin(radians), np.cos(radians)]])
    linear = rotation @ np.diag([scale * stretch, scale / stretch])
    extent = np.abs(linear) @ np.array([width, height])
    columns, rows = (int(np.ceil((e + 2) / _OVERSAMPLE)) * _OVERSAMPLE for e in extent)
    shift = np.array([columns / 2, rows / 2]) - linear @ np.array([width / 2, height / 2])
    matrix = np.column_stack([linear, shift])
    # Resampling straight from the large shape would alias, so it is first brought near its size.
    if scale < 0.6:
        factor = max(0.05, scale)
        shape = cv2.resize(shape, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        matrix[:, 0] *= width / shape.shape[1]
        matrix[:, 1] *= height / shape.shape[0]
    return cv2.warpAffine(shape, matrix, (columns, rows), flags=cv2.INTER_LINEAR)


@dataclass(frozen=True)
class _Placed:
    """An object on the picture: where its patch lies, and its ink there."""

    category: int
    left: int  # of the patch in pixels of the picture; may be negative
    top: int
    fine: np.ndarray  # uint8 (h * _OVERSAMPLE, w * _OVERSAMPLE): ink within the picture
    alpha: np.ndarray  # float32 (h, w): all ink, 0 to 1, at the picture's resolution
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 of the ink, clipped to the picture


def _window(left: int, top: int, height: int, width: int, size: int) -> tuple[slice, slice]:
    """The part of a patch (rows, columns; in pixels of the picture) that lies in the picture."""
    rows = slice(max(0, -top), min(height, size - top))
    cols = slice(max(0, -left), min(width, size - left))
    return rows, cols


def _clip_fine(fine: np.ndarray, left: int, top: int, size: int) -> np.ndarray:
    """A fine patch with the ink outside the picture removed."""
    height, width = fine.shape[0] // _OVERSAMPLE, fine.shape[1] // _OVERSAMPLE
    rows, cols = _window(left, top, height, width, size)
    clipped = np.zeros_like(fine)
    inside = np.s_[
        rows.start * _OVERSAMPLE : rows.stop * _OVERSAMPLE,
        cols.start * _OVERSAMPLE : cols.stop * _OVERSAMPLE,
    ]
    clipped[inside] = fine[inside]
    return clipped


def _ink_box(fine: np.ndarray, left: int, top: int) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 of a fine patch's ink in pixels of the picture."""
    x, y, width, height = cv2.boundingRect((fine > 127).astype(np.uint8))
    return (
        left + x / _OVERSAMPLE,
        top + y / _OVERSAMPLE,
        left + (x + width) / _OVERSAMPLE,
        top + (y + height) / _OVERSAMPLE,
    )


def _box_overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Shared area of two x0, y0, x1, y1 boxes over the area of the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return width * height / smaller


def _place(
    rng: np.random.Generator,
    category: int,
    character: str,
    longest: float,
    smallest: float,
    size: int,
    placed: Sequence[_Placed],
) -> _Placed | None:
    """Find room for one object, making it smaller when there is none.

    Args:
        rng: random stream.
        category: the object's category id.
        character: what to draw.
        longest: longer side of the upright glyph to begin with, in pixels.
        smallest: the glyph is not made smaller than this.
        size: side of the picture.
        placed: the objects already there.

    Returns:
        The object, or None if there is no room for it.
    """
    while True:
        fine = _pose_glyph(rng, character, longest)
        total = int((fine > 127).sum())
        height, width = fine.shape[0] // _OVERSAMPLE, fine.shape[1] // _OVERSAMPLE
        # Now and then an object may be cut a little by the picture's edge, as in photographs.
        beyond = 0.12 if rng.random() < 0.12 else 0.0
        for _ in range(14):
            left = int(rng.integers(-int(beyond * width), size - int((1 - beyond) * width) + 1))
            top = int(rng.integers(-int(beyond * height), size - int((1 - beyond) * height) + 1))
            rough = (left, top, left + width, top + height)
            if any(_box_overlap(rough, other.box) > 2 * _MAX_BOX_OVERLAP for other in placed):
                continue
            clipped = _clip_fine(fine, left, top, size)
            if (clipped > 127).sum() < _MIN_VISIBLE * total:
                continue
            box = _ink_box(clipped, left, top)
            if any(_box_overlap(box, other.box) > _MAX_BOX_OVERLAP for other in placed):
                continue
            alpha = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)
            return _Placed(category, left, top, clipped, alpha.astype(np.float32) / 255, box)
        if longest <= smallest:
            return None
        longest = max(smallest, 0.85 * longest)


def _composite(rng: np.random.Generator, picture: np.ndarray, item: _Placed) -> np.ndarray:
    """Paint one object in a random colour that stands out from what is behind it, in place.

    Args:
        rng: random stream.
        picture: float32 array (size, size, 3), BGR.
        item: the object.

    Returns:
        The opacity painted: float32 (h, w), the patch's part within the picture.
    """
    size = picture.shape[0]
    height, width = item.alpha.shape
    rows, cols = _window(item.left, item.top, height, width, size)
    alpha = item.alpha[rows, cols]
    region = picture[
        item.top + rows.start : item.top + rows.stop,
        item.left + cols.start : item.left + cols.stop,
    ]
    colour = _contrasting_colour(rng, region.mean((0, 1)), rng.uniform(45, 120))
    if rng.random() < 0.35:  # a soft shadow
        shadow = cv2.GaussianBlur(item.alpha, (0, 0), 1.6)
        shadow = np.roll(shadow, (1, 1), (0, 1))[rows, cols, None]
        region *= 1 - rng.uniform(0.12, 0.3) * shadow
    # Shade each glyph from top to bottom a little, so that flat colour is not a cue.
    shade = np.linspace(-1, 1, alpha.shape[0], dtype=np.float32) * rng.normal(0, 12)
    fill = np.clip(colour + shade[:, None, None], 0, 255)
    opacity = alpha * rng.uniform(0.85, 1.0)
    region += opacity[..., None].astype(np.float32) * (fill - region)
    return alpha


def _polygons(item: _Placed) -> tuple[list[list[float]], float]:
    """The outer outlines of an object's ink, holes filled.

    Returns:
        Polygons as flat lists x, y, x, y, ... in pixels of the picture, and their total area.
    """
    ink = (item.fine > 127).astype(np.uint8)
    # Contours run through the centres of the outermost pixels: half a pixel inside the ink. At
    # four times the resolution that is an eighth of a pixel of the picture.
    contours, _ = cv2.findContours(ink, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygons, area = [], 0.0
    for contour in contours:
        outline = cv2.approxPolyDP(contour, 0.8, True)[:, 0, :]
        extent = cv2.contourArea(outline) / _OVERSAMPLE**2
        if len(outline) < 3 or extent < 0.5:
            continue
        points = (outline + 0.5) / _OVERSAMPLE + (item.left, item.top)
        polygons.append([round(float(v), 2) for v in points.ravel()])
        area += extent
    return polygons, area


def _annotation(item: _Placed) -> dict:
    x0, y0, x1, y1 = item.box
    polygons, area = _polygons(item)
    return {
        "category_id": item.category,
        "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
        "area": round(area, 2),
        "segmentation": polygons,
    }


@dataclass(frozen=True)
class _Job:
    """One picture to draw. All that the drawing depends on is in here."""

    stream: tuple[int, ...]  # seeds the picture's own random stream
    path: str
    size: int
    glyph_size: tuple[int, int]
    objects: tuple[tuple[int, str], ...]  # category id and character
    photo: str | None


def _draw(job: _Job) -> tuple[np.ndarray, list[dict], list[int]]:
    """Draw one picture.

    Returns:
        The picture, uint8 (size, size, 3) BGR; its annotations, without ids; and the category ids
        for which there was no room.
    """
    rng = np.random.default_rng(job.stream)
    low, high = job.glyph_size
    sizes = np.exp(rng.uniform(np.log(low), np.log(high), len(job.objects)))
    placed: list[_Placed] = []
    left_over: list[int] = []
    # Large ones first: small ones still find room later.
    for index in np.argsort(-sizes, kind="stable"):
        category, character = job.objects[index]
        item = _place(rng, category, character, float(sizes[index]), low, job.size, placed)
        if item is None:
            left_over.append(category)
        else:
            placed.append(item)

    picture = _paper(rng, job.size) if job.photo is None else _photo(rng, job.size, job.photo)
    amount = job.size / 160
    _draw_clutter(rng, picture, round(int(rng.integers(2, 8)) * amount**2))
    for item in placed:
        _composite(rng, picture, item)
    if rng.random() < 0.6:  # a hairline or two in front: slight occlusion
        _draw_clutter(rng, picture, int(rng.integers(1, 3)))
    if rng.random() < 0.5:
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.35, 0.85))
    grain = rng.normal(0, rng.uniform(1, 4), picture.shape[:2]).astype(np.float32)
    picture = np.clip(np.round(picture + grain[..., None]), 0, 255).astype(np.uint8)
    return picture, [_annotation(item) for item in placed], left_over


def _draw_to_file(job: _Job) -> tuple[list[dict], list[int]]:
    picture, annotations, left_over = _draw(job)
    if not cv2.imwrite(job.path, picture, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]):
        raise DataError(
            f"The picture '{job.path}' could not be written; free some space, or choose another "
            "folder."
        )
    return annotations, left_over


# ---------------------------------------------------------------------------------------------
# Building
# ---------------------------------------------------------------------------------------------


_DrawAll = Callable[[Iterable[_Job]], Iterable[tuple[list[dict], list[int]]]]


@contextmanager
def _mapper(num_workers: int) -> Iterator[_DrawAll]:
    """An ordered, lazy map over jobs: in this process, or over worker processes."""
    if num_workers <= 1:
        yield partial(map, _draw_to_file)
        return
    # Forked workers start at once and need no guarded main module. OpenCV's threads do not survive
    # a fork, so they are stopped before it and put back afterwards.
    method = "fork" if sys.platform.startswith("linux") else "spawn"
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        with multiprocessing.get_context(method).Pool(num_workers) as pool:
            yield partial(pool.imap, _draw_to_file, chunksize=8)
    finally:
        cv2.setNumThreads(threads)


def _draw_split(
    spec: GlyphPreset,
    characters: Sequence[str],
    counts: np.ndarray,
    split: str,
    folder: Path,
    first_id: int,
    photos: Sequence[str],
    seed: int,
    draw_all: _DrawAll,
    progress: bool,
) -> list[list[dict]]:
    """Draw all pictures of a split; picture i of the list has the id first_id + i.

    Args:
        spec: the preset.
        characters: one per class.
        counts: (num_classes,) instances to draw.
        split: "train" or "val".
        folder: where the pictures go; it exists.
        first_id: id of the first picture.
        photos: background pictures, or empty for drawn backgrounds.
        seed: the set's seed.
        draw_all: ordered map from jobs to annotations and left-over category ids.
        progress: whether to show a progress bar.

    Returns:
        Annotations, without ids, per picture.
    """
    split_stream = {"train": 1, "val": 2}[split]
    rng = np.random.default_rng([seed, split_stream])
    pictures = _deal(counts, spec.objects_per_image, rng)
    drawn: list[list[dict]] = []
    with tqdm(total=len(pictures), desc=f"{spec.name} {split}", disable=not progress) as bar:
        # What does not fit is dealt out to further pictures, so that the plan is met exactly.
        while pictures:
            jobs = []
            for offset, categories in enumerate(pictures, len(drawn)):
                stream = (seed, split_stream, offset)
                pick = np.random.default_rng((*stream, 1)) if photos else None
                jobs.append(
                    _Job(
                        stream=stream,
                        path=str(folder / f"{first_id + offset:012d}.jpg"),
                        size=spec.image_size,
                        glyph_size=spec.glyph_size,
                        objects=tuple((c, characters[c - 1]) for c in categories),
                        photo=photos[int(pick.integers(len(photos)))] if pick else None,
                    )
                )
            left_over: list[int] = []
            for annotations, missing in draw_all(jobs):
                drawn.append(annotations)
                left_over += missing
                bar.update()
            remaining = np.bincount(left_over, minlength=len(counts) + 1)[1:]
            pictures = _deal(remaining, spec.objects_per_image, rng)
            bar.total += len(pictures)
            bar.refresh()
    return drawn


def _categories(characters: Sequence[str], instances: np.ndarray, images: np.ndarray) -> list[dict]:
    """LVIS categories with the training set's counts, (num_classes,) each."""
    categories = []
    for index, character in enumerate(characters):
        name = unicodedata.name(character).lower()
        image_count = int(images[index])
        categories.append(
            {
                "id": index + 1,
                "name": name,
                "synonyms": [name],
                "synset": f"{name.replace(' ', '_')}.n.01",
                "def": f"the character {character} (U+{ord(character):04X})",
                # LVIS's own thresholds, which go by images.
                "frequency": "r" if image_count <= 10 else "c" if image_count <= 100 else "f",
                "image_count": image_count,
                "instance_count": int(instances[index]),
            }
        )
    return categories


def _split_json(
    spec: GlyphPreset,
    split: str,
    drawn: Sequence[Sequence[dict]],
    first_image: int,
    first_annotation: int,
    categories: list[dict],
    seed: int,
) -> dict:
    """Put a split together in LVIS v1's layout."""
    rng = np.random.default_rng([seed, 3, {"train": 1, "val": 2}[split]])
    everything = np.arange(1, spec.num_classes + 1)
    images, annotations = [], []
    for image_id, items in enumerate(drawn, first_image):
        present = sorted({item["category_id"] for item in items})
        absent = np.setdiff1d(everything, present)
        if spec.negatives is not None and len(absent) > spec.negatives:
            absent = np.sort(rng.choice(absent, spec.negatives, replace=False))
        # Few, as in LVIS: detections of such a class that match nothing are not counted as wrong.
        loose = [int(rng.choice(present))] if rng.random() < 0.02 else []
        file_name = f"{image_id:012d}.jpg"
        images.append(
            {
                "id": image_id,
                "file_name": file_name,
                "coco_url": f"http://images.example.org/{split}/{file_name}",
                "height": spec.image_size,
                "width": spec.image_size,
                "neg_category_ids": absent.tolist(),
                "not_exhaustive_category_ids": loose,
            }
        )
        for item in items:
            annotations.append(
                {"id": first_annotation + len(annotations), "image_id": image_id, **item}
            )
    return {
        "info": {
            "description": f"{spec.name}: characters on calm pictures, in LVIS v1 layout",
            "version": str(GENERATOR_VERSION),
        },
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def _list_photos(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ConfigError(f"The image folder {folder} does not exist.")
    photos = sorted(
        str(p) for p in folder.iterdir() if p.suffix.lower() in _PHOTO_SUFFIXES and p.is_file()
    )
    if not photos:
        raise ConfigError(f"The image folder {folder} holds no pictures.")
    return photos


def _is_built(folder: Path, stamp: dict) -> bool:
    """Whether `folder` holds the set that `stamp` describes.

    Raises:
        DataError: it holds something else.
    """
    if not folder.exists():
        return False
    try:
        found = json.loads((folder / _STAMP).read_text("utf-8"))
    except (OSError, ValueError):
        found = {}
    found = found if isinstance(found, dict) else {}
    differing = [key for key, value in stamp.items() if found.get(key, object()) != value]
    if differing:
        raise DataError(
            f"The folder {folder} was not built with these settings ({', '.join(differing)} "
            "differ); remove it or choose another root."
        )
    return True


def _count(drawn: Iterable[Sequence[dict]], num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Instances and images of every class, (num_classes,) each."""
    instances, images = np.zeros((2, num_classes), np.int64)
    for items in drawn:
        categories = [item["category_id"] - 1 for item in items]
        np.add.at(instances, categories, 1)
        images[list(set(categories))] += 1
    return instances, images


def _write_json(path: Path, content: dict) -> None:
    """Write entry by entry: half a million outlines in a single string would fill memory."""
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    with path.open("w", encoding="utf-8") as file:
        for number, (key, value) in enumerate(content.items()):
            file.write(("," if number else "{") + encode(key) + ":")
            if isinstance(value, list):
                file.write("[")
                file.writelines(("," if i else "") + encode(item) for i, item in enumerate(value))
                file.write("]")
            else:
                file.write(encode(value))
        file.write("}")


def _build_into(
    folder: Path,
    spec: GlyphPreset,
    photos: Sequence[str],
    seed: int,
    num_workers: int,
    progress: bool,
) -> None:
    """Draw both splits and write their JSON files below `folder`, which exists and is empty."""
    characters = glyph_characters(spec.name)
    plans = {
        "train": train_counts(spec.name, seed),
        "val": np.full(spec.num_classes, spec.val_per_class, np.int64),
    }
    (folder / "annotations").mkdir()
    first_image = first_annotation = 1
    categories: list[dict] = []
    with _mapper(num_workers) as draw_all:
        for split, counts in plans.items():
            (folder / split).mkdir()
            drawn = _draw_split(
                spec, characters, counts, split, folder / split, first_image, photos, seed,
                draw_all, progress,
            )  # fmt: skip
            instances, images = _count(drawn, spec.num_classes)
            if split == "train":
                categories = _categories(characters, instances, images)
            content = _split_json(
                spec, split, drawn, first_image, first_annotation, categories, seed
            )
            _write_json(folder / "annotations" / f"{spec.name}_{split}.json", content)
            logger.info(
                "%s %s: %d images, %d objects", spec.name, split, len(drawn), instances.sum()
            )
            first_image += len(drawn)
            first_annotation += int(instances.sum())


def build_glyphs(
    preset: str,
    root: str | Path,
    *,
    image_folder: str | Path | None = None,
    seed: int = 0,
    num_workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Build a data set, or return at once if it is already there.

    The set is put together in a hidden folder beside its place and moved there as a whole at the
    end, so a build that is stopped never leaves half a set that looks complete.

    Args:
        preset: a key of `PRESETS`.
        root: the set goes to `<root>/<preset>`: `annotations/<preset>_{train,val}.json`, and the
            pictures in `train/` and `val/`.
        image_folder: photographs to take crops of as backgrounds; None draws calm backgrounds.
        seed: makes other pictures, and other classes rare.
        num_workers: worker processes; None takes one per processor, 0 or 1 draws in this process.
            The result does not depend on it.
        progress: whether to show progress bars.

    Returns:
        The folder `<root>/<preset>`.

    Raises:
        ConfigError, DataError: the preset does not exist, the seed is negative, the image folder
            is missing, empty or holds a broken picture, or the folder holds a set built with
            other settings.
    """
    spec = _preset(preset)
    if seed < 0:
        raise ConfigError(f"The seed must be 0 or more, not {seed}.")
    root = Path(root)
    final = root / preset
    backgrounds = None if image_folder is None else Path(image_folder).expanduser().resolve()
    stamp = {
        "preset": preset,
        "seed": int(seed),
        "version": GENERATOR_VERSION,
        "image_folder": None if backgrounds is None else str(backgrounds),
    }
    if _is_built(final, stamp):
        logger.info("%s is already built", final)
        return final
    photos = [] if backgrounds is None else _list_photos(backgrounds)
    workers = (os.cpu_count() or 1) if num_workers is None else num_workers

    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob(f".{preset}.partial-*"):
        logger.warning("%s is left of a stopped build, or of one still running", stale)
    partial_folder = root / f".{preset}.partial-{os.getpid()}"
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir()
    try:
        _build_into(partial_folder, spec, photos, int(seed), workers, progress)
        _write_json(partial_folder / _STAMP, stamp)
        try:
            partial_folder.rename(final)
        except OSError:
            # Another process may have finished the same set in the meantime: then that one is used.
            if not _is_built(final, stamp):
                raise
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    return final


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("preset", choices=list(PRESETS), help="which data set")
    parser.add_argument("--root", default="datasets", help="the set goes to ROOT/PRESET")
    parser.add_argument("--image-folder", help="photographs to take crops of as backgrounds")
    parser.add_argument("--seed", type=int, default=0, help="other pictures, other rare classes")
    parser.add_argument("--num-workers", type=int, help="default: one per processor")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = build_glyphs(
        args.preset,
        args.root,
        image_folder=args.image_folder,
        seed=args.seed,
        num_workers=args.num_workers,
        progress=not args.quiet,
    )
    logger.info("%s is ready", folder)


if __name__ == "__main__":
    with exit_with_one_sentence():
        main()
