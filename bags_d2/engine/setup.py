"""From command-line arguments to a checked config, before anything expensive starts."""

import argparse
import logging
import math
import os
import tempfile

import torch
import yaml
from detectron2 import modeling
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_setup
from detectron2.modeling.proposal_generator import RPN_HEAD_REGISTRY
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from ..config import (
    CONFIGS,
    add_bags_config,
    find_config,
    merge_config_file,
    rename_keys,
    rename_options,
    scale_schedule,
)
from ..config.lazy_reader import refuse_ineffective, split_overrides
from ..data.build import check_datasets, refuse_proposals
from ..data.datasets import missing_dataset_message, register_from_config
from ..errors import BagsError, ConfigError, MissingFileError
from ..modeling.box_predictors import ROI_BOX_PREDICTOR_REGISTRY
from ..utils.files import load_yaml
from ..utils.quiet import shorten_console
from ..utils.settings import config_value, select_config

__all__ = [
    "check_device",
    "check_files",
    "check_settings",
    "log_changed_settings",
    "setup_cfg",
    "setup_run",
]

logger = logging.getLogger(__name__)

# The least and the greatest value that works.
_LIMITS = {
    "SOLVER.IMS_PER_BATCH": (1, math.inf, "at least 1"),
    "SOLVER.CHECKPOINT_PERIOD": (1, math.inf, "at least 1"),
    "SOLVER.MAX_ITER": (0, math.inf, "at least 0"),
    "SOLVER.BASE_LR": (0, torch.finfo(torch.float32).max, "at least 0 and within float32"),
    "DATALOADER.NUM_WORKERS": (0, math.inf, "at least 0"),
    "SEED": (-math.inf, 2**32 - 1, "at most 2**32 - 1"),
}
_REGISTRIES = {
    "MODEL.META_ARCHITECTURE": modeling.META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": modeling.BACKBONE_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": modeling.ANCHOR_GENERATOR_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": modeling.PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.RPN.HEAD_NAME": RPN_HEAD_REGISTRY,
    "MODEL.ROI_HEADS.NAME": modeling.ROI_HEADS_REGISTRY,
    "MODEL.ROI_BOX_HEAD.NAME": modeling.ROI_BOX_HEAD_REGISTRY,
    "MODEL.ROI_BOX_PREDICTOR.NAME": ROI_BOX_PREDICTOR_REGISTRY,
    "MODEL.ROI_MASK_HEAD.NAME": modeling.ROI_MASK_HEAD_REGISTRY,
    "MODEL.ROI_KEYPOINT_HEAD.NAME": modeling.ROI_KEYPOINT_HEAD_REGISTRY,
}
# What a resumed run does not take from its config.
_NOT_RESUMED = {
    "MODEL.WEIGHTS": "its last checkpoint is loaded",
    "MODEL.ROI_BOX_PREDICTOR.REINITIALIZE": "its classifier has been trained",
}


def setup_cfg(args: argparse.Namespace) -> CfgNode:
    """Read ``args.config_file``, merge ``args.opts`` and register ``DATASETS.REGISTER``.

    Args:
        args: of ``bags-d2 train``, or of Detectron2's parser, which names no method. A config that
            the present folder lacks is looked for among those of this package.

    Returns:
        A frozen config.

    Raises:
        MissingFileError: if the config file or the method does not exist.
        ConfigError: if it is not valid YAML for this config, or an option is unknown, of the
            wrong type, or without effect.
    """
    cfg = get_cfg()
    add_bags_config(cfg)
    path = args.config_file
    if not path:
        raise ConfigError("No config was given: add --config-file configs/lvis_bags_R50.yaml.")
    overrides, opts = split_overrides(args.opts or []) if path.endswith(".py") else ((), args.opts)
    opts = rename_options(opts or [])
    if any(str(key).startswith("STAGE2.") for key in opts[::2]):
        raise ConfigError(
            "STAGE2.* has no effect on the command line; set MODEL.WEIGHTS, SOLVER.MAX_ITER and "
            "SOLVER.STEPS instead."
        )
    try:
        merge_config_file(cfg, path, getattr(args, "method", None), overrides)
        # YAML's infinity, which yacs takes for a word on the command line.
        cfg.merge_from_list([math.inf if o == ".inf" else o for o in opts])
        scale_schedule(cfg)
        refuse_ineffective(cfg)
    except BagsError:
        raise
    except Exception as error:  # yacs evaluates values, and raises nearly anything
        raise ConfigError(
            f"Config '{path}' with options {[*overrides, *opts]}: {' '.join(str(error).split())}"
        ) from None
    weights = cfg.MODEL.WEIGHTS
    if weights.startswith("checkpoints/") and not os.path.exists(weights):
        # Carried by this package, and written relative to the root of a source checkout.
        cfg.MODEL.WEIGHTS = str(CONFIGS.parent / weights)
    register_from_config(cfg.DATASETS.REGISTER)
    cfg.freeze()
    return cfg


