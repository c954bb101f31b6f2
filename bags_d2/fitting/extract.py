"""Pass 1: the box features of all training images, computed once.

With everything but the classifier frozen, epochs differ in augmentation and in the sampling of RoIs
alone. A few augmented *views* of an image stand for the augmentation of all epochs; of each, all
labelled proposals are kept, or some, from which pass 2 samples RoIs anew in every epoch.
"""

import contextlib
import dataclasses
import logging
import math
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..checkpoint import LongTailCheckpointer
from ..data.build import training_records
from ..data.loader import LongTailDatasetMapper
from ..engine.trainer import BAGSTrainer
from ..errors import ConfigError
from ..modeling.roi_heads import box_stages
from ..utils.files import lock_folder, write_json
from ..utils.seeding import seed_generators
from .cache import (
    DEFAULT_DTYPE,
    IMAGES_PER_BATCH,
    IMAGES_PER_SHARD,
    Settings,
    Shard,
    bytes_per_roi,
    cache_settings,
    encode_features,
    is_complete,
    plan_shards,
    read_settings,
    require_settings,
    write_shard,
)

__all__ = ["extract_features", "load_frozen_detector", "roi_features"]

logger = logging.getLogger(__name__)


def extract_features(
    cfg: CfgNode,
    folder: str | os.PathLike,
    views: int = 1,
    rois_per_image: int | None = None,
    images_per_shard: int = IMAGES_PER_SHARD,
    dtype: str = DEFAULT_DTYPE,
) -> None:
    """Fill a feature cache, or complete one that was begun with the same settings.

    Runs in each process of ``detectron2.engine.launch``. What is written depends neither on the
    number of processes nor on interruptions: augmentation and sampling are seeded by view and
    position in the training set, and batches never span shards.

    Args:
        cfg: config of stage 2; ``MODEL.WEIGHTS`` is the detector of stage 1.
        folder: the cache.
        views: views of every image, each with fresh augmentation.
        rois_per_image: RoIs to keep of an image (:func:`sample_for_cache`); None keeps all.
        images_per_shard: images of a shard.
        dtype: how features are stored (:func:`bags_d2.fitting.cache.encode_features`).

    Raises:
        ConfigError: if the folder holds a cache of other settings or data, the disk is too small,
            or the config trains anything but the classifiers of a Faster, Mask or Cascade R-CNN.
        DataError: if a feature is not finite as it is stored, or a file cannot be read or written.
        FolderInUseError: if another run writes to the folder.
        MissingFileError: if the checkpoint or an image does not exist.
    """
    folder = Path(folder)
    # The first process holds the folder for all.
    with lock_folder(folder) if comm.is_main_process() else contextlib.nullcontext():
        records = training_records(cfg)
        settings = cache_settings(cfg, records, views, rois_per_image, images_per_shard, dtype)
        if (folder / "cache.json").exists():
            require_settings(folder, read_settings(folder), settings)
        # All processes decide together: one that is ahead could finish shards that others look for.
        if all(comm.all_gather(is_complete(folder, settings))):
            logger.info("Feature cache '%s' is complete.", folder)
            return

        model = load_frozen_detector(cfg)
        shards = list(plan_shards(folder, settings))
        if comm.is_main_process():
            _check_disk_space(folder, shards, records, settings, model)
            write_json(folder / "cache.json", settings)
        comm.synchronize()  # before any process writes, the disk has been checked
        # Shared out before finished shards are left out, of which other processes may see more.
        own = [s for s in shards[comm.get_rank() :: comm.get_world_size()] if not s.path.is_dir()]
        _extract(cfg, model, records, own, settings)
        comm.synchronize()


