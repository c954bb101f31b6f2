"""Boxes drawn for people: labels that do not cover each other, rare classes marked.

Shapes: N boxes (x0, y0, x1, y1) in pixels; pictures are (H, W, 3) uint8, RGB.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from detectron2.structures import Instances
from PIL import Image, ImageColor, ImageDraw, ImageFont

from ..evaluation.bins import DEFAULT_COUNT_THRESHOLDS, bin_index
from ..utils.text import printable
from .grouping import bin_names
from .palette import bin_color

__all__ = ["best_instances", "draw_boxes", "draw_instances", "grid", "place_labels"]

_FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
_MASK_OPACITY = 0.4
_LONGEST_LABEL = 26  # characters
_UNCOUNTED = 3  # the colour of frequent classes


def best_instances(instances: Instances, top: int) -> Instances:
    """At most ``top`` instances, those of the highest scores, best first."""
    return instances[instances.scores.argsort(descending=True, stable=True)[:top]]


def draw_instances(
    image: np.ndarray,
    instances: Instances,
    class_names: Sequence[str],
    class_counts: Sequence[int] | None = None,
    title: str = "",
    min_side: int = 640,
    thresholds: Sequence[int] = DEFAULT_COUNT_THRESHOLDS,
) -> np.ndarray:
    """Draw boxes (and masks) with names and scores, coloured by training count.

    Boxes of the rarest group's classes are drawn thick, on top, and are labelled first.

    Args:
        image: the picture.
        instances: with ``pred_boxes``, ``scores``, ``pred_classes`` and maybe ``pred_masks``
            (N, H, W), in pixels of the image.
        class_names: K names.
        class_counts: K training instances; None draws all classes alike, without a legend.
        title: written above the picture.
        min_side: smaller pictures are enlarged until the shorter side has this many pixels, so
            that labels can be read.
        thresholds: edges of the groups.

    Returns:
        The picture, larger by the strips of title and legend.
    """
    instances = instances.to("cpu")
    classes = instances.pred_classes.numpy()
    legend, bins = (), np.full(len(classes), _UNCOUNTED)
    if class_counts is not None:
        bins = bin_index(class_counts, thresholds)[classes]
        names = bin_names(thresholds)
        names[-1] += " training instances"
        legend = [(name, bin_color(i)) for i, name in enumerate(names)]
    if instances.has("pred_masks"):
        image = image.astype(np.float32)
        for mask, b in zip(instances.pred_masks.numpy(), bins, strict=True):
            color = np.array(ImageColor.getrgb(bin_color(b)))
            image[mask] += _MASK_OPACITY * (color - image[mask])
        image = image.round().astype(np.uint8)
    order, scores = np.argsort(bins, kind="stable"), instances.scores.tolist()
    labels = [f"{_shortened(class_names[classes[i]])} {scores[i]:.0%}" for i in order]
    colors = [bin_color(b) for b in bins[order]]
    boxes = instances.pred_boxes.tensor.numpy()[order]
    return draw_boxes(image, boxes, labels, colors, bins[order] == 0, title, legend, min_side)


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[str],
    colors: Sequence[str],
    is_thick: Sequence[bool],
    title: str = "",
    legend: Sequence[tuple[str, str]] = (),
    min_side: int = 640,
) -> np.ndarray:
    """Draw N boxes (N, 4) with N labels and colours, the most important ones first.

    Where there is no room for a label, the box stays without one. ``is_thick`` boxes have a line of
    double width; the legend's texts and colours stand below. For the rest see `draw_instances`.
    """
    scale = max(1.0, min_side / min(image.shape[:2]))
    width, height = (round(side * scale) for side in image.shape[1::-1])
    shorter = min(width, height)
    font, line = ImageFont.truetype(_FONT, max(13, shorter // 42)), max(2, shorter // 320)
    picture = Image.fromarray(np.ascontiguousarray(image)).resize((width, height))
    draw = ImageDraw.Draw(picture)
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * scale
    for box, color, thick in reversed(list(zip(boxes, colors, is_thick, strict=True))):
        draw.rectangle(box.tolist(), outline=color, width=line * (2 if thick else 1))
    labels = [printable(label) for label in labels]
    sizes = np.array([(font.getlength(text) + 6, 1.4 * font.size) for text in labels])
    places = place_labels(boxes, sizes.reshape(-1, 2), (width, height))
    for text, color, place, (w, h) in zip(labels, colors, places, sizes, strict=True):
        if place is not None:
            x, y = place
            draw.rectangle((x, y, x + w, y + h), fill=color)
            is_light = np.dot(ImageColor.getrgb(color), (0.299, 0.587, 0.114)) > 150
            fill = "black" if is_light else "white"
            draw.text((x + 3, y + h / 2), text, fill, font, anchor="lm")
    strips = [_strip(width, font, title)] if title else []
    strips.append(np.asarray(picture))
    strips += [_strip(width, font, "", legend)] if legend else []
    return np.vstack(strips)


def place_labels(
    boxes: np.ndarray, sizes: np.ndarray, canvas: tuple[int, int]
) -> list[tuple[float, float] | None]:
    """Find a place for the label of each box at which it covers no label placed before.

    Args:
        boxes: (N, 4), the most important ones first.
        sizes: (N, 2) width and height of each label.
        canvas: width and height of the picture.

    Returns:
        The top left corner of each label, wholly inside the canvas; None where there is no room.
    """
    placed = np.zeros((0, 4))
    places: list[tuple[float, float] | None] = []
    for (x0, y0, x1, y1), (w, h) in zip(boxes, sizes, strict=True):
        places.append(None)
        if w > canvas[0] or h > canvas[1]:
            continue
        # Above, below, and within the box; then at its sides; left-aligned before right-aligned.
        lefts, rights = [(x0, y0 - h), (x0, y1), (x0, y0), (x0, y1 - h)], [(x1, y0), (x0 - w, y0)]
        for x, y in [*lefts, *((x1 - w, y) for _, y in lefts), *rights]:
            x, y = np.clip(x, 0, canvas[0] - w), np.clip(y, 0, canvas[1] - h)
            low, high = np.array([x, y]), np.array([x + w, y + h])
            if ((placed[:, :2] >= high) | (placed[:, 2:] <= low)).any(axis=1).all():
                placed = np.vstack([placed, (*low, *high)])
                places[-1] = float(x), float(y)
                break
    return places


def grid(rows: Sequence[Sequence[np.ndarray]], gap: int = 8) -> np.ndarray:
    """Pictures in rows and columns on white, each at the top left of its cell."""
    heights = [max(picture.shape[0] for picture in row) + gap for row in rows]
    widths = [max(p.shape[1] for p in column) + gap for column in zip(*rows, strict=True)]
    canvas = np.full((sum(heights), sum(widths), 3), 255, np.uint8)
    for row, y in zip(rows, np.cumsum([0, *heights]), strict=False):
        for picture, x in zip(row, np.cumsum([0, *widths]), strict=False):
            canvas[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    return canvas[:-gap, :-gap]


def _strip(
    width: int, font: ImageFont.FreeTypeFont, text: str, legend: Sequence[tuple[str, str]] = ()
) -> np.ndarray:
    """Text, and coloured squares with their meanings, on white."""
    strip = Image.new("RGB", (width, round(1.4 * font.size) + 6), "white")
    draw, middle = ImageDraw.Draw(strip), strip.height / 2
    draw.text((4, middle), printable(text), "black", font, anchor="lm")
    x = 4
    for name, color in legend:
        square = (x, middle - font.size / 2, x + font.size, middle + font.size / 2)
        draw.rectangle(square, fill=color)
        draw.text((x + font.size + 5, middle), name, "black", font, anchor="lm")
        x += font.size + font.getlength(name) + 20
    return np.asarray(strip)


def _shortened(name: str) -> str:
    name = printable(name.replace("_", " "))
    return name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 1]}…"
