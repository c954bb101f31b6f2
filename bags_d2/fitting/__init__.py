"""Fitting a classifier from cached box features (docs/fitting.md)."""

from .cache import FeatureCache
from .extract import extract_features
from .train import fit_classifier

__all__ = ["FeatureCache", "extract_features", "fit_classifier"]
