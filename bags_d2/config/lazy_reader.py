"""LazyConfigs as configs of keys, so that what serves a YAML serves them as well.

What commands ask of a config is read from the LazyConfig into keys. Methods and options are laid
over these as over a YAML's, and what is built is built from the LazyConfig, with the keys that have
changed put back (:func:`lazy_config`). The rest of it is in the config as a record, under ``LAZY``.
"""

import copy
import functools
import itertools
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode, LazyConfig, get_cfg
from omegaconf import OmegaConf

from ..errors import ConfigError, MissingFileError
from ..utils.settings import config_value, select_config, set_key

__all__ = [
    "LAZY_LOADER",
    "RECORD",
    "attach_lazy_config",
    "changes_predictor",
    "lazy_config",
    "read_lazy_config",
    "refuse_ineffective",
    "split_overrides",
]

RECORD = "LAZY"
# DATALOADER.SAMPLER_TRAIN of a data loader that no keys describe.
LAZY_LOADER = "dataloader.train"

_PARTS = ("model", "dataloader.train", "dataloader.test", "optimizer", "lr_multiplier", "train")
_TRAIN, _TEST, _HEADS = "dataloader.train", "dataloader.test.mapper", "model.roi_heads"
_PREDICTOR = f"{_HEADS}.box_predictor"  # box_predictors.0 and so on of a cascade
# Where the value of a key stands.
_PLACES = {
    "OUTPUT_DIR": "train.output_dir",
    "SEED": "train.seed",
    "CUDNN_BENCHMARK": "train.cudnn_benchmark",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "MODEL.DEVICE": "train.device",
    "MODEL.KEYPOINT_ON": f"{_TRAIN}.mapper.use_keypoint",
    "MODEL.LONG_TAIL.CASCADE_AVERAGE": f"{_HEADS}.average",
    "MODEL.ROI_HEADS.NUM_CLASSES": f"{_HEADS}.num_classes",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": f"{_HEADS}.batch_size_per_image",
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": f"{_HEADS}.positive_fraction",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": f"{_PREDICTOR}.test_score_thresh",
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": f"{_PREDICTOR}.test_nms_thresh",
    "TEST.DETECTIONS_PER_IMAGE": f"{_PREDICTOR}.test_topk_per_image",
    "TEST.EVAL_PERIOD": "train.eval_period",
    "DATASETS.REGISTER": "datasets.register",
    "DATASETS.TRAIN": f"{_TRAIN}.dataset.names",
    "DATASETS.TEST": "dataloader.test.dataset.names",
    "DATALOADER.NUM_WORKERS": f"{_TRAIN}.num_workers",
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": f"{_TRAIN}.dataset.filter_empty",
    "DATALOADER.ASPECT_RATIO_GROUPING": f"{_TRAIN}.aspect_ratio_grouping",
    "INPUT.FORMAT": f"{_TEST}.image_format",
    "INPUT.MASK_FORMAT": f"{_TRAIN}.mapper.instance_mask_format",
    "INPUT.MIN_SIZE_TEST": f"{_TEST}.augmentations.0.short_edge_length",
    "INPUT.MAX_SIZE_TEST": f"{_TEST}.augmentations.0.max_size",
    "SOLVER.IMS_PER_BATCH": f"{_TRAIN}.total_batch_size",
    "SOLVER.MAX_ITER": "train.max_iter",
    "SOLVER.BASE_LR": "optimizer.lr",
    "SOLVER.WEIGHT_DECAY": "optimizer.weight_decay",
    "SOLVER.AMP.ENABLED": "train.amp.enabled",
    "SOLVER.CHECKPOINT_PERIOD": "train.checkpointer.period",
}
# Read only: the keys alone are in effect, and a changed classifier is built from them.
_READ = {
    "MODEL.TRAINABLE_PARAMS": "optimizer.params.globs",
    "MODEL.SKIP_FROZEN": "optimizer.params.skip_frozen",
    "MODEL.LONG_TAIL.COUNT_BY": f"{_PREDICTOR}.groups.by",
    "MODEL.BAGS.GROUP_THRESHOLDS": f"{_PREDICTOR}.groups.thresholds",
    "MODEL.BAGS.OTHERS_SAMPLE_RATIO": f"{_PREDICTOR}.others_sample_ratio",
    "MODEL.BAGS.MERGE": f"{_PREDICTOR}.merge",
    "MODEL.ROI_BOX_PREDICTOR.TEMPERATURE": f"{_PREDICTOR}.temperature",
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": f"{_PREDICTOR}.use_sigmoid_ce",
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": f"{_PREDICTOR}.use_fed_loss",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES": f"{_PREDICTOR}.fed_loss_num_classes",
    "DATALOADER.REPEAT_THRESHOLD": f"{_TRAIN}.sampler.repeat_factors.repeat_thresh",
    "STAGE2.WEIGHTS": "stage2.weights",
    "STAGE2.MAX_ITER": "stage2.max_iter",
}
# The training loader that keys describe: its function, that of its records, and its mapper.
_LOADER = ["build_detection_train_loader", "get_detection_dataset_dicts", "DatasetMapper"]
_FEDERATED = ("MODEL.ROI_BOX_HEAD.USE_*", "MODEL.ROI_BOX_HEAD.FED_*")
# Keys of this package that do not make a classifier.
_NO_PREDICTOR = ("MODEL.TRAINABLE_PARAMS", "MODEL.SKIP_FROZEN", "MODEL.LONG_TAIL.CASCADE_AVERAGE")
_NO_PREDICTOR += ("MODEL.ROI_BOX_PREDICTOR.REINITIALIZE",)


