"""Score thresholds of classes for a precision that is asked for.

Detections here are structured arrays (N,) of ``DETECTION``: class 0..K-1, score, whether it found
an object (IoU of 0.5 or more), and image.
"""

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from detectron2.structures import Instances

from ..errors import ConfigError, DataError
from ..utils.files import load_json, write_json
from .detections import ANY_SIZE, match
from .ground_truth import GroundTruth

logger = logging.getLogger(__name__)

DETECTION = np.dtype([("class", int), ("score", float), ("right", bool), ("image", int)])


@dataclass(frozen=True)
class ScoreThresholds:
    """Least scores of classes, as they are stored beside a checkpoint.

    Attributes:
        precision, confidence, min_detections: what :func:`choose_thresholds` was asked for.
        pooled: threshold of the classes that abstain.
        thresholds: threshold of each class, by name.
        abstaining: names of the classes with the pooled threshold.
    """

    precision: float
    confidence: float
    min_detections: int
    pooled: float
    thresholds: dict[str, float]
    abstaining: list[str]

    @staticmethod
    def path_of(checkpoint: str | os.PathLike) -> Path:
        """The file of a checkpoint: ``model_final.thresholds.json`` of ``model_final.pth``."""
        return Path(checkpoint).with_suffix(".thresholds.json")

    @classmethod
    def of_checkpoint(
        cls, checkpoint: str | os.PathLike, choice: str | None = None
    ) -> "ScoreThresholds | None":
        """Those of the file ``choice`` ("none": none), else those beside the checkpoint, if any."""
        path = cls.path_of(checkpoint) if choice is None else choice
        if choice == "none" or (choice is None and not path.is_file()):
            return None
        logger.info("Scores have to reach the thresholds in '%s'.", path)
        return cls.load(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ScoreThresholds":
        """Read a file; MissingFileError without it, DataError if it is of another form."""
        content = load_json(path)
        try:
            found = cls(**content)
            valid = all(map(math.isfinite, [found.pooled, *found.thresholds.values()]))
        except (TypeError, AttributeError):
            valid = False
        if not valid:
            raise DataError(f"'{path}' has no thresholds; write it again with bags-d2 thresholds.")
        return found

    def save(self, path: str | os.PathLike) -> None:
        """Write a file, atomically."""
        write_json(path, asdict(self))

    def of_classes(self, names: Sequence[str]) -> np.ndarray:
        """Thresholds (K,); the pooled one of a class that has none."""
        return np.array([self.thresholds.get(name, self.pooled) for name in names])

    def select(self, instances: Instances, names: Sequence[str]) -> Instances:
        """The detections that reach the thresholds of their classes, which have these K names."""
        scores = instances.scores.double()
        least = torch.from_numpy(self.of_classes(names)).to(scores)
        return instances[scores >= least[instances.pred_classes]]


def judge(truth: GroundTruth, rows: np.ndarray, *, lvis: bool) -> np.ndarray:
    """Which rows (see ``evaluation.detections``) are right, as the evaluators see it.

    Those in ignored regions are left out; with ``lvis`` also those of classes that are not
    annotated in the image.
    """
    evaluation = match(truth, rows, None, "bbox", lvis=lvis, iou_thrs=[0.5], **ANY_SIZE)
    class_of = dict(zip(truth.category_ids.tolist(), truth.classes.tolist(), strict=True))
    found = [
        (class_of[pair["category_id"]], score, right, pair["image_id"])
        for pair in filter(None, evaluation.eval_imgs)
        for score, right, ignored in zip(
            pair["dtScores"], pair["dtMatched"][0], pair["dtIgnore"][0], strict=True
        )
        if not ignored
    ]
    return np.array(found, dtype=DETECTION)


def precisions(found: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Precision of each class (K,) at thresholds (K,); NaN where nothing reaches them."""
    kept = found[found["score"] >= thresholds[found["class"]]]
    right, all_kept = (
        np.bincount(kept["class"], weights, len(thresholds)) for weights in (kept["right"], None)
    )
    return np.where(all_kept > 0, right / np.maximum(all_kept, 1), np.nan)


def choose_thresholds(
    found: np.ndarray,
    names: Sequence[str],
    precision: float = 0.9,
    min_detections: int = 10,
    confidence: float = 0.9,
) -> ScoreThresholds:
    """The least threshold of each class that holds a precision.

    It holds it as long as the lower bound of Wilson's score interval (one-sided) does, of
    ``min_detections`` or more. A class without such a threshold abstains: it takes one pooled over
    all classes that do, or else over all classes.

    Args:
        found: detections (N,) of K classes.
        names: K names.
        precision: above 0 and below 1.
        min_detections: 1 or more.
        confidence: at least 0.5, which takes the measured precision as it is, and below 1.

    Raises:
        ConfigError, DataError: for values out of range, and if not even all classes together have
            such a threshold.
    """
    if not (0 < precision < 1 and 0.5 <= confidence < 1 and min_detections >= 1):
        raise ConfigError(
            "--precision must lie between 0 and 1, --confidence in 0.5..1, and --min-detections "
            f"be 1 or more, found {precision}, {confidence} and {min_detections}."
        )
    options = (precision, min_detections, NormalDist().inv_cdf(confidence))
    own = [_least_threshold(found[found["class"] == c], *options) for c in range(len(names))]
    abstaining = [c for c, threshold in enumerate(own) if threshold is None]
    pooled = _least_threshold(found[np.isin(found["class"], abstaining)], *options)
    if pooled is None:
        pooled = _least_threshold(found, *options)
    if pooled is None:
        raise DataError(
            f"No score holds a precision of {precision} among {len(found)} detections; lower "
            "--precision or --confidence, or take more images."
        )
    return ScoreThresholds(
        *(precision, confidence, min_detections, pooled),
        {name: pooled if t is None else t for name, t in zip(names, own, strict=True)},
        [names[c] for c in abstaining],
    )


def held_out_summary(found: np.ndarray, names: Sequence[str], precision: float, *options) -> str:
    """What thresholds chosen on half of the images are worth on the other half, in a sentence.

    The arguments are those of :func:`choose_thresholds`.
    """
    images = np.random.default_rng(0).permutation(np.unique(found["image"]))
    is_first = np.isin(found["image"], images[: len(images) // 2])
    chosen = choose_thresholds(found[is_first], names, precision, *options)
    least, held_out = chosen.of_classes(names), found[~is_first]
    measured = precisions(held_out, least)
    below, judged = int((measured < precision).sum()), int((~np.isnan(measured)).sum())
    kept = held_out[held_out["score"] >= least[held_out["class"]]]["right"]
    return (
        f"Chosen on {len(images) // 2} images and measured on the other {(len(images) + 1) // 2}: "
        f"{below} of {judged} classes with detections ({below / max(judged, 1):.0%}) are below a "
        f"precision of {precision}; all detections together have {kept.mean():.3f}, and are "
        f"{kept.sum() / max(held_out['right'].sum(), 1):.0%} of those that are right at any score."
    )


def _least_threshold(
    found: np.ndarray, precision: float, min_detections: int, z: float
) -> float | None:
    found = found[np.argsort(-found["score"], kind="stable")]
    scores, n = found["score"], np.arange(1, len(found) + 1)
    p = np.cumsum(found["right"]) / n
    bound = p + z**2 / (2 * n) - z * np.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    # Of equal scores all are kept or none.
    is_last = scores > np.append(scores[1:], -np.inf)
    holds = (bound / (1 + z**2 / n) >= precision) & (n >= min_detections) & is_last
    return float(scores[holds][-1]) if holds.any() else None
