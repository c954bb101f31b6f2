"""Data sets and their class counts."""

from .class_statistics import count_classes, read_class_counts, training_class_counts
from .datasets import load_lvis_format, register_lvis_format

__all__ = [
    "count_classes",
    "load_lvis_format",
    "read_class_counts",
    "register_lvis_format",
    "training_class_counts",
]
