"""What evaluated runs left in their folders, which may hold anything.

Shapes: K classes.
"""

import argparse
import csv
import itertools
import json
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..config import rename_keys
from ..data.datasets import evaluated_annotations, register_from_config
from ..engine.setup import setup_cfg
from ..errors import BagsError, ConfigError, DataError, MissingFileError
from ..evaluation.bins import DEFAULT_COUNT_THRESHOLDS, ap_per_bin, balanced_ap
from ..evaluation.label_check import LABEL_CHECK_FILE
from ..utils.files import load_json, load_yaml, require_file
from ..utils.text import printable

__all__ = [
    "EvaluatedRun",
    "check_comparable",
    "configured_thresholds",
    "flat_items",
    "loss_history",
    "objects_of",
    "read_ground_truth",
    "read_run",
    "read_runs",
    "register_data_sets",
]

RESULT_FILES = ("lvis_instances_results.json", "coco_instances_results.json")
# Of coordinates, scores, counts and losses: no run has larger ones.
_LARGEST = 1e12
# What reading fields of unknown shape raises.
_MALFORMED = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError, csv.Error)


@dataclass(frozen=True)
class EvaluatedRun:
    """An evaluation of a model on a data set."""

    label: str
    folder: Path  # the OUTPUT_DIR
    dataset: str
    task: str  # "bbox" or "segm"
    measures: Mapping[str, float | None]  # AP, AP50, ..., in percent; None where undefined
    category_ids: list[Hashable]  # K, of the annotation file
    names: list[str]  # K
    training_instances: np.ndarray  # (K,); -1 unknown
    validation_instances: np.ndarray  # (K,)
    ap: np.ndarray  # (K,) in percent, NaN where a class is not evaluated

    @property
    def is_counted(self) -> bool:
        """Whether the training instances of its classes are known."""
        return not (self.training_instances < 0).any()

    @property
    def count_of(self) -> dict[Hashable, int]:
        """Training instances by category id."""
        return dict(zip(self.category_ids, self.training_instances.tolist(), strict=True))

    def bin_measures(self, thresholds: Sequence[int]) -> dict[str, float | None]:
        """AP1, AP2, ... and bAP for any bins of training instances; None for empty ones."""
        if not self.is_counted:
            return {}
        bins = ap_per_bin(self.ap, self.training_instances, thresholds)
        bins["bAP"] = balanced_ap(bins)
        return {name: None if np.isnan(ap) else ap for name, ap in bins.items()}

    def config(self) -> dict[str, Any]:
        """Its ``config.yaml``, nested keys joined by dots; {} if it is missing or unreadable."""
        try:
            content = load_yaml(self.folder / "config.yaml")
            rename_keys(content)
            return dict(flat_items(content))
        except (BagsError, OSError):
            return {}

    def detections(self) -> list[dict]:
        """Its detections of the evaluated classes, in COCO's results format.

        Raises:
            MissingFileError: if their file does not exist.
            DataError: if it is not what evaluation writes.
        """
        folder = self.folder / "inference" / self.dataset
        path = next((folder / n for n in RESULT_FILES if (folder / n).is_file()), None)
        if path is None:
            raise MissingFileError(f"'{folder}' has no detections ({' or '.join(RESULT_FILES)}).")
        known = set(self.category_ids)
        rows = load_json(path)
        try:
            for i, row in enumerate(rows):  # in place: there may be millions
                rows[i] = {
                    "image_id": _id(row["image_id"]),
                    "category_id": _id(row["category_id"]),
                    "bbox": _box(*row["bbox"]),
                    "score": _number(row["score"]),
                }
            return [row for row in rows if row["category_id"] in known]
        except _MALFORMED as error:
            raise DataError(
                f"'{path}' does not hold detections ({error!r:.200}); evaluate again."
            ) from None

    @property
    def label_check_file(self) -> Path:
        """All objects, those first whose label the model contradicts most, if they were checked."""
        return self.folder / "inference" / self.dataset / LABEL_CHECK_FILE

    def label_check(self, most: int) -> list[dict]:
        """The first rows of that file.

        Raises:
            MissingFileError: if it does not exist.
            DataError: if it is not what evaluation writes.
        """
        path = self.label_check_file
        try:
            with open(require_file(path), newline="", encoding="utf-8") as file:
                rows = list(itertools.islice(csv.DictReader(file), most))
            numbers = ("probability", "model_probability", "contradiction")
            return [{**row, **{key: float(row[key]) for key in numbers}} for row in rows]
        except _MALFORMED as error:
            raise DataError(f"'{path}' is damaged ({error!r:.200}); evaluate again.") from None


