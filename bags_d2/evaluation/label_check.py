"""Labels that a model contradicts, from its class probabilities at the objects' own boxes.

Shapes: N objects, C evaluated classes, T classes kept of each object.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm
from torch import nn

from ..modeling.roi_heads import class_probs_of_boxes
from ..utils.files import write_csv
from .ground_truth import GroundTruth

__all__ = ["LABEL_CHECK_FILE", "LabelCheck", "contradictions"]

LABEL_CHECK_FILE = "label_check.csv"
_COLUMNS = (
    *("annotation_id", "image_id", "file_name", "category_id", "name", "probability"),
    *("model_category_id", "model_name", "model_probability", "contradiction"),
)
_KEPT = 20  # classes of an object, those of the highest probabilities


class LabelCheck(DatasetEvaluator):
    """What the box head makes of each object's own box, from the features of an evaluation's pass.

    Writes ``label_check.csv``: all objects, those first whose label the model contradicts most.
    Measures nothing.
    """

    def __init__(
        self,
        heads: StandardROIHeads,
        dataset_name: str,
        output_dir: str,
        class_names: Sequence[str] | None = None,
        common_classes_only: bool = False,
    ) -> None:
        """
        Args:
            heads: those of the model that is evaluated.
            dataset_name, output_dir, class_names, common_classes_only: as for the evaluators.
        """
        self._heads = heads
        self._truth = GroundTruth.of_dataset(dataset_name, class_names, common_classes_only)
        self._is_lvis = MetadataCatalog.get(dataset_name).get("evaluator_type") == "lvis"
        self._path = Path(output_dir, LABEL_CHECK_FILE)
        self._hook = None

    @staticmethod
    def heads_of(model: nn.Module) -> StandardROIHeads | None:
        """The RoI heads of a model, if they have a box head that can be asked about any box."""
        heads = getattr(getattr(model, "module", model), "roi_heads", None)
        return heads if isinstance(heads, StandardROIHeads) else None

    def reset(self) -> None:
        self._found: list[tuple[np.ndarray, ...]] = []
        self._hook = self._hook or self._heads.register_forward_pre_hook(self._keep_features)
        if comm.is_main_process():
            self._path.unlink(missing_ok=True)

    def _keep_features(self, _, inputs: tuple) -> None:
        images, self._features = inputs[:2]
        self._sizes = images.image_sizes

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take the objects of the images that the model has just seen."""
        objects, proposals = [], []
        for x, (height, width) in zip(inputs, self._sizes, strict=True):
            rows, labels = self._truth.objects(self._truth.image_position(x["image_id"]))
            boxes = torch.from_numpy(self._truth.annotations.boxes[rows])
            boxes = BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
            # Within the image, as for training: pooling a box takes as long as the box is large.
            size = torch.tensor([x.get("width", width), x.get("height", height)])
            boxes = Boxes(boxes.clamp(min=0).minimum(size.repeat(2)))
            boxes.scale(width / size[0].item(), height / size[1].item())
            device = next(iter(self._features.values())).device
            proposals.append(Instances((height, width), proposal_boxes=boxes.to(device)))
            objects.append((rows, labels))
        probs = torch.cat(class_probs_of_boxes(self._heads, self._features, proposals))
        probs = probs[:, torch.from_numpy(self._truth.classes).to(probs.device)].float()
        rows, labels = (np.concatenate(parts) for parts in zip(*objects, strict=True))
        own = probs[torch.arange(len(labels)), torch.from_numpy(labels).to(probs.device)]
        best = probs.topk(min(_KEPT, probs.shape[1]), dim=1)
        found = (t.cpu().numpy() for t in (own, best.values, best.indices))
        self._found.append((rows, labels, *found))
        self._features = None

    def evaluate(self) -> None:
        self._hook.remove()
        self._hook = None
        parts = comm.gather(self._found)
        found = [batch for part in parts for batch in part if len(batch[0])]
        if not comm.is_main_process() or not found:
            return
        rows, *columns = (np.concatenate(column) for column in zip(*found, strict=True))
        rows, first = np.unique(rows, return_index=True)
        labels, own, top, classes = (column[first] for column in columns)
        scores, others = contradictions(labels, own, top, classes)
        truth = self._truth.annotations
        ids = [truth.categories.outside_of(c["id"]) for c in self._truth.categories]
        names = [category["name"] for category in self._truth.categories]
        lines = []
        for i in np.argsort(-scores, kind="stable"):
            position, label, other = truth.image_index[rows[i]], labels[i], classes[i, others[i]]
            name = truth.file_name(position, self._is_lvis)
            lines.append(
                (
                    *(truth.annotation_ids[rows[i]], truth.images.outside[position], name),
                    *(ids[label], names[label], f"{own[i]:.6f}", ids[other], names[other]),
                    *(f"{top[i, others[i]]:.6f}", f"{scores[i]:.4f}"),
                )
            )
        write_csv(self._path, _COLUMNS, lines)


def contradictions(
    labels: np.ndarray, own: np.ndarray, top: np.ndarray, classes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    r"""How much a model contradicts the label of each object.

    :math:`\max_{c \ne y} \log (p_c + 10^{-4}) / (t_c + 10^{-3})`, minus the same of the label y.
    :math:`t_c` is the mean probability that objects labelled c get for c, as in confident learning
    (Northcutt et al., 2021): without it, all objects of rare classes, which the model hardly ever
    names, would come first.

    Args:
        labels: (N,) classes.
        own: (N,) probability of the label.
        top, classes: (N, T) highest probabilities, and of which classes.

    Returns:
        (N,) scores, and (N,) columns of ``top`` that compete with the labels. With one class, which
        nothing competes with, scores are -inf.
    """
    num_classes = max(labels.max(), classes.max()) + 1
    sizes = np.bincount(labels, minlength=num_classes)
    sums = np.bincount(labels, weights=own, minlength=num_classes)
    # Of a class without objects nothing is known; 1 lets it win where it is certain.
    usual = np.where(sizes > 0, sums / np.maximum(sizes, 1), 1.0) + 1e-3
    ratios = np.log((top + 1e-4) / usual[classes])
    ratios[classes == labels[:, None]] = -np.inf
    others = ratios.argmax(axis=1)
    best = ratios[np.arange(len(labels)), others]
    return best - np.log((own + 1e-4) / usual[labels]), others
