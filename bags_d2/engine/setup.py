"""From command-line arguments to a checked config, before anything expensive starts."""

import argparse
import math
import os
import tempfile

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..config import add_bags_config
from ..data.build import check_datasets
from ..data.datasets import missing_dataset_message, register_from_config
from ..errors import ConfigError, MissingFileError

__all__ = ["check_device", "check_files", "setup_cfg"]

# What yacs raises for unknown keys, wrong types, and files that hold no mapping.
_FAULTY_CONFIG = (KeyError, ValueError, AssertionError, AttributeError, TypeError)


def setup_cfg(args: argparse.Namespace) -> CfgNode:
    """Read ``args.config_file``, merge ``args.opts`` and register ``DATASETS.REGISTER``.

    Args:
        args: of ``detectron2.engine.default_argument_parser``.

    Returns:
        A frozen config.

    Raises:
        MissingFileError: if the config file does not exist.
        ConfigError: if it is not valid YAML for this config, or an option is unknown or of the
            wrong type.
    """
    cfg = get_cfg()
    add_bags_config(cfg)
    path = args.config_file
    if not path:
        raise ConfigError("No config was given: add --config-file configs/lvis_bags_R50.yaml.")
    if "://" not in path and not os.path.isfile(path):
        raise MissingFileError(f"Config file '{path}' does not exist.")
    try:
        cfg.merge_from_file(path)
        # YAML's infinity, which yacs takes for a word on the command line.
        cfg.merge_from_list([math.inf if o == ".inf" else o for o in args.opts or []])
    except FileNotFoundError as error:
        raise MissingFileError(
            f"'{error.filename}', a _BASE_ of '{path}', does not exist."
        ) from None
    except (*_FAULTY_CONFIG, yaml.YAMLError) as error:
        raise ConfigError(f"Config '{path}' with options {args.opts or []}: {error}") from error
    register_from_config(cfg.DATASETS.REGISTER)
    cfg.freeze()
    return cfg


def check_files(cfg: CfgNode, eval_only: bool = False, resume: bool = False) -> None:
    """Check that the data sets, the device and the initial checkpoint exist.

    A run that would fail after minutes of loading, or in several processes at once, fails here
    with one sentence. Evaluation does not ask for the training set.

    Args:
        cfg: the config.
        eval_only: whether nothing is to be trained.
        resume: whether a checkpoint in ``OUTPUT_DIR`` goes before ``MODEL.WEIGHTS``.

    Raises:
        ConfigError: if a data set is not registered or has another number of classes, nothing is
            to be trained on, there is no such device, or ``OUTPUT_DIR`` cannot be written to.
        DataError: if an annotation file is faulty (``DATASETS.CHECK_ANNOTATIONS``).
        MissingFileError: if annotations, the folder of images or the checkpoint do not exist.
    """
    if not eval_only and not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty: name at least one data set to train on.")
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
    resumes = resume and PathManager.exists(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    weights = cfg.MODEL.WEIGHTS.partition("?")[0]  # Detectron2 allows ?matching_heuristics=True
    if weights and "://" not in weights and not resumes and not os.path.isfile(weights):
        raise MissingFileError(
            f"Checkpoint '{weights}' (MODEL.WEIGHTS) does not exist{_how_to_make(weights)}."
        )
    # Last, since it may take a while.
    if cfg.DATASETS.CHECK_ANNOTATIONS:
        check_datasets(cfg, training=not eval_only)


def _check_output_dir(folder: str) -> None:
    if "://" in folder:
        return
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"OUTPUT_DIR '{folder}' cannot be written to ({error.strerror}); set another."
        ) from None


def check_device(cfg: CfgNode) -> None:
    """Raise ConfigError if ``MODEL.DEVICE`` is a CUDA device and there is none."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"MODEL.DEVICE is '{cfg.MODEL.DEVICE}' but there is no CUDA device; add "
            "'MODEL.DEVICE cpu' to the command."
        )


def _how_to_make(weights: str) -> str:
    """How to train a checkpoint whose folder is named after one of the configs."""
    run = os.path.basename(os.path.dirname(weights))
    config = os.path.join("configs", f"{run}.yaml")
    if not os.path.isfile(config):
        return "; correct the path"
    return f"; train stage 1 first: python train_net.py --config-file {config} --num-gpus 8"
