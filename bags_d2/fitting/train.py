"""Pass 2: train the classifiers of box predictors, one or one a stage, on cached features.

Shapes in this file: R RoIs of a device's batch, S stages, D features of a RoI, K classes.
"""

import functools
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.structures import Boxes, Instances
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import get_event_storage
from torch import nn

from ..checkpoint.files import read_checkpoint
from ..data.build import training_records
from ..data.class_statistics import ClassStatistics
from ..data.samplers import EpochOrder, epoch_order
from ..engine.finite import GuardedSimpleTrainer
from ..engine.setup import check_settings
from ..engine.trainer import BAGSTrainer
from ..errors import ConfigError, DataError, NonFiniteLossError
from ..modeling.roi_heads import box_stages
from ..utils.events import default_writers
from ..utils.files import lock_folder, write_atomically
from ..utils.seeding import seed_generators, step_seed
from ..utils.settings import first_difference, select_config
from .cache import FeatureCache
from .extract import load_frozen_detector

__all__ = ["ClassifierLoss", "ClassifierTrainer", "cached_batches", "fit_classifier", "sample_rois"]

logger = logging.getLogger(__name__)

# Detectron2's 20 would be a good part of the time of steps that take milliseconds.
LOG_PERIOD = 100
PROGRESS_FILE = "fitting.pth"  # in OUTPUT_DIR

Batch = tuple[tuple[torch.Tensor, torch.Tensor], ...]


def fit_classifier(cfg: CfgNode, folder: str | os.PathLike) -> Path:
    """Fit the classifier of ``MODEL.ROI_BOX_PREDICTOR.NAME`` with the config's solver.

    Initial weights are those that training online with the same ``SEED`` starts from. A fit that
    was killed resumes from ``OUTPUT_DIR/fitting.pth`` and ends with the same weights. One process
    does all the work.

    Args:
        cfg: config of stage 2. ``SOLVER.REFERENCE_WORLD_SIZE`` is the number of devices whose
            batches make one of ``SOLVER.IMS_PER_BATCH`` images: "others" are drawn, and losses
            normalised, for each part by itself; 0 is one device. A negative ``SEED`` counts as 0.
        folder: the feature cache.

    Returns:
        Path of ``OUTPUT_DIR/model_final.pth``: the whole detector with the fitted classifier.

    Raises:
        ConfigError: if the cache is of other settings or data, a setting cannot work, or
            ``OUTPUT_DIR`` holds an unfinished fit of other settings.
        DataError: if the cache or the unfinished fit is incomplete or damaged.
        FolderInUseError: if another process fits to ``OUTPUT_DIR``.
        MissingFileError: if there is no cache, or no checkpoint.
        NonFiniteLossError: if weights, or more than ``SOLVER.MAX_NONFINITE_STEPS`` losses, are
            infinite or NaN; no such weights are written.
    """
    check_settings(cfg)
    with lock_folder(cfg.OUTPUT_DIR):
        cache = FeatureCache(folder)
        records = training_records(cfg)
        cache.require(cfg, records)
        seed_all_rng(_seed_of(cfg))
        model = load_frozen_detector(cfg)
        predictors = [predictor for _, predictor in box_stages(model.roi_heads)]
        progress = Path(cfg.OUTPUT_DIR) / PROGRESS_FILE
        try:
            if hasattr(predictors[0], "fit_features"):
                for stage, predictor in enumerate(predictors):
                    predictor.fit_features(of_stage(*part, stage) for part in cache.parts())
            else:
                ClassifierTrainer(cfg, cache, predictors).fit(epoch_order(cfg, records))
            _require_finite(model.roi_heads.box_predictor)
        except NonFiniteLossError as error:
            what = str(error).partition(", on the images")[0]
            raise NonFiniteLossError(
                f"{what}; lower SOLVER.BASE_LR, delete '{progress}' if it exists and run the same "
                "command again, or let SOLVER.MAX_NONFINITE_STEPS such steps pass."
            ) from None
        path = progress.with_name("model_final.pth")
        classes = ClassStatistics.from_training_set(cfg).for_checkpoint()
        _save({"model": model.state_dict(), **classes}, path)
        progress.unlink(missing_ok=True)
    logger.info("The detector with the fitted classifier is in '%s'.", path)
    return path


