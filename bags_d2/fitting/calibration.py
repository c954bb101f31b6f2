"""Calibration of a trained classifier: maps of its logits, without training it.

Every method here maps each class's logit by ``z'_c = a_c z_c + s_c``. Such a map goes into the
classifier's own weights and bias, so the result is an ordinary checkpoint.

The formulas are those of a softmax over classes and background. A grouped classifier has one for
each group, with "others" in the place of background, and each is calibrated as if it stood alone;
group 0 keeps its logits. Seesaw's softmax has no background, and its objectness is left alone.

Shapes in this file: R RoIs, n classes of a softmax, K classes in all, C logits.
"""

import functools
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import BoxMode
from torch import nn
from torch.nn import functional as F

from ..checkpoint import LongTailCheckpointer
from ..checkpoint.files import read_model_weights
from ..data.build import training_records
from ..data.class_statistics import ClassStatistics, training_class_counts, training_image_count
from ..engine.trainer import BAGSTrainer
from ..errors import ConfigError
from ..modeling.box_predictors import (
    BAGSOutputLayers,
    ClassifierOutputLayers,
    FastRCNNOutputLayers,
    NormalizedLinear,
    SeesawOutputLayers,
)
from ..modeling.roi_heads import box_stages
from ..utils.files import write_atomically
from .cache import FeatureCache
from .extract import extract_features
from .run import default_cache
from .train import of_stage

__all__ = ["CALIBRATIONS", "cached_features", "calibrate", "load_detector", "save_detector"]

logger = logging.getLogger(__name__)

# Methods that fit to features look at no more logits than these, which keeps them under a minute.
# Of LVIS they are 55,000 RoIs.
MAX_LOGITS = 1 << 26
FINAL = "model_final.pth"


class Softmax(NamedTuple):
    """One softmax of a classifier's logits, and what its calibration may look at."""

    classes: torch.Tensor  # (n,)
    columns: torch.Tensor  # (n,), their logits
    is_group: bool  # one of several
    has_background: bool
    cfg: CfgNode
    layer: nn.Linear
    rois: Callable[[], tuple[torch.Tensor, torch.Tensor]]  # logits (R, C) and labels (R,)
    centers: Callable[[], list[np.ndarray]]  # of the boxes of each of K classes

    def image_counts(self) -> torch.Tensor:
        """Training images of each class (n,), at least 1."""
        counts = training_class_counts(self.cfg, "images")
        return counts[self.classes].clamp(min=1).double()


Map = tuple[torch.Tensor | float, torch.Tensor | float]  # a and s, (n,) or of all classes


def norcal(softmax: Softmax, gamma: float) -> Map:
    """NorCal: ``p'_c = (e^{z_c} / n_c^gamma) / (sum_k e^{z_k} / n_k^gamma + e^{z_bg})``.

    Pan et al., NeurIPS 2021, eq. 4 and 5, with n_c the training images of class c.
    """
    return 1.0, -gamma * softmax.image_counts().log()


