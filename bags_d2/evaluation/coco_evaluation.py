"""Detectron2's COCO evaluation with AP by training instances."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table
from pycocotools.cocoeval import COCOeval

from ..errors import DataError
from ..utils.files import load_json, write_json
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

__all__ = ["LongTailCOCOEvaluator"]

logger = logging.getLogger(__name__)


class LongTailCOCOEvaluator(COCOEvaluator):
    """COCO measures, AP by training instances (AP1, AP2, ...) and their mean over the bins (bAP).

    Everything else is Detectron2's, the choice of the official COCO API where its compiled one is
    missing included. With `output_dir` it also writes `per_class_{bbox,segm}.csv` there, see
    `write_per_class_csv`.
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
        **kwargs,
    ) -> None:
        """
        Args:
            dataset_name: data set whose metadata has `json_file`, in COCO format.
            tasks: as in `COCOEvaluator`.
            distributed: as in `COCOEvaluator`.
            output_dir: as in `COCOEvaluator`.
            class_counts: (K,) training instances of the model's classes; None leaves out AP1, AP2,
                ... and bAP.
            class_names: as in `LongTailLVISEvaluator`.
            common_classes_only: likewise.
            count_thresholds: bounds of the bins of AP1, AP2, ...
            **kwargs: further arguments of `COCOEvaluator`.

        Raises:
            MissingFileError: if the annotation file does not exist.
            DataError: if it is faulty, or the counts disagree with it.
            ConfigError: if its classes are not the model's.
        """
        self._truth = GroundTruth.of_dataset(dataset_name, class_names, common_classes_only)
        self._count_thresholds = tuple(count_thresholds)
        self._class_counts = None
        if class_counts is None:
            logger.info(
                "AP1, AP2, ... and bAP are left out: they need class_counts, the training "
                "instances of each class."
            )
        else:
            self._class_counts = self._truth.training_instances(class_counts)
            bin_index(self._class_counts, self._count_thresholds)  # reports bad values now

        # The parent reads a file, so it is given one: the normalized content under a name of its
        # own, in whose metadata the classes are the evaluated categories.
        ids = [category["id"] for category in self._truth.category_rows()]
        alias = f"{dataset_name} (normalized)"
        with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
            json.dump(self._coco_format(), file)
            file.flush()
            MetadataCatalog.pop(alias, None)
            MetadataCatalog.get(alias).set(
                json_file=file.name,
                thing_classes=[category["name"] for category in self._truth.categories],
                thing_dataset_id_to_contiguous_id={i: c for c, i in enumerate(ids)},
            )
            super().__init__(alias, tasks, distributed, output_dir, **kwargs)
        position = {category_id: c for c, category_id in enumerate(ids)}
        self._class_of_model = torch.full((self._truth.num_classes,), -1)
        for c, category_id in self._truth.category_of_class.items():
            self._class_of_model[c] = position[category_id]

    def _coco_format(self) -> dict:
        truth, positions = self._truth, range(len(self._truth.annotations.images))
        content = {
            "images": [truth.image_row(position, lvis=False) for position in positions],
            "categories": truth.category_rows(),
        }
        if truth.annotations.has_annotations:
            content["annotations"] = [
                t for position in positions for t in truth.truths(position, None, lvis=False)
            ]
        return content

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take the detections of some images, of the classes that are evaluated.

        Raises:
            DataError: if an image or a class is unknown, or masks are predicted but not annotated.
        """
        images = self._truth.annotations.images
        for model_input, output in zip(inputs, outputs, strict=True):
            position = images.position(model_input["image_id"])
            if position is None:
                raise DataError(
                    f"Predictions are for image {model_input['image_id']}, which "
                    f"{self._truth.path} does not list; evaluate with the annotations of the data "
                    "set that was predicted."
                )
            if "instances" in output:
                instances = output["instances"].to("cpu")
                classes = instances.pred_classes
                if ((classes < 0) | (classes >= len(self._class_of_model))).any():
                    raise DataError(
                        f"Image {model_input['image_id']} has predicted classes up to "
                        f"{int(classes.max())}, but {self._truth.path} has the classes 0 to "
                        f"{len(self._class_of_model) - 1}; correct MODEL.ROI_HEADS.NUM_CLASSES."
                    )
                if instances.has("pred_masks"):
                    self._truth.truths(position, "segm", lvis=False)  # which refuses boxes alone
                instances.pred_classes = self._class_of_model[classes]
                output = {**output, "instances": instances[instances.pred_classes >= 0]}
            super().process([{**model_input, "image_id": images.inside[position]}], [output])

    def evaluate(self, img_ids: Sequence[int | str] | None = None) -> dict:
        """Compute the measures of all processes' predictions.

        Args:
            img_ids: ids of the images to evaluate; None for all.

        Returns:
            {"bbox": {measure: percent}, "segm": {...}}.
        """
        images = self._truth.annotations.images
        if img_ids is not None:
            img_ids = [images.inside[images.position(i)] for i in img_ids]
        results = super().evaluate(img_ids)
        path = os.path.join(self._output_dir or "", "coco_instances_results.json")
        plain = images.are_plain and self._truth.annotations.categories.are_plain
        if results and self._output_dir and not plain:
            detections = load_json(path)
            write_json(path, self._truth.with_file_ids(detections))
        return results

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        # Without predictions Detectron2 has no COCOeval, and reports every measure as NaN.
        ap = ap50 = np.full(len(self._truth.positions), np.nan)
        if coco_eval is not None:
            precision = coco_eval.eval["precision"][..., 0, -1]  # (T, R, K), all sizes
            ap = 100 * per_class_ap(precision)
            ap50 = 100 * per_class_ap(precision[np.isclose(coco_eval.params.iouThrs, 0.5)])

        if self._class_counts is not None:
            bin_aps = ap_per_bin(ap, self._class_counts, self._count_thresholds)
            bin_aps["bAP"] = balanced_ap(bin_aps)
            results.update(bin_aps)
            logger.info(
                "AP by training instances for %s:\n%s\n%s",
                iou_type,
                create_small_table(bin_aps),
                bin_table(ap, self._class_counts, self._count_thresholds),
            )
        if self._output_dir:
            PathManager.mkdirs(self._output_dir)
            write_per_class_csv(
                os.path.join(self._output_dir, f"per_class_{iou_type}.csv"),
                categories=self._truth.categories,
                validation_instances=self._truth.instances,
                ap=ap,
                ap50=ap50,
                class_counts=self._class_counts,
            )
        return results
