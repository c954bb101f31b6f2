"""LVIS evaluation of detections as they arrive, equal to lvis-api's.

lvis-api holds every detection of the data set and matches at the end in Python. Matching one image
needs only that image, so here each image is matched when it is processed (by hotcoco) and only the
matches are kept and sent between processes: about 0.6 kB per image instead of 300 detections.
"""

from __future__ import annotations

import json
import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pycocotools.mask as mask_utils
import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table
from hotcoco import COCOeval, StreamingEval

from ..errors import ConfigError, DataError
from .ap_fixed import BestDetections, run_without_image_cap
from .bins import (
    DEFAULT_COUNT_THRESHOLDS,
    ap_per_bin,
    balanced_ap,
    bin_index,
    bin_table,
    per_class_ap,
    write_per_class_csv,
)
from .ground_truth import GroundTruth

__all__ = [
    "AnnotationError",
    "LVISResult",
    "LongTailLVISEvaluator",
    "PredictionError",
    "evaluate_lvis_predictions",
]

logger = logging.getLogger(__name__)

TASKS = ("bbox", "segm")
# hotcoco's StreamingEval applies the cap of the LVIS challenge whatever it is asked for.
MAX_DETS_LIMIT = 300

_FREQUENCIES = ("r", "c", "f")
_GEOMETRY_KEY = {"bbox": "bbox", "segm": "segmentation"}

# What a faulty annotation file raises, under the name that evaluation has always exported.
AnnotationError = DataError


class PredictionError(DataError):
    """Predictions do not fit the annotation file, or are not numbers."""


@dataclass(frozen=True)
class LVISResult:
    """Measures of one IoU type, all in percent; NaN where no class or object defines them.

    Attributes:
        metrics: AP, AP50, ..., AR@300 and, with training counts, AP1, ..., bAP.
        ap: (C,) AP of each evaluated category, in id order.
        ap50: (C,) AP at IoU 0.5.
    """

    metrics: dict[str, float]
    ap: np.ndarray
    ap50: np.ndarray


def evaluate_lvis_predictions(
    json_file: str | os.PathLike,
    detections: Iterable[Mapping],
    iou_type: str = "bbox",
    *,
    class_counts: Sequence[int] | np.ndarray | torch.Tensor | None = None,
    count_thresholds: Sequence[int] = DEFAULT_COUNT_THRESHOLDS,
    max_dets_per_image: int = MAX_DETS_LIMIT,
) -> dict[str, float]:
    """Evaluate detections in LVIS results format.

    Masks are measured by their own area, not their box's, as Detectron2's LVIS evaluator does.

    Args:
        json_file: LVIS annotations with ground truth.
        detections: dicts with "image_id", "category_id", "score" and "bbox" (XYWH, pixels) or
            "segmentation" (compressed run-length code). Images without any count as empty.
        iou_type: "bbox" or "segm".
        class_counts: (K,) training instances in ascending category id order; None leaves out
            AP1, AP2, ... and bAP.
        count_thresholds: bounds of the bins of AP1, AP2, ...
        max_dets_per_image: the highest scores kept in an image, over all classes; at most 300.

    Returns:
        Measure -> percent: AP, AP50, AP75, APs, APm, APl, APr, APc, APf, AR@300, ARs@300, ARm@300,
        ARl@300, AP1.., bAP.
        NaN where nothing in the ground truth defines the measure.

    Raises:
        MissingFileError: if there is no such file.
        PredictionError: for unknown images or categories and non-finite numbers.
        ConfigError: for an unknown `iou_type` or `max_dets_per_image` out of range.
        DataError: for an annotation file that is not in LVIS format, and class counts that do not
            fit.
    """
    _check_tasks((iou_type,))
    _check_max_dets(max_dets_per_image)
    truth = GroundTruth(json_file)
    if not truth.annotations.has_annotations:
        raise DataError(f"'{truth.path}' has no annotations to evaluate against.")
    truth.annotations.require_federated()
    counts = None if class_counts is None else truth.training_instances(class_counts)

    images, categories = truth.annotations.images, truth.annotations.categories
    by_image: list[list[dict]] = [[] for _ in range(len(images))]
    for detection in detections:
        position = _image_position(detection["image_id"], truth)
        category = categories.position(detection["category_id"])
        if category is None:
            raise PredictionError(
                f"A detection in image {detection['image_id']} is of category "
                f"{detection['category_id']}, which {truth.path} does not list; use the file's "
                "category ids."
            )
        ids = {"image_id": images.inside[position], "category_id": categories.inside[category]}
        by_image[position].append({**detection, **ids})
    stream = StreamingEval(truth.category_rows(), iou_type, lvis_style=True)
    for position, image_detections in enumerate(by_image):
        _check_detections(image_detections, iou_type)
        _update(stream, truth, iou_type, position, image_detections, max_dets_per_image)
    return _summarize(
        stream.finalize(), truth, counts, count_thresholds, f"@{max_dets_per_image}"
    ).metrics


