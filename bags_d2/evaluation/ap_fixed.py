"""AP-fixed: LVIS AP with a limit of detections for each class instead of each image.

With 300 detections for an image, classes compete for places: a detector can gain AP by scoring
rare classes high where frequent ones are, and calibration across classes decides what counts. AP
of Dave et al. (2021), "Evaluating Large-Vocabulary Object Detectors: The Devil is in the Details",
takes the best 10,000 detections of each class over the data set, however many an image has.

Shapes: N detections. A row is (image id, x, y, width, height, score, category id), as hotcoco
reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import numpy as np
import pycocotools.mask as mask_utils
from hotcoco import COCO, COCOeval

from .ground_truth import GroundTruth

__all__ = ["BestDetections", "evaluate_without_image_cap"]

_IMAGE, _WIDTH, _HEIGHT, _SCORE, _CATEGORY = 0, 3, 4, 5, 6
_NUM_COLUMNS = 7


class BestDetections:
    """The detections with the highest scores of each class, among all that were added.

    Equal scores are ordered by image and then by their order in it, so that neither the order of
    images nor the number of processes decides which is kept.

    Holds at most twice what it keeps, or twice the limit of one class if that is more. Boxes are
    rows of an array, 64 bytes each: 1203 classes can have 12 million of them, which as dicts would
    take some 10 GB.
    """

    def __init__(self, per_class: int, *, with_masks: bool = False) -> None:
        """
        Args:
            per_class: the limit.
            with_masks: keep masks as well, where detections have them.
        """
        self.per_class = per_class
        self._with_masks = with_masks
        # Rows (N, 7) and masks (N,): what the last pruning left, and what came since.
        self._kept = np.empty((0, _NUM_COLUMNS)), np.empty(0, dtype=object)
        self._new: list[tuple[np.ndarray, np.ndarray]] = []
        self._size = 0
        self._prune_at = 2 * per_class

    def add(self, image_id: int, detections: Sequence[Mapping]) -> None:
        """Add all detections (LVIS results format, with boxes) of an image."""
        rows = [(image_id, *d["bbox"], d["score"], d["category_id"]) for d in detections]
        masks = [d.get("segmentation") if self._with_masks else None for d in detections]
        self._append(
            np.array(rows, dtype=np.float64).reshape(-1, _NUM_COLUMNS),
            np.array(masks, dtype=object),
        )

    @staticmethod
    def merge(parts: Sequence[BestDetections], images: Sequence[Set[int]]) -> BestDetections:
        """Merge the processes' parts into the first; the first that saw an image counts.

        Args:
            parts: one of each process.
            images: ids of the images that each has seen.
        """
        merged, seen = parts[0], set(images[0])
        for part, part_images in zip(parts[1:], images[1:], strict=True):
            rows, masks = part.detections()
            is_new = ~np.isin(rows[:, _IMAGE], list(seen & part_images))
            merged._append(rows[is_new], masks[is_new])
            seen |= part_images
        return merged

    def detections(self) -> tuple[np.ndarray, np.ndarray]:
        """What is kept: by category id, best first.

        Returns:
            Rows (N, 7) and masks (N,) in run-length code, None where there is none.
        """
        if self._new:
            rows, masks = (np.concatenate(c) for c in zip(self._kept, *self._new, strict=True))
            # Stable: equal scores in an image stay as the detector ordered them.
            order = np.lexsort((rows[:, _IMAGE], -rows[:, _SCORE], rows[:, _CATEGORY]))
            categories = rows[order, _CATEGORY]
            rank = np.arange(len(order)) - np.searchsorted(categories, categories)
            order = order[rank < self.per_class]
            self._kept, self._new = (rows[order], masks[order]), []
            self._size = len(order)
            # Twice as many next time: every detection is then sorted a few times only.
            self._prune_at = 2 * max(self._size, self.per_class)
        return self._kept

    def num_full_classes(self) -> int:
        """How many classes have as many detections as the limit allows."""
        _, counts = np.unique(self.detections()[0][:, _CATEGORY], return_counts=True)
        return int((counts == self.per_class).sum())

    def _append(self, rows: np.ndarray, masks: np.ndarray) -> None:
        self._new.append((rows, masks))
        self._size += len(rows)
        if self._size >= self._prune_at:
            self.detections()


def evaluate_without_image_cap(truth: GroundTruth, best: BestDetections, task: str) -> COCOeval:
    """Match detections with ground truth in LVIS style, however many an image has.

    Args:
        truth: the data set.
        best: the detections; with a mask each if ``task`` is "segm".
        task: "bbox" or "segm".

    Returns:
        hotcoco's evaluation, to be accumulated.
    """
    rows, masks = best.detections()
    areas = mask_areas(masks) if task == "segm" else rows[:, _WIDTH] * rows[:, _HEIGHT]
    # After the limit, so that a detection without area takes a place: lvis-api's order.
    has_area = areas > 0
    rows, masks, areas = rows[has_area], masks[has_area], areas[has_area]

    ground_truth = COCO(truth.as_coco(task, lvis=True))
    if task == "segm":
        results = ground_truth.load_res(rows, segmentation=masks.tolist())
        # hotcoco has numbered them from 1, and taken the areas of the boxes.
        results.update_anns(ids=np.arange(1, len(rows) + 1), area=areas)
    else:
        results = ground_truth.load_res(rows)
    # Marked as capped, or hotcoco would take the best 300 of each image after all.
    results = results.cap_detections_per_image(None)
    evaluation = COCOeval(ground_truth, results, task, lvis_style=True)
    evaluation.params.max_dets = [max(len(rows), 1)]
    evaluation.evaluate()
    return evaluation


def mask_areas(masks: Sequence[Mapping]) -> np.ndarray:
    """(N,) areas in pixels of masks in run-length code."""
    # One by one: pycocotools' area of a list fails beyond 255 masks with numpy 2.
    return np.array([mask_utils.area(mask) for mask in masks], dtype=np.float64)