def fracal(softmax: Softmax, strength: float) -> Map:
    """FRACAL: ``s_c = softmax(z_c - log10 p_c - log10 K)``; then ``s_c / D_c^lambda``, normalised.

    Alexandridis et al., CVPR 2025, and its code: p_c is the share of the training images that show
    class c, D_c the :func:`fractal_dimension` of its boxes' centres; background keeps its logit,
    and its D is 1. To divide a softmax and normalise it is to subtract ``lambda ln D_c`` from its
    logits.
    """
    cfg = softmax.cfg
    share = softmax.image_counts() / training_image_count(cfg)
    dimensions = torch.tensor([fractal_dimension(softmax.centers()[c]) for c in softmax.classes])
    prior = share.log10() + math.log10(cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    return 1.0, -prior - strength * dimensions.double().log()


def logn(softmax: Softmax, _: float) -> Map:
    """Logit normalisation: ``z'_c = (z_c - mu_c + min_k mu_k) / sigma_c``, background as it is.

    LogN (Zhao et al.). Mean and deviation are each logit's over RoIs. Which RoIs is left open; here
    they are all proposals in training images, the objects' own boxes included.
    """
    logits = softmax.rois()[0][:, softmax.columns].double()
    deviation, mean = torch.std_mean(logits, dim=0, correction=0)
    scale = 1 / deviation.clamp(min=1e-12)
    return scale, scale * (mean.min() - mean)


def tau_norm(softmax: Softmax, tau: float) -> Map:
    """Tau-normalisation: the weights of a class become ``w_c / ||w_c||^tau``.

    Kang et al., ICLR 2020, section 4, on classification. BAGS reports it for detection and does not
    say what happens to background and biases. Here both are left alone, and norms are not rescaled
    to their former mean: with tau 1 every class has the norm 1, whatever that of background.
    """
    layer, columns = softmax.layer, softmax.columns
    scale = layer.weight[columns].double().norm(dim=1).clamp(min=1e-12) ** -tau
    return scale, (1 - scale) * layer.bias[columns].double()  # which keeps the bias as it is


def temperature(softmax: Softmax, _: float) -> Map:
    """A temperature for each class: ``z'_c = z_c / T_c``, of the least mean cross-entropy.

    Vector scaling (Guo et al., ICML 2017, section 4.2) without its bias, on RoIs of the training
    images; without background, on foreground. A class without RoIs keeps T = 1. A group is trained
    on a sample of "others", not on the RoIs that there are, so it is refused (ConfigError).
    """
    if softmax.is_group:
        raise ConfigError(
            "temperature has no meaning for groups, which are trained on a sample of 'others' "
            "(MODEL.BAGS.OTHERS_SAMPLE_RATIO); take another --calibration."
        )
    logits, labels = softmax.rois()
    num_classes = len(softmax.classes)
    if not softmax.has_background:
        foreground = labels < num_classes
        logits, labels = logits[foreground, :num_classes], labels[foreground]
    seen = labels.bincount(minlength=logits.shape[1]) > 0
    seen[num_classes:] = False
    probs = logits.softmax(dim=1)
    # In units of each class's curvature, which differs between classes as their counts do.
    curvature = (logits**2 * probs * (1 - probs)).mean(dim=0)
    units = torch.where(seen, curvature.clamp(min=1e-12).rsqrt(), 0.0)
    steps = torch.zeros_like(units, requires_grad=True)
    search = {"line_search_fn": "strong_wolfe", "tolerance_grad": 0, "tolerance_change": 0}
    optimizer = torch.optim.LBFGS([steps], max_iter=20, history_size=20, **search)

    def loss_of_steps() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits * (units * steps).exp(), labels)
        loss.backward()
        return loss

    if seen.any():
        optimizer.step(loss_of_steps)
    return (units * steps.detach()).double().exp()[:num_classes], 0.0


# With the default of --strength; None has none.
CALIBRATIONS: dict[str, tuple[Callable[[Softmax, float], Map], float | None]] = {
    "norcal": (norcal, 0.6),
    "fracal": (fracal, 2.0),
    "logn": (logn, None),
    "tau_norm": (tau_norm, 1.0),
    "temperature": (temperature, None),
}


@torch.no_grad()
def calibrate(
    cfg: CfgNode,
    method: str,
    *,
    strength: float | None = None,
    max_count: int | None = None,
    folder: str | os.PathLike | None = None,
    detector: str | None = None,
) -> Path:
    """Calibrate the classifier of ``MODEL.WEIGHTS`` with the training set.

    Args:
        cfg: config of the checkpoint.
        method: a key of ``CALIBRATIONS``.
        strength: gamma of NorCal, lambda of FRACAL, tau of tau-normalisation; None is the default.
        max_count: only classes with fewer training instances.
        folder, detector: see :func:`cached_features`; only LogN and temperature look at features.

    Returns:
        Path of ``OUTPUT_DIR/model_final.pth``: the whole detector.

    Raises:
        ConfigError: if there is no such method, or it has no meaning for this classifier.
        DataError, MissingFileError: if checkpoint, annotations or cache do not exist or are faulty.
    """
    if method not in CALIBRATIONS:
        raise ConfigError(f"--calibration must be one of {', '.join(CALIBRATIONS)}.")
    make_map, default = CALIBRATIONS[method]
    if strength is not None and not (default is not None and 0 <= strength < math.inf):
        has = "has none" if default is None else "takes a finite number of 0 or more"
        raise ConfigError(f"--strength is {strength}, but {method} {has}; correct it.")
    start = time.perf_counter()
    model = load_detector(cfg)
    features = functools.cache(lambda: cached_features(cfg, model, folder, detector))
    centers = functools.cache(lambda: _box_centers(cfg))
    for stage, (_, predictor) in enumerate(box_stages(model.roi_heads)):

        @functools.cache
        def rois(layer=predictor.cls_score, stage=stage):
            return _cached_logits(layer, features(), stage)

        for softmax in softmaxes(predictor, cfg, rois, centers):
            scale, shift = make_map(softmax, default if strength is None else strength)
            if max_count is not None:
                rare = training_class_counts(cfg, "instances")[softmax.classes] < max_count
                scale = torch.where(rare, torch.as_tensor(scale).double(), 1.0)
                shift = torch.where(rare, torch.as_tensor(shift).double(), 0.0)
            _map_logits(softmax, scale, shift, method)
    path = save_detector(cfg, model)
    seconds = time.perf_counter() - start
    logger.info("Calibrated by %s in %.1f s: '%s'", method, seconds, path)
    return path


