"""What an annotation file has to be evaluated, with its classes matched to the model's by name."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from detectron2.data import MetadataCatalog

from ..data.annotations import AnnotationSet, read_annotations
from ..data.build import evaluated_classes
from ..errors import DataError
from .bins import check_class_counts

__all__ = ["GroundTruth"]


class GroundTruth:
    """An annotation file and the model's class of each of its categories.

    Evaluators work with the ids of inside (:class:`bags_d2.data.annotations.Ids`); what a user sees
    has those of the file.

    Attributes:
        annotations: the file's content.
        num_classes: classes of the model, K.
        positions: of the categories that are evaluated, C of them, in the order of their ids: the
            order of every per-class result.
        category_of_class: id inside of the category of a class of the model.
    """

    def __init__(
        self,
        json_file: str | os.PathLike,
        metadata: Mapping | None = None,
        class_names: Sequence[str] | None = None,
        common_classes_only: bool = False,
    ) -> None:
        """
        Args:
            json_file: the annotation file.
            metadata: of the data set.
            class_names: names of the model's classes; see
                :func:`bags_d2.data.build.evaluated_classes`.
            common_classes_only: likewise.

        Raises:
            MissingFileError: if there is no such file.
            ConfigError, DataError: if it is faulty, or has other classes than the model.
        """
        self.path = os.fspath(json_file)
        self.annotations: AnnotationSet = read_annotations(json_file)
        classes = evaluated_classes(
            self.path, self.annotations, metadata or {}, class_names, in_common=common_classes_only
        )
        self.num_classes = len(classes if class_names is None else class_names)
        self.positions = np.flatnonzero(classes >= 0)
        self._classes = classes[self.positions]
        ids = self.annotations.categories.inside
        self.category_of_class = {
            c: ids[p] for c, p in zip(self._classes.tolist(), self.positions.tolist(), strict=True)
        }
        self._known = set(self.category_of_class.values())

    @classmethod
    def of_dataset(
        cls, name: str, class_names: Sequence[str] | None, common_classes_only: bool
    ) -> GroundTruth:
        """That of a registered data set, or one that has metadata.

        Raises:
            DataError: if its metadata name no annotation file.
        """
        metadata = MetadataCatalog.get(name)
        if metadata.get("json_file") is None:
            raise DataError(
                f"Data set '{name}' has no json_file in its metadata; register it with its "
                "annotation file."
            )
        return cls(metadata.json_file, metadata, class_names, common_classes_only)

    @property
    def categories(self) -> list[dict]:
        """Id and name in the file, and frequency, of each evaluated category."""
        truth = self.annotations
        keys = ("id", "name", "frequency")
        columns = (truth.categories.outside, truth.names, truth.frequencies)
        return [dict(zip(keys, (c[p] for c in columns), strict=True)) for p in self.positions]

    @functools.cached_property
    def instances(self) -> list[int]:
        """Objects of each evaluated category."""
        return self.annotations.instance_counts()[self.positions].tolist()

    def training_instances(
        self, class_counts: Sequence[int] | np.ndarray | torch.Tensor
    ) -> np.ndarray:
        """Counts (C,) of the evaluated categories, from those (K,) of the model's classes.

        Raises:
            DataError: if there is not exactly one for each class.
        """
        return check_class_counts(class_counts, self.num_classes)[self._classes]

    def category_rows(self) -> list[dict]:
        """The evaluated categories with the keys that an evaluation needs."""
        ids, names = self.annotations.categories.inside, self.annotations.names
        return [{"id": ids[p], "name": names[p]} for p in self.positions]

    def image_row(self, position: int, *, lvis: bool) -> dict:
        """An image with the keys that an evaluation needs."""
        image = self.annotations.image_rows[position]
        row = {"id": self.annotations.images.inside[position], "file_name": ""}
        row.update(height=image["height"], width=image["width"])
        if lvis:
            ids = self.annotations.categories.inside
            for key in ("neg_category_ids", "not_exhaustive_category_ids"):
                row[key] = [ids[p] for p in image[key] or () if ids[p] in self._known]
        return row

    def truths(self, position: int, task: str | None, *, lvis: bool) -> list[dict]:
        """Ground truth of an image; see :meth:`AnnotationSet.ground_truth`."""
        truths = self.annotations.ground_truth(position, task, lvis=lvis)
        return [truth for truth in truths if truth["category_id"] in self._known]

    def with_file_ids(self, detections: Sequence[dict]) -> Sequence[dict]:
        """Detections with the ids of the file, as they are written for users."""
        images, categories = self.annotations.images, self.annotations.categories
        if images.are_plain and categories.are_plain:
            return detections
        return [
            {
                **detection,
                "image_id": images.outside_of(detection["image_id"]),
                "category_id": categories.outside_of(detection["category_id"]),
            }
            for detection in detections
        ]
