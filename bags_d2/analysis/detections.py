"""Detections against the ground truth: right or wrong, who wins where an object is, side by side.

Boxes are (x, y, width, height) in pixels, as in the files of COCO and LVIS.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, pairwise_iou

from ..evaluation.bins import bin_index
from ..utils.files import write_atomically
from .palette import RIGHT, TRUTH, WRONG

__all__ = ["draw_comparison", "group_by", "label_detections", "winning_groups"]


def group_by(rows: Iterable[Mapping], key: str) -> dict[Hashable, list[Mapping]]:
    """The rows of each value of a key, in their order."""
    grouped = defaultdict(list)
    for row in rows:
        grouped[row[key]].append(row)
    return dict(grouped)


def label_detections(
    boxes: np.ndarray,
    classes: Sequence[Hashable],
    gt_boxes: np.ndarray,
    gt_classes: Sequence[Hashable],
    iou_threshold: float = 0.5,
) -> np.ndarray:
    """Which detections are right: each takes the free ground truth of its class that fits best.

    Args:
        boxes: (N, 4), in descending order of score, with N classes.
        gt_boxes: (M, 4), with M classes.

    Returns:
        Bool array (N,).
    """
    right = np.zeros(len(boxes), dtype=bool)
    if len(boxes) == 0 or len(gt_boxes) == 0:
        return right
    overlaps = _ious(boxes, gt_boxes)
    for i, of_class in enumerate(classes):
        is_same = [of_class == other for other in gt_classes]
        best = np.where(is_same, overlaps[i], -1.0).argmax()
        if is_same[best] and overlaps[i, best] >= iou_threshold:
            right[i] = True
            overlaps[:, best] = -1.0  # taken
    return right


def winning_groups(
    ground_truth: Iterable[Mapping],
    detections: Iterable[Mapping],
    training_instances: Mapping[Hashable, int],
    thresholds: Sequence[int],
    iou_threshold: float = 0.5,
) -> np.ndarray:
    """For each object: what scored highest where it is.

    All classes compete: of the detections that overlap an object enough, the one of the highest
    score wins (the first of equals), whatever its class.

    Args:
        ground_truth: annotations with "image_id", "category_id" and "bbox"; crowds are left out.
        detections: results with "image_id", "category_id", "bbox" and "score".
        training_instances: training count by category id.
        thresholds: edges of the groups.

    Returns:
        Counts of objects (G, G + 2): rows are groups of the objects; columns the right class, a
        wrong class of each group, and nothing.
    """
    bins = bin_index(list(training_instances.values()), thresholds)
    group_of = dict(zip(training_instances, bins.tolist(), strict=True))
    matrix = np.zeros((len(thresholds) + 1, len(thresholds) + 3), dtype=np.int64)
    found = group_by(detections, "image_id")
    objects = (a for a in ground_truth if not a.get("iscrowd", 0))
    for image, of_image in group_by(objects, "image_id").items():
        competitors = sorted(found.get(image, ()), key=lambda d: -d["score"])
        enough = _ious(_boxes(competitors), _boxes(of_image)) >= iou_threshold
        for annotation, candidates in zip(of_image, enough.T, strict=True):
            own, column = annotation["category_id"], -1
            if candidates.any():
                winner = competitors[candidates.argmax()]["category_id"]
                column = 0 if winner == own else 1 + group_of[winner]
            matrix[group_of[own], column] += 1
    return matrix


def draw_comparison(
    images: Sequence[Mapping],
    annotations: Mapping[Hashable, Sequence[Mapping]],
    detections: Mapping[str, Mapping[Hashable, Sequence[Mapping]]],
    class_labels: Mapping[Hashable, str],
    rare_classes: frozenset,
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
    import cv2

    from .drawing import draw_boxes, grid

    def draw(pixels, shown, colors, title, legend):
        corners = _boxes(shown)
        corners[:, 2:] += corners[:, :2]
        ids = [box["category_id"] for box in shown]
        labels, is_rare = [class_labels[i] for i in ids], [i in rare_classes for i in ids]
        return draw_boxes(pixels, corners, labels, colors, is_rare, title, legend, min_side=330)

    titles = ["ground truth", *detections]
    legends = [
        [("object (thick: rare class)", TRUTH)],
        [(f"right (score {min_score} or more)", RIGHT), ("wrong", WRONG)],
        *([()] * len(detections)),
    ]
    rows = []
    for image in images:
        truth = annotations.get(image["id"], ())
        pixels = read_image(image["file_name"], format="RGB")
        row = []
        for title, legend in zip(titles, legends, strict=False):
            shown, colors = truth, [TRUTH] * len(truth)
            if row:
                found = detections[title].get(image["id"], ())
                shown = sorted(found, key=lambda d: -d["score"])
                shown = [d for d in shown if d["score"] >= min_score]
                classes, of_truth = ([box["category_id"] for box in s] for s in (shown, truth))
                right = label_detections(_boxes(shown), classes, _boxes(truth), of_truth)
                colors = [RIGHT if r else WRONG for r in right]
            frame = title if not rows else "", legend if image is images[-1] else ()
            row.append(draw(pixels, shown, colors, *frame))
        rows.append(row)
    _, encoded = cv2.imencode(Path(path).suffix, grid(rows)[:, :, ::-1])
    with write_atomically(path, "wb") as file:
        file.write(encoded.tobytes())


def _boxes(rows: Sequence[Mapping]) -> np.ndarray:
    return np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)


def _ious(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of each box with each: (N, 4) and (M, 4) give (N, M)."""
    a, b = (torch.as_tensor(np.asarray(x)).float().reshape(-1, 4) for x in (a, b))
    corners = [Boxes(torch.cat([x[:, :2], x[:, :2] + x[:, 2:]], dim=1)) for x in (a, b)]
    return pairwise_iou(*corners).numpy()
