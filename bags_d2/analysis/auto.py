"""From a data set in any format to a baseline's config, and the commands from there to a report."""

import argparse
import contextlib
import json
import math
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from detectron2.config import CfgNode

from ..config import BASELINE, rename_options
from ..data.annotations import AnnotationSet, check_annotations
from ..data.formats import FOLDER_KINDS, Row, find_dataset, is_validation, read_row
from ..data.formats.split import split_dataset
from ..engine.setup import setup_cfg
from ..errors import ConfigError
from ..utils.files import (
    content_hash,
    load_json,
    local_path,
    require_file,
    write_atomically,
    write_json,
)
from ..utils.settings import first_difference, set_key
from .grouping import choose_thresholds

__all__ = ["Plan", "choose_settings", "make_plan"]

_METHODS = ("bags_one_group+cosine", "crt+cosine")  # the last is the recommended one
_PIXELS = 4 * 800 * 1333  # of the images of a step on a GPU, at most


@dataclass(frozen=True)
class Plan:
    """What ``bags-d2 auto`` writes and runs."""

    folder: Path
    origin: dict[str, str]  # what all of it follows from
    files: dict[Path, str]  # content by path, the config first
    commands: list[list[str]]  # of bags-d2
    weights: str  # that training starts from

    def write(self) -> None:
        """Write the files that are not there yet; the config may have been edited since.

        Raises:
            ConfigError: if the folder holds a plan that follows from something else.
            MissingFileError: if the weights cannot be downloaded.
        """
        local_path(self.weights, "--weights")
        path = self.folder / "auto.json"
        found = load_json(path) if path.exists() else None
        if found is not None and (difference := first_difference(found, self.origin)):
            raise ConfigError(
                f"'{self.folder}' was begun with other data or flags: {difference}; name another "
                "folder with --output, or delete it."
            )
        for file, text in self.files.items():
            if found is None or not file.exists():
                with write_atomically(file) as opened:
                    opened.write(text)
        write_json(path, self.origin)


