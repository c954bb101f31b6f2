"""What a detector finds in many images, as files: COCO results, and a table.

Images are worked on in parts, whose detections are written as they are made: a run that was killed
goes on where it was. The processes of a run share the parts.
"""

import argparse
import csv
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils import comm
from tqdm import tqdm

from ..errors import BagsError, ConfigError, DataError, one_sentence
from ..evaluation.detections import instances_to_rows
from ..evaluation.ground_truth import GroundTruth
from ..evaluation.thresholds import ScoreThresholds, judge
from ..utils.files import content_hash, load_json, lock_folder, write_atomically, write_json
from .launch import launch
from .predictor import LongTailPredictor

__all__ = ["PredictionJob", "judged_detections", "write_predictions"]

logger = logging.getLogger(__name__)

PART_SIZE = 16  # images
READERS = 4  # threads that read images while the model works


@dataclass(frozen=True)
class PredictionJob:
    """What to detect, and how.

    Attributes:
        cfg: of :func:`predictor_cfg`.
        images: paths.
        batch_size: images of one size that the model takes at once.
        min_score: of the detections.
        thresholds: those of the classes; None for none.
    """

    cfg: CfgNode
    images: Sequence[str]
    batch_size: int = 8
    min_score: float = 0.0
    thresholds: ScoreThresholds | None = None

    def fingerprint(self) -> str:
        """Of everything that the detections follow from, so that no other job is continued."""
        versions = [(p, os.path.exists(p) and os.stat(p).st_mtime_ns) for p in self.images]
        thresholds = self.thresholds and asdict(self.thresholds)
        settings = (self.cfg.dump(), content_hash(self.cfg.MODEL.WEIGHTS), self.min_score)
        described = repr((settings, thresholds, versions))
        return hashlib.sha256(described.encode(errors="surrogateescape")).hexdigest()[:16]


def write_predictions(job: PredictionJob, folder: str | os.PathLike, processes: int = 1) -> None:
    """Write ``detections.json``, ``detections.csv`` and ``images.json``.

    Ids of images are the numbers that are their files' names, as in COCO and LVIS, or if any is
    not, 1, 2, ...; categories are numbered 1 to K in the model's order.

    Args:
        job: continued if it was begun in the folder.
        folder: created if need be.
        processes: each on a GPU of its own, where there are any.

    Raises:
        DataError: after everything else was written, if images could not be read.
        BagsError: if a process ended early.
    """
    folder, images = Path(folder), job.images
    with lock_folder(folder):
        begun = folder / f".parts-{job.fingerprint()}"
        parts = {
            begun / f"{i}.json": images[i : i + PART_SIZE] for i in range(0, len(images), PART_SIZE)
        }
        work = [part for part in parts.items() if not part[0].exists()]
        if 0 < len(work) < len(parts):
            logger.info("%d of %d parts were finished before.", len(parts) - len(work), len(parts))
        if work:
            flags = {"num_gpus": processes, "num_machines": 1, "machine_rank": 0}
            namespace = argparse.Namespace(**flags, dist_url="auto")
            launch(_do_share, namespace, (job, work), remedy="run the same command to go on.")
        failures, seconds = _merge(folder, list(parts), images)
        for path in folder.glob(".parts-*"):
            shutil.rmtree(path)
    rate = len(images) * min(processes, len(parts)) / max(seconds, 1e-9)
    logger.info("%d images at %.1f images a second; results in '%s'.", len(images), rate, folder)
    if failures:
        raise DataError(
            f"{len(failures)} of {len(images)} images could not be read, which are not in "
            f"'{folder}': {failures[0]}"
        )