def setup_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Detectron2's ``default_setup``, which opens the config file, for a config of any name.

    What it says of environment and config goes to the log file alone.
    """
    # With its very arguments, since others would add a second handler.
    console = setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank())
    shorten_console(console)
    console.info("Environment, config and model are described in '%s/log.txt'.", cfg.OUTPUT_DIR)
    changes = {"config_file": find_config(args.config_file)[0]}
    default_setup(cfg, argparse.Namespace(**{"eval_only": False, **vars(args), **changes}))


def check_files(
    cfg: CfgNode, eval_only: bool = False, resume: bool = False, num_processes: int = 1
) -> None:
    """Check the settings, and that the data sets, the device and the initial checkpoint exist.

    A run that would fail after minutes of loading, or in several processes at once, fails here
    with one sentence. Evaluation does not ask for the training set.

    Args:
        cfg: the config.
        eval_only: nothing is to be trained.
        resume: a checkpoint in ``OUTPUT_DIR`` takes precedence over ``MODEL.WEIGHTS``.
        num_processes: that will train together.

    Raises:
        ConfigError: if a setting cannot work.
        DataError: if an annotation file is faulty (``DATASETS.CHECK_ANNOTATIONS``).
        MissingFileError: if annotations, the folder of images or the checkpoint do not exist.
    """
    check_settings(cfg)
    if not eval_only:
        _check_training_settings(cfg, num_processes)
    for name in (*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST):
        if name not in DatasetCatalog:
            raise ConfigError(
                f"Data set '{name}' (DATASETS) is not registered; register it before training "
                "(docs/datasets.md)."
            )
        metadata = MetadataCatalog.get(name)
        for path in (metadata.get("json_file"), metadata.get("image_root")):
            if path and not PathManager.exists(path):
                raise MissingFileError(missing_dataset_message(name, path))
    check_device(cfg)
    _check_output_dir(cfg.OUTPUT_DIR)
    resumes = resume and _is_begun(cfg)
    weights = cfg.MODEL.WEIGHTS.partition("?")[0]  # Detectron2 allows ?matching_heuristics=True
    if weights and "://" not in weights and not resumes and not os.path.isfile(weights):
        raise MissingFileError(
            f"Checkpoint '{weights}' (MODEL.WEIGHTS) does not exist{_how_to_make(cfg)}."
        )
    # Last, since it may take a while.
    if cfg.DATASETS.CHECK_ANNOTATIONS:
        check_datasets(cfg, training=not eval_only)


def check_device(cfg: CfgNode) -> None:
    """Raise ConfigError if ``MODEL.DEVICE`` is not a device of this machine."""
    name = cfg.MODEL.DEVICE
    try:
        device = torch.device(name)
        if device.type != "cuda":  # whose context costs memory in each process
            torch.zeros(1, device=device).item()
    except (RuntimeError, NotImplementedError, AssertionError):
        raise ConfigError(
            f"MODEL.DEVICE is '{name}', which does not work here; set it to cuda or cpu."
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        which = f" of number {device.index}" if device.index else ""
        raise ConfigError(
            f"MODEL.DEVICE is '{name}' but there is no CUDA device{which}; add 'MODEL.DEVICE cpu' "
            "to the command."
        )


def log_changed_settings(cfg: CfgNode) -> None:
    """Say how a config differs from that of the run which it is to resume.

    To be called before Detectron2's ``default_setup``, which writes it to ``OUTPUT_DIR``.
    """
    if not _is_begun(cfg):
        return
    path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    try:
        content = load_yaml(path)
        rename_keys(content)
        before = select_config(content, ("*",))
    except BagsError as error:
        logger.warning("Whether settings have changed since the run began is unknown: %s", error)
        return
    after = select_config(yaml.safe_load(cfg.dump()), ("*",))
    changed = [key for key in after if before.get(key, after[key]) != after[key]]
    applied = [f"{k} ({before[k]} -> {after[k]})" for k in changed if k not in _NOT_RESUMED]
    ignored = [f"{key} ({why})" for key, why in _NOT_RESUMED.items() if key in changed]
    if applied:
        logger.warning("Changed, and in effect from here on: %s", ", ".join(applied))
    if ignored:
        logger.warning("Changed, and not in effect in a resumed run: %s", ", ".join(ignored))


def check_settings(cfg: CfgNode) -> None:
    """Raise ConfigError if a value is out of range or names nothing that exists."""
    for key, (low, high, limits) in _LIMITS.items():
        value = config_value(cfg, key)
        if not low <= value <= high:
            raise ConfigError(f"{key} is {value}; it must be {limits}.")
    for key, registry in _REGISTRIES.items():
        name = config_value(cfg, key)
        known = sorted(known for known, _ in registry)
        if name and name not in known and name != "PrecomputedProposals":
            raise ConfigError(f"{key} is '{name}', which is not one of {', '.join(known)}.")
    refuse_proposals(cfg)


def _check_training_settings(cfg: CfgNode, num_processes: int) -> None:
    if cfg.SOLVER.IMS_PER_BATCH % num_processes:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which {num_processes} processes "
            "cannot share evenly; set it to a multiple of their number."
        )
    if not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty: name at least one data set to train on.")
    if cfg.SOLVER.MAX_ITER == 0:
        raise ConfigError("SOLVER.MAX_ITER is 0, so there is nothing to train; add --eval-only.")
    try:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], cfg.SOLVER.BASE_LR)
        build_lr_scheduler(cfg, optimizer)
    except (AssertionError, ArithmeticError, TypeError, ValueError) as error:
        raise ConfigError(
            "SOLVER's schedule (LR_SCHEDULER_NAME, STEPS, GAMMA, WARMUP_*) cannot be built: "
            f"{error or repr(error)}."
        ) from None
    if (
        cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler"
        and cfg.DATALOADER.REPEAT_THRESHOLD <= 0
    ):
        raise ConfigError(
            "DATALOADER.REPEAT_THRESHOLD is 0, so RepeatFactorTrainingSampler repeats no image; "
            "set it to the share of images below which a class is rare (LVIS: 0.001)."
        )
    if cfg.SOLVER.AMP.ENABLED and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise ConfigError(
            f"SOLVER.AMP.ENABLED needs a CUDA device but MODEL.DEVICE is '{cfg.MODEL.DEVICE}'; set "
            "SOLVER.AMP.ENABLED to False."
        )


def _check_output_dir(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # ValueError: a null byte
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"OUTPUT_DIR '{folder}' cannot be written to ({reason}); set another."
        ) from None


def _is_begun(cfg: CfgNode) -> bool:
    return os.path.exists(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))


def _how_to_make(cfg: CfgNode) -> str:
    """How to train a checkpoint whose folder is named after one of the configs."""
    run = os.path.basename(os.path.dirname(cfg.MODEL.WEIGHTS))
    config, methods = find_config(os.path.join("configs", f"{run}.yaml"))
    if not os.path.isfile(config):
        stage_1 = "train stage 1 first (the baseline's config without the method), or "
        return f"; {stage_1 if cfg.STAGE2.ENABLED else ''}correct the path"
    method = f" --method {methods[0]}" if methods else ""
    return f"; train stage 1 first: bags-d2 train --config-file {config}{method} --num-gpus 8"
