"""Boxes drawn for people: labels that do not cover each other, rare classes marked.

Shapes: N boxes (x0, y0, x1, y1) in pixels; pictures are (H, W, 3) uint8, RGB.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import cv2
import matplotlib
import numpy as np
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib.colors import to_rgb
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle

from ..evaluation.bins import DEFAULT_COUNT_THRESHOLDS, bin_index
from ..utils.text import printable
from .grouping import bin_names
from .palette import bin_color

__all__ = ["best_instances", "draw_boxes", "draw_instances", "grid", "place_labels", "side_by_side"]

_MASK_OPACITY = 0.4
_LONGEST_LABEL = 26  # characters
_UNCOUNTED = 3  # the colour of frequent classes


def best_instances(instances: Instances, top: int, min_score: float = 0.0) -> Instances:
    """The highest-scored instances, best first: at most ``top``, none below ``min_score``."""
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
        min_side: smaller pictures are enlarged until the shorter side has so many pixels, so that
            labels can be read.
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
    colors = [bin_color(b) for b in bins]
    if instances.has("pred_masks"):
        image = image.astype(np.float32)
        for mask, color in zip(instances.pred_masks.numpy(), colors, strict=True):
            image[mask] += _MASK_OPACITY * (255 * np.array(to_rgb(color)) - image[mask])
        image = image.round().astype(np.uint8)
    order, scores = np.argsort(bins, kind="stable"), instances.scores.tolist()
    labels = [f"{_shortened(class_names[classes[i]])} {scores[i]:.0%}" for i in order]
    boxes = instances.pred_boxes.tensor.numpy()[order]
    colors = [colors[i] for i in order]
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
    size = tuple(round(side * scale) for side in image.shape[1::-1])
    font_size = max(13, min(size) // 42)
    enlarged = cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_CUBIC)
    canvas = _Canvas(enlarged, font_size)
    line = max(2, min(size) // 320)
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * scale
    for box, color, thick in reversed(list(zip(boxes, colors, is_thick, strict=True))):
        canvas.outline(box, color, line * (2 if thick else 1))
    with _plain_text():
        sizes = np.array([canvas.label_size(text) for text in labels]).reshape(-1, 2)
        for text, color, corner, extent in zip(
            labels, colors, place_labels(boxes, sizes, size), sizes, strict=True
        ):
            if corner is not None:
                canvas.label(text, color, corner, extent)
        strips = [_strip(size[0], font_size, title)] if title else []
        strips.append(canvas.output.get_image())
        strips += [_strip(size[0], font_size, "", legend)] if legend else []
    return np.vstack(strips)


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
            low, high = np.array([x, y]), np.array([x + w, y + h])
            if ((placed[:, :2] >= high) | (placed[:, 2:] <= low)).any(axis=1).all():
                placed = np.vstack([placed, (*low, *high)])
                corners[-1] = float(x), float(y)
                break
    return corners


def grid(rows: Sequence[Sequence[np.ndarray]], gap: int = 8) -> np.ndarray:
    """Pictures in rows and columns on white, each at the top left of its cell."""
    widths = [max(picture.shape[1] for picture in column) for column in zip(*rows, strict=True)]
    stacked = []
    for row in rows:
        height = max(picture.shape[0] for picture in row) + gap
        margins = [
            ((0, height - picture.shape[0]), (0, width + gap - picture.shape[1]), (0, 0))
            for picture, width in zip(row, widths, strict=True)
        ]
        cells = [np.pad(p, m, constant_values=255) for p, m in zip(row, margins, strict=True)]
        stacked.append(np.hstack(cells))
    return np.vstack(stacked)[:-gap, :-gap]


def side_by_side(pictures: Sequence[np.ndarray], gap: int = 8) -> np.ndarray:
    """Pictures in a row."""
    return grid([pictures], gap)


class _Canvas(Visualizer):
    """Detectron2's visualizer, with opaque lines of whole pixels and labels of known size."""

    def __init__(self, image: np.ndarray, font_size: int) -> None:
        super().__init__(image)
        self.points = 72 / self.output.dpi  # per pixel
        self.font_size = font_size
        self.font = FontProperties(size=font_size * self.points)

    def outline(self, box: Sequence[float], color: str, width: int) -> None:
        (x0, y0, x1, y1), width = box, width * self.points
        self.output.ax.add_patch(
            Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=width)
        )

    def fill(self, corner: tuple[float, float], size: Sequence[float], color: str) -> None:
        self.output.ax.add_patch(Rectangle(corner, *size, facecolor=color, linewidth=0, zorder=2))

    def label_size(self, text: str) -> tuple[float, float]:
        renderer = self.output.canvas.get_renderer()
        width, _, _ = renderer.get_text_width_height_descent(text, self.font, ismath=False)
        return width + 6, round(1.4 * self.font_size)

    def write(self, text: str, x: float, y: float, color: str = "black") -> None:
        """Write with the label's top left corner at (x, y)."""
        baseline = y + 1.05 * self.font_size
        self.output.ax.text(x + 3, baseline, text, color=color, font=self.font, clip_on=True)

    def label(
        self, text: str, color: str, corner: tuple[float, float], size: Sequence[float]
    ) -> None:
        self.fill(corner, size, color)
        is_light = np.dot(to_rgb(color), (0.299, 0.587, 0.114)) > 0.59
        self.write(text, *corner, color="black" if is_light else "white")


def _strip(
    width: int, font_size: int, text: str, legend: Sequence[tuple[str, str]] = ()
) -> np.ndarray:
    """Text and coloured squares with their meanings on a white strip."""
    height = round(1.4 * font_size) + 6
    canvas = _Canvas(np.full((height, width, 3), 255, np.uint8), font_size)
    canvas.write(text, 1, 3)
    x = 4 + bool(text) * (canvas.label_size(text)[0] + 12)
    for name, color in legend:
        canvas.fill((x, 5), (font_size, font_size), color)
        canvas.write(name, x + font_size + 2, 3)
        x += font_size + canvas.label_size(name)[0] + 14
    return canvas.output.get_image()


@contextlib.contextmanager
def _plain_text() -> Iterator[None]:
    """Texts are drawn as they are: no formula between dollars, no warning of an unknown letter."""
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        yield


def _shortened(name: str) -> str:
    name = printable(name.replace("_", " "))
    return name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 1]}…"
