"""This package's configs and carried checkpoints, with the functions of Detectron2's model zoo.

::

    from bags_d2 import model_zoo

    cfg = model_zoo.get_config("lvis_bags_R50.yaml")
    model = model_zoo.get("glyphs_bags.yaml", trained=True)
"""

import argparse
import os
from pathlib import Path

import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import build_model
from torch import nn

from ..checkpoint import LongTailCheckpointer
from ..config import CONFIGS, find_config
from ..engine.setup import setup_cfg
from ..errors import MissingFileError

__all__ = ["get", "get_checkpoint", "get_config", "get_config_file", "list_configs"]

_CHECKPOINTS = Path(__file__).parent / "checkpoints"


def list_configs() -> list[str]:
    """Names of all configs that a model can be built from.

    They are those that have a file. What :func:`bags_d2.config.list_methods` names can be laid over
    each, as in "lvis_seesaw_R50.yaml" for "lvis_baseline_R50.yaml".
    """
    paths = (p.relative_to(CONFIGS) for p in CONFIGS.rglob("*") if p.suffix in (".yaml", ".py"))
    return sorted(
        path.as_posix()
        for path in paths
        if not path.name.startswith("Base-") and path.parent.name not in ("methods", "ablations")
    )


def get_config_file(config_path: str) -> str:
    """Path of a config ("lvis_bags_R50.yaml") of this package; a MissingFileError if there is none.

    Where a name stands for a baseline with a method, there is no file of that path.
    """
    path = str(CONFIGS / config_path)
    file, methods = find_config(path)
    if not os.path.isfile(file):
        raise MissingFileError(
            f"'{config_path}' is no config of bags_d2's model zoo; bags_d2.model_zoo.list_configs()"
            " names all."
        )
    return path if methods else file


def get_checkpoint(config_path: str) -> str:
    """Path of the checkpoint trained with a config; a MissingFileError if none is carried."""
    get_config_file(config_path)
    path = _CHECKPOINTS / Path(config_path).with_suffix("") / "model_final.pth"
    if not path.is_file():
        carried = sorted(p.parent.name for p in _CHECKPOINTS.glob("*/model_final.pth"))
        raise MissingFileError(
            f"bags_d2 carries no checkpoint of '{config_path}', only of {', '.join(carried)}; "
            "train one with bags-d2 train."
        )
    return str(path)


def get_config(config_path: str, trained: bool = False) -> CfgNode:
    """A config of this name, as a CfgNode or the DictConfig of a LazyConfig's file (``.py``).

    ``trained`` takes the weights of :func:`get_checkpoint`, not those that training starts from.
    """
    path = get_config_file(config_path)
    weights = get_checkpoint(config_path) if trained else None
    if path.endswith(".py") and os.path.isfile(path):
        lazy = LazyConfig.load(path)
        if weights:
            lazy.train.init_checkpoint = weights
        return lazy
    cfg = setup_cfg(argparse.Namespace(config_file=path, opts=[]))
    cfg.defrost()
    if weights:
        cfg.MODEL.WEIGHTS = weights
    return cfg


def get(config_path: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """A model with its weights, in training mode, as Detectron2's ``model_zoo.get`` returns it.

    Args:
        config_path, trained: see :func:`get_config`.
        device: None is the config's, or the CPU where there is no CUDA device.

    Raises:
        MissingFileError: if there is no such config, or its weights are not there.
        ConfigError: if its weights do not fit.
    """
    cfg = get_config(config_path, trained)
    if device is None and not torch.cuda.is_available():
        device = "cpu"
    if isinstance(cfg, CfgNode):
        if device is not None:
            cfg.MODEL.DEVICE = device
        model, weights = build_model(cfg), cfg.MODEL.WEIGHTS
    else:
        model, weights = instantiate(cfg.model), cfg.train.init_checkpoint
        model.to(device or cfg.train.device)
    LongTailCheckpointer(model, evaluating=trained).load(os.fspath(weights))
    return model
