"""Data sets and their class counts; importing it registers the built-in ones."""

import os

from .class_statistics import count_classes, read_class_counts, training_class_counts
from .datasets import (
    load_lvis_format,
    register_builtin_datasets,
    register_from_config,
    register_lvis_format,
)

__all__ = [
    "count_classes",
    "load_lvis_format",
    "read_class_counts",
    "register_from_config",
    "register_lvis_format",
    "training_class_counts",
]

register_builtin_datasets(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
