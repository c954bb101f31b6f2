"""Pass 2 of classifier fitting: train a box predictor's classifier on cached features.

Shapes in this file: R RoIs of a per-device batch, D features of a RoI, K classes.
"""

import dataclasses
import functools
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, SimpleTrainer, hooks
from detectron2.structures import Boxes, Instances
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import CommonMetricPrinter, JSONWriter
from torch import nn

from ..data.class_record import ClassRecord
from ..data.samplers import EpochOrder, epoch_order
from ..engine.trainer import BAGSTrainer
from ..errors import ConfigError, DataError
from ..seeding import seed_generators, step_seed
from .cache import (
    FeatureCache,
    first_difference,
    load_frozen_detector,
    select_config,
    training_records,
)

__all__ = ["CachedBatches", "ClassifierLoss", "RoISampler", "fit_classifier"]

logger = logging.getLogger(__name__)

# Steps between lines in the log and in metrics.json. Detectron2's 20 would be a good part of the
# time of steps that take milliseconds.
LOG_PERIOD = 100

Batch = list[tuple[torch.Tensor, torch.Tensor]]


def fit_classifier(cfg: CfgNode, folder: str | os.PathLike) -> Path:
    """Fit the classifier of ``MODEL.ROI_BOX_PREDICTOR.NAME`` with the config's solver.

    Initial weights are those that training online with the same ``SEED`` starts from. Progress is
    kept in ``OUTPUT_DIR/fitting.pth``; a fit that was killed goes on from there, to the result
    that it would have had. One process does all the work.

    Args:
        cfg: config of stage 2. ``SOLVER.REFERENCE_WORLD_SIZE`` is the number of devices whose
            batches make one of ``SOLVER.IMS_PER_BATCH`` images: "others" are drawn, and losses
            normalised, for each part by itself; 0 is one device. A negative ``SEED`` counts as 0.
        folder: the feature cache.

    Returns:
        Path of ``OUTPUT_DIR/model_final.pth``: the whole detector with the fitted classifier.

    Raises:
        ConfigError: if the cache is of another detector, the config cannot be fitted from cached
            features, or ``OUTPUT_DIR`` holds an unfinished fit of other settings.
        DataError: if the cache is incomplete.
        MissingFileError: if there is no cache, or no checkpoint.
    """
    cache = FeatureCache(folder)
    cache.require(cfg)
    seed_all_rng(_seed_of(cfg))
    model = load_frozen_detector(cfg)
    predictor = model.roi_heads.box_predictor
    path = Path(cfg.OUTPUT_DIR) / "model_final.pth"
    if hasattr(predictor, "fit_features"):
        path.parent.mkdir(parents=True, exist_ok=True)
        predictor.fit_features(cache.parts())
        return _save_detector(model, cfg, path)
    batches = CachedBatches(
        cache,
        *_batch_sizes(cfg),
        sampler=RoISampler.from_config(cfg),
        seed=_seed_of(cfg),
        order=_epoch_order(cfg, cache),
    )
    optimizer = BAGSTrainer.build_optimizer(cfg, predictor)
    trainer = SimpleTrainer(
        ClassifierLoss(predictor, model.device), batches, optimizer, gather_metric_period=LOG_PERIOD
    )
    output_dir = Path(cfg.OUTPUT_DIR)
    output_dir.mkdir(parents=True, exist_ok=True)
    progress = _Progress(output_dir / "fitting.pth", cfg, cache, predictor)
    writers = [CommonMetricPrinter(cfg.SOLVER.MAX_ITER), JSONWriter(output_dir / "metrics.json")]
    trainer.register_hooks(
        [
            hooks.LRScheduler(optimizer, BAGSTrainer.build_lr_scheduler(cfg, optimizer)),
            progress,  # after the scheduler, whose state it saves
            hooks.PeriodicWriter(writers, period=LOG_PERIOD),
        ]
    )
    batches.start = progress.resume()
    logger.info("Fitting the classifier of %s on %s", type(predictor).__name__, cache)
    trainer.train(batches.start, cfg.SOLVER.MAX_ITER)

    _save_detector(model, cfg, path)
    progress.path.unlink(missing_ok=True)
    return path


