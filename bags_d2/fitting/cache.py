"""Pass 1 of classifier fitting: box features of the training RoIs, computed once and kept.

With everything but the classifier frozen, what the classifier sees of an image changes between
epochs by augmentation and by the sampling of RoIs alone. The features of all labelled proposals of
an image, or of a choice of them, are stored, from which pass 2 samples RoIs afresh in every epoch,
as training online does; a few augmented *views* stand for the augmentation of all epochs. Layout of
a cache::

    cache.json                    what the features are of: CacheSettings
    view0/shard00000/             the first images of the first view
        features.npy              (R, D) float16, the classifier's input
        labels.npy                (R,) int32, 0..K, K is background
        images.npy                (I,) int64, positions in the training set
        offsets.npy               (I + 1,) int64: RoIs of image i are offsets[i]:offsets[i + 1]

Shapes in this file: I images of a shard, R RoIs, D features of a RoI, K classes.
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import logging
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from detectron2.utils.file_io import PathManager
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data.loader import NamingDatasetMapper
from ..engine.checkpoint import LongTailCheckpointer
from ..engine.trainer import BAGSTrainer
from ..errors import ConfigError, DataError, MissingFileError
from ..seeding import seed_generators

__all__ = [
    "CacheSettings",
    "FeatureCache",
    "extract_features",
    "load_frozen_detector",
    "roi_features",
    "sampling_for_cache",
]

logger = logging.getLogger(__name__)

# A shard is what a kill loses at most, and an open file in pass 2. Of LVIS v1 with about 1000
# RoIs of 1024 features, 512 images are a gigabyte, and five views stay under 1024 files.
IMAGES_PER_SHARD = 512
# Images that go through the detector together. Not the solver's batch: without gradients its size
# is a matter of memory alone, and features must not depend on how pass 2 will train.
IMAGES_PER_BATCH = 8

# Raise it whenever other RoIs come to be kept for the same settings.
SAMPLING_VERSION = 2

# Config keys that the features follow from ...
_DECISIVE = (
    *("MODEL.*", "INPUT.*", "DATASETS.TRAIN", "SOLVER.AMP.*"),
    *("DATALOADER.FILTER_EMPTY_ANNOTATIONS", "DATALOADER.ASPECT_RATIO_GROUPING"),
)
# ... but for these, which concern other parts of the model, its losses or its evaluation, and the
# classifier, of which a cache serves many. The checkpoint counts by its content, not its path.
_INDIFFERENT = (
    *("MODEL.WEIGHTS", "MODEL.DEVICE", "MODEL.TRAINABLE_PARAMS", "*_TEST"),
    *("MODEL.SKIP_FROZEN", "MODEL.ROI_MASK_HEAD.*", "MODEL.*_LOSS*"),
    *("MODEL.BAGS.*", "MODEL.ROI_BOX_PREDICTOR.*", "MODEL.REWEIGHT.*", "MODEL.FOCAL_LOSS.*"),
    *("MODEL.BALANCED_SOFTMAX.*", "MODEL.SEESAW.*", "MODEL.EQL.*", "MODEL.EQLV2.*"),
    "MODEL.NORCAL.*",
    *("MODEL.ROI_BOX_HEAD.USE_*", "MODEL.ROI_BOX_HEAD.FED_*", "MODEL.*SMOOTH_L1_BETA"),
)


@dataclasses.dataclass(frozen=True)
class CacheSettings:
    """What a cache was made of; two caches of equal settings hold equal features.

    Attributes:
        config: decisive config values as text, by dotted key.
        checkpoint: SHA-256 of the detector's checkpoint.
        annotations: size in bytes of the training sets' annotation files, by data set.
        views: views of every image.
        rois_per_image: RoIs kept of an image, None for all.
        sampling: version of the rule by which they are chosen.
        images_per_shard: images of a shard.
        images_per_batch: images that go through the detector together.
    """

    config: dict[str, str]
    checkpoint: str
    annotations: dict[str, int]
    views: int
    rois_per_image: int | None
    sampling: int  # without a default, so that a cache from before there was one is refused
    images_per_shard: int = IMAGES_PER_SHARD
    images_per_batch: int = IMAGES_PER_BATCH

    @classmethod
    def from_config(
        cls, cfg: CfgNode, views: int = 1, rois_per_image: int | None = None, **kwargs
    ) -> "CacheSettings":
        """Settings for a config.

        Args:
            cfg: config of stage 2.
            views: views of every image, each with fresh augmentation.
            rois_per_image: RoIs to keep of an image (:func:`sampling_for_cache`); None keeps all.
            **kwargs: other attributes.

        Raises:
            ConfigError: if ``views`` or ``rois_per_image`` is less than 1.
            MissingFileError: if the checkpoint does not exist.
        """
        if views < 1 or (rois_per_image is not None and rois_per_image < 1):
            raise ConfigError(
                f"--views and --rois-per-image must be 1 or more, found {views} and "
                f"{rois_per_image}; correct them."
            )
        return cls(
            config=select_config(cfg, _DECISIVE, _INDIFFERENT),
            checkpoint=_sha256(cfg.MODEL.WEIGHTS),
            annotations={name: _size_of_annotations(name) for name in cfg.DATASETS.TRAIN},
            views=views,
            rois_per_image=rois_per_image,
            sampling=SAMPLING_VERSION,
            **kwargs,
        )

    def difference(self, other: "CacheSettings") -> str:
        """The first difference from another cache's settings in words, "" if there is none."""
        mine, others = (
            {**settings.pop("config"), **settings}
            for settings in map(dataclasses.asdict, (self, other))
        )
        return first_difference(mine, others)