def load_frozen_detector(cfg: CfgNode) -> GeneralizedRCNN:
    """The model of stage 2 with the weights of stage 1, ready for both passes.

    Raises:
        ConfigError: if it is no Faster, Mask or Cascade R-CNN, or if anything but the classifier is
            to be trained.
    """
    model = BAGSTrainer.build_model(cfg)
    if not (
        isinstance(model, GeneralizedRCNN)
        and isinstance(model.proposal_generator, RPN)
        and isinstance(model.roi_heads, StandardROIHeads)
    ):
        raise ConfigError(
            f"MODEL.ROI_HEADS.NAME '{cfg.MODEL.ROI_HEADS.NAME}' in MODEL.META_ARCHITECTURE "
            f"'{cfg.MODEL.META_ARCHITECTURE}' with MODEL.PROPOSAL_GENERATOR.NAME "
            f"'{cfg.MODEL.PROPOSAL_GENERATOR.NAME}' cannot be fitted from cached features, only "
            "LongTailROIHeads and LongTailCascadeROIHeads with proposals of their own can; use "
            "bags-d2 train."
        )
    for name, parameter in model.named_parameters():
        is_classifier = name.startswith("roi_heads.box_predictor.") and ".bbox_pred." not in name
        if parameter.requires_grad and not is_classifier:
            raise ConfigError(
                f"MODEL.TRAINABLE_PARAMS {tuple(cfg.MODEL.TRAINABLE_PARAMS)} trains '{name}', but "
                "cached features serve the classifier alone; set it to "
                "('roi_heads.box_predictor*cls_score.*',) or use bags-d2 train."
            )
    new = cfg.MODEL.ROI_BOX_PREDICTOR.REINITIALIZE
    LongTailCheckpointer(model, stage2=True, new_classifier=new).load(cfg.MODEL.WEIGHTS)
    propose_only(model.proposal_generator)
    return model.train()