class LongTailLVISEvaluator(DatasetEvaluator):
    """LVIS measures, AP by training instances (AP1, AP2, ...) and their mean over the bins (bAP).

    The measures that lvis-api has are equal to lvis-api's. Every image of the annotation file
    counts, as there: one that was never processed counts as an image without detections.

    With `output_dir` it writes there

    - `lvis_instances_results.json`: all detections in LVIS results format, for the LVIS server or
      `evaluate_lvis_predictions`. Of several processes each writes its own part,
      `lvis_instances_results_rank{i}.json`, because gathering the detections would cost what
      streaming saves; the whole is the concatenation of the lists.
    - `per_class_bbox.csv`, `per_class_segm.csv`: AP of every category, see `write_per_class_csv`.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        class_counts: Sequence[int] | np.ndarray | torch.Tensor | None = None,
        class_names: Sequence[str] | None = None,
        common_classes_only: bool = False,
        count_thresholds: Sequence[int] = DEFAULT_COUNT_THRESHOLDS,
        max_dets_per_image: int = MAX_DETS_LIMIT,
        detections_per_class: int | None = None,
    ) -> None:
        """
        Args:
            dataset_name: registered data set whose metadata has `json_file`, in LVIS format.
            tasks: "bbox", "segm" or both. None: "bbox", and "segm" if any process sees masks.
            distributed: merge the processes' results; the main process evaluates. Otherwise
                each process evaluates what it saw.
            output_dir: folder for the files above; None writes nothing.
            class_counts: (K,) training instances of the model's classes; None leaves out AP1, AP2,
                ... and bAP.
            class_names: K names of the model's classes, by which the data set's are found; None if
                the model has the data set's classes in their order.
            common_classes_only: evaluate the classes that the two have in common, instead of
                refusing a data set of others.
            count_thresholds: bounds of the bins of AP1, AP2, ...
            max_dets_per_image: the highest scores kept in an image, over all classes; at most 300.
            detections_per_class: also measure AP-fixed (`evaluation/ap_fixed.py`), with this many
                detections of each class over the data set, as "bbox_fixed" and "segm_fixed". It
                sees all detections of an image, of which the detector should give many.

        Raises:
            MissingFileError: if the annotation file does not exist.
            DataError: if it is not in LVIS format, or class counts or metadata disagree with it.
            ConfigError: for arguments out of range, and classes that are not the model's.
        """
        if tasks is not None:
            _check_tasks(tasks)
        _check_max_dets(max_dets_per_image)
        self._tasks = None if tasks is None else tuple(tasks)
        self._distributed = distributed
        self._output_dir = output_dir
        self._count_thresholds = tuple(count_thresholds)
        self._max_dets_per_image = max_dets_per_image
        if detections_per_class is not None and detections_per_class < 1:
            raise ConfigError(
                f"detections_per_class (TEST.DETECTIONS_PER_CLASS) is {detections_per_class}: set "
                "it to 1 or more."
            )
        self._detections_per_class = detections_per_class

        self._truth = GroundTruth.of_dataset(dataset_name, class_names, common_classes_only)
        if self._truth.annotations.has_annotations:
            self._truth.annotations.require_federated()
        self._class_counts = None
        if class_counts is None:
            logger.info(
                "AP1, AP2, ... and bAP are left out: they need class_counts, the training "
                "instances of each class."
            )
        else:
            self._class_counts = self._truth.training_instances(class_counts)
            bin_index(self._class_counts, self._count_thresholds)  # reports bad values now

    def reset(self) -> None:
        """Forget all predictions, and start a new results file if one is written."""
        self._streams = {
            task: StreamingEval(self._truth.category_rows(), task, lvis_style=True)
            for task in self._tasks or TASKS
        }
        self._best = None
        if self._detections_per_class is not None:
            self._best = BestDetections(
                self._detections_per_class, with_masks="segm" in self._streams
            )
        self._seen: set[int] = set()
        self._mask_presence: set[bool] = set()
        self._writer = None
        if self._output_dir:
            PathManager.mkdirs(self._output_dir)
            self._writer = _JsonListWriter(os.path.join(self._output_dir, _results_file_name()))

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Match the detections of some images with their ground truth.

        Args:
            inputs: Detectron2's model inputs; "image_id" is read.
            outputs: for each image {"instances": Instances} with pred_boxes (XYXY, pixels),
                scores, pred_classes and perhaps pred_masks, (N, H, W) of the original image.

        Raises:
            PredictionError: for unknown images or classes, non-finite numbers, and missing masks.
        """
        for model_input, output in zip(inputs, outputs, strict=True):
            position = _image_position(model_input["image_id"], self._truth)
            image_id = self._truth.annotations.images.inside[position]
            if image_id in self._seen:
                logger.warning("Image %s came twice; its first detections stay.", image_id)
                continue
            if "instances" not in output:
                raise PredictionError(
                    f"The model's output for image {image_id} has no 'instances': LVIS "
                    "evaluation needs detections, not proposals."
                )
            self._seen.add(image_id)
            instances = output["instances"].to("cpu")
            # The mask head of an image without detections may leave no pred_masks.
            has_masks = instances.has("pred_masks")
            if has_masks or len(instances):
                self._mask_presence.add(has_masks)
            detections = self._to_lvis_format(instances, image_id)
            if self._truth.annotations.has_annotations:
                self._match(position, image_id, detections, has_masks)
            if self._writer is not None:
                self._writer.write(self._truth.with_file_ids(detections))

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """Compute the measures of all processes' predictions.

        Returns:
            {"bbox": {measure: percent}, "segm": {...}}; see `evaluate_lvis_predictions`. Empty
            where the process is not the main one, and if there is no ground truth.

        Raises:
            PredictionError: if the images disagree on whether predictions have masks.
        """
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._best is not None:
            self._best.prune()  # no process sends more than it keeps
        parts = [(self._streams, self._best, self._seen, self._mask_presence)]
        if self._distributed:
            comm.synchronize()
            parts = comm.gather(parts[0], dst=0)
            if not comm.is_main_process():
                return OrderedDict()
        if not self._truth.annotations.has_annotations:
            logger.info("%s has no annotations, so nothing is evaluated.", self._truth.path)
            return OrderedDict()

        streams, best, seen, mask_presence = zip(*parts, strict=True)
        self._report_coverage(seen)
        merged = None
        if self._best is not None:
            merged = _merge_best(best, seen)
            logger.info(
                "AP-fixed: %d of %d classes have %d detections; more of them need a larger "
                "TEST.DETECTIONS_PER_IMAGE.",
                merged.num_full_classes(),
                len(self._truth.positions),
                merged.per_class,
            )
        results = OrderedDict()
        for task in self._tasks or _tasks_of_predictions(set().union(*mask_presence)):
            results[task] = self._evaluate_task(task, [s[task] for s in streams])
            if merged is not None:
                results[f"{task}_fixed"] = self._evaluate_fixed(task, merged)
        return results

    def _to_lvis_format(self, instances: Instances, image_id: int) -> list[dict]:
        classes = instances.pred_classes
        if ((classes < 0) | (classes >= self._truth.num_classes)).any():
            raise PredictionError(
                f"Image {image_id} has predicted classes from {int(classes.min())} to "
                f"{int(classes.max())}, but {self._truth.path} has the classes 0 to "
                f"{self._truth.num_classes - 1}: set MODEL.ROI_HEADS.NUM_CLASSES to "
                f"{self._truth.num_classes}."
            )
        finite = instances.scores.isfinite().all() and instances.pred_boxes.tensor.isfinite().all()
        _require_finite(finite, image_id)
        detections = []
        for detection in instances_to_coco_json(instances, image_id):
            category_id = self._truth.category_of_class.get(detection["category_id"])
            if category_id is not None:  # else of a class that is not evaluated
                detections.append({**detection, "category_id": category_id})
        return detections

    def _match(self, position: int, image_id: int, detections: list[dict], has_masks: bool) -> None:
        for task, stream in self._streams.items():
            if task == "segm" and not has_masks:
                if self._tasks is not None and detections:
                    raise PredictionError(
                        f"The task 'segm' needs masks, but image {image_id} has no pred_masks: "
                        "set MODEL.MASK_ON to True or leave the task out."
                    )
                continue
            _update(stream, self._truth, task, position, detections, self._max_dets_per_image)
        if self._best is not None:
            self._best.add(image_id, detections)

    def _report_coverage(self, seen: Sequence[set[int]]) -> None:
        union = set().union(*seen)
        repeated = sum(map(len, seen)) - len(union)
        if repeated:
            logger.warning("%d images were processed by two processes; one counts.", repeated)
        unseen = len(self._truth.annotations.images) - len(union)
        if unseen:
            logger.warning(
                "%d of %d images were not processed and count as images without detections.",
                unseen,
                len(self._truth.annotations.images),
            )

    def _evaluate_task(self, task: str, streams: Sequence[StreamingEval]) -> dict[str, float]:
        # When streams share an image, the last one counts. With all images empty in the first
        # stream, those that nobody processed are counted without knowing which they are.
        empty = StreamingEval(self._truth.category_rows(), task, lvis_style=True)
        for position in range(len(self._truth.annotations.images)):
            _update(empty, self._truth, task, position, (), self._max_dets_per_image)
        evaluation = StreamingEval.merge([empty, *streams]).finalize()
        return self._report(task, evaluation, f"@{self._max_dets_per_image}")

    def _evaluate_fixed(self, task: str, best: BestDetections) -> dict[str, float]:
        truth, positions = self._truth, range(len(self._truth.annotations.images))
        evaluation = run_without_image_cap(
            [truth.image_row(position, lvis=True) for position in positions],
            truth.category_rows(),
            [t for position in positions for t in truth.truths(position, task, lvis=True)],
            best,
            task,
        )
        return self._report(f"{task}_fixed", evaluation, "")

    def _report(self, task: str, evaluation: COCOeval, recall_suffix: str) -> dict[str, float]:
        """Summarise, log, and write the table of classes."""
        result = _summarize(
            evaluation, self._truth, self._class_counts, self._count_thresholds, recall_suffix
        )
        logger.info("Evaluation results for %s:\n%s", task, create_small_table(result.metrics))
        if self._class_counts is not None:
            table = bin_table(result.ap, self._class_counts, self._count_thresholds)
            logger.info("AP by training instances for %s:\n%s", task, table)
        if self._output_dir:
            write_per_class_csv(
                os.path.join(self._output_dir, f"per_class_{task}.csv"),
                categories=self._truth.categories,
                validation_instances=self._truth.instances,
                ap=result.ap,
                ap50=result.ap50,
                class_counts=self._class_counts,
            )
        return result.metrics


