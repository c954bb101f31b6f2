"""A new class for a trained BAGS detector, in a column of its own, with all else frozen.

The groups of a BAGS classifier do not know of each other, so a group that takes in a class leaves
every conditional probability of the others as it is. A softmax over all classes cannot.

Shapes in this file: R RoIs, D features of a RoI, K classes before, m + 1 slots of a group.
"""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch.nn import functional as F

from ..config import long_tail
from ..data.annotations import read_annotations
from ..data.class_statistics import ClassStatistics
from ..engine.trainer import BAGSTrainer
from ..errors import ConfigError, DataError
from ..modeling.box_predictors import BAGSOutputLayers, NormalizedLinear
from ..modeling.class_groups import ClassGroups
from ..modeling.losses import group_targets
from .calibration import cached_features, load_detector, save_detector
from .train import of_stage

__all__ = ["Change", "add_class", "fit_column", "widened"]

logger = logging.getLogger(__name__)

_DATASET = "images_of_the_new_class"


class Change(NamedTuple):
    """How the new class's group sees the RoIs of one of its slots that it was fitted to."""

    name: str  # of a class, or "others"
    rois: int
    prob_before: float  # mean conditional probability of the slot
    prob_after: float
    taken: float  # share of the RoIs for which the new class is now the group's likeliest


@torch.no_grad()
def add_class(
    cfg: CfgNode,
    name: str,
    data: Sequence[str],
    *,
    folder: str | os.PathLike | None = None,
    detector: str | None = None,
) -> tuple[Path, list[Change]]:
    """Add a class to the BAGS detector of ``MODEL.WEIGHTS``, as its last.

    Its group follows from its count in the new images, by the checkpoint's thresholds. Where boxes
    or masks are class-specific, its own are the mean of its group's, or of all classes if it is the
    first of its group.

    Args:
        cfg: config of the checkpoint, of K classes.
        name: the class.
        data: "coco" or "lvis", the annotation file and the folder of the new images. Objects of the
            checkpoint's classes are found by name; what is of no class, or not annotated, is a
            negative like those.
        folder, detector: feature cache of the training images, see :func:`cached_features`. If
            either is given, their foreground RoIs are negatives too; their background may be of the
            new class.

    Returns:
        Path of ``OUTPUT_DIR/model_final.pth``, a detector of K + 1 classes, and what has changed in
        the new class's group.

    Raises:
        ConfigError: if the checkpoint cannot take in a class, or has it already.
        DataError: if the annotations have no object of it, or are faulty.
        MissingFileError: if a file does not exist.
    """
    model = load_detector(cfg)
    predictor = model.roi_heads.box_predictor
    known = ClassStatistics.from_model(cfg, model)
    if (
        type(predictor) is not BAGSOutputLayers
        or isinstance(predictor.cls_score, NormalizedLinear)
        or None in (known.names, known.training_instances)
    ):
        raise ConfigError(
            f"MODEL.WEIGHTS '{cfg.MODEL.WEIGHTS}' cannot take in a class: it must be a BAGS "
            "detector (linear, not a cascade) that knows the names and counts of its classes."
        )
    names, (kind, json_file, image_root) = (*known.names, name), data
    if kind not in ("coco", "lvis"):
        raise ConfigError(f"--data is of kind '{kind}'; it must be coco or lvis.")
    annotations = read_annotations(json_file)
    theirs = annotations.names
    instances, images = (
        dict(zip(theirs, of_file.tolist(), strict=True)).get(name, 0)
        for of_file in (annotations.instance_counts(), annotations.image_counts())
    )
    if name in known.names or not instances:
        fault = "is a class of the checkpoint" if name in known.names else "has no object"
        raise DataError(f"--name '{name}' {fault} in '{json_file}'; correct it.")

    old = predictor.groups
    count = images if long_tail(cfg).COUNT_BY == "images" else instances
    edges = old.thresholds.cpu()
    group = torch.bucketize(torch.tensor([count]), edges, right=True) + 1
    counts = torch.cat([old.class_counts.cpu(), torch.tensor([count])])
    new = ClassGroups(torch.cat([old.class_to_group.cpu(), group]), counts, edges.tolist())
    class_of = {known_name: c for c, known_name in enumerate(names)}
    records = annotations.records(image_root, lvis=kind == "lvis", masks=False)
    for record in records:
        record["annotations"] = [
            a | {"category_id": class_of[theirs[a["category_id"]]]}
            for a in record["annotations"]
            if theirs[a["category_id"]] in class_of
        ]
    negatives = []
    if folder or detector:
        parts = [of_stage(*p, 0) for p in cached_features(cfg, model, folder, detector).parts()]
        negatives = [(x[y < len(known.names)], y[y < len(known.names)]) for x, y in parts]
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(names)
    cfg.MODEL.LONG_TAIL.CLASS_COUNTS_FILE = cfg.MODEL.BAGS.CLASS_COUNTS_FILE = ""
    cfg.MODEL.BAGS.GROUP_THRESHOLDS = tuple(edges.tolist())
    cfg.DATASETS.TRAIN = (_DATASET,)
    with _registered(records, names, counts.tolist()):
        wider = BAGSTrainer.build_model(cfg)
        wider.load_state_dict(widened(model.state_dict(), wider.state_dict(), old, new))
        wider.class_statistics = ClassStatistics(names, (*known.training_instances, instances))
        # Features are those of a checkpoint, of which the column makes no difference.
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cfg.OUTPUT_DIR) as temporary:
            start = save_detector(cfg, wider, f"{Path(temporary).name}/start.pth")
            cfg.MODEL.WEIGHTS = str(start)
            cache = cached_features(cfg, wider, start.with_name("features"))
            parts = [of_stage(*part, 0) for part in cache.parts()]
    features, labels = (torch.cat(x) for x in zip(*parts, *negatives, strict=True))
    changes = _fit(wider.roi_heads.box_predictor, features, labels, names, cfg)
    path = save_detector(cfg, wider)
    logger.info(
        "'%s' is class %d of %d, in group %d: '%s'", name, len(names) - 1, len(names), group, path
    )
    return path, changes