def read_ground_truth(run: EvaluatedRun) -> dict[Hashable, dict]:
    """The images that a run was evaluated on, by id.

    Returns:
        For each image its "file_name", its objects of the evaluated classes ("annotations", with
        the ids of the annotation file; no crowds) and, of LVIS, its two lists of categories.

    Raises:
        ConfigError: if the data set is not registered.
        MissingFileError, DataError: if its annotation file does not exist or cannot be read.
    """
    if run.dataset not in DatasetCatalog:
        raise ConfigError(
            f"Data set '{run.dataset}' of '{run.folder}' is not registered here; add --config-file "
            "with the config of the run."
        )
    truth, metadata = evaluated_annotations(run.dataset), MetadataCatalog.get(run.dataset)
    known, ids = set(run.category_ids), [_id(i) for i in truth.categories.outside]
    is_lvis, root = metadata.get("evaluator_type") == "lvis", metadata.get("image_root") or ""
    boxes, classes, is_object = (a.tolist() for a in (truth.boxes, truth.classes, truth.is_object))
    images = {}
    for position, image in enumerate(truth.image_rows):
        image_id = _id(truth.images.outside[position])
        images[image_id] = record = {
            "file_name": os.path.join(root, truth.file_name(position, is_lvis)),
            "annotations": [
                {
                    "id": truth.annotation_ids[i],
                    "image_id": image_id,
                    "category_id": ids[classes[i]],
                    "bbox": boxes[i],
                }
                for i in truth.rows_of_image(position)
                if is_object[i] and ids[classes[i]] in known
            ],
        }
        for key in ("neg_category_ids", "not_exhaustive_category_ids") if is_lvis else ():
            record[key] = {ids[c] for c in image[key] or ()}
    return images


def objects_of(images: Mapping[Hashable, Mapping]) -> list[dict]:
    """All objects of images as of :func:`read_ground_truth`."""
    return [annotation for image in images.values() for annotation in image["annotations"]]


def read_run(
    folder: str | Path, label: str | None = None, dataset: str | None = None, task: str = "bbox"
) -> EvaluatedRun:
    """Read what evaluation has left in an OUTPUT_DIR.

    Args:
        label: what to call it; None takes the folder's name.
        dataset: which of several evaluated data sets; None if there is one.

    Raises:
        MissingFileError: if there is no evaluation in it.
        ConfigError: if it holds several data sets and none is named.
        DataError: if a file is not what evaluation writes.
    """
    folder, pattern = Path(folder), f"inference/*/per_class_{task}.csv"
    paths = [p for p in sorted(folder.glob(pattern)) if dataset in (None, p.parent.name)]
    if not paths:
        what = f"of '{dataset}' " if dataset else ""
        raise MissingFileError(
            f"'{folder}' has no {task} evaluation {what}({pattern}); run "
            "bags-d2 train --eval-only with this OUTPUT_DIR."
        )
    if len(paths) > 1:
        found = ", ".join(path.parent.name for path in paths)
        raise ConfigError(f"'{folder}' has evaluations of {found}; name one (--dataset).")
    path, dataset = paths[0], paths[0].parent.name
    results = load_json(folder / "inference" / "results.json")
    try:
        with open(require_file(path), newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        measures = results.get(dataset, results)[task]
        run = EvaluatedRun(
            label=printable(label or folder.resolve().name),
            folder=folder,
            dataset=dataset,
            task=task,
            measures={name: _number_or_none(value) for name, value in measures.items()},
            category_ids=[_id(row["category_id"]) for row in rows],
            names=[row["name"] for row in rows],
            training_instances=np.array([_count(row["training_instances"], -1) for row in rows]),
            validation_instances=np.array([_count(row["validation_instances"], 0) for row in rows]),
            ap=np.array([float(row["AP"] or "nan") for row in rows]),
        )
        if not rows or len(set(run.category_ids)) < len(rows) or np.isinf(run.ap).any():
            raise ValueError("no classes, one of them twice, or an infinite AP")
        return run
    except _MALFORMED as error:
        raise DataError(
            f"'{path}' or 'results.json' beside it is not what evaluation writes ({error!r:.200}); "
            "evaluate again."
        ) from None


def read_runs(
    folders: Sequence[Path],
    labels: Sequence[str] | None = None,
    dataset: str | None = None,
    task: str = "bbox",
    config_file: str | None = None,
) -> list[EvaluatedRun]:
    """Read the runs that a command names, and register the data sets of the first one.

    Raises:
        ConfigError: if there are too few or too many labels, or the runs cannot be compared; for
            the rest see :func:`read_run` and :func:`register_data_sets`.
    """
    labels = labels or [None] * len(folders)
    if len(labels) != len(folders):
        raise ConfigError(f"--labels names {len(labels)} runs, but there are {len(folders)}.")
    register_data_sets(folders[0], config_file)
    runs = [read_run(f, n, dataset, task) for f, n in zip(folders, labels, strict=True)]
    check_comparable(runs)
    return runs


def check_comparable(runs: Sequence[EvaluatedRun]) -> None:
    """Refuse runs that share a name or are of different classes (ConfigError)."""
    labels = [run.label for run in runs]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"Runs share a name among {', '.join(labels)}; add --labels.")
    for run in runs[1:]:
        if (run.dataset, run.category_ids) != (runs[0].dataset, runs[0].category_ids):
            raise ConfigError(
                f"'{runs[0].folder}' ({runs[0].dataset}) and '{run.folder}' ({run.dataset}) were "
                "not evaluated on the same classes."
            )


