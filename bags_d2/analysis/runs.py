"""What evaluated runs left in their folders, and what tells two of them apart.

Shapes: K classes, G groups by training count.
"""

import argparse
import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.data import MetadataCatalog
from pycocotools import mask as mask_util

from ..engine.setup import setup_cfg
from ..errors import ConfigError, DataError, MissingFileError
from ..evaluation.bins import bin_index
from ..utils.files import load_json

__all__ = ["Run", "read_run", "register_data_sets", "winning_groups"]

RESULT_FILES = ("lvis_instances_results.json", "coco_instances_results.json")


@dataclass(frozen=True)
class Run:
    """An evaluated run.

    Attributes:
        label: what to call it.
        folder: its OUTPUT_DIR.
        dataset: the evaluated data set.
        task: "bbox" or "segm".
        measures: AP, AP1, ..., in percent; None where undefined.
        category_ids: K ids of the annotation file, ascending.
        names: K class names.
        training_instances: (K,) int; -1 unknown.
        validation_instances: (K,) int.
        ap: (K,) AP in percent, NaN where a class is not evaluated.
    """

    label: str
    folder: Path
    dataset: str
    task: str
    measures: Mapping[str, float | None]
    category_ids: list[int]
    names: list[str]
    training_instances: np.ndarray
    validation_instances: np.ndarray
    ap: np.ndarray

    def detections(self) -> list[dict]:
        """Its detections in COCO's results format.

        Raises:
            MissingFileError: if their file is gone.
        """
        folder = self.folder / "inference" / self.dataset
        for name in RESULT_FILES:
            if (folder / name).is_file():
                return load_json(folder / name)
        raise MissingFileError(f"'{folder}' has no detections ({' or '.join(RESULT_FILES)}).")

    def ground_truth(self) -> dict:
        """Content of the data set's annotation file.

        Raises:
            ConfigError: if the data set is not registered, or has no annotation file.
            MissingFileError: if the file does not exist.
        """
        path = MetadataCatalog.get(self.dataset).get("json_file")
        if path is None:
            raise ConfigError(
                f"Data set '{self.dataset}' of '{self.folder}' is not registered here; add "
                "--config-file with the config of the run."
            )
        if not Path(path).is_file():
            raise MissingFileError(f"'{path}', the ground truth of '{self.dataset}', is missing.")
        return load_json(path)


def read_run(
    folder: str | Path, label: str | None = None, dataset: str | None = None, task: str = "bbox"
) -> Run:
    """Read what evaluation has left in an OUTPUT_DIR.

    Args:
        folder: the OUTPUT_DIR.
        label: what to call it; None takes the folder's name.
        dataset: which of several evaluated data sets; None if there is one.
        task: "bbox" or "segm".

    Raises:
        MissingFileError: if there is no evaluation in it.
        ConfigError: if it holds several data sets and none is named.
        DataError: if a file is not what evaluation writes.
    """
    folder = Path(folder)
    tables = sorted(folder.glob(f"inference/*/per_class_{task}.csv"))
    found = [path.parent.name for path in tables]
    if dataset is None and len(found) > 1:
        raise ConfigError(
            f"'{folder}' has evaluations of {', '.join(found)}; name one (--dataset)."
        )
    if not found or (dataset is not None and dataset not in found):
        what = f"of '{dataset}' " if dataset else ""
        raise MissingFileError(
            f"'{folder}' has no {task} evaluation {what}(inference/*/per_class_{task}.csv); run "
            "train_net.py --eval-only with this OUTPUT_DIR."
        )
    dataset = dataset or found[0]
    path = folder / "inference" / dataset / f"per_class_{task}.csv"
    results = load_json(folder / "inference" / "results.json")
    measures = results.get(dataset, results).get(task)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return Run(
            label=label or folder.name,
            folder=folder,
            dataset=dataset,
            task=task,
            measures=dict(measures),
            category_ids=[int(row["category_id"]) for row in rows],
            names=[row["name"] for row in rows],
            training_instances=np.array([int(row["training_instances"] or -1) for row in rows]),
            validation_instances=np.array([int(row["validation_instances"]) for row in rows]),
            ap=np.array([float(row["AP"] or "nan") for row in rows]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"'{path}' or 'results.json' beside it is not what evaluation writes ({error!r}); "
            "evaluate again."
        ) from None


def register_data_sets(folder: str | Path, config_file: str | None = None) -> None:
    """Register what a run's config registers (``DATASETS.REGISTER``), to find its ground truth.

    Args:
        folder: the run's OUTPUT_DIR, whose ``config.yaml`` is read if there is one.
        config_file: another config to take in its place.

    Raises:
        MissingFileError: if ``config_file`` does not exist.
        ConfigError: if the config is faulty.
    """
    own = Path(folder) / "config.yaml"
    if config_file or own.is_file():
        setup_cfg(argparse.Namespace(config_file=config_file or str(own), opts=[]))


def winning_groups(
    ground_truth: Sequence[Mapping],
    detections: Sequence[Mapping],
    training_instances: Mapping[int, int],
    thresholds: Sequence[int],
    iou_threshold: float = 0.5,
) -> np.ndarray:
    """For each object: what scored highest where it is.

    All classes compete: of the detections that overlap an object enough, the one of the highest
    score wins (the first of equals), whatever its class.

    Args:
        ground_truth: annotations with "image_id", "category_id" and "bbox"; crowds are left out.
        detections: results with "image_id", "category_id", "bbox" and "score".
        training_instances: training count by category id.
        thresholds: edges of the groups.
        iou_threshold: least overlap of boxes.

    Returns:
        Counts of objects (G, G + 2): rows are groups of the objects; columns the right class, a
        wrong class of each group, and nothing.
    """
    ids = sorted(training_instances)
    group_of = dict(
        zip(ids, bin_index([training_instances[i] for i in ids], thresholds), strict=True)
    )
    matrix = np.zeros((len(thresholds) + 1, len(thresholds) + 3), dtype=np.int64)
    found = _by_image(detections)
    objects = _by_image(a for a in ground_truth if not a.get("iscrowd", 0))
    for image, of_image in objects.items():
        competitors = sorted(found.get(image, ()), key=lambda d: -d["score"])
        if competitors:
            overlaps = mask_util.iou(
                np.array([d["bbox"] for d in competitors], dtype=np.float64),
                np.array([a["bbox"] for a in of_image], dtype=np.float64),
                [0] * len(of_image),
            )
            enough = overlaps >= iou_threshold  # (detections, objects)
            winners = np.where(enough.any(axis=0), enough.argmax(axis=0), -1)
        else:
            winners = np.full(len(of_image), -1)
        for annotation, winner in zip(of_image, winners, strict=True):
            own = annotation["category_id"]
            if winner < 0:
                column = -1
            elif competitors[winner]["category_id"] == own:
                column = 0
            else:
                column = 1 + group_of[competitors[winner]["category_id"]]
            matrix[group_of[own], column] += 1
    return matrix


def _by_image(rows) -> dict[int, list]:
    grouped: dict[int, list] = {}
    for row in rows:
        grouped.setdefault(row["image_id"], []).append(row)
    return grouped