def widened(
    state: Mapping[str, torch.Tensor],
    wider: Mapping[str, torch.Tensor],
    old: ClassGroups,
    new: ClassGroups,
) -> dict[str, torch.Tensor]:
    """The state of a BAGS detector with one class more, whose column is zero.

    Args:
        state: of the detector of K classes.
        wider: of any of K + 1 classes, for the shapes.
        old, new: their groups.
    """
    group, column = new.class_to_group[-1], int(new.class_to_column[-1])
    members = old.class_to_group == group.to(old.class_to_group.device)
    members = members if members.any() else torch.ones_like(members)
    result = dict(state)
    for name in (n for n in state if state[n].shape != wider[n].shape):
        tensor = state[name]
        if ".groups." in name:
            result[name] = new.state_dict()[name.rpartition(".")[2]]
        elif ".cls_score." in name:
            before, after = tensor.split([column, len(tensor) - column])
            result[name] = torch.cat([before, torch.zeros_like(tensor[:1]), after])
        else:  # what each class has of its own: box deltas, masks
            own = tensor.unflatten(0, (old.num_classes, -1))[members].mean(dim=0)
            result[name] = torch.cat([tensor, own])
    return result


def fit_column(
    features: torch.Tensor,
    positive: torch.Tensor,
    rest: torch.Tensor,
    weights: torch.Tensor,
    decay: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights (D,) and the bias of a new column of a softmax whose other columns are frozen.

    They minimise ``sum_i w_i CE_i / sum_i w_i + decay / 2 |weights|^2``. With the other columns
    frozen, cross-entropy is that of a logistic regression with logit ``z_new - rest``.

    Args:
        features: (R, D).
        positive: bool tensor (R,), whether a RoI is of the new class.
        rest: (R,), log-sum-exp of the other columns' logits.
        weights: (R,), how much a RoI counts.
        decay: weight decay.
    """
    column = features.new_zeros(features.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([column], max_iter=200, line_search_fn="strong_wolfe")

    def loss_of_column() -> torch.Tensor:
        optimizer.zero_grad()
        logits = features @ column[:-1] + column[-1] - rest
        losses = F.binary_cross_entropy_with_logits(
            logits, positive.to(logits), weights, reduction="sum"
        )
        loss = losses / weights.sum() + decay / 2 * column[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(loss_of_column)
    return column[:-1].detach(), column[-1].detach()


def _fit(
    predictor: BAGSOutputLayers,
    features: torch.Tensor,
    labels: torch.Tensor,
    names: Sequence[str],
    cfg: CfgNode,
) -> list[Change]:
    """Fit the column of the last class in place."""
    groups, layer = predictor.groups, predictor.cls_score
    group, column = int(groups.class_to_group[-1]), int(groups.class_to_column[-1])
    part = groups.group_slices[group]
    features, labels = features.to(layer.weight), labels.to(layer.weight.device)
    targets = group_targets(labels, groups)[group]
    before = layer(features)[:, part]
    before[:, -1] = -torch.inf  # the new class, the last of its group
    # As many "others" as training draws, in expectation.
    ratio = predictor.others_sample_ratio * (targets > 0).sum() / (targets == 0).sum().clamp(min=1)
    weights = torch.where(targets > 0, 1.0, ratio.clamp(max=1))
    positive = targets == len(before[0]) - 1
    layer.weight[column], layer.bias[column] = fit_column(
        features, positive, before.logsumexp(dim=1), weights, cfg.SOLVER.WEIGHT_DECAY
    )
    after = layer(features)[:, part].softmax(dim=1)
    members = (groups.class_to_group == group).nonzero()[:, 0].tolist()
    slots = ["others", *(names[c] for c in members)]
    changes, taken = [], after.argmax(dim=1) == len(slots) - 1
    for slot, name in enumerate(slots):
        chosen = targets == slot
        if chosen.any():
            probs = (p[chosen, slot].mean().item() for p in (before.softmax(dim=1), after))
            share = taken[chosen].float().mean().item()
            changes.append(Change(name, int(chosen.sum()), *probs, share))
    return changes


@contextlib.contextmanager
def _registered(records: list[dict], names: Sequence[str], counts: list[int]) -> Iterator[None]:
    DatasetCatalog.register(_DATASET, lambda: records)
    metadata = MetadataCatalog.get(_DATASET)
    metadata.set(thing_classes=list(names), class_instance_count=counts, class_image_count=counts)
    try:
        yield
    finally:
        DatasetCatalog.remove(_DATASET)
        MetadataCatalog.remove(_DATASET)