def softmaxes(
    predictor: nn.Module,
    cfg: CfgNode,
    rois: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    centers: Callable[[], list[np.ndarray]],
) -> list[Softmax]:
    """The softmaxes of a box predictor that hold any class; see :class:`Softmax`.

    Raises:
        ConfigError: if its scores are no softmax of what its last layer returns.
    """
    kind, rest = type(predictor), (cfg, predictor.cls_score, rois, centers)
    classes = torch.arange(predictor.num_classes)
    if kind.forward is FastRCNNOutputLayers.forward:
        if kind is BAGSOutputLayers:
            groups = predictor.groups
            groups.require_determined()
            group_of, column_of = groups.class_to_group.cpu(), groups.class_to_column.cpu()
            members = [classes[group_of == g] for g in group_of.unique()]
            return [Softmax(m, column_of[m], True, True, *rest) for m in members]
        if kind is SeesawOutputLayers:
            return [Softmax(classes, classes, False, False, *rest)]
        stock = kind is FastRCNNOutputLayers and not predictor.use_sigmoid_ce
        if stock or getattr(kind, "class_probs", None) is ClassifierOutputLayers.class_probs:
            return [Softmax(classes, classes, False, True, *rest)]
    raise ConfigError(
        f"{kind.__name__} (MODEL.ROI_BOX_PREDICTOR.NAME) does not score by a softmax of its last "
        "layer's output, so calibration has no meaning for it; calibrate a softmax, Seesaw or BAGS "
        "checkpoint."
    )


def fractal_dimension(centers: np.ndarray) -> float:
    """Box-counting dimension of points (n, 2) in the unit square, 1 at least.

    The slope of the least-squares line through log(occupied cells) over log G, on grids of G x G
    cells, G = 1, 2, .. 64 while G^2 <= n; 1 where n < 4 (FRACAL's code).
    """
    sizes = np.arange(1, min(64, math.isqrt(len(centers))) + 1)
    if len(sizes) < 2:
        return 1.0
    cells = [np.minimum((centers * g).astype(int), g - 1) @ (g, 1) for g in sizes]
    occupied = [len(np.unique(c)) for c in cells]
    return max(1.0, float(np.polyfit(np.log(sizes), np.log(occupied), 1)[0]))


def _box_centers(cfg: CfgNode) -> list[np.ndarray]:
    """Centres of the training objects of each class, (n, 2), in shares of their image's size."""
    centers = [[] for _ in range(cfg.MODEL.ROI_HEADS.NUM_CLASSES)]
    for record in training_records(cfg):
        for a in record["annotations"]:
            if not a.get("iscrowd"):
                x0, y0, x1, y1 = BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
                center = (x0 + x1) / 2 / record["width"], (y0 + y1) / 2 / record["height"]
                centers[a["category_id"]].append(center)
    return [np.array(of_class, dtype=float).reshape(-1, 2).clip(0, 1) for of_class in centers]


