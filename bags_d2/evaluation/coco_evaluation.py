"""Detectron2's COCO evaluation with AP by training instances."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table
from pycocotools.cocoeval import COCOeval

from .bins import (
    DEFAULT_COUNT_THRESHOLDS,
    ap_per_bin,
    balanced_ap,
    bin_index,
    bin_table,
    check_class_counts,
    contiguous_classes,
    per_class_ap,
    write_per_class_csv,
)

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
        count_thresholds: Sequence[int] = DEFAULT_COUNT_THRESHOLDS,
        **kwargs,
    ) -> None:
        """
        Args:
            dataset_name: registered data set in COCO format.
            tasks: as in `COCOEvaluator`.
            distributed: as in `COCOEvaluator`.
            output_dir: as in `COCOEvaluator`.
            class_counts: (K,) training instances per contiguous class; None leaves out AP1, AP2,
                ... and bAP.
            count_thresholds: bounds of the bins of AP1, AP2, ...
            **kwargs: further arguments of `COCOEvaluator`.

        Raises:
            DataError: if the counts or the data set's class order disagree with its annotations.
        """
        super().__init__(dataset_name, tasks, distributed, output_dir, **kwargs)
        self._count_thresholds = tuple(count_thresholds)
        category_ids = sorted(self._coco_api.getCatIds())
        classes = contiguous_classes(
            category_ids,
            self._metadata.get("thing_dataset_id_to_contiguous_id"),
            self._metadata.json_file,
        )
        # COCOeval orders classes by category id, so the counts are brought into that order.
        self._class_counts = None
        if class_counts is None:
            logger.info(
                "AP1, AP2, ... and bAP are left out: they need class_counts, the training "
                "instances of each class."
            )
        else:
            self._class_counts = check_class_counts(class_counts, len(category_ids))[classes]
            bin_index(self._class_counts, self._count_thresholds)  # reports bad values now

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        # Without predictions Detectron2 has no COCOeval, and reports every measure as NaN.
        ap = ap50 = np.full(len(self._coco_api.getCatIds()), np.nan)
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
                categories=self._coco_api.loadCats(sorted(self._coco_api.getCatIds())),
                validation_instances=self._instances_per_category(coco_eval),
                ap=ap,
                ap50=ap50,
                class_counts=self._class_counts,
            )
        return results

    def _instances_per_category(self, coco_eval: COCOeval | None) -> list[int]:
        """Count the ground truth of each category; crowds are not evaluated as objects."""
        image_ids = self._coco_api.getImgIds() if coco_eval is None else coco_eval.params.imgIds
        annotations = self._coco_api.loadAnns(self._coco_api.getAnnIds(imgIds=list(image_ids)))
        counts = Counter(a["category_id"] for a in annotations if not a.get("iscrowd"))
        return [counts[category_id] for category_id in sorted(self._coco_api.getCatIds())]
