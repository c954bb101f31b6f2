"""Box features of training RoIs on disk, and what they were computed from.

A cache is a folder with ``cache.json`` (:func:`cache_settings`) and folders such as
``view0/shard00000``: the arrays (``ARRAYS``) of the first images of the first view.

Shapes in this file: N training images, I images of a shard, R RoIs, S stages of a cascade (1 of
other detectors), D features of a RoI, B bytes or numbers that they are stored in, K classes.
"""

import hashlib
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog

from ..config import add_bags_config
from ..errors import ConfigError, DataError, MissingFileError
from ..utils.files import content_hash, load_json, local_path, require_file, write_atomically
from ..utils.settings import first_difference, select_config

__all__ = [
    "DEFAULT_DTYPE",
    "DTYPES",
    "FEATURE_KEYS",
    "FeatureCache",
    "Shard",
    "bytes_per_roi",
    "cache_settings",
    "decode_features",
    "encode_features",
    "read_settings",
]

FORMAT = 4  # of the layout, and of the rule by which RoIs are kept

# A kill costs one shard at most. Of LVIS v1 with about 1000 RoIs of 1024 features, 512 images in
# float16 are a gigabyte.
IMAGES_PER_SHARD = 512
# Not the solver's batch: without gradients its size is a matter of memory alone, and features must
# not depend on how pass 2 will train.
IMAGES_PER_BATCH = 8

# Bits of a stored feature: a float16, or an integer between the least and the greatest of its RoI.
DTYPES = {"uint2": 2, "uint4": 4, "uint8": 8, "float16": 16}
DEFAULT_DTYPE = "uint4"
_RANGE_BYTES = 8  # two float32 at the end of a RoI's integers: its least feature, and the step

_PART = 1 << 16  # RoIs decoded at a time by FeatureCache.parts

# The config keys that features and labels follow from.
FEATURE_KEYS = (
    *("MODEL.META_ARCHITECTURE", "MODEL.PIXEL_*", "MODEL.MASK_ON", "MODEL.KEYPOINT_ON"),
    *("MODEL.BACKBONE.*", "MODEL.RESNETS.*", "MODEL.FPN.*", "MODEL.ANCHOR_GENERATOR.*"),
    *("MODEL.PROPOSAL_GENERATOR.*", "MODEL.RPN.HEAD_NAME", "MODEL.RPN.IN_FEATURES"),
    *("MODEL.RPN.CONV_DIMS", "MODEL.RPN.BBOX_REG_WEIGHTS", "MODEL.RPN.NMS_THRESH"),
    *("MODEL.RPN.*_TOPK_TRAIN", "MODEL.ROI_HEADS.NAME", "MODEL.ROI_HEADS.NUM_CLASSES"),
    *("MODEL.ROI_HEADS.IN_FEATURES", "MODEL.ROI_HEADS.IOU_*", "MODEL.ROI_HEADS.BATCH_SIZE_*"),
    *("MODEL.ROI_HEADS.POSITIVE_FRACTION", "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT"),
    *("MODEL.ROI_BOX_HEAD.NAME", "MODEL.ROI_BOX_HEAD.POOLER_*", "MODEL.ROI_BOX_HEAD.NUM_*"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "MODEL.ROI_BOX_HEAD.CONV_DIM", "MODEL.ROI_BOX_HEAD.NORM"),
    "MODEL.ROI_BOX_CASCADE_HEAD.*",
    *("INPUT.*_TRAIN", "INPUT.*_TRAIN_SAMPLING", "INPUT.RANDOM_FLIP", "INPUT.CROP.*"),
    *("INPUT.*FORMAT", "DATASETS.TRAIN", "SOLVER.AMP.ENABLED"),
    *("DATALOADER.FILTER_EMPTY_ANNOTATIONS", "DATALOADER.ASPECT_RATIO_GROUPING"),
    # Of a LazyConfig; its classifiers may differ.
    *("LAZY.model.[!r]*", "LAZY.model.roi_heads.[!b]*", "LAZY.model.roi_heads.box_[!p]*"),
    *("LAZY.model.roi_heads.box_po*",),
    *("LAZY.model.roi_heads.*.box2box_transform.*", "LAZY.dataloader.train.mapper.*"),
)
_ANY = ("MODEL.*", "INPUT.*")
# What a fit leaves open: any choice of RoIs serves it.
_OPEN = ("dtype", "rois_per_image", "views", "images_per_shard", "images_per_batch")
_COUNTS = ("num_images", "num_classes", *_OPEN[2:])  # 1 or more
# Type and number of dimensions of the .npy files of a shard; features as integers are uint8.
ARRAYS = {
    "features": (np.float16, 3),  # (R, S, B), the classifiers' input (encode_features)
    # (R, S), 0..K, K is background; -1 from the stage on at which a RoI's box became empty
    "labels": (np.int32, 2),
    "images": (np.int64, 1),  # (I,), positions in the training set
    "offsets": (np.int64, 1),  # (I + 1,): RoIs of image i are offsets[i]:offsets[i + 1]
}