class _JsonListWriter:
    """Writes dicts to a JSON list one by one, so that no detection has to be kept."""

    def __init__(self, path: str) -> None:
        self._file = PathManager.open(path, "w")
        self._file.write("[")
        self._separator = ""

    def write(self, entries: Iterable[dict]) -> None:
        for entry in entries:
            self._file.write(self._separator + json.dumps(entry))
            self._separator = ",\n"

    def close(self) -> None:
        self._file.write("]\n")
        self._file.close()


def _results_file_name() -> str:
    part = f"_rank{comm.get_rank()}" if comm.get_world_size() > 1 else ""
    return f"lvis_instances_results{part}.json"


def _tasks_of_predictions(mask_presence: set[bool]) -> tuple[str, ...]:
    if mask_presence == {True, False}:
        raise PredictionError(
            "Some images have pred_masks and others do not: pass tasks=('bbox',) to evaluate "
            "boxes only."
        )
    return TASKS if mask_presence == {True} else ("bbox",)


def _merge_best(best: Sequence[BestDetections], seen: Sequence[set[int]]) -> BestDetections:
    """Merge into the first part; an image that two processes saw counts once."""
    merged, merged_images = best[0], set(seen[0])
    for part, images in zip(best[1:], seen[1:], strict=True):
        merged.merge(part, without_images=images & merged_images)
        merged_images |= images
    return merged