def _map_logits(softmax: Softmax, scale, shift, method: str) -> None:
    """Let the layer return ``scale * z + shift`` for the classes of a softmax."""
    layer, columns = softmax.layer, softmax.columns
    scale, shift = (torch.as_tensor(x).double().to(layer.weight.device) for x in (scale, shift))
    if isinstance(layer, NormalizedLinear) and not bool((scale == 1).all()):
        raise ConfigError(
            f"{method} scales the logit of each class, which a cosine classifier (MODEL."
            "ROI_BOX_PREDICTOR.NORMALIZED) cannot express; take --calibration norcal or fracal."
        )
    layer.weight[columns] = (layer.weight[columns].double() * scale[..., None]).to(layer.weight)
    layer.bias[columns] = (layer.bias[columns].double() * scale + shift).to(layer.bias)
    if not all(bool(p.isfinite().all()) for p in layer.parameters()):
        raise ConfigError(
            f"The classifier overflows, or is not finite before, with {method}; lower --strength."
        )


def _cached_logits(
    layer: nn.Linear, cache: FeatureCache, stage: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (R, C) and labels (R,) of a stage's RoIs of all images, or of some at random."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randperm(cache.settings["num_images"], generator=generator).tolist()
    features, labels = read_rois(cache, images, MAX_LOGITS // layer.out_features, stage)
    return layer(features.to(layer.weight)), labels.to(layer.weight.device)


def read_rois(
    cache: FeatureCache, images: Sequence[int], num_rois: int, stage: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (R, D) and labels (R,) of a stage, of as many images as have ``num_rois`` RoIs."""
    parts, left = [], num_rois
    for i in range(0, len(images), 64):
        if left > 0:
            keys = [(0, image) for image in images[i : i + 64]]
            parts.append(of_stage(*cache.read(keys), stage))
            left -= len(parts[-1][1])
    features, labels = zip(*parts, strict=True)
    return torch.cat(features), torch.cat(labels)


def load_detector(cfg: CfgNode) -> GeneralizedRCNN:
    """The whole detector of ``MODEL.WEIGHTS``, of which ``OUTPUT_DIR`` is to hold another one."""
    weights, output = cfg.MODEL.WEIGHTS, os.path.join(cfg.OUTPUT_DIR, FINAL)
    if not weights or os.path.abspath(weights) == os.path.abspath(output):
        raise ConfigError(
            f"MODEL.WEIGHTS is '{weights}'; set it to the trained checkpoint, and OUTPUT_DIR to "
            "another folder."
        )
    model = BAGSTrainer.build_model(cfg)
    LongTailCheckpointer(model, evaluating=True).load(weights)
    return model


def save_detector(cfg: CfgNode, model: nn.Module, name: str = FINAL) -> Path:
    """Write a checkpoint of ``OUTPUT_DIR`` with what is known of the classes."""
    path = Path(cfg.OUTPUT_DIR) / name
    classes = ClassStatistics.from_model(cfg, model).for_checkpoint()
    with write_atomically(path, "wb") as file:
        torch.save({"model": model.state_dict(), **classes}, file)
    return path


def cached_features(
    cfg: CfgNode,
    model: nn.Module | None = None,
    folder: str | os.PathLike | None = None,
    detector: str | None = None,
) -> FeatureCache:
    """The feature cache of a model's detector.

    Args:
        cfg: config of the model; ``MODEL.WEIGHTS`` is its checkpoint.
        model: with these weights; needed beside ``detector``.
        folder: the cache, which is made if it does not exist; None is the one that fitting takes.
        detector: checkpoint that the cache is of; None is ``MODEL.WEIGHTS``.

    Raises:
        ConfigError: if ``detector`` has another one, or the cache was made from something else.
        DataError: if the cache is damaged or incomplete.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.TRAINABLE_PARAMS = ("roi_heads.box_predictor*cls_score.*",)
    if detector:
        theirs, nothing = read_model_weights(detector), torch.empty(0)
        for name, tensor in model.state_dict().items():
            same = torch.equal(tensor.cpu(), theirs.get(name, nothing))
            if not same and ".box_predictor" not in name:
                raise ConfigError(
                    f"'{name}' is not the same in '{cfg.MODEL.WEIGHTS}' and '{detector}' "
                    "(--detector), whose features thus do not serve the former; leave it out."
                )
        cfg.MODEL.WEIGHTS = detector
    folder = Path(folder or default_cache(cfg))
    if not (folder / "cache.json").exists():
        extract_features(cfg, folder)
    cache = FeatureCache(folder)
    cache.require(cfg, training_records(cfg))
    return cache
