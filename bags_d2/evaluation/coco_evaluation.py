"""Detectron2's COCO evaluation with AP by training instances."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from pycocotools.cocoeval import COCOeval

from ..utils.files import load_json, write_json
from .bins import DEFAULT_COUNT_THRESHOLDS, ClassReport, Counts
from .ground_truth import GroundTruth


class LongTailCOCOEvaluator(COCOEvaluator):
    """COCO measures, AP by training instances (AP1, AP2, ...) and their mean over the bins (bAP).

    With `output_dir` it also writes `per_class_bbox.csv` and `per_class_segm.csv` there: AP of
    every category. Everything else is Detectron2's.
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
        **kwargs,
    ) -> None:
        """
        Args:
            dataset_name: data set whose metadata has `json_file`, in COCO format.
            tasks, distributed, output_dir, **kwargs: see `COCOEvaluator`.
            class_counts, class_names, common_classes_only, count_thresholds: see
                `LongTailLVISEvaluator`.
        """
        self._truth = GroundTruth.of_dataset(dataset_name, class_names, common_classes_only)
        self._report = ClassReport(self._truth, class_counts, count_thresholds, output_dir)
        # The parent reads a file and keeps the metadata of a name, so it is given both for as long
        # as that takes: the normalized content, with the evaluated categories as classes.
        with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
            json.dump(self._truth.as_coco(None, lvis=False), file)
            file.flush()
            try:
                MetadataCatalog.get(file.name).set(
                    json_file=file.name,
                    thing_classes=[category["name"] for category in self._truth.categories],
                    thing_dataset_id_to_contiguous_id={
                        category["id"]: c for c, category in enumerate(self._truth.categories)
                    },
                )
                super().__init__(file.name, tasks, distributed, output_dir, **kwargs)
            finally:
                MetadataCatalog.pop(file.name)

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take the detections of some images.

        Raises:
            PredictionError: if an image or a class is unknown.
            DataError: if masks are predicted but not annotated.
        """
        for model_input, output in zip(inputs, outputs, strict=True):
            position = self._truth.image_position(model_input["image_id"])
            if "instances" in output:
                if output["instances"].has("pred_masks"):
                    self._truth.truths(position, "segm", lvis=False)  # which refuses boxes alone
                instances = self._truth.evaluated_instances(output["instances"], position)
                output = {**output, "instances": instances}
            image_id = self._truth.annotations.images.inside[position]
            super().process([{**model_input, "image_id": image_id}], [output])

    def evaluate(self, img_ids: Sequence[int | str] | None = None) -> dict:
        """Compute {"bbox": {measure: percent}, "segm": {...}} as the parent does.

        Args:
            img_ids: ids in the file of the images to evaluate; None for all.
        """
        if img_ids is not None:
            inside = self._truth.annotations.images.inside
            img_ids = [inside[self._truth.image_position(i)] for i in img_ids]
        # The parent writes the ids of inside, even if there is no ground truth.
        path = Path(self._output_dir or "", "coco_instances_results.json")
        writes = self._output_dir and (comm.is_main_process() or not self._distributed)
        if writes:
            path.unlink(missing_ok=True)
        results = super().evaluate(img_ids)
        if writes and path.exists() and not self._truth.has_plain_ids:
            write_json(path, self._truth.with_file_ids(load_json(path)))
        return results

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        # Without predictions Detectron2 has no COCOeval, and reports every measure as NaN.
        precision = None if coco_eval is None else coco_eval.eval["precision"]
        return self._report.complete(iou_type, results, precision)
