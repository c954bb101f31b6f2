"""Detections drawn for people: few boxes, labels that do not cover each other, rare classes marked.

Shapes: N detections; boxes are (x0, y0, x1, y1) in pixels.
"""

import functools
from collections.abc import Sequence

import numpy as np
from detectron2.structures import Instances
from matplotlib.font_manager import findfont
from PIL import Image, ImageColor, ImageDraw, ImageFont

from ..evaluation.bins import bin_index

__all__ = ["best_instances", "draw_instances", "place_labels", "side_by_side"]

# Okabe and Ito's colours for training instances 0-9, 10-99, 100-999 and 1000+: the rarer, the
# warmer. The last is for unknown counts.
_BIN_COLORS = ("#D55E00", "#E69F00", "#009E73", "#0072B2", "#0072B2")
_BIN_NAMES = ("0-9", "10-99", "100-999", "1000+")
_MASK_OPACITY = 0.4
_LONGEST_LABEL = 26  # characters


def best_instances(instances: Instances, top: int, min_score: float = 0.0) -> Instances:
    """The highest-scored instances, best first.

    Args:
        instances: with ``scores``.
        top: how many at most.
        min_score: least score.
    """
    order = instances.scores.argsort(descending=True, stable=True)[:top]
    best = instances[order]
    return best[best.scores >= min_score]