def _update(
    stream: StreamingEval,
    truth: GroundTruth,
    iou_type: str,
    position: int,
    detections: Sequence[Mapping],
    max_dets: int,
) -> None:
    """Match one image's detections (LVIS results format) with its ground truth."""
    stream.update(
        [truth.image_row(position, lvis=True)],
        truth.truths(position, iou_type, lvis=True),
        _prepare_detections(detections, iou_type, max_dets),
    )


def _prepare_detections(detections: Sequence[Mapping], iou_type: str, max_dets: int) -> list[dict]:
    """Cap and filter one image's detections in lvis-api's order.

    The cap comes first and over all classes, so a detection without area takes a place from a
    better one; equal scores keep the order in which the detector gave them.
    """
    if not detections:
        return []
    kept = detections
    if len(kept) > max_dets:
        kept = sorted(kept, key=lambda detection: -detection["score"])[:max_dets]
    if iou_type == "segm":
        # One by one: pycocotools' area of a list fails beyond 255 masks with numpy 2.
        areas = [mask_utils.area(detection["segmentation"]) for detection in kept]
    else:
        areas = [detection["bbox"][2] * detection["bbox"][3] for detection in kept]
    # hotcoco takes the area of a box that is there for the area of the mask, so it gets no box.
    keys = ("image_id", "category_id", "score", _GEOMETRY_KEY[iou_type])
    return [
        # Most have these keys and no others, as Detectron2 makes them without masks.
        detection if len(detection) == len(keys) else {key: detection[key] for key in keys}
        for detection, area in zip(kept, areas, strict=True)
        if area > 0
    ]


