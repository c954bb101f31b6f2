"""Detections against the ground truth: which are right, and which class wins where an object is.

Rows are annotations and detections as in the files of COCO and LVIS: dicts with "image_id",
"category_id" and "bbox", (x, y, width, height) in pixels; detections also with "score".
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
import torch
from detectron2.structures import Boxes, BoxMode, pairwise_iou

from ..evaluation.bins import bin_index

__all__ = ["corners", "group_by", "label_detections", "winning_classes", "winning_groups"]


def group_by(rows: Iterable[Mapping], key: str) -> dict[Hashable, list[Mapping]]:
    """The rows of each value of a key, in their order."""
    grouped = defaultdict(list)
    for row in rows:
        grouped[row[key]].append(row)
    return dict(grouped)


def corners(rows: Sequence[Mapping]) -> np.ndarray:
    """The boxes of N rows as (N, 4) corners: x0, y0, x1, y1."""
    boxes = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
    return BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)


def label_detections(
    detections: Sequence[Mapping], objects: Sequence[Mapping], iou_threshold: float = 0.5
) -> np.ndarray:
    """Which of N detections of an image are right, a bool array (N,).

    In the given order, that of descending scores, each takes the free object of its class that
    fits it best.
    """
    right = np.zeros(len(detections), dtype=bool)
    overlaps = _ious(detections, objects)
    for i, detection in enumerate(detections) if objects else ():
        is_same = [detection["category_id"] == other["category_id"] for other in objects]
        best = np.where(is_same, overlaps[i], -1.0).argmax()
        if is_same[best] and overlaps[i, best] >= iou_threshold:
            right[i] = True
            overlaps[:, best] = -1.0  # taken
    return right


def winning_classes(
    objects: Sequence[Mapping], detections: Iterable[Mapping], iou_threshold: float = 0.5
) -> list[Hashable | None]:
    """For each object the class that scores highest where it is; None if nothing is there.

    All classes compete: of the detections that overlap an object enough, the one with the highest
    score wins (the first of equals), whatever its class.
    """
    found, winners = group_by(detections, "image_id"), {}
    for image, of_image in group_by(objects, "image_id").items():
        competitors = sorted(found.get(image, ()), key=lambda d: -d["score"])
        names = [*(d["category_id"] for d in competitors), None]
        is_near = _ious(competitors, of_image) >= iou_threshold
        # The last row, which is near to all, is that of nothing.
        is_near = np.vstack([is_near, np.ones((1, len(of_image)), bool)])
        winners[image] = iter([names[i] for i in is_near.argmax(axis=0)])
    return [next(winners[row["image_id"]]) for row in objects]


def winning_groups(
    objects: Sequence[Mapping],
    winners: Sequence[Hashable | None],
    training_instances: Mapping[Hashable, int],
    thresholds: Sequence[int],
) -> np.ndarray:
    """How often classes of each group win over objects of each group.

    Args:
        winners: of the objects, as of :func:`winning_classes`.
        training_instances: training count by category id.
        thresholds: edges of the G groups.

    Returns:
        Counts of objects (G, G + 2): rows are groups of the objects; columns the right class, a
        wrong class of each group, and nothing.
    """
    bins = bin_index(list(training_instances.values()), thresholds)
    group_of = dict(zip(training_instances, bins.tolist(), strict=True))
    matrix = np.zeros((len(thresholds) + 1, len(thresholds) + 3), dtype=np.int64)
    for row, winner in zip(objects, winners, strict=True):
        own, column = row["category_id"], -1
        if winner is not None:
            column = 0 if winner == own else 1 + group_of[winner]
        matrix[group_of[own], column] += 1
    return matrix


def _ious(a: Sequence[Mapping], b: Sequence[Mapping]) -> np.ndarray:
    """IoU of N rows with M rows, (N, M)."""
    return pairwise_iou(
        *(Boxes(torch.from_numpy(corners(rows)).float()) for rows in (a, b))
    ).numpy()
