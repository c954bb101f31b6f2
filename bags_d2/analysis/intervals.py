"""Confidence intervals of a comparison: paired bootstrap over the images of the test set."""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from detectron2.data import MetadataCatalog

from ..errors import DataError, MissingFileError
from ..evaluation.bootstrap import (
    bootstrap_ap,
    bootstrap_measures,
    draw_images,
    match_detections,
)
from ..evaluation.ground_truth import GroundTruth
from ..utils.files import load_json, require_file, write_atomically
from .method_runs import MethodRun

__all__ = ["Draws", "bootstrap_runs"]

# Measures (B,) of each method, the mean over its seeds, in percent.
Draws = dict[str, Mapping[str, np.ndarray]]


def bootstrap_runs(
    runs: Iterable[MethodRun], dataset: str, task: str = "bbox", num_draws: int = 1000
) -> Draws:
    """Measures of each method on images drawn with replacement, the same for all runs.

    What a run gives is kept in its folder, and computed again when its detections change.

    Args:
        runs: evaluated runs.
        dataset: the data set that they were evaluated on.
        task: "bbox" or "segm".
        num_draws: B.

    Raises:
        MissingFileError: if a run left no detections.
        DataError: if its table of classes is damaged.
    """
    truth = GroundTruth.of_dataset(dataset, None, False)
    draws = draw_images(len(truth.annotations.images), num_draws)
    of_method: dict[str, list[Mapping[str, np.ndarray]]] = {}
    for run in runs:
        found = _bootstrap_run(run, truth, dataset, task, draws)
        of_method.setdefault(run.method, []).append(found)
    return {
        method: {name: np.mean([found[name] for found in each], axis=0) for name in each[0]}
        for method, each in of_method.items()
    }


def _bootstrap_run(
    run: MethodRun, truth: GroundTruth, dataset: str, task: str, draws: np.ndarray
) -> Mapping[str, np.ndarray]:
    style = MetadataCatalog.get(dataset).evaluator_type
    folder = run.results_file.parent / dataset
    detections = folder / f"{style}_instances_results.json"
    if not detections.is_file():
        raise MissingFileError(
            f"'{detections}' does not exist, which intervals need; delete "
            f"'{run.results_file}' and compare again."
        )
    kept = run.results_file.parent / f"bootstrap_{task}_{len(draws)}.npz"
    if kept.exists() and kept.stat().st_mtime > detections.stat().st_mtime:
        with np.load(kept) as arrays:
            return dict(arrays)
    counts = _training_instances(folder / f"per_class_{task}.csv")
    matches = match_detections(truth, load_json(detections), task, lvis=style == "lvis")
    measures = bootstrap_measures(bootstrap_ap(matches, draws), counts)
    with write_atomically(kept, "wb") as file:
        np.savez(file, **measures)
    return measures


def _training_instances(path: Path) -> list[int]:
    try:
        with open(require_file(path), encoding="utf-8", newline="") as file:
            return [int(row["training_instances"]) for row in csv.DictReader(file)]
    except (KeyError, TypeError, ValueError, csv.Error):
        raise DataError(f"'{path}' has no training instances; evaluate the run again.") from None