@dataclass(frozen=True)
class _Source:
    """What a config was read from, beside its keys: no YAML can name a program to be run."""

    path: str
    overrides: tuple[str, ...]
    as_read: dict[str, str]  # all keys, before methods and options


def split_overrides(opts: Sequence) -> tuple[list[str], list]:
    """The ``path.key=value`` of a LazyConfig among options, and the ``KEY VALUE`` of keys."""
    overrides, pairs, rest = [], [], iter(opts)
    for option in rest:
        if isinstance(option, str) and "=" in option:
            overrides.append(option)
        else:
            pairs += [option, *itertools.islice(rest, 1)]
    return overrides, pairs


def read_lazy_config(
    path: str, overrides: Sequence[str] = (), overridden: bool = False
) -> dict[str, Any]:
    """Run a LazyConfig, and return what a YAML would say in its place.

    Args:
        path: the file, which is run once in a process.
        overrides: of its values, as ``LazyConfig.apply_overrides`` takes them.
        overridden: only the keys whose values these set.

    Raises:
        MissingFileError: if it does not exist.
        ConfigError: if it lacks a part that Detectron2's ``lazyconfig_train_net.py`` would need, or
            resizes test images in another way than ``ResizeShortestEdge``.
    """
    lazy = _load(path, tuple(overrides))
    absent = [part for part in _PARTS if OmegaConf.select(lazy, part) is None]
    if absent:
        raise ConfigError(f"'{path}' has no '{absent[0]}'; a LazyConfig needs {', '.join(_PARTS)}.")
    set_here = {override.partition("=")[0].lstrip("+") for override in overrides}
    content: dict[str, Any] = {}
    for key, place in (_PLACES | _READ).items():
        places = list(_expand(lazy, place))
        value = OmegaConf.select(lazy, places[0])
        if value is not None and (not overridden or set_here & {place, *places}):
            set_key(content, key, _plain(value, key))
    if overridden:
        return content
    augmentations = OmegaConf.select(lazy, f"{_TEST}.augmentations") or []
    if [_name(a) for a in augmentations] != ["ResizeShortestEdge"]:
        raise ConfigError(
            f"'{path}': {_TEST}.augmentations must be one ResizeShortestEdge, as all that detects "
            "resizes images so."
        )
    set_key(content, "MODEL.META_ARCHITECTURE", "LazyModel")
    set_key(content, "MODEL.MASK_ON", OmegaConf.select(lazy, f"{_HEADS}.mask_head") is not None)
    if predictor := OmegaConf.select(lazy, next(_expand(lazy, _PREDICTOR))):
        is_cosine = predictor.get("temperature") is not None
        node = {"NAME": _name(predictor), "NORMALIZED": is_cosine}
        content["MODEL"].setdefault("ROI_BOX_PREDICTOR", {}).update(node)
    loader = lazy.dataloader.train
    sampler = _name(loader.get("sampler")) or "TrainingSampler"
    parts = [_name(loader), *(_name(loader.get(part)) for part in ("dataset", "mapper"))]
    if parts != _LOADER or sampler not in ("TrainingSampler", "RepeatFactorTrainingSampler"):
        sampler = LAZY_LOADER
    set_key(content, "DATALOADER.SAMPLER_TRAIN", sampler)
    set_key(content, "SOLVER.STEPS", [])  # the LazyConfig has a schedule of its own
    set_key(content, "STAGE2.ENABLED", bool(content["MODEL"].get("TRAINABLE_PARAMS")))
    return content | {"VERSION": 2}