def _summarize(
    evaluation: COCOeval,
    truth: GroundTruth,
    class_counts: np.ndarray | None,
    count_thresholds: Sequence[int],
    recall_suffix: str,
) -> LVISResult:
    evaluation.accumulate()
    precision = evaluation.eval["precision"][..., -1]  # (T, R, K, areas)
    recall = evaluation.eval["recall"][..., -1]  # (T, K, areas)
    iou_thresholds = np.array(evaluation.params.iou_thrs)
    at_50, at_75 = (np.isclose(iou_thresholds, iou) for iou in (0.5, 0.75))
    every_size, small, medium, large = range(4)
    of_frequency = {
        frequency: [c["frequency"] == frequency for c in truth.categories]
        for frequency in _FREQUENCIES
    }

    metrics = {
        "AP": _percent(precision[..., every_size]),
        "AP50": _percent(precision[at_50, ..., every_size]),
        "AP75": _percent(precision[at_75, ..., every_size]),
        "APs": _percent(precision[..., small]),
        "APm": _percent(precision[..., medium]),
        "APl": _percent(precision[..., large]),
        **{
            f"AP{frequency}": _percent(precision[:, :, classes, every_size])
            for frequency, classes in of_frequency.items()
        },
        **{
            f"AR{name}{recall_suffix}": _percent(recall[..., size])
            for name, size in (("", every_size), ("s", small), ("m", medium), ("l", large))
        },
    }
    ap = 100 * per_class_ap(precision[..., every_size])
    if class_counts is not None:
        bin_aps = ap_per_bin(ap, class_counts, count_thresholds)
        metrics.update(bin_aps, bAP=balanced_ap(bin_aps))
    return LVISResult(metrics, ap, ap50=100 * per_class_ap(precision[at_50, ..., every_size]))


def _percent(values: np.ndarray) -> float:
    """Mean of the defined entries in percent; -1 marks what has no ground truth."""
    defined = values[values > -1]
    return 100 * float(defined.mean()) if defined.size else float("nan")


def _image_position(image_id: int | str, truth: GroundTruth) -> int:
    position = truth.annotations.images.position(image_id)
    if position is None:
        raise PredictionError(
            f"Predictions are for image {image_id}, which {truth.path} does not list: evaluate "
            "with the annotations of the data set that was predicted."
        )
    return position


def _check_detections(detections: Sequence[Mapping], iou_type: str) -> None:
    geometry = _GEOMETRY_KEY[iou_type]
    for detection in detections:
        if geometry not in detection:
            raise PredictionError(
                f"A detection in image {detection['image_id']} has no '{geometry}', which the "
                f"evaluation of '{iou_type}' needs: add it, or evaluate the other type."
            )
    _check_finite(detections)


def _check_finite(detections: Sequence[Mapping]) -> None:
    values = [value for d in detections for value in (d["score"], *d.get("bbox", ()))]
    if detections:
        _require_finite(np.isfinite(values).all(), detections[0]["image_id"])


def _require_finite(finite: bool | np.bool_ | torch.Tensor, image_id: int) -> None:
    if not finite:
        raise PredictionError(
            f"Image {image_id} has a score or box that is not finite: the model has diverged, or "
            "its checkpoint is damaged."
        )


def _check_tasks(tasks: Sequence[str]) -> None:
    if not tasks or isinstance(tasks, str) or not set(tasks) <= set(TASKS):
        raise ConfigError(f"tasks must be a tuple of 'bbox' and 'segm', not {tasks!r}.")


def _check_max_dets(max_dets: int) -> None:
    if not 1 <= max_dets <= MAX_DETS_LIMIT:
        raise ConfigError(
            f"max_dets_per_image (TEST.DETECTIONS_PER_IMAGE) is {max_dets}: set it between 1 and "
            f"{MAX_DETS_LIMIT}, the limit of the LVIS challenge."
        )
