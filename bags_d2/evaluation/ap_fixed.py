"""AP-fixed: LVIS AP with a limit of detections for each class instead of each image.

With 300 detections for an image, classes compete for places: a detector can gain AP by scoring
rare classes high where frequent ones are, and calibration across classes decides what counts. AP
of Dave et al. (2021), "Evaluating Large-Vocabulary Object Detectors: The Devil is in the Details",
takes the best 10,000 detections of each class over the data set, however many an image has.
"""

from collections.abc import Sequence, Set

import numpy as np
from hotcoco import COCOeval

from .detections import CATEGORY, IMAGE, best_rows, match, matchable
from .ground_truth import GroundTruth


class BestDetections:
    """The detections with the highest scores of each class, among all that were added.

    Equal scores are ordered by image and then by their order in it, so that neither the order of
    images nor the number of processes decides which is kept.

    Holds at most twice what it keeps, or twice the limit of one class if that is more. A box takes
    64 bytes: 1203 classes can have 12 million of them.
    """

    def __init__(self, per_class: int) -> None:
        self.per_class = per_class
        # Rows (N, 7) and masks (N,): what the last pruning left, and what came since.
        self._kept = np.empty((0, 7)), np.empty(0, dtype=object)
        self._new: list[tuple[np.ndarray, np.ndarray]] = []
        self._size = 0
        self._prune_at = 2 * per_class

    def add(self, rows: np.ndarray, masks: np.ndarray) -> None:
        """Add detections (see `to_rows`), all of an image at once."""
        self._new.append((rows, masks))
        self._size += len(rows)
        if self._size >= self._prune_at:
            self.detections()

    @staticmethod
    def merge(parts: Sequence["BestDetections"], images: Sequence[Set[int]]) -> "BestDetections":
        """Merge the processes' parts into the first; the first that saw an image counts."""
        merged, seen = parts[0], set(images[0])
        for part, part_images in zip(parts[1:], images[1:], strict=True):
            rows, masks = part.detections()
            is_new = ~np.isin(rows[:, IMAGE], list(seen & part_images))
            merged.add(rows[is_new], masks[is_new])
            seen |= part_images
        return merged

    def detections(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows (N, 7) and masks (N,) of what is kept: by category id, best first."""
        if self._new:
            rows, masks = (np.concatenate(c) for c in zip(self._kept, *self._new, strict=True))
            order = best_rows(rows, CATEGORY, self.per_class)
            self._kept, self._new = (rows[order], masks[order]), []
            self._size = len(order)
            # Twice as many next time: every detection is then sorted a few times only.
            self._prune_at = 2 * max(self._size, self.per_class)
        return self._kept

    def num_full_classes(self) -> int:
        """How many classes have as many detections as the limit allows."""
        _, counts = np.unique(self.detections()[0][:, CATEGORY], return_counts=True)
        return int((counts == self.per_class).sum())


def evaluate_without_image_cap(truth: GroundTruth, best: BestDetections, task: str) -> COCOeval:
    """Match detections in LVIS style, however many an image has; to be accumulated."""
    # After the limit, so that a detection without area takes a place: lvis-api's order.
    return match(truth, *matchable(*best.detections(), task), task, lvis=True)
