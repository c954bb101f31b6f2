"""LVIS evaluation of detections as they arrive, equal to lvis-api's.

lvis-api holds every detection of the data set and matches at the end in Python. Matching one image
needs only that image, so here each image is matched when it is processed (by hotcoco) and only the
matches are kept and sent between processes: about 0.6 kB per image instead of 300 detections.
"""

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table
from hotcoco import COCOeval, StreamingEval

from ..data.annotations import read_annotations
from ..errors import ConfigError, DataError
from ..utils.files import write_atomically
from .ap_fixed import BestDetections, evaluate_without_image_cap
from .bins import DEFAULT_COUNT_THRESHOLDS, ClassReport, Counts
from .detections import (
    IMAGE,
    SCORE,
    best_rows,
    instances_to_rows,
    masks_of,
    match,
    matchable,
    to_rows,
)
from .ground_truth import GroundTruth, PredictionError

logger = logging.getLogger(__name__)

# hotcoco's StreamingEval applies the cap of the LVIS challenge whatever it is asked for.
MAX_DETS_LIMIT = 300

_TASKS = ("bbox", "segm")

# What a faulty annotation file raises, under the name that evaluation has always exported.
AnnotationError = DataError


def evaluate_lvis_predictions(
    json_file: str | os.PathLike,
    detections: Iterable[Mapping],
    iou_type: str = "bbox",
    *,
    class_counts: Counts | None = None,
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
        class_counts, count_thresholds, max_dets_per_image: see `LongTailLVISEvaluator`; classes are
            in ascending category id order.

    Returns:
        Measure -> percent: AP, AP50, AP75, APs, APm, APl, APr, APc, APf, AR@300, ARs@300, ARm@300,
        ARl@300, AP1, AP2, ..., bAP. NaN where nothing in the ground truth defines the measure.

    Raises:
        MissingFileError, DataError, ConfigError: as `LongTailLVISEvaluator`.
        PredictionError: for unknown images or categories, missing masks and non-finite numbers.
    """
    _check_options((iou_type,), max_dets_per_image)
    truth = GroundTruth(read_annotations(json_file))
    if not truth.annotations.has_annotations:
        raise DataError(f"'{truth.path}' has no annotations to evaluate against.")
    truth.annotations.require_federated()
    report = ClassReport(truth, class_counts, count_thresholds)

    rows, masks = to_rows(truth.with_inside_ids(detections), (iou_type,))
    kept = np.sort(best_rows(rows, IMAGE, max_dets_per_image))
    rows, masks = matchable(rows[kept], masks[kept], iou_type)
    evaluation = match(truth, rows, masks, iou_type, lvis=True)
    return _measures(evaluation, report, iou_type, f"@{max_dets_per_image}")


class LongTailLVISEvaluator(DatasetEvaluator):
    """LVIS measures, AP by training instances (AP1, AP2, ...) and their mean over the bins (bAP).

    The measures that lvis-api has are equal to lvis-api's. Every image of the annotation file
    counts, as there: one that was never processed counts as an image without detections.

    With `output_dir` it writes there

    - `lvis_instances_results.json`: all detections in LVIS results format, for the LVIS server or
      `evaluate_lvis_predictions`. It appears when `evaluate` is called. Each of several processes
      writes its own list, `lvis_instances_results_rank{i}.json`, because gathering the detections
      would cost what streaming saves.
    - `per_class_bbox.csv`, `per_class_segm.csv`: AP of every category.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        class_counts: Counts | None = None,
        class_names: Sequence[str] | None = None,
        common_classes_only: bool = False,
        count_thresholds: Sequence[int] = DEFAULT_COUNT_THRESHOLDS,
        max_dets_per_image: int = MAX_DETS_LIMIT,
        detections_per_class: int | None = None,
    ) -> None:
        """
        Args:
            dataset_name: data set whose metadata has `json_file`, in LVIS format.
            tasks: "bbox", "segm" or both. None: "bbox", and "segm" if any process sees masks.
            distributed: the main process evaluates the detections of all processes. Otherwise
                each process evaluates its own.
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
                detections of each class over the data set, as "bbox_fixed" and "segm_fixed".

        Raises:
            MissingFileError: if the annotation file does not exist.
            DataError: if it is not in LVIS format, or class counts or metadata disagree with it.
            ConfigError: for arguments out of range, and classes that are not the model's.
        """
        _check_options(_TASKS if tasks is None else tasks, max_dets_per_image)
        if detections_per_class is not None and detections_per_class < 1:
            raise ConfigError(
                f"detections_per_class (TEST.DETECTIONS_PER_CLASS) is {detections_per_class}: set "
                "it to 1 or more."
            )
        self._tasks = tasks
        self._distributed = distributed
        self._output_dir = output_dir
        self._max_dets_per_image = max_dets_per_image
        self._detections_per_class = detections_per_class
        self._truth = GroundTruth.of_dataset(dataset_name, class_names, common_classes_only)
        if self._truth.annotations.has_annotations:
            self._truth.annotations.require_federated()
        self._report = ClassReport(self._truth, class_counts, count_thresholds, output_dir)

    def reset(self) -> None:
        """Forget all predictions, and start a new results file if one is written."""
        self._streams = {task: self._new_stream(task) for task in self._tasks or _TASKS}
        per_class = self._detections_per_class
        self._best = None if per_class is None else BestDetections(per_class)
        self._seen: set[int] = set()
        self._mask_presence: set[bool] = set()
        self._results_file = None  # drops that of an evaluation that ended early
        if self._output_dir:
            part = f"_rank{comm.get_rank()}" if comm.get_world_size() > 1 else ""
            name = f"lvis_instances_results{part}.json"
            self._results_file = _JsonListFile(os.path.join(self._output_dir, name))

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Match the detections of some images with their ground truth.

        Args:
            inputs: Detectron2's model inputs; "image_id" is read.
            outputs: for each image {"instances": Instances} with pred_boxes (XYXY, pixels),
                scores, pred_classes and perhaps pred_masks, (N, H, W) of the original image.

        Raises:
            PredictionError: for unknown images or classes, non-finite numbers, and missing masks.
        """
        truth = self._truth
        for model_input, output in zip(inputs, outputs, strict=True):
            position = truth.image_position(model_input["image_id"])
            image_id = truth.annotations.images.inside[position]
            if image_id in self._seen:
                logger.warning("Image %s came twice; its first detections count.", image_id)
                continue
            if "instances" not in output:
                raise PredictionError(
                    f"The model's output for image {model_input['image_id']} has no 'instances': "
                    "LVIS evaluation needs detections, not proposals."
                )
            self._seen.add(image_id)
            instances = truth.evaluated_instances(output["instances"], position)
            # The mask head of an image without detections may leave no pred_masks.
            has_masks = instances.has("pred_masks")
            if has_masks or len(instances):
                self._mask_presence.add(has_masks)
            tasks = self._streams.keys()
            if not has_masks and not (self._tasks and len(instances)):
                tasks = tasks & {"bbox"}
            rows = instances_to_rows(instances, image_id, truth.category_ids)
            masks, detections = np.full(len(rows), None), []
            if "segm" in tasks or self._results_file is not None:
                detections = instances_to_coco_json(instances, image_id)
                for detection in detections:
                    detection["category_id"] = truth.categories[detection["category_id"]]["id"]
            if "segm" in tasks:
                masks = masks_of(detections, tasks)
            if truth.annotations.has_annotations:
                for task in tasks:
                    self._match(self._streams[task], task, position, rows, masks)
            if self._best is not None:
                self._best.add(rows, masks)
            if self._results_file is not None:
                self._results_file.write(truth.with_file_ids(detections))

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Compute the measures of all processes' predictions.

        Returns:
            {"bbox": {measure: percent}, "segm": {...}}; see `evaluate_lvis_predictions`. Empty
            where the process is not the main one, and if there is no ground truth.

        Raises:
            PredictionError: if the images disagree on whether predictions have masks.
        """
        if self._results_file is not None:
            self._results_file.close()
            self._results_file = None
        if self._best is not None:
            self._best.detections()  # no process sends more than it keeps
        parts = [(self._streams, self._best, self._seen, self._mask_presence)]
        if self._distributed:
            comm.synchronize()
            parts = comm.gather(parts[0], dst=0)
            if not comm.is_main_process():
                return {}

        truth = self._truth
        if not truth.annotations.has_annotations:
            logger.info("%s has no annotations, so nothing is evaluated.", truth.path)
            return {}
        streams, best, seen, mask_presence = zip(*parts, strict=True)
        self._warn_of_coverage(seen)
        merged = None
        if self._best is not None:
            merged = BestDetections.merge(best, seen)
            logger.info(
                "AP-fixed: %d of %d classes have %d detections; more of them need a larger "
                "TEST.DETECTIONS_PER_IMAGE.",
                *(merged.num_full_classes(), len(truth.classes), merged.per_class),
            )
        have_masks = set().union(*mask_presence)
        if not self._tasks and len(have_masks) == 2:
            raise PredictionError(
                "Some images have pred_masks and others do not: pass tasks=('bbox',) to evaluate "
                "boxes only."
            )
        results = {}
        for task in self._tasks or (_TASKS if True in have_masks else ("bbox",)):
            # When streams share an image, the last one counts. With all images empty in the first
            # stream, those that nobody processed are counted without knowing which they are.
            empty = self._new_stream(task)
            for position in range(len(truth.annotations.images)):
                self._match(empty, task, position, *to_rows((), ()))
            evaluation = StreamingEval.merge([empty, *(s[task] for s in streams)]).finalize()
            recall_suffix = f"@{self._max_dets_per_image}"
            results[task] = _measures(evaluation, self._report, task, recall_suffix)
            if merged is not None:
                evaluation = evaluate_without_image_cap(truth, merged, task)
                results[f"{task}_fixed"] = _measures(evaluation, self._report, f"{task}_fixed", "")
        for task, metrics in results.items():
            shown = {name: "-" if math.isnan(value) else value for name, value in metrics.items()}
            logger.info("Evaluation results for %s:\n%s", task, create_small_table(shown))
        return results

    def _new_stream(self, task: str) -> StreamingEval:
        return StreamingEval(self._truth.categories, task, lvis_style=True)

    def _match(
        self, stream: StreamingEval, task: str, position: int, rows: np.ndarray, masks: np.ndarray
    ) -> None:
        """Match one image's detections (see `to_rows`) with its ground truth.

        In lvis-api's order: the cap comes first and over all classes, so a detection without area
        takes a place from a better one; equal scores keep the order in which they come.
        """
        kept = np.argsort(-rows[:, SCORE], kind="stable")[: self._max_dets_per_image]
        rows, masks = matchable(rows[kept], masks[kept], task)
        truths = self._truth.truths(position, task, lvis=True)
        stream.update([self._truth.image_row(position)], truths, rows, segmentation=masks)

    def _warn_of_coverage(self, seen: Sequence[set[int]]) -> None:
        num_images, num_seen = len(self._truth.annotations.images), len(set().union(*seen))
        repeated, unseen = sum(map(len, seen)) - num_seen, num_images - num_seen
        if repeated:
            logger.warning("%d images were processed by two processes; one counts.", repeated)
        if unseen:
            logger.warning(
                "%d of %d images were not processed and count as images without detections.",
                *(unseen, num_images),
            )


