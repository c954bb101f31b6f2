"""AP-fixed: LVIS AP with a limit of detections for each class instead of each image.

With 300 detections for an image, classes compete for places: a detector can gain AP by scoring
rare classes high where frequent ones are, and calibration across classes decides what counts. AP
of Dave et al. (2021), "Evaluating Large-Vocabulary Object Detectors: The Devil is in the Details",
takes the best 10,000 detections of each class over the data set, however many an image has.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from hotcoco import COCO, COCOeval

__all__ = ["DETECTIONS_PER_CLASS", "BestDetections", "run_without_image_cap"]

DETECTIONS_PER_CLASS = 10_000


class BestDetections:
    """The detections of the highest scores of each class, among all that were added.

    Equal scores are ordered by image and then by their order in it, so that neither the order of
    images nor the number of processes decides which is kept. Holds at most the limit for each
    class, and as many again before it lets them go.
    """

    def __init__(self, per_class: int = DETECTIONS_PER_CLASS) -> None:
        """
        Args:
            per_class: the limit.
        """
        self.per_class = per_class
        # Of each category (-score, image id, position in the image, detection).
        self._kept: dict[int, list[tuple[float, int, int, Mapping]]] = defaultdict(list)

    def add(self, image_id: int, detections: Iterable[Mapping]) -> None:
        """Add the detections of an image.

        Args:
            image_id: the image, which is added once.
            detections: LVIS results format.
        """
        for position, detection in enumerate(detections):
            kept = self._kept[detection["category_id"]]
            kept.append((-detection["score"], image_id, position, detection))
            if len(kept) >= 2 * self.per_class:
                self._prune(kept)

    def merge(self, other: BestDetections) -> None:
        """Add the detections that another process has kept."""
        for category_id, rows in other._kept.items():
            self._kept[category_id].extend(rows)
            self._prune(self._kept[category_id])

    def detections(self) -> list[Mapping]:
        """At most ``per_class`` detections of each class, best first."""
        for kept in self._kept.values():
            self._prune(kept)
        return [row[-1] for kept in self._kept.values() for row in kept]

    def __len__(self) -> int:
        return sum(map(len, self._kept.values()))

    def _prune(self, kept: list) -> None:
        # The key leaves the detection itself out, which has no order.
        kept[:] = heapq.nsmallest(self.per_class, kept, key=lambda row: row[:3])


def run_without_image_cap(
    images: Sequence[Mapping],
    categories: Sequence[Mapping],
    annotations: Sequence[Mapping],
    detections: Sequence[Mapping],
    iou_type: str,
) -> COCOeval:
    """Match detections with ground truth in LVIS style, however many an image has.

    Args:
        images: with the federated lists of categories.
        categories: of the data set.
        annotations: ground truth.
        detections: LVIS results format.
        iou_type: "bbox" or "segm".

    Returns:
        hotcoco's evaluation, to be accumulated.
    """
    ground_truth = COCO(
        {"images": list(images), "categories": list(categories), "annotations": list(annotations)}
    )
    # Marked as capped, or hotcoco would take the best 300 of each image after all.
    results = ground_truth.load_res(list(detections)).cap_detections_per_image(None)
    evaluation = COCOeval(ground_truth, results, iou_type, lvis_style=True)
    evaluation.params.max_dets = [max(len(detections), 1)]
    evaluation.evaluate()
    return evaluation