class ClassifierTrainer(GuardedSimpleTrainer):
    """Trains the predictors of all stages on cached features, and resumes an unfinished fit.

    Each step is a function of its number and the weights before it.
    """

    def __init__(self, cfg: CfgNode, cache: FeatureCache, predictors: Sequence[nn.Module]) -> None:
        num_images, num_parts = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE or 1
        if num_images % num_parts:
            raise ConfigError(
                f"SOLVER.IMS_PER_BATCH {num_images} is not a multiple of "
                f"SOLVER.REFERENCE_WORLD_SIZE {num_parts}; change one of them."
            )
        loss = ClassifierLoss(predictors)
        optimizer = BAGSTrainer.build_optimizer(cfg, loss.predictors)
        super().__init__(
            loss,
            None,  # the first batch is known once the progress has been read
            optimizer,
            max_skips=cfg.SOLVER.MAX_NONFINITE_STEPS,
            gather_metric_period=LOG_PERIOD,
        )
        self.cfg, self.cache, self.predictors = cfg, cache, loss.predictors
        self.path = Path(cfg.OUTPUT_DIR) / PROGRESS_FILE
        self.device = torch.device(cfg.MODEL.DEVICE).type
        # Where and how often a fit may be resumed, not what it computes.
        may_change = ("MODEL.DEVICE", "MODEL.WEIGHTS", "DATALOADER.NUM_WORKERS")
        may_change += ("SOLVER.CHECKPOINT_PERIOD", "SOLVER.MAX_NONFINITE_STEPS")
        self.settings = {
            **select_config(cfg, ("MODEL.*", "SOLVER.*", "DATALOADER.*", "SEED"), may_change),
            **{f"cache.{name}": value for name, value in cache.settings.items()},
        }
        schedule = BAGSTrainer.build_lr_scheduler(cfg, optimizer)
        writers = default_writers(cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER)
        self.register_hooks(
            [hooks.LRScheduler(optimizer, schedule), hooks.PeriodicWriter(writers, LOG_PERIOD)]
        )

    def fit(self, order: EpochOrder) -> None:
        """Train to the end, from the step after the last that was saved."""
        start = self.resume()
        self.reset_data_loader(lambda: cached_batches(self.cfg, self.cache, order, start))
        name = type(self.predictors[0]).__name__
        logger.info("Fitting the classifier of %s on '%s'", name, self.cache.folder)
        self.train(start, self.cfg.SOLVER.MAX_ITER)

    def resume(self) -> int:
        """Restore an unfinished fit; returns the step to resume at."""
        if not self.path.exists():
            return 0
        try:
            saved = read_checkpoint(self.path)
            difference = first_difference(saved["settings"], self.settings)
            if not difference:
                self.predictors.load_state_dict(saved["model"])
                self.load_state_dict(saved["trainer"])
                _require_finite(self.predictors)
                start = range(self.cfg.SOLVER.MAX_ITER + 1).index(self.iter + 1)
        except Exception as error:  # states of another form raise nearly anything
            detail = " ".join(str(error).split())[:200]
            raise DataError(
                f"'{self.path}' is not the progress of a fit or is damaged ({detail}); delete it "
                "and run the same command again, which starts over."
            ) from None
        if difference:
            raise ConfigError(
                f"'{self.path}' is an unfinished fit with other settings: {difference}; delete it "
                "or set another OUTPUT_DIR."
            )
        logger.info("Resuming after step %d of '%s'", start - 1, self.path)
        return start

    def before_step(self) -> None:
        super().before_step()
        # The predictor may draw from the global generators, as BAGS draws its "others".
        seed_generators(step_seed(_seed_of(self.cfg), self.iter), self.device)

    def after_step(self) -> None:
        super().after_step()  # the schedule's step is part of what is saved
        if (self.iter + 1) % self.cfg.SOLVER.CHECKPOINT_PERIOD == 0:
            _require_finite(self.predictors)
            model, trainer = self.predictors.state_dict(), self.state_dict()
            _save({"settings": self.settings, "model": model, "trainer": trainer}, self.path)


