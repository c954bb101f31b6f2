"""Trainer, checkpointing and the choice of what trains."""

from .checkpoint import LongTailCheckpointer
from .launch import launch
from .predictor import LongTailPredictor
from .setup import check_files, setup_cfg
from .trainable import select_trainable_params
from .trainer import BAGSTrainer

__all__ = [
    "BAGSTrainer",
    "LongTailCheckpointer",
    "LongTailPredictor",
    "check_files",
    "launch",
    "select_trainable_params",
    "setup_cfg",
]
