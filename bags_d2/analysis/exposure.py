"""How often each sampler shows the classes of a data set, from its annotations alone."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
from detectron2.config import CfgNode

from ..data.build import training_records
from ..data.samplers import EPOCH_SAMPLERS, expected_draws, instance_classes
from ..errors import DataError
from ..evaluation.bins import bin_index

__all__ = ["class_exposure", "exposure_table"]


def class_exposure(records: Sequence[dict], draws: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Instances of each class (K,) that an epoch shows, if it takes image i ``draws[i]`` times."""
    exposure = torch.zeros(num_classes, dtype=torch.float64)
    for record, times in zip(records, draws.tolist(), strict=True):
        for c, number in Counter(instance_classes(record)).items():
            exposure[c] += times * number
    return exposure


def exposure_table(cfg: CfgNode) -> tuple[list[str], list[list]]:
    """Of each sampler the length of an epoch, and the mean exposure of a class of each bin.

    Bins are those of ``MODEL.BAGS.GROUP_THRESHOLDS``; classes without instances are left out. A
    sampler that finds nothing to draw has no row.
    """
    records = training_records(cfg)
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    counts = class_exposure(records, torch.ones(len(records)), num_classes)
    thresholds = cfg.MODEL.BAGS.GROUP_THRESHOLDS
    bins = torch.from_numpy(bin_index(counts, thresholds))
    members = [(bins == i) & (counts > 0) for i in range(len(thresholds) + 1)]
    header = ["sampler", "images"]
    for (low, high), of_bin in zip(pairwise([0, *thresholds, math.inf]), members, strict=True):
        header.append(f"[{low}, {high}): {int(of_bin.sum())} classes")
    rows = []
    for name in EPOCH_SAMPLERS:
        of_sampler = cfg.clone()
        of_sampler.defrost()
        of_sampler.DATALOADER.SAMPLER_TRAIN = name
        try:
            draws = expected_draws(of_sampler, records)
        except DataError:
            continue
        exposure = class_exposure(records, draws, num_classes)
        means = [exposure[of_bin].mean().item() for of_bin in members]
        rows.append([name.removesuffix("TrainingSampler") or "Random", draws.sum().item(), *means])
    return header, rows