def sample_rois(
    labels: np.ndarray,
    sizes: Sequence[int],
    generator: np.random.Generator,
    num_rois: int,
    positive_fraction: float,
    num_classes: int,
) -> np.ndarray:
    """Sample RoIs for training as ``StandardROIHeads`` does, for several images at once.

    Args:
        labels: (R,) labels 0..K of all RoIs, image after image.
        sizes: number of RoIs of each image.
        generator: source of randomness.
        num_rois: RoIs to sample of an image, all if there are fewer.
        positive_fraction: the largest share of them that is foreground.
        num_classes: K, the label of background.

    Returns:
        Ascending indices.
    """
    # Runs 2i and 2i + 1 are the foreground and the background of image i. Sorted by run and a
    # random number, the first of each run are a random choice.
    run = np.repeat(np.arange(0, 2 * len(sizes), 2), sizes) + (labels == num_classes)
    order = np.argsort(run + generator.random(len(run)))
    available = np.bincount(run, minlength=2 * len(sizes))
    taken = available.copy()
    np.minimum(taken[::2], int(num_rois * positive_fraction), out=taken[::2])
    np.minimum(taken[1::2], num_rois - taken[::2], out=taken[1::2])
    rank = np.arange(len(run)) - np.repeat(np.cumsum(available) - available, available)
    return np.sort(order[rank < np.repeat(taken, available)])


def cached_batches(
    cfg: CfgNode, cache: FeatureCache, order: EpochOrder, start: int = 0
) -> Iterator[Batch]:
    """Endless batches of cached images, in one part for each device, from step ``start`` on.

    Epochs take the views in turn and sample RoIs anew; batches may span two epochs. A batch
    follows from ``SEED`` and its step alone, so that a run can resume anywhere.
    """
    heads, seed, device = cfg.MODEL.ROI_HEADS, _seed_of(cfg), cfg.MODEL.DEVICE
    num_images, num_parts = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE or 1
    keys = epoch_keys(order, cache.settings["views"], seed, start * num_images)
    for step in itertools.count(start):
        sample = functools.partial(
            sample_rois,
            generator=np.random.default_rng((seed, step)),
            num_rois=heads.BATCH_SIZE_PER_IMAGE,
            positive_fraction=heads.POSITIVE_FRACTION,
            num_classes=heads.NUM_CLASSES,
        )
        yield tuple(
            cache.read(list(itertools.islice(keys, num_images // num_parts)), sample, device)
            for _ in range(num_parts)
        )


def epoch_keys(
    order: EpochOrder, views: int, seed: int, start: int = 0
) -> Iterator[tuple[int, int]]:
    """View and image of every sample from number ``start`` on."""
    generator = torch.Generator()
    for epoch in itertools.count():
        images = order(generator.manual_seed(step_seed(seed, epoch))).tolist()
        for image in images[start:]:
            yield epoch % views, image
        start = max(start - len(images), 0)


class ClassifierLoss(nn.Module):
    """The classification losses of box predictors on cached RoIs, as a model to train."""

    def __init__(self, predictors: Sequence[nn.Module]) -> None:
        super().__init__()
        self.predictors = nn.ModuleList(predictors)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """``loss_cls``, or ``loss_cls_stage0`` and so on of a cascade.

        They are means over devices, as DistributedDataParallel averages gradients.
        """
        parts = [self._losses(*part) for part in batch]
        return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}

    def _losses(self, features: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if len(self.predictors) == 1:
            return {"loss_cls": _loss(self.predictors[0], *of_stage(features, labels, 0))}
        losses = {}
        for stage, predictor in enumerate(self.predictors):
            with get_event_storage().name_scope(f"stage{stage}"):
                loss = _loss(predictor, *of_stage(features, labels, stage))
            losses[f"loss_cls_stage{stage}"] = loss
        return losses


def of_stage(
    features: torch.Tensor, labels: torch.Tensor, stage: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (R', D) and labels (R',) of the RoIs that a stage sees, of (R, S, D) and (R, S)."""
    features, labels = features[:, stage], labels[:, stage]
    if stage == 0:  # which sees all of them
        return features, labels
    kept = labels >= 0
    return features[kept], labels[kept]


def _loss(predictor: nn.Module, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    # Losses that regress boxes need some that are not degenerate.
    boxes = Boxes(features.new_tensor([0.0, 0.0, 1.0, 1.0]).expand(len(labels), 4))
    rois = Instances((1, 1), proposal_boxes=boxes, gt_boxes=boxes, gt_classes=labels)
    return predictor.losses(predictor(features), [rois])["loss_cls"]


def _seed_of(cfg: CfgNode) -> int:
    return max(cfg.SEED, 0)


def _require_finite(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            raise NonFiniteLossError(f"Weights of '{name}' have become infinite or NaN")


def _save(content: dict, path: Path) -> None:
    with write_atomically(path, "wb") as file:
        torch.save(content, file)