def _save_detector(model: nn.Module, cfg: CfgNode, path: Path) -> Path:
    classes = ClassRecord.of_training_set(cfg).for_checkpoint()
    _save({"model": model.state_dict(), **classes}, path)
    logger.info("The detector with the fitted classifier is in '%s'.", path)
    return path


def _epoch_order(cfg: CfgNode, cache: FeatureCache) -> EpochOrder:
    # Images that are drawn evenly need not be looked at, which may take longer than all of pass 2.
    evenly = cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler"
    records = [{}] * cache.num_images if evenly else training_records(cfg)
    if len(records) != cache.num_images:
        raise DataError(
            f"The training set has {len(records)} images and {cache} another number; delete the "
            "cache, or name another with --cache."
        )
    return epoch_order(cfg, records)


@dataclasses.dataclass(frozen=True)
class RoISampler:
    """Samples RoIs for training as ``StandardROIHeads`` does, for several images at once.

    Attributes:
        num_rois: RoIs of an image, or all if there are fewer.
        positive_fraction: the part of them that foreground may take.
        num_classes: K, the label of background.
    """

    num_rois: int
    positive_fraction: float
    num_classes: int

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "RoISampler":
        heads = cfg.MODEL.ROI_HEADS
        return cls(heads.BATCH_SIZE_PER_IMAGE, heads.POSITIVE_FRACTION, heads.NUM_CLASSES)

    def __call__(
        self, labels: np.ndarray, sizes: Sequence[int], generator: np.random.Generator
    ) -> np.ndarray:
        """
        Args:
            labels: (R,) labels 0..K of all RoIs, image after image.
            sizes: number of RoIs of each image.
            generator: source of randomness.

        Returns:
            Ascending indices of the sampled RoIs.
        """
        # Runs 2i and 2i + 1 are the foreground and the background of image i. Sorted by run and a
        # random number, the first of each run are a random choice.
        run = np.repeat(np.arange(0, 2 * len(sizes), 2), sizes) + (labels == self.num_classes)
        order = np.argsort(run + generator.random(len(run)))
        available = np.bincount(run, minlength=2 * len(sizes))
        taken = available.copy()
        np.minimum(taken[::2], int(self.num_rois * self.positive_fraction), out=taken[::2])
        np.minimum(taken[1::2], self.num_rois - taken[::2], out=taken[1::2])
        rank = np.arange(len(run)) - np.repeat(np.cumsum(available) - available, available)
        return np.sort(order[rank < np.repeat(taken, available)])


class CachedBatches:
    """Endless batches of cached images in the order of a training run.

    Every epoch has the order of ``DATALOADER.SAMPLER_TRAIN``, a new one each time, and batches run
    over the ends of epochs. Epoch after epoch takes the next view, and samples RoIs of it afresh. A
    batch follows from the seed and its step alone, so a run can go on anywhere.

    Attributes:
        start: step of the first batch.
    """

    def __init__(
        self,
        cache: FeatureCache,
        images_per_part: int,
        num_parts: int,
        sampler: RoISampler,
        seed: int = 0,
        order: EpochOrder | None = None,
    ) -> None:
        """
        Args:
            cache: the features.
            images_per_part: images of a device's batch.
            num_parts: devices.
            sampler: samples the RoIs of an image from those of the cache.
            seed: seed of the order and of the RoIs.
            order: positions of an epoch's images; None takes each once.
        """
        self.cache = cache
        self.images_per_part = images_per_part
        self.num_parts = num_parts
        self.sampler = sampler
        self.seed = seed
        self.order = order or (lambda g: torch.randperm(cache.num_images, generator=g))
        self.start = 0

    def __iter__(self) -> Iterator[Batch]:
        keys = self._keys(self.start * self.images_per_part * self.num_parts)
        for step in itertools.count(self.start):
            generator = np.random.default_rng((self.seed, step))
            sample = functools.partial(self.sampler, generator=generator)
            yield [
                self.cache.read(list(itertools.islice(keys, self.images_per_part)), sample)
                for _ in range(self.num_parts)
            ]

    def _keys(self, start: int) -> Iterator[tuple[int, int]]:
        """View and image of every sample from a given one on."""
        generator = torch.Generator()
        for epoch in itertools.count():
            generator.manual_seed(step_seed(self.seed, epoch))
            order = self.order(generator).tolist()
            for image in order[start:]:
                yield epoch % self.cache.settings.views, image
            start = max(start - len(order), 0)


