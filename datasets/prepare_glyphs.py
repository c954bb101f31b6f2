#!/usr/bin/env python
"""Draw a long-tailed data set that needs no download: characters on calm pictures.

Every class is one character in the type faces that matplotlib ships; annotations are in LVIS v1
format. How often a class is drawn follows a plan that is met exactly, so the imbalance is an input
rather than an accident of sampling. Everything is a function of the preset and a seed: each picture
has its own random stream, so the number of worker processes never changes the result.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import multiprocessing
import os
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from bags_d2.data.lvis_v1 import lvis_v1_counts
from bags_d2.errors import ConfigError, DataError, MissingFileError, exit_on_user_error
from bags_d2.utils.files import load_json, write_atomically
from bags_d2.utils.quiet import silence_dependencies

logger = logging.getLogger(__name__)

# Part of the stamp: raise it whenever the pictures or the annotations of any preset change.
GENERATOR_VERSION = 1

# Heavier faces are in the majority on purpose: at 20 pixels a hairline stroke of a light face is
# narrower than one pixel and disappears in the JPEG.
FACES = (
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
ASCII_FACES = ("cmb10.ttf", "cmss10.ttf")

EM = 160  # pixels per em of the stored shapes, from which every size is resampled
OVERSAMPLE = 4  # outlines are traced at this multiple of the picture's resolution
MAX_BOX_OVERLAP = 0.15  # shared area over the smaller of two boxes
MIN_VISIBLE = 0.8  # share of an object's ink that must stay inside the picture


@dataclass(frozen=True)
class Preset:
    """What one data set consists of."""

    name: str
    characters: str  # one for each class
    counts: tuple[int, ...]  # training instances of classes, which are dealt out to them at random
    val_per_class: int  # instances
    image_size: int  # side of the square pictures in pixels
    objects_per_image: tuple[int, int]  # range of what is planned for a picture
    glyph_size: tuple[int, int]  # range of the longer side of an upright glyph in pixels
    negatives: int | None  # absent classes that a picture lists as verified absent; None: all


def _log_spaced(low: int, high: int, num: int) -> tuple[int, ...]:
    return tuple(round(float(v)) for v in np.geomspace(low, high, num))


def _lvis_characters() -> str:
    # Letters, digits and symbols of all alphabets that have enough ink to be seen at 20 pixels and
    # of which no two look alike in any face.
    return "".join(Path(__file__).with_name("glyphs_lvis.txt").read_text("utf-8").split())


_GLYPHS = Preset(
    name="glyphs",
    characters="AEFGHKMQRSTXZΓΔΘΞΣΦΨΩБДЖИЦШЮЯ24578★♣♥♪☂&",
    counts=(
        *_log_spaced(2, 9, 12),
        *_log_spaced(12, 90, 12),
        *_log_spaced(110, 800, 12),
        *_log_spaced(1500, 4000, 4),
    ),
    val_per_class=40,
    image_size=160,
    objects_per_image=(5, 11),
    glyph_size=(20, 52),
    negatives=None,
)
_GLYPHS_LVIS = Preset(
    name="glyphs_lvis",
    characters=_lvis_characters(),
    counts=tuple(min(n, 1500) for n in lvis_v1_counts()["instance_count"]),
    val_per_class=20,
    image_size=320,
    objects_per_image=(18, 30),
    glyph_size=(22, 56),
    negatives=20,
)
_GLYPHS_TINY = Preset(
    name="glyphs_tiny",
    characters="AΩЖ5★♥",
    counts=(3, 12, 150, 5, 40, 110),
    val_per_class=14,
    image_size=112,
    objects_per_image=(7, 11),
    glyph_size=(14, 30),
    negatives=None,
)
PRESETS = {preset.name: preset for preset in (_GLYPHS, _GLYPHS_LVIS, _GLYPHS_TINY)}


def train_counts(spec: Preset, seed: int = 0) -> np.ndarray:
    """Training instances of every class, (K,); entry i - 1 belongs to category id i.

    Which class is rare is drawn at random, so that rarity says nothing about how hard a character
    is; another seed makes other characters rare.
    """
    return np.random.default_rng([seed, 0]).permutation(np.asarray(spec.counts, np.int64))


def deal(
    counts: np.ndarray, per_image: tuple[int, int], rng: np.random.Generator
) -> list[list[int]]:
    """Shuffle all instances and cut them into pictures: for each its category ids, with repeats."""
    everything = rng.permutation(np.repeat(np.arange(1, len(counts) + 1), counts)).tolist()
    pictures, start = [], 0
    while start < len(everything):
        size = int(rng.integers(per_image[0], per_image[1] + 1))
        pictures.append(everything[start : start + size])
        start += size
    return pictures


# --- shapes ---------------------------------------------------------------------------------------


def _font_path(face: str) -> str:
    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf", face)


@functools.cache
def _coverage(face: str) -> frozenset[int]:
    """Code points for which a face has a glyph of its own."""
    return frozenset(FT2Font(_font_path(face)).get_charmap())


@functools.cache
def _font(face: str) -> ImageFont.FreeTypeFont:
    # The complex layout engine is not there on every machine, and gives other shapes.
    return ImageFont.truetype(_font_path(face), EM, layout_engine=ImageFont.Layout.BASIC)


def faces_of(character: str) -> tuple[str, ...]:
    """The faces in which a character is drawn."""
    ascii_faces = ASCII_FACES if character.isascii() and character.isalnum() else ()
    return tuple(face for face in FACES + ascii_faces if ord(character) in _coverage(face))


@functools.lru_cache(maxsize=4096)
def shape_of(character: str, face: str) -> np.ndarray:
    """The upright glyph, cropped to its ink: uint8 (h, w), 255 where there is ink."""
    font = _font(face)
    left, top, right, bottom = font.getbbox(character)
    canvas = Image.new("L", (max(1, right - left) + 8, max(1, bottom - top) + 8))
    ImageDraw.Draw(canvas).text((4 - left, 4 - top), character, fill=255, font=font)
    ink = np.asarray(canvas)
    rows, cols = np.flatnonzero(ink.max(1) > 127), np.flatnonzero(ink.max(0) > 127)
    return np.ascontiguousarray(ink[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1])


def _pose(rng: np.random.Generator, character: str, longest: float) -> np.ndarray:
    """One glyph in a random face, at a random moderate angle and aspect, `longest` pixels long.

    Returns:
        uint8 (h, w) at `OVERSAMPLE` times the picture's resolution; both are multiples of it.
    """
    faces = faces_of(character)
    shape = shape_of(character, faces[int(rng.integers(len(faces)))])
    angle = np.deg2rad(float(np.clip(rng.normal(0, 9), -22, 22)))
    stretch = float(np.exp(rng.normal(0, 0.07)))
    height, width = shape.shape
    scale = longest * OVERSAMPLE / max(height, width)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = rotation @ np.diag([scale * stretch, scale / stretch])
    extent = np.abs(linear) @ np.array([width, height])
    columns, rows = (int(np.ceil((e + 2) / OVERSAMPLE)) * OVERSAMPLE for e in extent)
    shift = np.array([columns / 2, rows / 2]) - linear @ np.array([width / 2, height / 2])
    matrix = np.column_stack([linear, shift])
    # Resampling straight from the large shape would alias, so it is first brought near its size.
    if scale < 0.6:
        factor = max(0.05, scale)
        shape = cv2.resize(shape, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        matrix[:, 0] *= width / shape.shape[1]
        matrix[:, 1] *= height / shape.shape[0]
    return cv2.warpAffine(shape, matrix, (columns, rows), flags=cv2.INTER_LINEAR)


# --- background (pictures are float32 (size, size, 3), BGR, 0 to 255) ----------------------------


def _random_colour(
    rng: np.random.Generator, value: tuple[float, float], saturation: tuple[float, float]
) -> np.ndarray:
    """A colour of any hue, with HSV value and saturation in ranges."""
    hsv = [[[rng.uniform(0, 360), rng.uniform(*saturation), rng.uniform(*value)]]]
    return cv2.cvtColor(np.array(hsv, np.float32), cv2.COLOR_HSV2BGR)[0, 0] * 255


def _luminance(colour: np.ndarray) -> float:
    return float(colour @ np.array([0.114, 0.587, 0.299], np.float32))


def _contrasting_colour(rng: np.random.Generator, behind: np.ndarray, least: float) -> np.ndarray:
    """A random colour whose luminance differs from that of `behind` by at least so much."""
    reference = _luminance(behind)
    for _ in range(24):
        colour = _random_colour(rng, (0.12, 1.0), (0.15, 0.9))
        if abs(_luminance(colour) - reference) >= least:
            return colour
    return np.full(3, 245 if reference < 128 else 15, np.float32)


def _smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    coarse = rng.standard_normal((cells, cells)).astype(np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def _paper(rng: np.random.Generator, size: int) -> np.ndarray:
    """A gradient between two neighbouring colours, mottled."""
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


def _draw_clutter(rng: np.random.Generator, picture: np.ndarray, number: int) -> None:
    """Paint faint strokes, arcs and dots, none of which is a class, onto the picture."""
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


# --- objects --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """An object on the picture: where its patch lies, and its ink there."""

    category: int
    left: int  # of the patch in pixels of the picture; may be negative
    top: int
    fine: np.ndarray  # uint8 (h * OVERSAMPLE, w * OVERSAMPLE): ink within the picture
    alpha: np.ndarray  # float32 (h, w): all ink, 0 to 1, at the picture's resolution
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 of the ink within the picture

    def window(self, size: int) -> tuple[slice, slice]:
        return _window(self.left, self.top, *self.alpha.shape, size)


def _window(left: int, top: int, height: int, width: int, size: int) -> tuple[slice, slice]:
    """The part of a patch (rows, columns) that lies in the picture."""
    rows = slice(max(0, -top), min(height, size - top))
    return rows, slice(max(0, -left), min(width, size - left))


def _clip(fine: np.ndarray, left: int, top: int, size: int) -> np.ndarray:
    """A fine patch without the ink outside the picture."""
    height, width = (side // OVERSAMPLE for side in fine.shape)
    inside = tuple(
        slice(part.start * OVERSAMPLE, part.stop * OVERSAMPLE)
        for part in _window(left, top, height, width, size)
    )
    clipped = np.zeros_like(fine)
    clipped[inside] = fine[inside]
    return clipped


def _ink_box(fine: np.ndarray, left: int, top: int) -> tuple[float, float, float, float]:
    x, y, width, height = (v / OVERSAMPLE for v in cv2.boundingRect((fine > 127).astype(np.uint8)))
    return left + x, top + y, left + (x + width), top + (y + height)


def box_overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Shared area of two x0, y0, x1, y1 boxes over the area of the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b))


def _place(
    rng: np.random.Generator,
    spec: Preset,
    category: int,
    longest: float,
    placed: Sequence[Placed],
) -> Placed | None:
    """Find room for one object, making it smaller when there is none; None if there is none."""
    size, smallest = spec.image_size, spec.glyph_size[0]
    while True:
        fine = _pose(rng, spec.characters[category - 1], longest)
        total = int((fine > 127).sum())
        height, width = (side // OVERSAMPLE for side in fine.shape)
        # Now and then an object may be cut a little by the picture's edge, as in photographs.
        beyond = 0.12 if rng.random() < 0.12 else 0.0
        for _ in range(14):
            left = int(rng.integers(-int(beyond * width), size - int((1 - beyond) * width) + 1))
            top = int(rng.integers(-int(beyond * height), size - int((1 - beyond) * height) + 1))
            rough = (left, top, left + width, top + height)
            if any(box_overlap(rough, other.box) > 2 * MAX_BOX_OVERLAP for other in placed):
                continue
            clipped = _clip(fine, left, top, size)
            if (clipped > 127).sum() < MIN_VISIBLE * total:
                continue
            box = _ink_box(clipped, left, top)
            if any(box_overlap(box, other.box) > MAX_BOX_OVERLAP for other in placed):
                continue
            alpha = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)
            return Placed(category, left, top, clipped, alpha.astype(np.float32) / 255, box)
        if longest <= smallest:
            return None
        longest = max(smallest, 0.85 * longest)


def _composite(rng: np.random.Generator, picture: np.ndarray, item: Placed) -> None:
    """Paint one object in a random colour that stands out from what is behind it."""
    rows, cols = item.window(picture.shape[0])
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


def _annotation(item: Placed) -> dict:
    """Its box, and the outer outlines of its ink, holes filled, with their area."""
    # Contours run through the centres of the outermost pixels: half a pixel inside the ink. At
    # four times the resolution that is an eighth of a pixel of the picture.
    ink = (item.fine > 127).astype(np.uint8)
    contours, _ = cv2.findContours(ink, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygons, area = [], 0.0
    for contour in contours:
        outline = cv2.approxPolyDP(contour, 0.8, True)[:, 0, :]
        extent = cv2.contourArea(outline) / OVERSAMPLE**2
        if len(outline) < 3 or extent < 0.5:
            continue
        points = (outline + 0.5) / OVERSAMPLE + (item.left, item.top)
        polygons.append([round(float(v), 2) for v in points.ravel()])
        area += extent
    x0, y0, x1, y1 = item.box
    return {
        "category_id": item.category,
        "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
        "area": round(area, 2),
        "segmentation": polygons,
    }


@dataclass(frozen=True)
class Job:
    """One picture to draw. All that the drawing depends on is in here."""

    spec: Preset
    stream: tuple[int, ...]  # seeds the picture's own random stream
    categories: Sequence[int]
    path: str


def draw(job: Job) -> tuple[list[dict], list[int]]:
    """Draw one picture to its file.

    Returns:
        Its annotations, without ids; and the category ids for which there was no room.
    """
    rng = np.random.default_rng(job.stream)
    low, high = job.spec.glyph_size
    sizes = np.exp(rng.uniform(np.log(low), np.log(high), len(job.categories)))
    placed: list[Placed] = []
    left_over: list[int] = []
    # Large ones first: small ones still find room later.
    for index in np.argsort(-sizes, kind="stable"):
        category = job.categories[index]
        item = _place(rng, job.spec, category, float(sizes[index]), placed)
        placed += [item] if item else []
        left_over += [] if item else [category]

    size = job.spec.image_size
    picture = _paper(rng, size)
    _draw_clutter(rng, picture, round(int(rng.integers(2, 8)) * (size / 160) ** 2))
    for item in placed:
        _composite(rng, picture, item)
    if rng.random() < 0.6:  # a hairline or two in front: slight occlusion
        _draw_clutter(rng, picture, int(rng.integers(1, 3)))
    if rng.random() < 0.5:
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.35, 0.85))
    grain = rng.normal(0, rng.uniform(1, 4), picture.shape[:2]).astype(np.float32)
    picture = np.clip(np.round(picture + grain[..., None]), 0, 255).astype(np.uint8)
    if not cv2.imwrite(job.path, picture, [cv2.IMWRITE_JPEG_QUALITY, 92]):
        raise DataError(
            f"'{job.path}' could not be written; free some space, or name another root."
        )
    return [_annotation(item) for item in placed], left_over


# --- building -------------------------------------------------------------------------------------

_DrawAll = Callable[[Iterable[Job]], Iterable[tuple[list[dict], list[int]]]]


@contextmanager
def _mapper(num_workers: int) -> Iterator[_DrawAll]:
    """An ordered, lazy map over jobs: in this process, or over worker processes."""
    if num_workers <= 1:
        yield functools.partial(map, draw)
        return
    # Not by forking this process: a fork of many threads, as OpenCV has them, may wait for ever.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(["bags_d2", "cv2", "matplotlib.ft2font"])
    with context.Pool(num_workers, cv2.setNumThreads, (1,)) as pool:
        yield functools.partial(pool.imap, draw, chunksize=8)


def _draw_split(
    spec: Preset,
    split: int,
    counts: np.ndarray,
    folder: Path,
    first_id: int,
    seed: int,
    draw_all: _DrawAll,
    progress: bool,
) -> list[list[dict]]:
    """Draw all pictures of a split (1 train, 2 val); their annotations, without ids."""
    pictures = deal(counts, spec.objects_per_image, rng := np.random.default_rng([seed, split]))
    drawn: list[list[dict]] = []
    with tqdm(total=len(pictures), desc=f"{spec.name} {folder.name}", disable=not progress) as bar:
        # What does not fit is dealt out to further pictures, so that the plan is met exactly.
        while pictures:
            jobs = [
                Job(spec, (seed, split, i), picture, str(folder / f"{first_id + i:012d}.jpg"))
                for i, picture in enumerate(pictures, len(drawn))
            ]
            left_over: list[int] = []
            for annotations, missing in draw_all(jobs):
                drawn.append(annotations)
                left_over += missing
                bar.update()
            remaining = np.bincount(left_over, minlength=len(counts) + 1)[1:]
            pictures = deal(remaining, spec.objects_per_image, rng)
            bar.total += len(pictures)
    return drawn


def _categories(spec: Preset, drawn: Sequence[Sequence[dict]]) -> list[dict]:
    """LVIS categories, with the training set's counts."""
    of_images = [[item["category_id"] for item in items] for items in drawn]
    instances = Counter(i for ids in of_images for i in ids)
    images = Counter(i for ids in of_images for i in set(ids))
    categories = []
    for i, character in enumerate(spec.characters, start=1):
        name = unicodedata.name(character).lower()
        categories.append(
            {
                "id": i,
                "name": name,
                "synonyms": [name],
                "synset": f"{name.replace(' ', '_')}.n.01",
                "def": f"the character {character} (U+{ord(character):04X})",
                # LVIS's own thresholds, which go by images.
                "frequency": "r" if images[i] <= 10 else "c" if images[i] <= 100 else "f",
                "image_count": images[i],
                "instance_count": instances[i],
            }
        )
    return categories