@torch.no_grad()
def roi_features(
    model: GeneralizedRCNN, inputs: list[dict]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Features (R, S, D) and labels (R, S) of each image that a step would train classifiers on.

    These are the steps of ``GeneralizedRCNN.forward`` and of ``forward`` of the RoI heads up to the
    box predictors. The model must be in training mode, with an EventStorage around the call.

    In a cascade of S stages each sees the boxes that the one before refined, and labels them by its
    own IoU threshold. As box regression is class-agnostic and frozen, and all that concerns a RoI
    follows from that RoI, no classifier and no sampling has a part in it. Training drops a RoI
    whose box has become empty: its labels from there on are -1.
    """
    heads = model.roi_heads
    images = model.preprocess_image(inputs)
    # A sampled proposal gets all fields of its object, and a mask for each of a thousand proposals
    # is a gigabyte.
    targets = [
        Instances(x.image_size, gt_boxes=x.gt_boxes, gt_classes=x.gt_classes).to(model.device)
        for x in (x["instances"] for x in inputs)
    ]
    pyramid = model.backbone(images.tensor)
    proposals, _ = model.proposal_generator(images, pyramid, targets)
    proposals = heads.label_and_sample_proposals(proposals, targets)
    pyramid = [pyramid[name] for name in heads.box_in_features]
    stages = box_stages(heads)
    features, labels = [], []
    for stage, (box_head, predictor) in enumerate(stages):
        boxes = [p.proposal_boxes for p in proposals]
        features.append(box_head(heads.box_pooler(pyramid, boxes)).flatten(start_dim=1))
        classes = torch.cat([p.gt_classes for p in proposals])
        if stage > 0:
            is_empty = ~torch.cat([b.nonempty() for b in boxes]) | (labels[-1] < 0)
            classes = classes.masked_fill(is_empty, -1)
        labels.append(classes)
        if stage + 1 < len(stages):
            predictions = None, predictor.bbox_pred(features[-1])
            refined = [Boxes(b) for b in predictor.predict_boxes(predictions, proposals)]
            proposals = [
                Instances(p.image_size, proposal_boxes=b)
                for p, b in zip(proposals, refined, strict=True)
            ]
            for p in proposals:
                p.proposal_boxes.clip(p.image_size)
            # Private, but there is no other way to Detectron2's labels of a later stage.
            heads._match_and_label_boxes(proposals, stage + 1, targets)
    of_images = (torch.stack(x, 1).split([len(p) for p in proposals]) for x in (features, labels))
    return list(zip(*of_images, strict=True))


def propose_only(rpn: RPN) -> None:
    """Let an RPN compute no losses in training mode: they take a tenth of an extraction's time."""
    rpn.label_and_sample_anchors = lambda *_: (None, None)
    rpn.losses = lambda *_: {}


def sample_for_cache(heads: StandardROIHeads, rois_per_image: int | None) -> None:
    """Let RoI heads in training mode sample the RoIs that a cache keeps of an image.

    All of them (None), or what a step samples and of the rest as much foreground as background: a
    larger share of foreground than a step's, since RoIs of the tail are few. If a step samples more
    than are to be kept, its foreground takes precedence.
    """
    if rois_per_image is None:
        heads.batch_size_per_image, heads.positive_fraction = sys.maxsize, 1.0
        return
    rest = max(rois_per_image - heads.batch_size_per_image, 0)
    of_step = int(heads.batch_size_per_image * heads.positive_fraction)
    num_foreground = min(of_step + rest // 2, rois_per_image)
    heads.batch_size_per_image = rois_per_image
    # Detectron2 rounds the product down, which must give this very number.
    heads.positive_fraction = (num_foreground + 0.5) / rois_per_image


@dataclasses.dataclass
class _Images(Dataset):
    """Training images by (view, position), augmented alike in any process and order."""

    records: list[dict]
    mapper: Callable[[dict], dict]

    def __getitem__(self, key: tuple[int, int]) -> dict:
        seed_generators(_seed("augmentation", *key))
        return self.mapper(self.records[key[1]])


def _extract(cfg, model, records, shards: Sequence[Shard], settings: Settings) -> None:
    order = list(range(len(records)))
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        # Padding portraits and landscapes to a common size costs up to twice the work.
        order.sort(key=lambda i: records[i]["width"] > records[i]["height"])
    batches = [
        [(shard.view, order[i]) for i in shard.places[start : start + IMAGES_PER_BATCH]]
        for shard in shards
        for start in range(0, len(shard.places), IMAGES_PER_BATCH)
    ]
    loader = DataLoader(
        _Images(records, LongTailDatasetMapper(cfg, is_train=True)),
        batch_sampler=batches,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=list,
    )
    device = model.device.type
    autocast = torch.autocast(device, enabled=cfg.SOLVER.AMP.ENABLED and device == "cuda")
    sample_for_cache(model.roi_heads, settings["rois_per_image"] or None)
    loaded = zip(batches, loader, strict=True)
    with EventStorage(), autocast:
        for shard in tqdm(shards, "shards of box features", disable=not comm.is_main_process()):
            rois = []
            while len(rois) < len(shard.places):
                keys, inputs = next(loaded)
                seed_generators(_seed("sampling", *keys[0]), device)
                for features, labels in roi_features(model, inputs):
                    stored = encode_features(features, settings["dtype"])
                    rois.append((stored.cpu(), labels.int().cpu()))
            write_shard(shard, [order[i] for i in shard.places], rois)


def _seed(*parts) -> int:
    return zlib.crc32(repr(parts).encode())


def _check_disk_space(
    folder: Path, shards: Sequence[Shard], records, settings: Settings, model
) -> None:
    """Log an estimate; raise a ConfigError unless the missing shards fit on the disk."""
    heads, stages = model.roi_heads, box_stages(model.roi_heads)
    shape = stages[0][0].output_shape
    num_features = shape.channels * (shape.height or 1) * (shape.width or 1)
    size = bytes_per_roi(num_features, settings["dtype"], len(stages))
    rois_per_image = settings["rois_per_image"]
    if not rois_per_image:
        rois_per_image = model.proposal_generator.post_nms_topk[True]
        if heads.proposal_append_gt:
            rois_per_image += sum(len(r.get("annotations", ())) for r in records) / len(records)
    num_images = sum(len(shard.places) for shard in shards if not shard.path.is_dir())
    needed, free = math.ceil(num_images * rois_per_image) * size, shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"Feature cache '{folder}' needs up to {needed:,} bytes more and its disk has {free:,} "
            "free; set --cache-dtype uint2, lower --rois-per-image or --views, or set another "
            "--cache."
        )
    logger.info(
        "Extracting box features to '%s': %d images of up to %.0f RoIs of %d bytes (%s) are up to "
        "%.3g GB of %.3g GB that are free",
        *(folder, num_images, rois_per_image, size, settings["dtype"], needed / 1e9, free / 1e9),
    )