class _JsonListFile:
    """Writes dicts to a JSON list one by one, so that no detection has to be kept."""

    def __init__(self, path: str) -> None:
        self._context = write_atomically(path)
        self._file = self._context.__enter__()
        self._file.write("[")
        self._separator = ""

    def write(self, entries: Iterable[dict]) -> None:
        try:
            for entry in entries:
                self._file.write(self._separator + json.dumps(entry))
                self._separator = ",\n"
        except OSError as error:  # as on a full disk, which is reported as of any other file
            self._context.__exit__(type(error), error, error.__traceback__)

    def close(self) -> None:
        self._file.write("]\n")
        self._context.__exit__(None, None, None)


def _measures(
    evaluation: COCOeval, report: ClassReport, task: str, recall_suffix: str
) -> dict[str, float]:
    """Measures in percent, NaN where nothing defines them; and the report of classes."""
    evaluation.accumulate()
    evaluation.summary_lines()  # computes the measures, and prints nothing
    metrics = {
        name.replace("@300", recall_suffix): 100 * float(value) if value > -1 else math.nan
        for name, value in zip(evaluation.metric_keys(), evaluation.stats, strict=True)
    }
    return report.complete(task, metrics, evaluation.eval["precision"])


def _check_options(tasks: Iterable[str], max_dets: int) -> None:
    if not tasks or isinstance(tasks, str) or not set(tasks) <= set(_TASKS):
        raise ConfigError(f"tasks must be a tuple of 'bbox' and 'segm', not {tasks!r}.")
    if not 1 <= max_dets <= MAX_DETS_LIMIT:
        raise ConfigError(
            f"max_dets_per_image (TEST.DETECTIONS_PER_IMAGE) is {max_dets}: set it between 1 and "
            f"{MAX_DETS_LIMIT}, the limit of the LVIS challenge."
        )
