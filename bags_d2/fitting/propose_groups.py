"""Class groups and beta from the data: BAGS fitted on half of the training images, judged on half.

Shapes in this file: R RoIs, K classes.
"""

import itertools
import math
import os
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from tqdm import tqdm

from ..config import scale_schedule
from ..data.build import training_records
from ..data.class_statistics import training_class_counts
from ..data.samplers import epoch_order
from ..errors import ConfigError
from ..evaluation.bins import ap_per_bin, balanced_ap
from ..modeling.box_predictors import BAGSOutputLayers
from .calibration import MAX_LOGITS, cached_features, read_rois
from .extract import load_frozen_detector
from .train import ClassifierTrainer

__all__ = ["Proposal", "propose_groups", "roi_ap"]

# The paper's, its ablations', and one between. A single group is a softmax, and no grouping.
THRESHOLDS = ((10, 100, 1000), (100,), (10, 100), (30, 300), (5, 10, 50, 100, 500, 1000, 5000))
BETAS = (2.0, 8.0, 32.0, math.inf)


class Proposal(NamedTuple):
    """One choice, with the AP over held-out RoIs in percent."""

    thresholds: tuple[int, ...]
    beta: float
    bap: float  # mean over bins of training count
    bins: dict[str, float]  # AP1, AP2, ..; NaN for a bin without held-out objects


def propose_groups(
    cfg: CfgNode,
    folder: str | os.PathLike | None = None,
    thresholds: Sequence[Sequence[int]] = THRESHOLDS,
    betas: Sequence[float] = BETAS,
) -> list[Proposal]:
    """Rank class groups and beta for BAGS, the best first, by an inner split of the training set.

    Each choice is fitted twice, on either half of the training images with half of the schedule,
    and scores the RoIs of the other half by the config's merge. The detector itself has been
    trained on all of them.

    Args:
        cfg: config of BAGS, stage 2; ``MODEL.WEIGHTS`` is the detector of stage 1.
        folder: its feature cache, see :func:`cached_features`.
        thresholds, betas: what to choose from.

    Raises:
        ConfigError: if the config is not of BAGS, or of a cascade.
        DataError, MissingFileError: see :func:`cached_features`.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cache = cached_features(cfg, folder=folder)
    predictor = load_frozen_detector(cfg).roi_heads.box_predictor
    if type(predictor) is not BAGSOutputLayers:
        raise ConfigError(
            "Groups are proposed for BAGSOutputLayers (MODEL.ROI_BOX_PREDICTOR.NAME) without a "
            "cascade; add --method bags to the config of a Faster or Mask R-CNN."
        )
    records, counts = training_records(cfg), training_class_counts(cfg)
    shuffled = torch.randperm(len(records), generator=torch.Generator().manual_seed(0))
    halves = shuffled.tensor_split(2)
    num_rois = MAX_LOGITS // len(counts)
    held_out = [read_rois(cache, half.tolist(), num_rois) for half in halves]
    cfg.SOLVER.SCHEDULE_FACTOR = 0.5
    scale_schedule(cfg)
    proposals = []
    for edges, beta in tqdm(list(itertools.product(thresholds, betas)), "groups and beta"):
        cfg.MODEL.BAGS.GROUP_THRESHOLDS, cfg.MODEL.BAGS.OTHERS_SAMPLE_RATIO = tuple(edges), beta
        scores = []
        for half, (features, _) in zip(halves, reversed(held_out), strict=True):
            predictor = _fit(cfg, cache, records, half)
            with torch.no_grad():
                logits = predictor.cls_score(features.to(predictor.cls_score.weight))
                scores.append(predictor.class_probs(logits).cpu())
        labels = torch.cat([labels for _, labels in reversed(held_out)])
        bins = ap_per_bin(100 * roi_ap(torch.cat(scores), labels), counts)
        proposals.append(Proposal(tuple(edges), beta, balanced_ap(bins), bins))
    return sorted(proposals, key=lambda p: -p.bap)


def roi_ap(scores: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """AP of each class (K,) over RoIs: precision at each RoI of the class, averaged.

    Args:
        scores: (R, K + 1), background last.
        labels: (R,), 0..K.

    Returns:
        0..1; NaN for a class without a RoI.
    """
    ap = np.full(scores.shape[1] - 1, np.nan)
    for c in labels[labels < len(ap)].unique().tolist():
        order = scores[:, c].argsort(descending=True, stable=True)
        ranks = (labels[order] == c).nonzero()[:, 0] + 1.0
        ap[c] = (torch.arange(1, len(ranks) + 1) / ranks).mean().item()
    return ap


def _fit(cfg: CfgNode, cache, records: Sequence[dict], half: torch.Tensor) -> BAGSOutputLayers:
    """A classifier fitted on half of the images."""
    order = epoch_order(cfg, [records[i] for i in half])
    with tempfile.TemporaryDirectory() as cfg.OUTPUT_DIR:
        seed_all_rng(max(cfg.SEED, 0))
        predictor = load_frozen_detector(cfg).roi_heads.box_predictor
        ClassifierTrainer(cfg, cache, [predictor]).fit(lambda generator: half[order(generator)])
    return predictor.eval()
