"""Pass 2: train a box predictor's classifier on cached features.

Shapes in this file: R RoIs of a device's batch, D features of a RoI, K classes.
"""

import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.structures import Boxes, Instances
from detectron2.utils.env import seed_all_rng
from torch import nn

from ..checkpoint.files import read_checkpoint
from ..data.build import training_records
from ..data.class_record import ClassRecord
from ..data.samplers import EpochOrder, epoch_order
from ..engine.finite import GuardedSimpleTrainer
from ..engine.setup import check_settings
from ..engine.trainer import BAGSTrainer
from ..errors import ConfigError, DataError, NonFiniteLossError
from ..utils.events import default_writers
from ..utils.files import lock_folder, write_atomically
from ..utils.seeding import seed_generators, step_seed
from ..utils.settings import first_difference, select_config
from .cache import FeatureCache
from .extract import load_frozen_detector

__all__ = ["ClassifierLoss", "cached_batches", "fit_classifier", "roi_sampler", "sample_rois"]

logger = logging.getLogger(__name__)

# Detectron2's 20 would be a good part of the time of steps that take milliseconds.
LOG_PERIOD = 100

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
        predictor = model.roi_heads.box_predictor
        progress = Path(cfg.OUTPUT_DIR) / "fitting.pth"
        try:
            if hasattr(predictor, "fit_features"):
                predictor.fit_features(cache.parts())
            else:
                _train(cfg, cache, epoch_order(cfg, records), predictor, progress)
            _require_finite(predictor)
        except NonFiniteLossError as error:
            what = str(error).partition(", on the images")[0]
            raise NonFiniteLossError(
                f"{what}; lower SOLVER.BASE_LR, delete '{progress}' if it exists and run the same "
                "command again, or let SOLVER.MAX_NONFINITE_STEPS such steps pass."
            ) from None
        path = progress.with_name("model_final.pth")
        classes = ClassRecord.of_training_set(cfg).for_checkpoint()
        _save({"model": model.state_dict(), **classes}, path)
        progress.unlink(missing_ok=True)
    logger.info("The detector with the fitted classifier is in '%s'.", path)
    return path