def make_plan(args: argparse.Namespace) -> Plan:
    """The plan for the arguments of ``bags-d2 auto``; nothing is written.

    Raises:
        ConfigError, DataError, MissingFileError: if the data set or a flag is faulty, or a file
            is missing.
    """
    if bool(args.data) == bool(args.row):
        raise ConfigError("Name either DATA or rows (--row NAME KIND ANNOTATIONS IMAGES).")
    rows = [
        (name, kind, os.path.abspath(source), os.path.abspath(images))
        for name, kind, source, images in args.row or find_dataset(args.data)
    ]
    # Not the names of the rows, which may be those of built-in data sets.
    name = re.sub(r"_(train|val)\d*$", "", rows[0][0]) + "_auto"
    folder = args.output or Path("output", name)
    if args.data and Path(args.data).resolve() in folder.resolve().parents:
        raise ConfigError(
            f"'{folder}' lies in '{args.data}', where it would be taken for data the next time; "
            "name a folder outside with --output."
        )
    base = args.config_file or f"lvis_baseline_{'mask_' * args.masks}R50.yaml"
    opts = rename_options(args.opts)
    # The data sets of the base are of no concern.
    options = [*opts, "DATASETS.REGISTER", "()"]
    if "SOLVER.SCHEDULE_FACTOR" in opts:  # would scale the written schedule again
        raise ConfigError("--opts SOLVER.SCHEDULE_FACTOR has no place here; set SOLVER.MAX_ITER.")
    cfg = setup_cfg(argparse.Namespace(config_file=base, opts=options))
    given = {key: _value(text) for key, text in zip(opts[::2], opts[1::2], strict=True)}
    if args.weights:
        is_url = "://" in args.weights
        path = args.weights if is_url else os.path.abspath(require_file(args.weights))
        given["MODEL.WEIGHTS"] = path
    num_gpus = torch.cuda.device_count() if args.num_gpus is None else args.num_gpus
    flags = {"--config-file": base, "--masks": args.masks, "--num-gpus": num_gpus}
    origin = {key: str(value) for key, value in (flags | {"--seed": args.seed} | given).items()}
    origin |= {f"annotations of {row[0]}": _version(*row[1:]) for row in rows}

    sets, files = _two_sets(rows, name, folder, args.seed)
    (train_row, train), (val_row, val) = sets
    train.require_objects()
    chosen = {
        "_BASE_": os.path.abspath(base) if os.path.isfile(base) else base,
        "DATASETS.REGISTER": [list(train_row), list(val_row)],
        "DATASETS.TRAIN": [train_row[0]],
        "DATASETS.TEST": [val_row[0]],
        **choose_settings(cfg, train, num_gpus, given),
    }
    if args.masks:
        is_code = (train.masks.is_code & train.is_object).any()
        chosen["MODEL.MASK_ON"] = True
        chosen["INPUT.MASK_FORMAT"] = "bitmask" if is_code else "polygon"
    config = folder / f"{name}_{BASELINE}.yaml"
    text = (
        f"# Chosen by bags-d2 auto (docs/auto.md) for {len(train.images)} images to train on and "
        f"{len(val.images)} to validate.\n{_dump(chosen | given)}"
    )
    reads, task = ("--config-file", str(config)), ["--task", "segm"] * args.masks
    writes = ("--methods", ",".join(_METHODS), "--seeds", "1", "--num-gpus", str(num_gpus), *task)
    runs = [str(folder / method / "seed1") for method in (BASELINE, *_METHODS)]
    shows = ("--labels", BASELINE, *_METHODS, *task)
    commands = [
        ["groups", *reads, "--output", str(folder / "groups.png")],
        ["compare", *reads, *writes, "--output", str(folder)],
        ["report", *runs, *shows, "--output", str(folder / "report.html")],
    ]
    weights = given.get("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS)
    return Plan(folder, origin, {config: text, **files}, commands, weights)


def choose_settings(
    cfg: CfgNode, train: AnnotationSet, num_gpus: int, given: Collection[str] = ()
) -> dict[str, Any]:
    """Config keys that follow from a training set, by dotted key; docs/auto.md has the rules.

    Args:
        cfg: the base.
        train: the training set.
        num_gpus: 0 is the CPU.
        given: keys of ``cfg`` that the user has set, from which others follow.
    """
    boxes, image = train.boxes[train.is_object], train.image_index[train.is_object]
    quartile, median = np.percentile(np.sqrt(boxes[:, 2] * boxes[:, 3]), (25, 50))
    per_image = np.bincount(image, minlength=len(train.images))
    own = np.median([min(row["height"], row["width"]) for row in train.image_rows])

    side = cfg.INPUT.MIN_SIZE_TEST
    if "INPUT.MIN_SIZE_TEST" not in given:
        side = min(np.clip(16 * own / median, side, 2 * side), 2 * own)
    scale = side / cfg.INPUT.MIN_SIZE_TEST
    sizes = {
        "INPUT.MIN_SIZE_TRAIN": [round(scale * size) for size in cfg.INPUT.MIN_SIZE_TRAIN],
        "INPUT.MAX_SIZE_TRAIN": round(scale * cfg.INPUT.MAX_SIZE_TRAIN),
        "INPUT.MIN_SIZE_TEST": round(side),
        "INPUT.MAX_SIZE_TEST": round(scale * cfg.INPUT.MAX_SIZE_TEST),
    }

    anchors, ratios = cfg.MODEL.ANCHOR_GENERATOR.SIZES, cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS
    doublings = int(np.clip(np.log2(quartile * side / own / anchors[0][0]).round(), -2, 0))
    if (abs(np.log2(boxes[:, 2] / boxes[:, 3])) > np.log2(3)).mean() > 0.1:
        ratios = [[0.25, 0.5, 1.0, 2.0, 4.0]]
    rpn, rois = cfg.MODEL.RPN, 2 ** math.ceil(math.log2(4 * per_image.mean()))
    factor = max(5 * np.percentile(per_image, 95) / rpn.POST_NMS_TOPK_TEST, 1)
    topk = [f"{when}_NMS_TOPK_{mode}" for when in ("PRE", "POST") for mode in ("TRAIN", "TEST")]

    batch, processes = cfg.SOLVER.IMS_PER_BATCH, max(num_gpus, 1)
    if "SOLVER.IMS_PER_BATCH" not in given:
        pixels = sizes["INPUT.MIN_SIZE_TRAIN"][-1] * sizes["INPUT.MAX_SIZE_TRAIN"]
        batch = processes * max(min(batch // processes, int(_PIXELS / pixels)), 1)
    steps = cfg.SOLVER.MAX_ITER
    if "SOLVER.MAX_ITER" not in given:
        steps = math.ceil(max(12 * len(train.images), 8000) / batch)
    half = max(steps // 2, 1)
    return {
        "MODEL.DEVICE": "cuda" if num_gpus else "cpu",
        "MODEL.ANCHOR_GENERATOR.SIZES": [[n * 2.0**doublings for n in level] for level in anchors],
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": ratios,
        **{f"MODEL.RPN.{key}": math.ceil(factor * rpn[key]) for key in topk},
        "MODEL.ROI_HEADS.NUM_CLASSES": len(train.names),
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": max(rois, cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE),
        "MODEL.BAGS.GROUP_THRESHOLDS": list(choose_thresholds(train.instance_counts().tolist())),
        **sizes,
        "SOLVER.IMS_PER_BATCH": batch,
        "SOLVER.BASE_LR": cfg.SOLVER.BASE_LR * batch / cfg.SOLVER.IMS_PER_BATCH,
        "SOLVER.MAX_ITER": steps,
        "SOLVER.STEPS": _decays(steps),
        "SOLVER.WARMUP_ITERS": min(cfg.SOLVER.WARMUP_ITERS, steps // 10),
        "SOLVER.CHECKPOINT_PERIOD": min(cfg.SOLVER.CHECKPOINT_PERIOD, max(steps // 4, 1)),
        "STAGE2.MAX_ITER": half,
        "STAGE2.STEPS": _decays(half),
        "TEST.DETECTIONS_PER_IMAGE": max(int(per_image.max()), cfg.TEST.DETECTIONS_PER_IMAGE),
    }


def _decays(steps: int) -> list[int]:
    # Of a few steps the two may be one, or the start, which no schedule takes.
    return sorted({steps * 2 // 3, steps * 11 // 12} - {0})


def _two_sets(
    rows: list[Row], name: str, folder: Path, seed: int
) -> tuple[list[tuple[Row, AnnotationSet]], dict[Path, str]]:
    """The training and the validation set: those that there are, or of new annotation files."""
    val = [row for row in rows if is_validation(row[0])]
    train = [row for row in rows if row not in val]
    if len(train) == len(val) == 1:
        named = ((f"{name}_train", *train[0][1:]), (f"{name}_val", *val[0][1:]))
        return [(row, read_row(*row[1:])) for row in named], {}
    sets, files = [], {}
    contents, images = split_dataset(train, val, seed=seed)
    for split, content in contents.items():
        path = folder / f"{split}.json"
        files[path] = json.dumps(content)
        row = (f"{name}_{split}", "coco", os.path.abspath(path), images)
        sets.append((row, check_annotations(str(path), content)))
    return sets, files


def _version(kind: str, source: str, images: str) -> str:
    if kind in FOLDER_KINDS:
        return read_row(kind, source, images).digest()
    return content_hash(source)[:16]


def _value(text: str) -> Any:
    with contextlib.suppress(yaml.YAMLError):
        return yaml.safe_load(text)
    return text


def _dump(settings: dict[str, Any]) -> str:
    """YAML of values by dotted key."""
    content: dict[str, Any] = {}
    for key, value in settings.items():
        set_key(content, key, value)
    return yaml.safe_dump(
        content, default_flow_style=None, sort_keys=False, allow_unicode=True, width=100
    )
