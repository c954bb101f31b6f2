"""Box features of training RoIs on disk, and what they were computed from.

Layout of a cache::

    cache.json                    its settings, see cache_settings
    view0/shard00000/             the first images of the first view
        features.npy              (R, D) float16, the classifier's input
        labels.npy                (R,) int32, 0..K, K is background
        images.npy                (I,) int64, positions in the training set
        offsets.npy               (I + 1,) int64: RoIs of image i are offsets[i]:offsets[i + 1]

Shapes in this file: N training images, I images of a shard, R RoIs, D features of a RoI, K classes.
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
from detectron2.utils.file_io import PathManager

from ..config import add_bags_config
from ..errors import ConfigError, DataError, MissingFileError
from ..utils.files import content_hash, load_json, require_file, write_atomically
from ..utils.settings import first_difference, select_config

__all__ = ["FEATURE_KEYS", "FeatureCache", "Shard", "cache_settings", "read_settings"]

FORMAT = 3  # of the layout, and of the rule by which RoIs are kept

# A shard is what a kill costs at most, and a memory map in pass 2. Of LVIS v1 with about 1000 RoIs
# of 1024 features, 512 images are a gigabyte.
IMAGES_PER_SHARD = 512
# Images that go through the detector together. Not the solver's batch: without gradients its size
# is a matter of memory alone, and features must not depend on how pass 2 will train.
IMAGES_PER_BATCH = 8

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
    *("INPUT.*_TRAIN", "INPUT.*_TRAIN_SAMPLING", "INPUT.RANDOM_FLIP", "INPUT.CROP.*"),
    *("INPUT.*FORMAT", "DATASETS.TRAIN", "SOLVER.AMP.ENABLED"),
    *("DATALOADER.FILTER_EMPTY_ANNOTATIONS", "DATALOADER.ASPECT_RATIO_GROUPING"),
)
_ANY = ("MODEL.*", "INPUT.*")
# What a use of the cache may leave open: any choice of RoIs serves it.
_OPEN = ("views", "rois_per_image", "images_per_shard", "images_per_batch")
_COUNTS = ("num_images", "num_classes", "views", "images_per_shard", "images_per_batch")

Settings = dict[str, str | int]


class Shard(NamedTuple):
    """Some images of a view: where their files stand, and their places in the order of pass 1."""

    path: Path
    view: int
    images: slice


def cache_settings(
    cfg: CfgNode,
    records: Sequence[dict],
    views: int = 1,
    rois_per_image: int | None = None,
    images_per_shard: int = IMAGES_PER_SHARD,
) -> Settings:
    """What a cache is made of; two caches of equal settings hold equal features.

    Beside the arguments these are

    - the config keys of ``FEATURE_KEYS``, and those of MODEL and INPUT that neither Detectron2 nor
      this package defines, since they may configure a backbone of the user's;
    - the detector's checkpoint and the annotation files, by content. Data sets without annotation
      files count by their records;
    - the names of the classes and the labels of all objects, in order;
    - the images, by name, size and time of modification. Reading them all would cost as much as
      computing the features, so an edit that keeps all three goes unnoticed.

    In which folders files lie makes no difference, and neither does anything else in a config.

    Raises:
        ConfigError: if ``views`` or ``rois_per_image`` is less than 1.
        MissingFileError: if the checkpoint or an image does not exist.
    """
    if views < 1 or (rois_per_image is not None and rois_per_image < 1):
        raise ConfigError(
            f"--views and --rois-per-image must be 1 or more, found {views} and {rois_per_image}; "
            "correct them."
        )
    try:
        checkpoint = content_hash(cfg.MODEL.WEIGHTS)
    except MissingFileError:
        raise MissingFileError(
            f"Checkpoint '{cfg.MODEL.WEIGHTS}' (MODEL.WEIGHTS) does not exist; set it to that of "
            "stage 1."
        ) from None
    datasets = [MetadataCatalog.get(name) for name in cfg.DATASETS.TRAIN]
    files = [PathManager.get_local_path(data.get("json_file") or "") for data in datasets]
    from_files = all(map(os.path.isfile, files))
    contents = ({**record, "image_id": None} for record in records)  # may be numbered anew
    labels = ([a["category_id"] for a in r.get("annotations", ())] for r in records)
    defaults = get_cfg()
    add_bags_config(defaults)
    return {
        **select_config(cfg, FEATURE_KEYS),
        **select_config(cfg, _ANY, tuple(select_config(defaults, _ANY))),
        "format": FORMAT,
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
    """The settings of a cache.

    Raises:
        MissingFileError: if the folder is no cache.
        DataError: if it is of another version of this package, or damaged.
    """
    path = folder / "cache.json"
    try:
        settings = load_json(path)
    except MissingFileError:
        raise MissingFileError(
            f"'{folder}' is no feature cache; make one with tools/fit_classifier.py, or name "
            "another with --cache."
        ) from None
    except DataError as error:
        raise DataError(f"{str(error).partition(';')[0]}; {_remedy(folder)}") from None
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        raise DataError(
            f"Feature cache '{folder}' was made by another version of bags_d2; {_remedy(folder)}"
        )
    counts = [settings.get(name) for name in _COUNTS]
    if not all(type(n) is int and n > 0 for n in counts) or "rois_per_image" not in settings:
        raise DataError(f"'{path}' is damaged; {_remedy(folder)}")
    return settings


def require_settings(folder: Path, found: Settings, wanted: Settings) -> None:
    """Raise a ConfigError that names the first difference between two settings, if there is one."""
    difference = first_difference(found, wanted)
    if difference:
        raise ConfigError(
            f"Feature cache '{folder}' was made with other settings or data: {difference}; "
            f"{_remedy(folder)}"
        )


def plan_shards(folder: Path, settings: Settings) -> Iterator[Shard]:
    """The shards of a complete cache."""
    size = settings["images_per_shard"]
    for view in range(settings["views"]):
        for start in range(0, settings["num_images"], size):
            images = slice(start, min(start + size, settings["num_images"]))
            yield Shard(folder / f"view{view}" / f"shard{start // size:05d}", view, images)


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
    """A complete cache, its features memory-mapped.

    Attributes:
        settings: what it was made of.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        """
        Raises:
            MissingFileError: if the folder is no cache.
            DataError: if shards do not exist yet, or a file is damaged.
        """
        self.folder = Path(folder)
        self.settings = read_settings(self.folder)
        if not is_complete(self.folder, self.settings):
            raise DataError(
                f"Feature cache '{self.folder}' is not complete; run the command that makes it "
                "again, which goes on where it stopped."
            )
        self._shards = list(plan_shards(self.folder, self.settings))
        arrays = [_open_shard(shard, self.settings["num_classes"]) for shard in self._shards]
        self._features = [features for features, *_ in arrays]
        self._labels = [labels for _, labels, *_ in arrays]
        # Of every view and image: shard, first RoI, end of the RoIs.
        shape = (self.settings["views"], self.settings["num_images"], 3)
        self._places = np.full(shape, -1, dtype=np.int64)
        for number, (shard, (features, _, images, offsets)) in enumerate(
            zip(self._shards, arrays, strict=True)
        ):
            view = self._places[shard.view]
            # As many images as there should be are the right ones if none comes twice.
            unique = len(np.unique(images)) == len(images)
            in_range = 0 <= images.min() <= images.max() < len(view)
            if not (unique and in_range) or (view[images] >= 0).any():
                raise _damaged(shard.path / "images.npy", "not every image once")
            if features.shape[1] != self._features[0].shape[1]:
                raise _damaged(shard.path / "features.npy", "another width than other shards")
            view[images] = np.stack([np.full(len(images), number), offsets[:-1], offsets[1:]], 1)

    def require(self, cfg: CfgNode, records: Sequence[dict]) -> None:
        """Raise a ConfigError unless the features are those of a config's frozen detector."""
        left_open = {name: self.settings[name] for name in _OPEN}
        require_settings(self.folder, self.settings, cache_settings(cfg, records) | left_open)

    def parts(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Features (R, D) float16 and labels (R,) of all views and images, a shard at a time."""
        for i, (features, labels) in enumerate(zip(self._features, self._labels, strict=True)):
            yield self._finite(np.array(features), [i]), torch.from_numpy(labels).long()

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

        Raises:
            DataError: if a feature is infinite or NaN.
        """
        places = [self._places[key].tolist() for key in keys]
        labels = np.concatenate([self._labels[shard][a:b] for shard, a, b in places])
        sizes = [b - a for _, a, b in places]
        chosen = sample(labels, sizes) if sample else np.arange(len(labels))
        ends = np.cumsum(sizes)
        of_image = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
        features = [
            self._features[shard][rows - (end - b)]  # row 0 of the image is row a of the shard
            for (shard, _, b), rows, end in zip(places, of_image, ends, strict=True)
        ]
        shards = [shard for shard, *_ in places]
        labels = torch.from_numpy(labels[chosen]).long()
        return self._finite(np.concatenate(features), shards), labels

    def _finite(self, features: np.ndarray, shards: Sequence[int]) -> torch.Tensor:
        tensor = torch.from_numpy(features)
        # Faster by far than isfinite: one pass, and NaN is both least and greatest.
        if tensor.numel() and not all(math.isfinite(x) for x in tensor.aminmax()):
            bad = next(s for s in shards if not np.isfinite(self._features[s]).all())
            raise _damaged(self._shards[bad].path / "features.npy", "infinite or NaN")
        return tensor


def write_shard(
    shard: Shard, images: Sequence[int], rois: Sequence[tuple[np.ndarray, np.ndarray]]
) -> None:
    """Write features (R, D) and labels (R,) of each image; the folder appears once it is whole.

    Raises:
        DataError: if a feature is not finite, or the files cannot be written.
    """
    if not all(np.isfinite(features).all() for features, _ in rois):
        raise DataError(
            f"Box features for '{shard.path}' are not finite in float16; check MODEL.WEIGHTS, or "
            "train with train_net.py."
        )
    partial = shard.path.with_name(f"{shard.path.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    sizes = [len(features) for features, _ in rois]
    for name, array in (
        ("labels", np.concatenate([labels for _, labels in rois])),
        ("images", np.asarray(images, dtype=np.int64)),
        ("offsets", np.cumsum([0, *sizes])),
    ):
        with write_atomically(partial / f"{name}.npy", "wb") as file:
            np.save(file, array)
    # Image after image, without another copy of a gigabyte. Not through a memory map, where a full
    # disk kills the process.
    header = {"descr": "<f2", "fortran_order": False, "shape": (sum(sizes), rois[0][0].shape[1])}
    with write_atomically(partial / "features.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for features, _ in rois:
            file.write(np.ascontiguousarray(features))
    partial.rename(shard.path)


def _open_shard(shard: Shard, num_classes: int) -> tuple[np.ndarray, ...]:
    """Features, memory-mapped, labels, images and offsets, which agree with each other."""
    path = shard.path
    features = _open_array(path / "features.npy", np.float16, 2)
    labels = np.array(_open_array(path / "labels.npy", np.int32, 1))
    images = np.array(_open_array(path / "images.npy", np.int64, 1))
    offsets = np.array(_open_array(path / "offsets.npy", np.int64, 1))
    if not len(images) == len(offsets) - 1 == shard.images.stop - shard.images.start:
        raise _damaged(path, f"{len(images)} images and {len(offsets)} offsets")
    if not len(features) == len(labels) == offsets[-1]:
        raise _damaged(path, f"{len(features)} features, {len(labels)} labels, {offsets[-1]} RoIs")
    if offsets[0] != 0 or (np.diff(offsets) < 0).any():
        raise _damaged(path / "offsets.npy", "not rising from 0")
    if ((labels < 0) | (labels > num_classes)).any():
        raise _damaged(path / "labels.npy", f"labels beyond 0 to {num_classes}")
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
    shard = path if path.name.startswith("shard") else path.parent
    return DataError(
        f"'{path}' is damaged ({what}); delete '{shard}' and run tools/fit_classifier.py again, "
        "which makes it anew."
    )


def _remedy(folder: Path) -> str:
    return f"delete '{folder}' and run tools/fit_classifier.py again, or name another with --cache."


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