class FeatureCache:
    """A complete cache, its features memory-mapped.

    Attributes:
        settings: what it was made of.
        num_images: training images, N.
        num_bytes: size of the features.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        """
        Args:
            folder: the cache.

        Raises:
            MissingFileError: if the folder is no cache.
            DataError: if some shards do not exist yet.
        """
        self.folder = Path(folder)
        self.settings, self.num_images = _read_stamp(self.folder)
        shards = _plan_shards(self.folder, self.settings, range(self.num_images))
        absent = sum(not shard.path.is_dir() for shard in shards)
        if absent:
            raise DataError(
                f"Feature cache '{self.folder}' lacks {absent} of {len(shards)} shards; run "
                "pass 1 again, which goes on where it stopped."
            )
        # As plain arrays: reading from a numpy.memmap takes several times as long, for no gain.
        self._features = [
            np.load(shard.path / "features.npy", mmap_mode="r").view(np.ndarray) for shard in shards
        ]
        self._labels = [np.load(s.path / "labels.npy") for s in shards]
        self.num_bytes = sum(features.nbytes for features in self._features)
        # Of every view and image: shard, first RoI, end of the RoIs.
        self._places = np.empty((self.settings.views, self.num_images, 3), dtype=np.int64)
        for number, shard in enumerate(shards):
            offsets = np.load(shard.path / "offsets.npy")
            places = np.stack([np.full(len(offsets) - 1, number), offsets[:-1], offsets[1:]], 1)
            self._places[shard.view, np.load(shard.path / "images.npy")] = places

    def __repr__(self) -> str:
        return (
            f"FeatureCache('{self.folder}': {self.num_images:,} images x {self.settings.views} "
            f"views, {self.num_bytes / 1e9:.2f} GB)"
        )

    def require(self, cfg: CfgNode) -> None:
        """Raise a ConfigError unless the features are those of a config's frozen detector."""
        wanted = CacheSettings.from_config(cfg)
        same = ("views", "rois_per_image", "images_per_shard", "images_per_batch")
        wanted = dataclasses.replace(
            wanted, **{name: getattr(self.settings, name) for name in same}
        )
        _refuse_difference(self.folder, self.settings, wanted)

    def parts(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Features (R, D) float16 and labels (R,) of all views and images, a shard at a time."""
        for features, labels in zip(self._features, self._labels, strict=True):
            yield torch.from_numpy(np.array(features)), torch.from_numpy(labels).long()

    def read(
        self,
        keys: Sequence[tuple[int, int]],
        sample: Callable[[np.ndarray, Sequence[int]], np.ndarray] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """RoIs of some images.

        Args:
            keys: view and image (position in the training set) of each.
            sample: chooses RoIs before their features are read: from the labels (R,) of all images
                and the number of RoIs of each, ascending indices of those to read. None reads all.

        Returns:
            Features (R, D) float16 and labels (R,) int64, image after image.
        """
        places = [self._places[key].tolist() for key in keys]
        labels = np.concatenate([self._labels[shard][a:b] for shard, a, b in places])
        if sample is None:
            features = np.concatenate([self._features[shard][a:b] for shard, a, b in places])
            return torch.from_numpy(features), torch.from_numpy(labels).long()
        sizes = [b - a for _, a, b in places]
        chosen = sample(labels, sizes)
        ends = np.cumsum(sizes)
        of_image = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
        features = np.concatenate(
            [
                self._features[shard][rows - (end - b)]  # row 0 of the image is row a of the shard
                for (shard, _, b), rows, end in zip(places, of_image, ends, strict=True)
            ]
        )
        return torch.from_numpy(features), torch.from_numpy(labels[chosen]).long()


def extract_features(
    cfg: CfgNode,
    folder: str | os.PathLike,
    views: int = 1,
    rois_per_image: int | None = None,
    images_per_shard: int = IMAGES_PER_SHARD,
) -> None:
    """Fill a feature cache, or complete one that was begun with the same settings.

    Runs in each process of ``detectron2.engine.launch``. What is written depends neither on the
    number of processes nor on interruptions: augmentation and sampling are seeded by view and
    position in the training set, and batches never reach over shards. The global random
    generators are left in another state.

    Args:
        cfg: config of stage 2; ``MODEL.WEIGHTS`` is the detector of stage 1.
        folder: the cache.
        views: as for :meth:`CacheSettings.from_config`.
        rois_per_image: likewise.
        images_per_shard: images of a shard.

    Raises:
        ConfigError: if the folder holds a cache of other settings, the disk is too small, or the
            config trains anything but the classifier of a plain Faster or Mask R-CNN.
        DataError: if a feature is not finite in float16.
        MissingFileError: if the checkpoint does not exist.
    """
    folder = Path(folder)
    settings = CacheSettings.from_config(
        cfg, views, rois_per_image, images_per_shard=images_per_shard
    )
    if _stamp(folder).is_file():
        found, num_images = _read_stamp(folder)
        _refuse_difference(folder, found, settings)
        # Looked at before the training set is loaded, which may take longer than all of pass 2.
        shards = _plan_shards(folder, settings, range(num_images))
        if all(shard.path.is_dir() for shard in shards):
            logger.info("Feature cache '%s' is complete.", folder)
            return

    model = load_frozen_detector(cfg)
    records = training_records(cfg)
    order = range(len(records))
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        # As online: padding portraits and landscapes to a common size costs up to twice the work.
        order = sorted(order, key=lambda i: records[i]["width"] > records[i]["height"])
    shards = _plan_shards(folder, settings, order)
    if comm.is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        missing = [records[i] for s in shards if not s.path.is_dir() for i in s.images]
        _check_disk_space(folder, missing, settings, model)
        _write_stamp(folder, settings, len(records))
    comm.synchronize()  # before any process writes, the disk has been checked

    # The share of a process is chosen before finished shards are left out: other processes may
    # have finished some more by now, and shares must not depend on that.
    own = [s for s in shards[comm.get_rank() :: comm.get_world_size()] if not s.path.is_dir()]
    _extract_shards(cfg, model, records, own, settings)
    comm.synchronize()


def training_records(cfg: CfgNode) -> list[dict]:
    """Records of the training images, in the order that positions in a cache refer to."""
    return get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    )


def load_frozen_detector(cfg: CfgNode) -> GeneralizedRCNN:
    """The model of stage 2 with the weights of stage 1, ready for both passes.

    Raises:
        ConfigError: if features of the classifier's input alone cannot stand for training it:
            it is a cascade, or other parts train as well.
    """
    model = BAGSTrainer.build_model(cfg)
    heads = getattr(model, "roi_heads", None)
    if (
        not isinstance(model, GeneralizedRCNN)
        or not isinstance(heads, StandardROIHeads)
        or isinstance(heads, CascadeROIHeads)
        or not isinstance(model.proposal_generator, RPN)
    ):
        # A cascade's later stages see boxes that the earlier ones refined and labels of their own.
        raise ConfigError(
            f"MODEL.ROI_HEADS.NAME '{cfg.MODEL.ROI_HEADS.NAME}' in MODEL.META_ARCHITECTURE "
            f"'{cfg.MODEL.META_ARCHITECTURE}' with MODEL.PROPOSAL_GENERATOR.NAME "
            f"'{cfg.MODEL.PROPOSAL_GENERATOR.NAME}' cannot be fitted from cached features, only "
            "LongTailROIHeads with proposals of its own can; use train_net.py."
        )
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    prefix = "roi_heads.box_predictor."
    stray = [n for n in trainable if not n.startswith(prefix) or n.startswith(f"{prefix}bbox_pred")]
    if stray:
        raise ConfigError(
            f"MODEL.TRAINABLE_PARAMS {tuple(cfg.MODEL.TRAINABLE_PARAMS)} trains '{stray[0]}', but "
            "cached features serve the classifier alone; set it to "
            "('roi_heads.box_predictor*cls_score.*',) or use train_net.py."
        )
    LongTailCheckpointer(
        model,
        cfg.OUTPUT_DIR,
        stage2=True,
        new_classifier=cfg.MODEL.ROI_BOX_PREDICTOR.REINITIALIZE,
    ).load(cfg.MODEL.WEIGHTS)
    return model.train()


@torch.no_grad()
def roi_features(
    model: GeneralizedRCNN, inputs: list[dict]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the classifier would be trained on in a step of ``model`` with these inputs.

    Which RoIs these are is up to the RoI heads, and so to :func:`sampling_for_cache`. The steps are
    those of ``GeneralizedRCNN.forward`` and ``StandardROIHeads.forward`` in training mode up to the
    box predictor, but for the losses of the RPN.

    Args:
        model: the detector, in training mode; needs an EventStorage around the call.
        inputs: as for the model.

    Returns:
        For each image features (R, D) and labels (R,) of its sampled RoIs.
    """
    heads = model.roi_heads
    images = model.preprocess_image(inputs)
    targets = [_boxes_and_classes(x["instances"]).to(model.device) for x in inputs]
    features = model.backbone(images.tensor)
    with without_rpn_losses(model.proposal_generator):
        proposals, _ = model.proposal_generator(images, features, targets)
    proposals = heads.label_and_sample_proposals(proposals, targets)
    boxes = [p.proposal_boxes for p in proposals]
    pooled = heads.box_pooler([features[name] for name in heads.box_in_features], boxes)
    box_features = heads.box_head(pooled).flatten(start_dim=1)
    labels = [p.gt_classes for p in proposals]
    return list(zip(box_features.split([len(x) for x in labels]), labels, strict=True))


def _boxes_and_classes(instances: Instances) -> Instances:
    # A sampled proposal takes all fields of its object with it, and a mask for each of a thousand
    # proposals is a gigabyte.
    fields = {name: instances.get(name) for name in ("gt_boxes", "gt_classes")}
    return Instances(instances.image_size, **fields)


@contextlib.contextmanager
def without_rpn_losses(rpn: RPN) -> Iterator[None]:
    """Let an RPN in training mode propose only: its losses are a tenth of an extraction's time."""
    rpn.label_and_sample_anchors = lambda *_: (None, None)
    rpn.losses = lambda *_: {}
    try:
        yield
    finally:
        del rpn.label_and_sample_anchors, rpn.losses


@contextlib.contextmanager
def sampling_for_cache(heads: StandardROIHeads, rois_per_image: int | None) -> Iterator[None]:
    """Let RoI heads sample the RoIs that a cache keeps of an image.

    All of them, or so many: what a step samples, and of the rest as much foreground as background.
    That is a larger share of foreground than a step's, since RoIs of the tail are few, and each
    adds more than yet another piece of background. If a step samples more than are to be kept, its
    foreground goes first.

    Args:
        heads: the RoI heads of the model, in training mode.
        rois_per_image: RoIs to keep, None for all.
    """
    step_size, step_fraction = heads.batch_size_per_image, heads.positive_fraction
    if rois_per_image is None:
        heads.batch_size_per_image, heads.positive_fraction = sys.maxsize, 1.0
    else:
        rest = max(rois_per_image - step_size, 0)
        num_foreground = min(int(step_size * step_fraction) + rest // 2, rois_per_image)
        heads.batch_size_per_image = rois_per_image
        # Rounded down after multiplication, which must give this very number.
        heads.positive_fraction = (num_foreground + 0.5) / rois_per_image
    try:
        yield
    finally:
        heads.batch_size_per_image, heads.positive_fraction = step_size, step_fraction


@dataclasses.dataclass(frozen=True)
class _Shard:
    """Some images of one view, and where their features stand or will stand."""

    path: Path
    view: int
    images: Sequence[int]

    def batches(self, size: int) -> list[list[tuple[int, int]]]:
        keys = [(self.view, image) for image in self.images]
        return [keys[i : i + size] for i in range(0, len(keys), size)]

    def write(self, rois: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Write features and labels of each image; the folder appears when it is complete."""
        if not all(np.isfinite(features).all() for features, _ in rois):
            raise DataError(
                f"Box features for '{self.path}' are not finite in float16; check MODEL.WEIGHTS, "
                "or train with train_net.py."
            )
        partial = self.path.with_name(f"{self.path.name}.tmp")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        # Straight into the file, without another copy of a gigabyte.
        shape = (sum(len(features) for features, _ in rois), *rois[0][0].shape[1:])
        file = np.lib.format.open_memmap(partial / "features.npy", "w+", np.float16, shape)
        np.concatenate([features for features, _ in rois], out=file)
        file.flush()
        np.save(partial / "labels.npy", np.concatenate([labels for _, labels in rois]))
        np.save(partial / "images.npy", np.asarray(self.images, dtype=np.int64))
        np.save(partial / "offsets.npy", np.cumsum([0, *(len(f) for f, _ in rois)]))
        partial.rename(self.path)


def _plan_shards(folder: Path, settings: CacheSettings, order: Sequence[int]) -> list[_Shard]:
    size = settings.images_per_shard
    return [
        _Shard(folder / f"view{view}" / f"shard{i // size:05d}", view, order[i : i + size])
        for view in range(settings.views)
        for i in range(0, len(order), size)
    ]


class _Images(Dataset):
    """Training images by (view, position), augmented alike whichever process asks and when."""

    def __init__(self, records: list[dict], mapper: Callable[[dict], dict]) -> None:
        self.records = records
        self.mapper = mapper

    def __getitem__(self, key: tuple[int, int]) -> dict:
        seed_generators(_seed("augmentation", *key))
        return self.mapper(self.records[key[1]])


def _extract_shards(cfg, model, records, shards: list[_Shard], settings: CacheSettings) -> None:
    device = model.device.type
    batches = [shard.batches(settings.images_per_batch) for shard in shards]
    inputs = iter(
        DataLoader(
            _Images(records, NamingDatasetMapper(cfg, is_train=True)),
            batch_sampler=[keys for of_shard in batches for keys in of_shard],
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            collate_fn=list,
        )
    )
    with (
        tqdm(
            total=sum(len(shard.images) for shard in shards),
            desc="box features",
            unit="image",
            disable=not comm.is_main_process(),
        ) as progress,
        EventStorage(),
        sampling_for_cache(model.roi_heads, settings.rois_per_image),
        torch.autocast(device, enabled=cfg.SOLVER.AMP.ENABLED and device == "cuda"),
    ):
        for shard, of_shard in zip(shards, batches, strict=True):
            rois = []
            for keys in of_shard:
                batch = next(inputs)
                seed_generators(_seed("sampling", *keys[0]), device)
                for features, labels in roi_features(model, batch):
                    rois.append((features.half().cpu().numpy(), labels.int().cpu().numpy()))
                progress.update(len(keys))
            shard.write(rois)


def _seed(*parts) -> int:
    return zlib.crc32(repr(parts).encode())


def _check_disk_space(
    folder: Path, records: Sequence[dict], settings: CacheSettings, model: GeneralizedRCNN
) -> None:
    """Raise a ConfigError unless the features of these images fit on the disk."""
    shape = model.roi_heads.box_head.output_shape
    num_features = shape.channels * (shape.height or 1) * (shape.width or 1)
    bytes_per_roi = num_features * np.dtype(np.float16).itemsize + np.dtype(np.int32).itemsize
    if settings.rois_per_image is None:
        num_rois = len(records) * model.proposal_generator.post_nms_topk[True]
        if model.roi_heads.proposal_append_gt:
            num_rois += sum(len(record.get("annotations", ())) for record in records)
    else:
        num_rois = len(records) * settings.rois_per_image
    needed = num_rois * bytes_per_roi
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"Feature cache '{folder}' needs up to {needed:,} bytes more and its disk has {free:,} "
            "free; lower --rois-per-image or --views, or name another disk with --cache."
        )
    sizes = f"up to {needed / 1e9:.2f} GB of {free / 1e9:.2f} GB that are free"
    logger.info("Extracting box features of %d images to '%s': %s", len(records), folder, sizes)


def _stamp(folder: Path) -> Path:
    return folder / "cache.json"


def _read_stamp(folder: Path) -> tuple[CacheSettings, int]:
    try:
        content = json.loads(_stamp(folder).read_text())
        return CacheSettings(**content["settings"]), content["num_images"]
    except FileNotFoundError:
        raise MissingFileError(
            f"'{folder}' is no feature cache; make one with tools/fit_classifier.py, or name "
            "another with --cache."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"'{_stamp(folder)}' does not describe a feature cache of this version ({error!r}); "
            "delete the folder or name another with --cache."
        ) from error


def _write_stamp(folder: Path, settings: CacheSettings, num_images: int) -> None:
    content = {"settings": dataclasses.asdict(settings), "num_images": num_images}
    partial = folder / "cache.json.tmp"
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(_stamp(folder))


def _refuse_difference(folder: Path, found: CacheSettings, wanted: CacheSettings) -> None:
    difference = found.difference(wanted)
    if difference:
        raise ConfigError(
            f"Feature cache '{folder}' was made with other settings: {difference}; name another "
            "folder with --cache, or delete this one."
        )


def select_config(
    cfg: CfgNode, include: Sequence[str], exclude: Sequence[str] = ()
) -> dict[str, str]:
    """Values of a config as text by dotted key, chosen by globs on the keys."""
    selected = {}

    def visit(node: CfgNode, prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, CfgNode):
                visit(value, f"{name}.")
            elif _matches(name, include) and not _matches(name, exclude):
                # A list and a tuple of the same values mean the same in a config.
                selected[name] = str(list(value) if isinstance(value, tuple) else value)

    visit(cfg, "")
    return dict(sorted(selected.items()))


def first_difference(found: Mapping, wanted: Mapping) -> str:
    """The first differing entry of two mappings in words, "" if there is none."""
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            there, now = (m.get(name, "not set") for m in (found, wanted))
            return f"{name} is {there} there and {now} now"
    return ""


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _sha256(path: str) -> str:
    local = PathManager.get_local_path(path)
    if not os.path.isfile(local):
        raise MissingFileError(
            f"Checkpoint '{path}' (MODEL.WEIGHTS) does not exist; set it to that of stage 1."
        )
    digest = hashlib.sha256()
    with open(local, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _size_of_annotations(dataset: str) -> int:
    path = MetadataCatalog.get(dataset).get("json_file")
    return os.path.getsize(PathManager.get_local_path(path)) if path else 0
