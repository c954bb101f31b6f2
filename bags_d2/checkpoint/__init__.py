"""Loading and saving checkpoints, and reading them as data."""

from .checkpointer import LongTailCheckpointer
from .files import read_checkpoint

__all__ = ["LongTailCheckpointer", "read_checkpoint"]