def register_data_sets(folder: str | Path, config_file: str | None = None) -> None:
    """Register the data sets of an OUTPUT_DIR's ``config.yaml``, or those of another config.

    Raises:
        MissingFileError, ConfigError: if the config is missing or faulty.
    """
    own = Path(folder) / "config.yaml"
    if config_file:
        setup_cfg(argparse.Namespace(config_file=config_file, opts=[]))
    elif own.is_file():
        rows = dict(flat_items(load_yaml(own))).get("DATASETS.REGISTER") or ()
        if not isinstance(rows, list | tuple):
            raise ConfigError(f"'{own}': DATASETS.REGISTER must be a list; add --config-file.")
        register_from_config(rows)


def configured_thresholds(runs: Sequence[EvaluatedRun]) -> tuple[int, ...]:
    """The edges of the class groups in the runs' configs: those of the last run that has any."""
    for run in reversed(runs):
        edges = run.config().get("MODEL.BAGS.GROUP_THRESHOLDS")
        is_list = isinstance(edges, list) and all(type(e) is int for e in edges)
        if is_list and edges == sorted(set(edges)) and all(0 < e < _LARGEST for e in edges):
            return tuple(edges)
    return DEFAULT_COUNT_THRESHOLDS


def loss_history(folder: str | Path) -> dict[str, dict[int, float]]:
    """The losses in an OUTPUT_DIR's ``metrics.json``: for each its last value by iteration.

    Truncated lines, as where a run was killed, and values that are not numbers are left out.
    """
    history: dict[str, dict[int, float]] = {}
    path = Path(folder) / "metrics.json"
    if not path.is_file():
        return history
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
                iteration = int(_number(row["iteration"]))
                values = {name: _number_or_none(value) for name, value in row.items()}
            except (*_MALFORMED, RecursionError):
                continue
            for name, value in values.items():
                is_loss = name.removeprefix("bags/").startswith("loss_") or name == "total_loss"
                if is_loss and value is not None:
                    history.setdefault(printable(name), {})[iteration] = value
    return history


def flat_items(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested dicts with their keys joined by dots."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if isinstance(value, dict):
            yield from flat_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _id(value: Any) -> Hashable:
    """An id as an integer, if it can be one, since a table cannot distinguish 7 from "7"."""
    if not isinstance(value, int | str):
        raise TypeError(f"an id of {value!r:.50}")
    try:
        return int(value)
    except ValueError:
        return value


def _number_or_none(value: Any) -> float | None:
    # NaN is not within any limit.
    return float(value) if isinstance(value, int | float) and abs(value) < _LARGEST else None


def _number(value: Any) -> float:
    if (number := _number_or_none(value)) is None:
        raise ValueError(f"a number of {value!r:.50}")
    return number


def _count(text: str, if_unknown: int) -> int:
    return int(_number(int(text))) if text else if_unknown


def _box(x: Any, y: Any, width: Any, height: Any) -> tuple[float, ...]:
    return _number(x), _number(y), _number(width), _number(height)