def draw_instances(
    image: np.ndarray,
    instances: Instances,
    class_names: Sequence[str],
    class_counts: Sequence[int] | None = None,
    title: str = "",
    min_side: int = 640,
) -> np.ndarray:
    """Draw boxes (and masks) with names and scores, coloured by training count.

    Boxes of classes with fewer than 10 training instances are drawn thick. Where there is no room
    for a label, the box stays without one; labels of rare classes find their place first.

    Args:
        image: (H, W, 3) uint8, RGB.
        instances: with ``pred_boxes``, ``scores``, ``pred_classes`` and maybe ``pred_masks``
            (N, H, W), in pixels of the image.
        class_names: K names.
        class_counts: K training instances; None draws all classes alike, without a legend.
        title: written above the picture.
        min_side: smaller pictures are enlarged until the shorter side has so many pixels, so that
            labels can be read.

    Returns:
        RGB picture (H', W', 3), larger by the strips of title and legend.
    """
    height, width = image.shape[:2]
    scale = max(1.0, min_side / min(height, width))
    size = round(width * scale), round(height * scale)
    instances = instances.to("cpu")
    classes = instances.pred_classes.numpy()
    bins = (
        np.full(len(classes), len(_BIN_NAMES))
        if class_counts is None
        else bin_index(class_counts)[classes]
    )
    colors = [_BIN_COLORS[b] for b in bins]
    if instances.has("pred_masks"):
        image = _blend_masks(image, instances.pred_masks.numpy(), colors)
    picture = Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    font = _font(max(13, min(size) // 42))
    line = max(2, min(size) // 320)
    boxes = instances.pred_boxes.tensor.numpy() * scale
    # The rarest on top, and first to get a place for their labels.
    order = np.argsort(bins, kind="stable")
    for i in reversed(order):
        draw.rectangle(tuple(boxes[i]), outline=colors[i], width=line * (2 if bins[i] == 0 else 1))
    texts = [_label(class_names[c], s) for c, s in zip(classes, instances.scores, strict=True)]
    sizes = np.array([_text_size(font, text) for text in texts]).reshape(-1, 2)
    places = place_labels(boxes[order], sizes[order], size)
    for i, place in zip(order, places, strict=True):
        if place is not None:
            _draw_label(draw, place, sizes[i], texts[i], colors[i], font)
    return np.asarray(_frame(picture, title, class_counts is not None, font))


def place_labels(
    boxes: np.ndarray, sizes: np.ndarray, canvas: tuple[int, int]
) -> list[tuple[float, float] | None]:
    """Find a place for the label of each box at which it covers no label placed before.

    Args:
        boxes: (N, 4).
        sizes: (N, 2) width and height of each label.
        canvas: width and height of the picture.

    Returns:
        The top left corner of each label, wholly inside the canvas; None where there is no room.
    """
    placed = np.zeros((0, 4))
    corners: list[tuple[float, float] | None] = []
    for (x0, y0, x1, y1), (w, h) in zip(boxes, sizes, strict=True):
        corners.append(None)
        if w > canvas[0] or h > canvas[1]:
            continue
        # Above, below, and within the box; then at its sides; left-aligned before right-aligned.
        lefts, rights = [(x0, y0 - h), (x0, y1), (x0, y0), (x0, y1 - h)], [(x1, y0), (x0 - w, y0)]
        for x, y in [*lefts, *((x1 - w, y) for _, y in lefts), *rights]:
            x, y = np.clip(x, 0, canvas[0] - w), np.clip(y, 0, canvas[1] - h)
            apart = (
                (placed[:, 0] >= x + w)
                | (placed[:, 2] <= x)
                | (placed[:, 1] >= y + h)
                | (placed[:, 3] <= y)
            )
            if apart.all():
                placed = np.vstack([placed, (x, y, x + w, y + h)])
                corners[-1] = float(x), float(y)
                break
    return corners


def side_by_side(pictures: Sequence[np.ndarray], gap: int = 8) -> np.ndarray:
    """RGB pictures of equal height in a row."""
    space = np.full((pictures[0].shape[0], gap, 3), 255, dtype=np.uint8)
    row = [part for picture in pictures for part in (picture, space)][:-1]
    return np.hstack(row)


def _blend_masks(image: np.ndarray, masks: np.ndarray, colors: Sequence[str]) -> np.ndarray:
    blended = image.astype(np.float32)
    for mask, color in zip(masks, colors, strict=True):
        tint = np.array(ImageColor.getrgb(color), dtype=np.float32)
        blended[mask] += _MASK_OPACITY * (tint - blended[mask])
    return blended.round().astype(np.uint8)


@functools.lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # matplotlib brings this one, which has letters of nearly every script.
    return ImageFont.truetype(findfont("DejaVu Sans"), size)


def _label(name: str, score: float) -> str:
    name = name.replace("_", " ")
    if len(name) > _LONGEST_LABEL:
        name = f"{name[: _LONGEST_LABEL - 1]}…"
    return f"{name} {score:.0%}"


def _text_size(font: ImageFont.FreeTypeFont, text: str) -> tuple[float, float]:
    ascent, descent = font.getmetrics()
    return font.getlength(text) + 6, ascent + descent + 2


def _draw_label(draw, place, size, text, color, font) -> None:
    (x, y), (w, h) = place, size
    draw.rectangle((x, y, x + w - 1, y + h - 1), fill=color)
    red, green, blue = ImageColor.getrgb(color)
    is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 150
    draw.text((x + 3, y + 1), text, font=font, fill="black" if is_light else "white")


def _frame(
    picture: Image.Image, title: str, has_legend: bool, font: ImageFont.FreeTypeFont
) -> Image.Image:
    """The picture with its title above and the legend of colours below."""
    strip = sum(font.getmetrics()) + 8
    top, bottom = strip * bool(title), strip * has_legend
    framed = Image.new("RGB", (picture.width, picture.height + top + bottom), "white")
    framed.paste(picture, (0, top))
    draw = ImageDraw.Draw(framed)
    draw.text((4, 4), title, font=font, fill="black")
    if has_legend:
        x, y = 4.0, picture.height + top + 4
        side = strip - 14
        for name, color in zip(_BIN_NAMES, _BIN_COLORS, strict=False):
            draw.rectangle((x, y + 3, x + side, y + 3 + side), fill=color)
            draw.text((x + side + 5, y), name, font=font, fill="black")
            x += side + font.getlength(name) + 18
        draw.text((x, y), "training instances", font=font, fill="black")
    return framed