def attach_lazy_config(cfg: CfgNode, path: str, overrides: Sequence[str] = ()) -> None:
    """Set the keys of a config as a LazyConfig has them, and tie it to that file."""
    cfg.merge_from_other_cfg(CfgNode(read_lazy_config(path, overrides)))
    path, lazy = os.path.abspath(path), _load(path, tuple(overrides))
    vars(cfg)["lazy_source"] = _Source(path, tuple(overrides), select_config(cfg, ("*",)))
    known = {p for place in (_PLACES | _READ).values() for p in _expand(lazy, place)}
    record = _described(OmegaConf.to_container(lazy, resolve=False), known)
    cfg[RECORD] = CfgNode({"file": path, **record})


def lazy_config(cfg: CfgNode):
    """The LazyConfig (DictConfig) that a config was read from, with its keys as they are now.

    None if it was read from a YAML. Changes of what is returned have no effect elsewhere.
    """
    source = vars(cfg).get("lazy_source")
    if source is None:
        return None
    lazy = copy.deepcopy(_load(source.path, source.overrides))
    for key, text in select_config(cfg, tuple(_PLACES)).items():
        if text != source.as_read[key]:
            value = config_value(cfg, key)
            for place in _expand(lazy, _PLACES[key]):
                OmegaConf.update(lazy, place, list(value) if isinstance(value, tuple) else value)
    return lazy


def changes_predictor(cfg: CfgNode) -> bool:
    """Whether methods or options have changed the classifier of a LazyConfig."""
    keys = select_config(cfg, ("MODEL.*",), _NO_PREDICTOR)
    stock = _stock_keys().keys() - select_config(cfg, _FEDERATED).keys()
    as_read = vars(cfg)["lazy_source"].as_read
    return any(value != as_read[key] for key, value in keys.items() if key not in stock)


def refuse_ineffective(cfg: CfgNode) -> None:
    """Raise ConfigError if methods or options set a key that a LazyConfig has no use for."""
    source = vars(cfg).get("lazy_source")
    if source is None:
        return
    keys = select_config(cfg, ("MODEL.*", "INPUT.*", "SOLVER.*"), (*_PLACES, *_READ, *_FEDERATED))
    for key, value in keys.items():
        if key in _stock_keys() and value != source.as_read[key]:
            raise ConfigError(
                f"{key} has no effect on '{source.path}'; override the LazyConfig's own key "
                "(path.key=value) instead."
            )


@functools.cache
def _run(path: str):
    if not os.path.isfile(path):
        raise MissingFileError(f"Config file '{path}' does not exist.")
    return LazyConfig.load(path)


@functools.cache
def _load(path: str, overrides: tuple[str, ...]):
    lazy = copy.deepcopy(_run(os.path.abspath(path)))
    return LazyConfig.apply_overrides(lazy, list(overrides))


@functools.cache
def _stock_keys() -> dict[str, Any]:
    """Detectron2's keys, with their defaults."""
    defaults = get_cfg()
    return {key: config_value(defaults, key) for key in select_config(defaults, ("*",))}


def _expand(lazy, place: str) -> Iterator[str]:
    """The places of all stages, of one in a box predictor."""
    stages = OmegaConf.select(lazy, f"{_HEADS}.box_predictors")
    if stages is None or not place.startswith(_PREDICTOR):
        return iter([place])
    return (place.replace(_PREDICTOR, f"{_PREDICTOR}s.{i}", 1) for i in range(len(stages)))


def _plain(value: Any, key: str) -> Any:
    """The value of a key."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(_stock_keys().get(key), float):
        return float(value)
    return [value] if isinstance(value, str) and key.startswith("DATASETS.") else value


def _name(called: Any) -> str:
    """What a LazyCall (or None) calls, without its module."""
    target = called["_target_"] if called else ""
    return target.rpartition(".")[2] if isinstance(target, str) else target.__name__


def _described(value: Any, without: Collection[str], place: str = "") -> Any:
    """A part of a LazyConfig as plain values, without the places that keys stand for."""
    if isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        value = {str(i): item for i, item in enumerate(value)}
    if isinstance(value, dict):
        within = {f"{place}.{key}".lstrip("."): key for key in value}
        return {k: _described(value[k], without, p) for p, k in within.items() if p not in without}
    if isinstance(value, str | int | float | None | list):
        return value
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{value.__module__}.{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # the same in every process
