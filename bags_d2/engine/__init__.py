"""Trainer, checkpointing and the choice of what trains."""

from ..checkpoint import LongTailCheckpointer
from .evaluate import evaluate_classifiers, load_for_evaluation
from .freezing import select_trainable_params
from .launch import launch, process_count
from .predictor import LongTailPredictor
from .setup import check_files, log_changed_settings, setup_cfg
from .trainer import BAGSTrainer

__all__ = [
    "BAGSTrainer",
    "LongTailCheckpointer",
    "LongTailPredictor",
    "check_files",
    "evaluate_classifiers",
    "launch",
    "load_for_evaluation",
    "log_changed_settings",
    "process_count",
    "select_trainable_params",
    "setup_cfg",
]
