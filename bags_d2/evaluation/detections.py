"""Detections as hotcoco takes them fastest: an array of boxes, and masks beside it.

What is not finite, or lacks the box or mask of a task, is a PredictionError.

Shapes: N detections. A row is (image id, x, y, width, height, score, category id).
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pycocotools.mask as mask_utils
from detectron2.structures import BoxMode, Instances
from hotcoco import COCO, COCOeval

from .ground_truth import GroundTruth, PredictionError

# Of match(): AP of all sizes alone.
ANY_SIZE = {"area_rng": [[0.0, 1e10]], "area_rng_lbl": ["all"]}

IMAGE, _WIDTH, _HEIGHT, SCORE, CATEGORY = 0, 3, 4, 5, 6
_GEOMETRY_KEYS = {"bbox": "bbox", "segm": "segmentation"}  # by task


def to_rows(detections: Sequence[Mapping], tasks: Collection[str]) -> tuple[np.ndarray, np.ndarray]:
    """Check detections in LVIS results format, and make them an array.

    Returns:
        Rows (N, 7) and masks (N,) in run-length code, None where ``tasks`` need none.
    """
    masks = masks_of(detections, tasks)
    rows = [
        (d["image_id"], *d.get("bbox", (0, 0, 0, 0)), d["score"], d["category_id"])
        for d in detections
    ]
    rows = np.array(rows, dtype=np.float64).reshape(-1, 7)
    return _finite(rows), masks


def masks_of(detections: Sequence[Mapping], tasks: Collection[str]) -> np.ndarray:
    """Masks (N,) in run-length code, None where ``tasks`` need none."""
    for key in [_GEOMETRY_KEYS[task] for task in tasks]:
        for detection in detections:
            if key not in detection:
                raise PredictionError(
                    f"A detection in image {detection['image_id']} has no '{key}', which a task of "
                    f"{tuple(tasks)} needs: set MODEL.MASK_ON to True, or leave the task out."
                )
    masks = [d["segmentation"] if "segm" in tasks else None for d in detections]
    return np.array(masks, dtype=object)


def instances_to_rows(
    instances: Instances, image_id: int, category_ids: Sequence[int]
) -> np.ndarray:
    """Rows (N, 7) of Detectron2's detections, ``category_ids`` those of each ``pred_classes``."""
    rows = np.empty((len(instances), 7))
    rows[:, IMAGE] = image_id
    boxes = instances.pred_boxes.tensor.numpy()
    rows[:, 1:SCORE] = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    rows[:, SCORE] = instances.scores.numpy()
    rows[:, CATEGORY] = np.asarray(category_ids)[instances.pred_classes.numpy()]
    return _finite(rows)


def _finite(rows: np.ndarray) -> np.ndarray:
    if not np.isfinite(rows).all():
        raise PredictionError(
            f"Image {int(rows[0, IMAGE])} has a score or box that is not finite: the model has "
            "diverged, or its checkpoint is damaged."
        )
    return rows


def matchable(rows: np.ndarray, masks: np.ndarray, task: str) -> tuple[np.ndarray, list | None]:
    """Rows and masks that a task matches: those with an area, which in "segm" is the mask's."""
    if task == "segm":
        # hotcoco takes the area of the row's box for that of the mask. pycocotools' area of a list
        # fails beyond 255 masks with numpy 2.
        rows = rows.copy()
        rows[:, _WIDTH] = [mask_utils.area(mask) for mask in masks]
        rows[:, _HEIGHT] = 1
    has_area = rows[:, _WIDTH] * rows[:, _HEIGHT] > 0
    return rows[has_area], masks[has_area].tolist() if task == "segm" else None


def best_rows(rows: np.ndarray, column: int, limit: int) -> np.ndarray:
    """Indices of the best rows of each image or category (a column), in its order, best first.

    Equal scores are ordered by image and then stay as the detector ordered them.
    """
    order = np.lexsort((rows[:, IMAGE], -rows[:, SCORE], rows[:, column]))
    groups = rows[order, column]
    return order[np.arange(len(order)) - np.searchsorted(groups, groups) < limit]


def match(
    truth: GroundTruth, rows: np.ndarray, masks: list | None, task: str, *, lvis: bool, **params
) -> COCOeval:
    """Match all of these detections with the ground truth, in the style of COCO or of LVIS.

    ``params`` are hotcoco's; ``max_dets`` limits COCO's detections of an image and a class.
    """
    ground_truth = COCO(truth.as_coco(task, lvis=lvis))
    results = ground_truth.load_res(rows, segmentation=masks)
    if lvis:
        # Marked as capped, or hotcoco would take the best 300 of each image after all.
        results = results.cap_detections_per_image(None)
    evaluation = COCOeval(ground_truth, results, task, lvis_style=lvis)
    evaluation.params.max_dets = [max(len(rows), 1)]
    for name, value in params.items():
        setattr(evaluation.params, name, value)
    evaluation.evaluate()
    return evaluation
