"""Confidence intervals of AP: the bootstrap over images.

Images are drawn with replacement, as many as there are, and AP is computed anew. With the same
draws for two models (a seed and a number of images decide them) their difference is *paired*: what
makes some images hard for both cancels out.

Shapes: B draws, N images, C evaluated categories, T IoU thresholds, D detections of a category.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import ConfigError
from .bins import DEFAULT_COUNT_THRESHOLDS, Counts, ap_per_bin, balanced_ap, defined_mean
from .detections import ANY_SIZE, IMAGE, best_rows, match, matchable, to_rows
from .ground_truth import GroundTruth

_MAX_DETS = {"lvis": 300, "coco": 100}  # of an image; of an image and a class
_RECALLS = np.linspace(0, 1, 101)


class Matches(NamedTuple):
    """What became of the detections of one category, best score first."""

    images: np.ndarray  # (D,) positions of their images
    is_true: np.ndarray  # (T, D)
    is_ignored: np.ndarray  # (T, D): neither true nor false
    objects: np.ndarray  # (N,) objects of each image that are to be found


def match_detections(
    truth: GroundTruth, detections: Sequence[dict], task: str = "bbox", *, lvis: bool
) -> list[Matches]:
    """Match detections (of COCO's and LVIS's results format) in the style of COCO or of LVIS.

    Returns:
        One for each of ``truth.categories``.
    """
    rows, masks = to_rows(truth.with_inside_ids(detections), (task,))
    if lvis:
        kept = np.sort(best_rows(rows, IMAGE, _MAX_DETS["lvis"]))
        rows, masks = rows[kept], masks[kept]
    max_dets = [_MAX_DETS["lvis" if lvis else "coco"]]
    rows, masks = matchable(rows, masks, task)
    evaluation = match(truth, rows, masks, task, lvis=lvis, max_dets=max_dets, **ANY_SIZE)

    position = {image_id: i for i, image_id in enumerate(truth.annotations.images.inside)}
    of_category = defaultdict(list)
    for found in evaluation.eval_imgs:
        if found is not None:
            of_category[found["category_id"]].append(found)
    num_thresholds = len(evaluation.params.iou_thrs)
    return [
        _matches(of_category[category["id"]], position, num_thresholds)
        for category in truth.categories
    ]


def draw_images(num_images: int, num_draws: int, seed: int = 0) -> np.ndarray:
    """How often each draw takes each image: (B, N) float32, each row of the sum N."""
    generator = np.random.default_rng(seed)
    even = np.full(num_images, 1 / num_images)
    return generator.multinomial(num_images, even, size=num_draws).astype(np.float32)


def bootstrap_ap(matches: Sequence[Matches], draws: np.ndarray) -> np.ndarray:
    """AP of each category (B, C) in percent; NaN where a draw has no object of it.

    Args:
        matches: of each category.
        draws: (B, N) how often each image counts; ones give the AP of the data set itself.
    """
    return np.stack([_ap_of_category(m, draws) for m in matches], axis=1)


def bootstrap_measures(
    class_ap: np.ndarray,
    class_counts: Counts,
    thresholds: Sequence[int] = DEFAULT_COUNT_THRESHOLDS,
) -> dict[str, np.ndarray]:
    """AP, AP1, AP2, ... and bAP of each draw (B,), from AP of each class (B, C)."""
    rows = []
    for ap in class_ap:
        bins = ap_per_bin(ap, class_counts, thresholds)
        rows.append({"AP": defined_mean(ap), **bins, "bAP": balanced_ap(bins)})
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def interval(
    values: np.ndarray, measured: float | None = None, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of a measure or a difference from its bootstrapped values (B,).

    Images that are drawn twice raise AP, so that draws lie above what is ``measured`` on the images
    themselves: given that, their quantiles are shifted to have their mean there.
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"A confidence must be between 0 and 1, found {confidence}.")
    tail = 50 * (1 - confidence)
    shift = 0.0 if measured is None else measured - float(np.nanmean(values))
    low, high = np.nanpercentile(values, [tail, 100 - tail]) + shift
    return float(low), float(high)


def _matches(found: Sequence[dict], position: dict[int, int], num_thresholds: int) -> Matches:
    objects = np.zeros(len(position))
    images, scores, is_true, is_ignored = [], [], [], []
    for f in found:
        image = position[f["image_id"]]
        objects[image] = len(f["gtIgnore"]) - sum(f["gtIgnore"])
        images.append(np.full(len(f["dtScores"]), image))
        scores.append(f["dtScores"])
        is_true.append(np.array(f["dtMatched"], dtype=bool).reshape(num_thresholds, -1))
        is_ignored.append(np.array(f["dtIgnore"], dtype=bool).reshape(num_thresholds, -1))
    if not images:
        empty = np.empty((num_thresholds, 0), dtype=bool)
        return Matches(np.empty(0, dtype=int), empty, empty, objects)
    # Equal scores stay in the order of images, as evaluators have them.
    order = np.argsort(-np.concatenate(scores), kind="stable")
    true, ignored = np.concatenate(is_true, 1)[:, order], np.concatenate(is_ignored, 1)[:, order]
    return Matches(np.concatenate(images)[order], true & ~ignored, ignored, objects)


def _ap_of_category(matches: Matches, draws: np.ndarray) -> np.ndarray:
    """(B,) mean over the IoU thresholds of the mean precision at 101 recalls."""
    num_objects = draws @ matches.objects  # (B,)
    total = np.zeros(len(draws))
    weights = draws[:, matches.images]  # (B, D)
    kept = None
    for is_true, is_ignored in zip(matches.is_true, matches.is_ignored, strict=True):
        # Precision is highest where recall rises, so only true detections matter.
        hits = np.flatnonzero(is_true)
        if not len(hits):
            continue
        if kept is None or not np.array_equal(is_ignored, kept[0]):
            counted = np.cumsum(weights * ~is_ignored, axis=1)  # (B, D)
            kept = is_ignored, counted
        true = np.cumsum(weights[:, hits], axis=1, dtype=np.float64)  # (B, hits)
        precision = true / np.maximum(kept[1][:, hits], 1e-9)
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = true / np.maximum(num_objects, 1)[:, None]
        for b in range(len(draws)):
            first = np.searchsorted(recall[b], _RECALLS, side="left")
            reached = first < len(hits)
            total[b] += precision[b, first[reached]].sum()
    ap = 100 * total / (len(_RECALLS) * len(matches.is_true))
    return np.where(num_objects > 0, ap, np.nan)