class ClassifierLoss(nn.Module):
    """The classification loss of a box predictor on cached RoIs, as a model to train."""

    def __init__(self, predictor: nn.Module, device: torch.device | str = "cpu") -> None:
        """
        Args:
            predictor: any box predictor of the registry.
            device: where it computes.
        """
        super().__init__()
        self.predictor = predictor
        self.device = torch.device(device)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """
        Args:
            batch: features (R, D) and labels (R,) of every device's RoIs.

        Returns:
            ``loss_cls``: the mean over devices, as DistributedDataParallel averages gradients.
        """
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
    """Makes each step a function of its number, and saves what is needed to go on after it."""

    def __init__(self, path: Path, cfg: CfgNode, cache: FeatureCache, predictor: nn.Module) -> None:
        self.path = path
        self.period = cfg.SOLVER.CHECKPOINT_PERIOD
        self.predictor = predictor
        self.seed = _seed_of(cfg)
        self.device = torch.device(cfg.MODEL.DEVICE).type
        # What may differ between a fit and its continuation: where and how often, not what.
        decisive = ("MODEL.*", "SOLVER.*", "DATALOADER.*", "SEED")
        indifferent = ("MODEL.DEVICE", "SOLVER.CHECKPOINT_PERIOD", "DATALOADER.NUM_WORKERS")
        self.settings = {
            **select_config(cfg, decisive, indifferent),
            "cache.checkpoint": cache.settings.checkpoint,
            "cache.views": cache.settings.views,
            "cache.rois_per_image": cache.settings.rois_per_image,
            "cache.sampling": cache.settings.sampling,
        }

    def resume(self) -> int:
        """Restore an unfinished fit.

        Returns:
            The step to go on with, 0 if there is nothing to restore.
        """
        if not self.path.is_file():
            return 0
        saved = torch.load(self.path, weights_only=True, map_location="cpu")
        difference = first_difference(saved["settings"], self.settings)
        if difference:
            raise ConfigError(
                f"'{self.path}' is an unfinished fit with other settings: {difference}; delete it "
                "or set another OUTPUT_DIR."
            )
        self.predictor.load_state_dict(saved["predictor"])
        self.trainer.load_state_dict(saved["trainer"])
        logger.info("Going on after step %d of '%s'", self.trainer.iter, self.path)
        return self.trainer.iter + 1

    def before_step(self) -> None:
        # The predictor may draw from the global generators, BAGS its "others" among them.
        seed_generators(step_seed(self.seed, self.trainer.iter), self.device)

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self.period == 0:
            state = {
                "settings": self.settings,
                "predictor": self.predictor.state_dict(),
                "trainer": self.trainer.state_dict(),
            }
            _save(state, self.path)


def _batch_sizes(cfg: CfgNode) -> tuple[int, int]:
    """Images of a device's batch, and the number of devices."""
    num_images, num_parts = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE or 1
    if num_images % num_parts:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {num_images} is not a multiple of SOLVER.REFERENCE_WORLD_SIZE "
            f"{num_parts}; change one of them."
        )
    return num_images // num_parts, num_parts


def _seed_of(cfg: CfgNode) -> int:
    return max(cfg.SEED, 0)


def _save(content: dict, path: Path) -> None:
    """Write a file that is complete whenever it exists."""
    partial = path.with_name(f"{path.name}.tmp")
    torch.save(content, partial)
    partial.replace(path)