def _images(spec: Preset, split: str, drawn, first_id: int, rng: np.random.Generator) -> list[dict]:
    """LVIS images, with the classes that they are verified not to show."""
    images = []
    for image_id, items in enumerate(drawn, first_id):
        present = sorted({item["category_id"] for item in items})
        absent = np.setdiff1d(np.arange(1, len(spec.characters) + 1), present)
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
    return images


def _write_json(path: Path, content: dict) -> None:
    """Write entry by entry: half a million outlines in a single string would fill memory."""
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    with write_atomically(path) as file:
        for number, (key, value) in enumerate(content.items()):
            file.write(f"{',' if number else '{'}{encode(key)}:")
            if isinstance(value, list):
                file.write("[")
                file.writelines(("," if i else "") + encode(item) for i, item in enumerate(value))
                file.write("]")
            else:
                file.write(encode(value))
        file.write("}")


def _build_into(folder: Path, spec: Preset, seed: int, draw_all: _DrawAll, progress: bool) -> None:
    counts = train_counts(spec, seed)
    first_image = first_annotation = 1
    categories: list[dict] = []
    for split, name in enumerate(("train", "val"), start=1):
        (folder / name).mkdir()
        drawn = _draw_split(
            spec, split, counts, folder / name, first_image, seed, draw_all, progress
        )
        categories = categories or _categories(spec, drawn)
        images = _images(spec, name, drawn, first_image, np.random.default_rng([seed, 3, split]))
        every = [(image["id"], a) for image, of in zip(images, drawn, strict=True) for a in of]
        content = {
            "info": {
                "description": f"{spec.name}: characters on calm pictures, in LVIS v1 layout",
                "version": str(GENERATOR_VERSION),
            },
            "images": images,
            "annotations": [
                {"id": i, "image_id": image_id, **a}
                for i, (image_id, a) in enumerate(every, first_annotation)
            ],
            "categories": categories,
        }
        _write_json(folder / "annotations" / f"{spec.name}_{name}.json", content)
        logger.info("%s %s: %d images, %d objects", spec.name, name, len(drawn), len(every))
        first_image += len(drawn)
        first_annotation += len(every)
        counts = np.full(len(counts), spec.val_per_class)