def _train(
    cfg: CfgNode, cache: FeatureCache, order: EpochOrder, predictor: nn.Module, path: Path
) -> None:
    num_images, num_parts = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE or 1
    if num_images % num_parts:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {num_images} is not a multiple of SOLVER.REFERENCE_WORLD_SIZE "
            f"{num_parts}; change one of them."
        )
    optimizer = BAGSTrainer.build_optimizer(cfg, predictor)
    trainer = GuardedSimpleTrainer(
        ClassifierLoss(predictor, cfg.MODEL.DEVICE),
        None,  # the first batch is known once the progress has been read
        optimizer,
        max_skips=cfg.SOLVER.MAX_NONFINITE_STEPS,
        gather_metric_period=LOG_PERIOD,
    )
    progress = _Progress(path, cfg, cache, predictor)
    writers = default_writers(cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER)
    trainer.register_hooks(
        [
            hooks.LRScheduler(optimizer, BAGSTrainer.build_lr_scheduler(cfg, optimizer)),
            progress,  # after the scheduler, whose state it saves
            hooks.PeriodicWriter(writers, period=LOG_PERIOD),
        ]
    )
    start = progress.resume()
    division = (num_images // num_parts, num_parts)
    trainer.reset_data_loader(
        lambda: cached_batches(cache, *division, roi_sampler(cfg), order, _seed_of(cfg), start)
    )
    logger.info("Fitting the classifier of %s on '%s'", type(predictor).__name__, cache.folder)
    trainer.train(start, cfg.SOLVER.MAX_ITER)


def roi_sampler(cfg: CfgNode) -> Callable[..., np.ndarray]:
    """:func:`sample_rois` for a config."""
    heads = cfg.MODEL.ROI_HEADS
    return functools.partial(
        sample_rois,
        num_rois=heads.BATCH_SIZE_PER_IMAGE,
        positive_fraction=heads.POSITIVE_FRACTION,
        num_classes=heads.NUM_CLASSES,
    )


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
    cache: FeatureCache,
    images_per_part: int,
    num_parts: int,
    sample: Callable[..., np.ndarray],
    order: EpochOrder,
    seed: int = 0,
    start: int = 0,
) -> Iterator[Batch]:
    """Endless batches of cached images in the order of a training run, a part for each device.

    Epochs take the views in turn and sample RoIs afresh; batches may span two epochs. A batch
    follows from the seed and its step alone, so that a run can resume anywhere.

    Args:
        cache: the features.
        images_per_part: images of a device's batch.
        num_parts: devices.
        sample: see :func:`roi_sampler`.
        order: positions of an epoch's images.
        seed: of the order and of the RoIs.
        start: step of the first batch.
    """
    keys = epoch_keys(order, cache.settings["views"], seed, start * images_per_part * num_parts)
    for step in itertools.count(start):
        draw = functools.partial(sample, generator=np.random.default_rng((seed, step)))
        yield tuple(
            cache.read(list(itertools.islice(keys, images_per_part)), draw)
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
    """The classification loss of a box predictor on cached RoIs, as a model to train."""

    def __init__(self, predictor: nn.Module, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.predictor = predictor
        self.device = torch.device(device)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """``loss_cls``, the mean over devices, as DistributedDataParallel averages gradients."""
        losses = [self._loss(features, labels) for features, labels in batch]
        return {"loss_cls": torch.stack(losses).mean()}

    def _loss(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # A box that is not degenerate, since a predictor of another family may encode it.
        boxes = Boxes(torch.tensor([0.0, 0.0, 1.0, 1.0], device=self.device).expand(len(labels), 4))
        rois = Instances((1, 1), proposal_boxes=boxes, gt_boxes=boxes)
        rois.gt_classes = labels.to(self.device, non_blocking=True)
        predictions = self.predictor(features.to(self.device, non_blocking=True).float())
        return self.predictor.losses(predictions, [rois])["loss_cls"]


class _Progress(HookBase):
    """Makes each step a function of its number, and saves what is needed to resume after it."""

    def __init__(self, path: Path, cfg: CfgNode, cache: FeatureCache, predictor: nn.Module) -> None:
        self.path, self.predictor = path, predictor
        self.period, self.num_steps = cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.MAX_ITER
        self.seed, self.device = _seed_of(cfg), torch.device(cfg.MODEL.DEVICE).type
        # Where and how often a fit may be resumed, not what it computes.
        may_change = ("MODEL.DEVICE", "MODEL.WEIGHTS", "DATALOADER.NUM_WORKERS")
        may_change += ("SOLVER.CHECKPOINT_PERIOD", "SOLVER.MAX_NONFINITE_STEPS")
        self.settings = {
            **select_config(cfg, ("MODEL.*", "SOLVER.*", "DATALOADER.*", "SEED"), may_change),
            **{f"cache.{name}": value for name, value in cache.settings.items()},
        }

    def resume(self) -> int:
        """Restore an unfinished fit; returns the step to resume at."""
        if not self.path.exists():
            return 0
        try:
            saved = read_checkpoint(self.path)
            difference = first_difference(saved["settings"], self.settings)
            if not difference:
                self.predictor.load_state_dict(saved["model"])
                self.trainer.load_state_dict(saved["trainer"])
                _require_finite(self.predictor)
                start = range(self.num_steps + 1).index(self.trainer.iter + 1)
        except Exception as error:  # states of another form raise nearly anything
            detail = " ".join(str(error).split())[:200]
            raise DataError(
                f"'{self.path}' is not the progress of a fit or is damaged ({detail}); delete it "
                "and run the same command again, which starts anew."
            ) from None
        if difference:
            raise ConfigError(
                f"'{self.path}' is an unfinished fit with other settings: {difference}; delete it "
                "or set another OUTPUT_DIR."
            )
        logger.info("Resuming after step %d of '%s'", start - 1, self.path)
        return start

    def before_step(self) -> None:
        # The predictor may draw from the global generators, as BAGS draws its "others".
        seed_generators(step_seed(self.seed, self.trainer.iter), self.device)

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self.period == 0:
            _require_finite(self.predictor)
            model, trainer = self.predictor.state_dict(), self.trainer.state_dict()
            _save({"settings": self.settings, "model": model, "trainer": trainer}, self.path)


def _seed_of(cfg: CfgNode) -> int:
    return max(cfg.SEED, 0)


def _require_finite(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            raise NonFiniteLossError(f"Weights of '{name}' have become infinite or NaN")


def _save(content: dict, path: Path) -> None:
    with write_atomically(path, "wb") as file:
        torch.save(content, file)