Settings = dict[str, str | int]


class Shard(NamedTuple):
    """Where some images of a view are stored, and their places in the order of pass 1."""

    path: Path
    view: int
    places: range


def cache_settings(
    cfg: CfgNode,
    records: Sequence[dict],
    views: int = 1,
    rois_per_image: int | None = None,
    images_per_shard: int = IMAGES_PER_SHARD,
    dtype: str = DEFAULT_DTYPE,
) -> Settings:
    """What a cache is made of; two caches of equal settings hold equal features.

    docs/fitting.md lists what is compared. Of images these are name, size and modification time:
    reading them all would cost as much as computing the features.

    Raises:
        ConfigError: if ``views`` or ``rois_per_image`` is less than 1, or ``dtype`` unknown.
        MissingFileError: if the checkpoint or an image does not exist.
    """
    if views < 1 or (rois_per_image is not None and rois_per_image < 1):
        raise ConfigError(
            f"--views and --rois-per-image must be 1 or more, found {views} and {rois_per_image}; "
            "correct them."
        )
    if dtype not in DTYPES:
        raise ConfigError(f"--cache-dtype is '{dtype}'; it must be one of {', '.join(DTYPES)}.")
    weights = local_path(cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS")
    try:
        checkpoint = content_hash(weights)
    except MissingFileError:
        raise MissingFileError(
            f"Checkpoint '{cfg.MODEL.WEIGHTS}' (MODEL.WEIGHTS) does not exist; set it to that of "
            "stage 1."
        ) from None
    datasets = [MetadataCatalog.get(name) for name in cfg.DATASETS.TRAIN]
    files = [local_path(data.get("json_file") or "") for data in datasets]
    from_files = all(map(os.path.isfile, files))
    contents = ({**record, "image_id": None} for record in records)  # ids need not be stable
    labels = ([a["category_id"] for a in r.get("annotations", ())] for r in records)
    defaults = get_cfg()
    add_bags_config(defaults)
    return {
        **select_config(cfg, FEATURE_KEYS),
        **select_config(cfg, _ANY, tuple(select_config(defaults, _ANY))),
        "format": FORMAT,
        "dtype": dtype,
        "checkpoint": checkpoint[:16],
        "annotations": _digest(map(content_hash, files) if from_files else contents),
        "classes": _digest([*(data.get("thing_classes") for data in datasets), *labels]),
        "images": _digest(map(_image_version, records)),
        "num_images": len(records),
        "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
        "views": views,
        "rois_per_image": rois_per_image or 0,
        "images_per_shard": images_per_shard,
        "images_per_batch": IMAGES_PER_BATCH,
    }


def read_settings(folder: Path) -> Settings:
    """The settings of a cache; a MissingFileError or DataError if the folder does not hold one."""
    path = folder / "cache.json"
    try:
        settings = load_json(path)
    except MissingFileError:
        raise MissingFileError(
            f"'{folder}' is not a feature cache; make one with bags-d2 fit, or name "
            "another with --cache."
        ) from None
    except DataError:
        settings = None
    if not (
        isinstance(settings, dict)
        and settings.get("format") == FORMAT
        and "rois_per_image" in settings
        and settings.get("dtype") in [*DTYPES]
        and all(type(n) is int and n > 0 for n in map(settings.get, _COUNTS))
    ):
        raise DataError(
            f"'{path}' is damaged or was made by another version of bags_d2; {_remedy(folder)}"
        )
    return settings


def require_settings(folder: Path, found: Settings, wanted: Settings) -> None:
    """Raise a ConfigError that names the first difference between two settings, if any."""
    if difference := first_difference(found, wanted):
        raise ConfigError(
            f"Feature cache '{folder}' was made with other settings or data: {difference}; "
            f"{_remedy(folder)}"
        )


def bytes_per_roi(num_features: int, dtype: str, num_stages: int = 1) -> int:
    """Disk space of a RoI of D features a stage, labels included."""
    range_bytes = 0 if dtype == "float16" else _RANGE_BYTES
    return num_stages * (num_features * DTYPES[dtype] // 8 + range_bytes + 4)


def encode_features(features: torch.Tensor, dtype: str) -> torch.Tensor:
    """Features (..., D) as they are stored (..., B), float16 or uint8.

    The integers of n bits divide the range of a RoI's features in 2^n - 1 equal steps. The least
    feature, which is 0 after a ReLU, is exact; the others are off by half a step at most.

    Raises:
        ConfigError: if the features do not fill whole bytes.
    """
    if dtype == "float16":
        return features.half()
    bits, features = DTYPES[dtype], features.float()
    if features.shape[-1] * bits % 8:
        raise ConfigError(
            f"--cache-dtype {dtype} cannot hold {features.shape[-1]} features in whole bytes; set "
            "it to uint8."
        )
    low, high = features.aminmax(dim=-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    codes = ((features - low) / step.clamp(min=1e-30)).round().to(torch.uint8)
    # A byte holds features far apart, so that decoding is one copy for each of them.
    parts = codes.chunk(8 // bits, dim=-1)
    codes = sum(part << bits * i for i, part in enumerate(parts))
    return torch.cat([codes, torch.cat([low, step], dim=-1).view(torch.uint8)], dim=-1)


def decode_features(stored: torch.Tensor, dtype: str) -> torch.Tensor:
    """Features (..., D) in float32 from what :func:`encode_features` made of them."""
    if dtype == "float16":
        return stored.float()
    bits, codes = DTYPES[dtype], stored[..., :-_RANGE_BYTES]
    if bits < 8:
        parts = [codes >> shift & 2**bits - 1 for shift in range(0, 8, bits)]
        codes = torch.cat(parts, dim=-1)
    low, step = _ranges(stored).split(1, dim=-1)
    return codes.float().mul_(step).add_(low)


def _ranges(stored: torch.Tensor) -> torch.Tensor:
    """The least feature and the step (..., 2) of integers (..., B)."""
    return stored[..., -_RANGE_BYTES:].contiguous().view(torch.float32)


def plan_shards(folder: Path, settings: Settings) -> Iterator[Shard]:
    """The shards of a complete cache."""
    size = settings["images_per_shard"]
    for view in range(settings["views"]):
        for start in range(0, settings["num_images"], size):
            places = range(start, min(start + size, settings["num_images"]))
            yield Shard(folder / f"view{view}" / f"shard{start // size:05d}", view, places)


def is_complete(folder: Path, settings: Settings) -> bool:
    """Whether all shards exist."""
    # Counted first: a damaged cache.json may ask for any number.
    found = sum(1 for _ in folder.glob("view*/shard*[0-9]"))
    expected = settings["views"] * -(-settings["num_images"] // settings["images_per_shard"])
    if found > expected:
        raise DataError(
            f"Feature cache '{folder}' holds {found} shards and should hold {expected}; "
            f"{_remedy(folder)}"
        )
    return found == expected and all(s.path.is_dir() for s in plan_shards(folder, settings))


class FeatureCache:
    """A complete cache, its features memory-mapped; ``settings`` is what it was made of."""

    def __init__(self, folder: str | os.PathLike) -> None:
        """Raises a MissingFileError or DataError unless the cache is complete and intact."""
        self.folder = Path(folder)
        self.settings = read_settings(self.folder)
        if not is_complete(self.folder, self.settings):
            raise DataError(
                f"Feature cache '{self.folder}' is not complete; run the command that makes it "
                "again, which continues where it stopped."
            )
        self._shards = list(plan_shards(self.folder, self.settings))
        self._features, self._labels = [], []
        # Shard, first RoI and end of the RoIs of every image.
        shape = (self.settings["views"], self.settings["num_images"], 3)
        self._places = np.full(shape, -1, dtype=np.int64)
        for number, shard in enumerate(self._shards):
            features, labels, images, offsets = _open_shard(shard, self.settings)
            self._features.append(features)
            self._labels.append(labels)
            if features.shape[1:] != self._features[0].shape[1:]:
                raise _damaged(shard.path / "features.npy", "another width than other shards")
            view = self._places[shard.view]
            if (view[images] >= 0).any():
                raise _damaged(shard.path / "images.npy", "images of another shard")
            view[images] = np.stack([np.full(len(images), number), offsets[:-1], offsets[1:]], 1)

    def require(self, cfg: CfgNode, records: Sequence[dict]) -> None:
        """Raise a ConfigError unless the features are those of a config's frozen detector."""
        left_open = {name: self.settings[name] for name in _OPEN}
        require_settings(self.folder, self.settings, cache_settings(cfg, records) | left_open)

    def parts(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Features (R, S, D) and labels (R, S) of all views and images, some thousand at a time."""
        for shard, (stored, labels) in enumerate(zip(self._features, self._labels, strict=True)):
            for i in range(0, len(labels), _PART):
                rows = slice(i, i + _PART)
                features = self._decode(np.array(stored[rows]), [shard])
                yield features, torch.from_numpy(labels[rows]).long()

    def read(
        self,
        keys: Sequence[tuple[int, int]],
        sample: Callable[[np.ndarray, Sequence[int]], np.ndarray] | None = None,
        device: torch.device | str = "cpu",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (R, S, D) float32 and labels (R, S) int64 of some images, one after another.

        Args:
            keys: view and image (position in the training set) of each.
            sample: from the first stage's labels (R,) of all these images and the number of RoIs of
                each, ascending indices of the RoIs to read. None reads all.
            device: of the result.

        Raises:
            DataError: if a feature is infinite or NaN.
        """
        places = [self._places[key].tolist() for key in keys]
        sizes = [end - start for _, start, end in places]
        labels = np.concatenate([self._labels[shard][start:end] for shard, start, end in places])
        chosen = sample(labels[:, 0], sizes) if sample else np.arange(len(labels))
        firsts = np.cumsum([0, *sizes[:-1]])  # of each image among the labels
        rows = np.split(chosen, np.searchsorted(chosen, firsts[1:]))
        stored = [
            self._features[shard][of_image - first + start]
            for (shard, start, _), of_image, first in zip(places, rows, firsts, strict=True)
        ]
        shards = [shard for shard, *_ in places]
        features = self._decode(np.concatenate(stored), shards, device)
        return features, torch.from_numpy(labels[chosen]).long().to(device)

    def _decode(self, stored: np.ndarray, shards: Sequence[int], device="cpu") -> torch.Tensor:
        tensor = torch.from_numpy(stored)
        if not _is_finite(tensor):
            bad = next(s for s in shards if not _is_finite(torch.tensor(self._features[s])))
            raise _damaged(self._shards[bad].path / "features.npy", "infinite or NaN")
        return decode_features(tensor.to(device, non_blocking=True), self.settings["dtype"])


def _is_finite(stored: torch.Tensor) -> bool:
    """Whether what is decoded from (R, S, B) is finite: of integers, the greatest possible."""
    if stored.dtype == torch.uint8:
        stored = _ranges(stored) @ torch.tensor([1.0, 255.0])
    # Much faster than isfinite: one pass, and aminmax propagates NaN.
    return not stored.numel() or all(math.isfinite(x) for x in stored.aminmax())


def write_shard(
    shard: Shard, images: Sequence[int], rois: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Write encoded features (R, S, B) and labels (R, S) of each image, both on the CPU.

    The folder appears once it is whole.
    """
    features, labels = map(torch.cat, zip(*rois, strict=True))
    if not _is_finite(features):
        raise DataError(
            f"Box features for '{shard.path}' are not finite as {features.dtype}; check "
            "MODEL.WEIGHTS, set another --cache-dtype, or use bags-d2 train."
        )
    arrays = {
        "features": features.numpy(),
        "labels": labels.int().numpy(),
        "images": np.asarray(images, np.int64),
        "offsets": np.cumsum([0, *(len(labels) for _, labels in rois)]),
    }
    partial = shard.path.with_name(f"{shard.path.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    for name, array in arrays.items():
        with write_atomically(partial / f"{name}.npy", "wb") as file:
            np.save(file, array)
    partial.rename(shard.path)


def _open_shard(shard: Shard, settings: Settings) -> tuple[np.ndarray, ...]:
    """Features, memory-mapped, labels, images and offsets, which agree with each other."""
    kinds = dict(ARRAYS)
    if settings["dtype"] != "float16":
        kinds["features"] = (np.uint8, 3)
    features, *small = (
        _open_array(shard.path / f"{name}.npy", *kind) for name, kind in kinds.items()
    )
    labels, images, offsets = map(np.array, small)
    first, later = labels[:, :1], labels[:, 1:]
    size, num_images, num_classes = (
        len(shard.places),
        settings["num_images"],
        settings["num_classes"],
    )
    rules = {
        "features": features.shape[2] > (0 if settings["dtype"] == "float16" else _RANGE_BYTES),
        "labels": labels.shape == features.shape[:2] != (len(labels), 0)
        and ((first >= 0) & (labels <= num_classes)).all()
        and (later >= -1).all(),
        "images": len(images) == size == len(np.unique(images))
        and 0 <= images.min() <= images.max() < num_images,
        "offsets": len(offsets) == size + 1
        and (offsets[0], offsets[-1]) == (0, len(labels))
        and (np.diff(offsets) >= 0).all(),
    }
    for name, holds in rules.items():
        if not holds:
            raise _damaged(
                shard.path / f"{name}.npy",
                f"its length or values do not fit {size} images and {num_classes} classes",
            )
    return features, labels, images, offsets


def _open_array(path: Path, dtype: type, ndim: int) -> np.ndarray:
    try:
        array = np.lib.format.open_memmap(require_file(path), mode="r")  # which never unpickles
        is_whole = array.offset + array.nbytes == os.path.getsize(path)
    except Exception as error:  # damaged headers raise nearly anything
        raise _damaged(path, " ".join(str(error).split())[:120]) from None
    if array.dtype != dtype or array.ndim != ndim or not (array.flags.c_contiguous and is_whole):
        raise _damaged(path, f"{array.dtype} {array.shape} in {os.path.getsize(path)} bytes")
    # As a plain array: reading from a numpy.memmap takes several times as long, for no gain.
    return array.view(np.ndarray)


def _damaged(path: Path, what: str) -> DataError:
    return DataError(
        f"'{path}' is damaged ({what}); delete '{path.parent}' and run bags-d2 fit "
        "again, which computes it again."
    )


def _remedy(folder: Path) -> str:
    return f"delete '{folder}' and run bags-d2 fit again, or name another with --cache."


def _image_version(record: dict) -> tuple[str, int, int]:
    found = os.stat(require_file(record["file_name"]))
    return os.path.basename(record["file_name"]), found.st_size, found.st_mtime_ns


def _digest(values: Iterable) -> str:
    digest = hashlib.sha256()
    for value in values:
        # Arrays and bytes, as of masks, are no JSON.
        text = json.dumps(value, default=lambda x: pickle.dumps(x).hex())
        digest.update(f"{text}\n".encode())
    return digest.hexdigest()[:16]
