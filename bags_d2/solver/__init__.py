"""Optimizer and clipping."""

from .clipping import clip_full_model

__all__ = ["clip_full_model"]
