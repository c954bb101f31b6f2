"""Detections of several models side by side, each told right or wrong."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from detectron2.data.detection_utils import read_image
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

__all__ = ["draw_comparison", "label_detections"]

_RIGHT, _WRONG, _TRUTH = "#0072B2", "#D55E00", "#009E73"


def label_detections(
    boxes: np.ndarray,
    classes: Sequence[int],
    gt_boxes: np.ndarray,
    gt_classes: Sequence[int],
    iou_threshold: float = 0.5,
) -> np.ndarray:
    """Which detections are right: each takes the free ground truth of its class that fits best.

    Args:
        boxes: (N, 4) XYWH, in descending order of score.
        classes: N classes.
        gt_boxes: (M, 4) XYWH.
        gt_classes: M classes.
        iou_threshold: least IoU of a match.

    Returns:
        Bool array (N,).
    """
    right = np.zeros(len(boxes), dtype=bool)
    free = np.ones(len(gt_boxes), dtype=bool)
    for i, box in enumerate(boxes):
        candidates = np.flatnonzero(free & (np.asarray(gt_classes) == classes[i]))
        if len(candidates) == 0:
            continue
        ious = _iou(box, gt_boxes[candidates])
        if ious.max() >= iou_threshold:
            free[candidates[ious.argmax()]] = False
            right[i] = True
    return right


def draw_comparison(
    images: Sequence[Mapping],
    annotations: Mapping[int, Sequence[Mapping]],
    detections: Mapping[str, Mapping[int, Sequence[Mapping]]],
    class_labels: Mapping[int, str],
    rare_classes: frozenset[int],
    path: str | Path,
    min_score: float = 0.3,
) -> None:
    """Draw pictures in rows: the ground truth first, then the detections of each model.

    Args:
        images: for each row a dict with "id" and "file_name" (a path that can be read).
        annotations: ground truth in LVIS format by image id.
        detections: for each model its LVIS results by image id.
        class_labels: what to write on a box, by category id.
        rare_classes: category ids whose boxes are drawn thick.
        path: the picture to write.
        min_score: detections below it are left out, the same for all models.
    """
    columns = ["ground truth", *detections]
    figure = Figure(figsize=(3 * len(columns), 3.15 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), len(columns), squeeze=False)
    for row, image in zip(grid, images, strict=True):
        truth = annotations[image["id"]]
        pixels = read_image(image["file_name"], format="RGB")
        for axes, column in zip(row, columns, strict=True):
            axes.imshow(pixels, interpolation="bilinear")
            axes.set_axis_off()
            if column == "ground truth":
                shown, colors = truth, [_TRUTH] * len(truth)
            else:
                found = detections[column].get(image["id"], ())
                shown = [d for d in found if d["score"] >= min_score]
                shown.sort(key=lambda d: -d["score"])
                right = label_detections(
                    np.array([d["bbox"] for d in shown]),
                    [d["category_id"] for d in shown],
                    np.array([a["bbox"] for a in truth]),
                    [a["category_id"] for a in truth],
                )
                colors = [_RIGHT if r else _WRONG for r in right]
            for box, color in zip(shown, colors, strict=True):
                _draw_box(axes, box, color, class_labels, rare_classes)
    for axes, column in zip(grid[0], columns, strict=True):
        axes.set_title(column, fontsize=11)
    figure.supxlabel(
        f"Blue: right (IoU of 0.5 or more), orange: wrong; scores of {min_score} or more. "
        "Thick: rare classes.",
        fontsize=9,
    )
    figure.savefig(path, dpi=110)


def _draw_box(axes, box, color, class_labels, rare_classes) -> None:
    x, y, w, h = box["bbox"]
    is_rare = box["category_id"] in rare_classes
    axes.add_patch(
        Rectangle((x, y), w, h, fill=False, edgecolor=color, linewidth=2.6 if is_rare else 1.1)
    )
    axes.text(
        x,
        y,
        class_labels[box["category_id"]],
        fontsize=8,
        color="white",
        verticalalignment="bottom",
        bbox={"facecolor": color, "edgecolor": "none", "pad": 0.8},
    )


def _iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    low = np.maximum(box[:2], others[:, :2])
    high = np.minimum(box[:2] + box[2:], others[:, :2] + others[:, 2:])
    overlap = np.clip(high - low, 0, None).prod(axis=1)
    return overlap / (box[2:].prod() + others[:, 2:].prod(axis=1) - overlap)