def _is_built(folder: Path, stamp: dict) -> bool:
    """Whether `folder` holds the set that `stamp` describes.

    Raises:
        DataError: it holds something else.
    """
    if not folder.exists():
        if folder.is_symlink():  # no finished set could be moved to its place
            raise DataError(f"{folder} is a link to nothing; remove it or create its target.")
        return False
    try:
        found = load_json(folder / "glyphs.json")
    except (DataError, MissingFileError):
        found = None
    found = found if isinstance(found, dict) else {}
    differing = [key for key, value in stamp.items() if found.get(key, object()) != value]
    if differing:
        raise DataError(
            f"The folder {folder} was not built with these settings ({', '.join(differing)} "
            "differ); remove it or choose another root."
        )
    return True


def build_glyphs(
    preset: str,
    root: str | Path,
    *,
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
        seed: makes other pictures, and other classes rare; 0 or more.
        num_workers: worker processes; None takes one per processor, 0 or 1 draws in this process.
            The result does not depend on it.
        progress: whether to show progress bars.

    Returns:
        The folder `<root>/<preset>`.

    Raises:
        ConfigError: the seed is negative.
        DataError: the folder holds something else, or a file cannot be written.
    """
    if seed < 0:
        raise ConfigError(f"--seed must be 0 or more, not {seed}.")
    final = Path(root) / preset
    # Sets with photographs as backgrounds, which earlier versions could draw, are other sets.
    stamp = {"preset": preset, "seed": seed, "version": GENERATOR_VERSION, "image_folder": None}
    if _is_built(final, stamp):
        logger.info("%s is already built", final)
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    for stale in final.parent.glob(f".{preset}.partial-*"):
        logger.warning("%s is left of a stopped build, or of one still running", stale)
    partial_folder = final.with_name(f".{preset}.partial-{os.getpid()}")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir()
    try:
        with _mapper((os.cpu_count() or 1) if num_workers is None else num_workers) as draw_all:
            _build_into(partial_folder, PRESETS[preset], seed, draw_all, progress)
        _write_json(partial_folder / "glyphs.json", stamp)
        try:
            partial_folder.rename(final)
        except OSError:
            # Another process may have finished the same set in the meantime: then that one is used.
            if not _is_built(final, stamp):
                raise
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    return final


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("preset", choices=list(PRESETS), help="which data set")
    parser.add_argument("--root", default="datasets", help="the set goes to ROOT/PRESET")
    parser.add_argument("--seed", type=int, default=0, help="other pictures, other rare classes")
    parser.add_argument("--num-workers", type=int, help="default: one per processor")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    silence_dependencies()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = build_glyphs(
        args.preset,
        args.root,
        seed=args.seed,
        num_workers=args.num_workers,
        progress=not args.quiet,
    )
    logger.info("%s is ready", folder)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
