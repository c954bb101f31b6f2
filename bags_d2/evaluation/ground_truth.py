"""What an annotation file has to be evaluated, with its classes matched to the model's by name."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances

from ..data.annotations import AnnotationSet, Id
from ..data.build import evaluated_classes
from ..data.datasets import evaluated_annotations
from ..errors import DataError


class PredictionError(DataError):
    """Predictions do not fit the annotation file, or are not numbers."""


class GroundTruth:
    """An annotation file and the model's class of each of its categories.

    Evaluators work with inside ids (:class:`bags_d2.data.annotations.Ids`); users see the file's.

    Attributes:
        annotations: the file's content.
        num_classes: classes of the model, K.
        classes: (C,) the model's class of each category that is evaluated, in the order of category
            ids, which is that of every per-class result.
        categories: C dicts with "id", "name" and "frequency" (None if the file has none).
        category_ids: (C,) their ids.
        instances: (C,) numbers of objects.
    """

    def __init__(
        self,
        annotations: AnnotationSet,
        metadata: Mapping | None = None,
        class_names: Sequence[str] | None = None,
        common_classes_only: bool = False,
    ) -> None:
        """See :func:`evaluated_classes` for the arguments."""
        self.path = annotations.path
        self.annotations = annotations
        classes = evaluated_classes(
            self.path, annotations, metadata or {}, class_names, in_common=common_classes_only
        )
        self.num_classes = len(classes if class_names is None else class_names)
        positions = np.flatnonzero(classes >= 0)
        self.classes = classes[positions]
        self._evaluated = np.full(len(classes), -1)  # by position in the file
        self._evaluated[positions] = np.arange(len(positions))
        self.instances = annotations.instance_counts()[positions]
        ids, names = annotations.categories.inside, annotations.names
        self.categories = [
            {"id": ids[p], "name": names[p], "frequency": annotations.frequencies[p]}
            for p in positions
        ]
        self.category_ids = np.array([category["id"] for category in self.categories])
        self._known = set(self.category_ids.tolist())
        self._category_of_class = torch.full((self.num_classes,), -1)
        self._category_of_class[torch.from_numpy(self.classes)] = torch.arange(len(self.classes))

    @classmethod
    def of_dataset(
        cls,
        name: str,
        class_names: Sequence[str] | None = None,
        common_classes_only: bool = False,
    ) -> "GroundTruth":
        """That of a data set; see :func:`evaluated_annotations`."""
        metadata = MetadataCatalog.get(name)
        return cls(evaluated_annotations(name), metadata, class_names, common_classes_only)

    @property
    def has_plain_ids(self) -> bool:
        """Whether inside ids are those of the file."""
        return self.annotations.images.are_plain and self.annotations.categories.are_plain

    def image_row(self, position: int) -> dict:
        """An image with the keys that an evaluation needs."""
        image, ids = self.annotations.image_rows[position], self.annotations.categories.inside
        row = {"id": self.annotations.images.inside[position], "file_name": ""}
        row.update(height=image["height"], width=image["width"])
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            row[key] = [ids[p] for p in image[key] or () if ids[p] in self._known]
        return row

    def truths(self, position: int, task: str | None, *, lvis: bool) -> list[dict]:
        """Ground truth of an image; see :meth:`AnnotationSet.ground_truth`."""
        truths = self.annotations.ground_truth(position, task, lvis=lvis)
        return [truth for truth in truths if truth["category_id"] in self._known]

    def objects(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Objects of evaluated categories in an image: their rows, and their categories below C."""
        rows = np.array(self.annotations.rows_of_image(position), dtype=np.int64)
        rows = rows[self.annotations.is_object[rows]]
        categories = self._evaluated[self.annotations.classes[rows]]
        return rows[categories >= 0], categories[categories >= 0]

    def as_coco(self, task: str | None, *, lvis: bool) -> dict:
        """The whole in COCO's format; without "annotations" if the file has none."""
        positions = range(len(self.annotations.images))
        content = {"images": [*map(self.image_row, positions)], "categories": self.categories}
        if self.annotations.has_annotations:
            truths = (self.truths(p, task, lvis=lvis) for p in positions)
            content["annotations"] = list(itertools.chain.from_iterable(truths))
        return content

    def image_position(self, image_id: Id) -> int:
        """Position of an image by its id of either kind; PredictionError if it is unknown."""
        position = self.annotations.images.position(image_id)
        if position is None:
            raise PredictionError(
                f"Predictions are for image {image_id}, which {self.path} does not list: evaluate "
                "with the annotations of the data set that was predicted."
            )
        return position

    def evaluated_instances(self, instances: Instances, position: int) -> Instances:
        """Detections of evaluated categories in an image, on the CPU, with pred_classes below C."""
        instances = instances.to("cpu")
        classes = instances.pred_classes
        if ((classes < 0) | (classes >= self.num_classes)).any():
            raise PredictionError(
                f"Image {self.annotations.images.outside[position]} has predicted classes from "
                f"{int(classes.min())} to {int(classes.max())}, but {self.path} has the classes 0 "
                f"to {self.num_classes - 1}: set MODEL.ROI_HEADS.NUM_CLASSES to "
                f"{self.num_classes}."
            )
        instances.pred_classes = self._category_of_class[classes]
        is_evaluated = instances.pred_classes >= 0
        # Indexing copies all masks.
        return instances if is_evaluated.all() else instances[is_evaluated]

    def with_inside_ids(self, detections: Iterable[Mapping]) -> list[dict]:
        """Detections with the ids of inside; PredictionError if one is unknown."""
        images, categories = self.annotations.images, self.annotations.categories
        found = []
        for detection in detections:
            image = images.inside[self.image_position(detection["image_id"])]
            category = categories.position(detection["category_id"])
            if category is None:
                raise PredictionError(
                    f"A detection in image {detection['image_id']} is of category "
                    f"{detection['category_id']}, which {self.path} does not list; use the file's "
                    "category ids."
                )
            ids = {"image_id": image, "category_id": categories.inside[category]}
            found.append({**detection, **ids})
        return found

    def with_file_ids(self, detections: Sequence[dict]) -> Sequence[dict]:
        """Detections with the ids of the file, as they are written for users."""
        if self.has_plain_ids:
            return detections
        image_id = self.annotations.images.outside_of
        category_id = self.annotations.categories.outside_of
        return [
            {**d, "image_id": image_id(d["image_id"]), "category_id": category_id(d["category_id"])}
            for d in detections
        ]