def judged_detections(predictor: LongTailPredictor, dataset: str | None = None) -> np.ndarray:
    """What is detected in a data set (None: the first of ``DATASETS.TEST``), and what is right.

    Returns:
        Detections (N,) of ``evaluation.thresholds.DETECTION``.

    Raises:
        MissingFileError, DataError: if the data set cannot be read, or has other classes.
    """
    cfg = predictor.cfg
    if not dataset and not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty; name a validation set (--dataset).")
    name = dataset or cfg.DATASETS.TEST[0]
    if name not in DatasetCatalog:
        raise ConfigError(f"Data set '{name}' is not registered (docs/datasets.md).")
    truth = GroundTruth.of_dataset(name, predictor.class_names, cfg.TEST.COMMON_CLASSES_ONLY)
    rows = []
    for record in tqdm(DatasetCatalog.get(name), unit="image"):
        position = truth.image_position(record["image_id"])
        found = predictor(record["file_name"])["instances"]
        found = truth.evaluated_instances(found, position)
        image_id = truth.annotations.images.inside[position]
        rows.append(instances_to_rows(found, image_id, truth.category_ids))
    lvis = MetadataCatalog.get(name).get("evaluator_type") == "lvis"
    return judge(truth, np.concatenate(rows), lvis=lvis)


def _do_share(job: PredictionJob, work: Sequence[tuple[Path, Sequence[str]]]) -> None:
    """This process's share of the parts."""
    rank, world_size = comm.get_rank(), comm.get_world_size()
    if world_size > 1 and not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    predictor, share = LongTailPredictor(job.cfg), work[rank::world_size]
    predictor.thresholds = job.thresholds
    total = sum(len(paths) for _, paths in share)
    progress = tqdm(total=total, unit="image", disable=rank > 0)
    with ThreadPoolExecutor(READERS) as readers, progress:
        for file, paths in share:
            start = time.perf_counter()
            images = list(_detect(predictor, job, paths, readers))
            seconds = time.perf_counter() - start
            content = {"classes": predictor.class_names, "seconds": seconds, "images": images}
            write_json(file, content)
            progress.update(len(paths))


def _detect(predictor, job, paths, readers: ThreadPoolExecutor) -> Iterator[dict]:
    def prepare(path: str) -> dict:
        try:
            return {"file_name": path, **predictor.prepare(path)}
        except BagsError as error:
            logger.warning("%s", error)
            return {"file_name": path, "error": one_sentence(error)}

    records = list(readers.map(prepare, paths))
    yield from (record for record in records if "error" in record)
    readable = [record for record in records if "error" not in record]
    for i in range(0, len(readable), job.batch_size):
        batch = readable[i : i + job.batch_size]
        for record, output in zip(batch, predictor.detect(batch), strict=True):
            found = output["instances"].to("cpu")
            found = found[found.scores >= job.min_score]
            del record["image"]
            yield {**record, "detections": instances_to_coco_json(found, 0)}


def _merge(folder: Path, parts: Sequence[Path], paths: Sequence[str]) -> tuple[list[str], float]:
    """Write the results; what could not be read and why, and the seconds that detecting took."""
    stems = [Path(path).stem for path in paths]
    ids = {path: i for i, path in enumerate(paths, 1)}
    if all(s.isascii() and s.isdigit() for s in stems) and len({*map(int, stems)}) == len(stems):
        ids = {path: int(stem) for path, stem in zip(paths, stems, strict=True)}
    images, failures, names, seconds = [], [], [], 0.0
    results = write_atomically(folder / "detections.json")
    table = write_atomically(folder / "detections.csv")
    with results as results_file, table as table_file:
        writer = csv.writer(table_file)
        writer.writerow(("image", "class", "score", "x", "y", "width", "height"))
        separator = "["
        for path in parts:
            part = load_json(path)
            names, seconds = part["classes"], seconds + part["seconds"]
            for image in part["images"]:
                if "error" in image:
                    failures.append(image["error"])
                    continue
                detections, image_id = image.pop("detections"), ids[image["file_name"]]
                images.append({"id": image_id, **image})
                for found in detections:
                    position = found["category_id"]
                    found.update(image_id=image_id, category_id=position + 1)
                    results_file.write(separator + json.dumps(found))
                    separator = ",\n"
                    box = (round(x, 2) for x in found["bbox"])
                    row = (image["file_name"], names[position], round(found["score"], 5), *box)
                    writer.writerow(row)
        results_file.write("[]\n" if separator == "[" else "]\n")
    categories = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    write_json(folder / "images.json", {"images": images, "categories": categories})
    return failures, seconds
