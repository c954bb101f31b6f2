"""Small pictures of what a run found, took for something else, and missed, class by class."""

import base64
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image

from .detections import label_detections

__all__ = ["Crop", "choose_crops", "cut_crops"]

# Of a class's detections: the best of these are looked through.
_CONSIDERED = 500
_SIDE = 112  # pixels
_CONTEXT = 0.35  # of the box's longer side, on each side


@dataclass(frozen=True)
class Crop:
    """A box to be cut out of an image.

    Attributes:
        kind: "right", "wrong" or "missed".
        image_id: its image.
        box: XYWH.
        score: of the detection; None for missed objects.
    """

    kind: str
    image_id: int
    box: tuple[float, float, float, float]
    score: float | None = None

    @property
    def text(self) -> str:
        """What to write below it."""
        return self.kind if self.score is None else f"{self.kind}, score {self.score:.2f}"


def choose_crops(
    category_id: int,
    truth: Mapping[int, Sequence[Mapping]],
    detections: Sequence[Mapping],
    images: Mapping[int, Mapping],
    per_kind: int,
    min_score: float = 0.3,
) -> list[Crop]:
    """The best right and wrong detections of a class, and objects of it that were missed.

    Where a data set says for which images a class was annotated (LVIS), nothing is called wrong on
    others, nor where not all of its instances are annotated.

    Args:
        category_id: the class.
        truth: its annotations by image id.
        detections: its detections.
        images: "images" of the annotation file by id.
        per_kind: most crops of each kind.
        min_score: an object counts as missed if no right detection of it scores so high.

    Returns:
        Right, wrong, then missed ones.
    """
    best = sorted(detections, key=lambda d: -d["score"])[:_CONSIDERED]
    by_image = _by_image(best)
    right, wrong = [], []
    for image_id, of_image in by_image.items():
        objects = truth.get(image_id, ())
        labels = label_detections(
            np.array([d["bbox"] for d in of_image]),
            [category_id] * len(of_image),
            np.array([a["bbox"] for a in objects]).reshape(-1, 4),
            [category_id] * len(objects),
        )
        for detection, is_right in zip(of_image, labels, strict=True):
            if is_right:
                right.append(detection)
            elif _is_exhaustive(images.get(image_id, {}), category_id, bool(objects)):
                wrong.append(detection)
    for kind in (right, wrong):
        kind.sort(key=lambda d: -d["score"])
    missed = []
    for image_id, objects in truth.items():
        confident = [d for d in by_image.get(image_id, ()) if d["score"] >= min_score]
        # Objects take detections here as detections take objects above: one each.
        labels = label_detections(
            np.array([a["bbox"] for a in objects]),
            [category_id] * len(objects),
            np.array([d["bbox"] for d in confident]).reshape(-1, 4),
            [category_id] * len(confident),
        )
        missed += [a for a, is_found in zip(objects, labels, strict=True) if not is_found]
    shown = [("right", d) for d in right[:per_kind]] + [("wrong", d) for d in wrong[:per_kind]]
    return [
        *(Crop(kind, d["image_id"], tuple(d["bbox"]), d["score"]) for kind, d in shown),
        *(Crop("missed", a["image_id"], tuple(a["bbox"])) for a in missed[:per_kind]),
    ]


def cut_crops(crops: Iterable[Crop], files: Mapping[int, str]) -> dict[Crop, str]:
    """Cut boxes out of their images, with some context.

    Args:
        crops: in any order; every image is read once.
        files: path of each image by id.

    Returns:
        For each crop whose image can be read a data URI of a JPEG.
    """
    of_image = defaultdict(list)
    for crop in crops:
        of_image[crop.image_id].append(crop)
    cut = {}
    for image_id, crops_of_image in of_image.items():
        try:
            image = read_image(files[image_id], format="BGR")
        except (KeyError, OSError, ValueError, SyntaxError):
            continue
        for crop in crops_of_image:
            _, jpeg = cv2.imencode(".jpg", _cut(image, crop.box), [cv2.IMWRITE_JPEG_QUALITY, 80])
            cut[crop] = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    return cut


def _cut(image: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    height, width = image.shape[:2]
    x, y, w, h = box
    margin = _CONTEXT * max(w, h) + 2
    x0, y0 = max(int(x - margin), 0), max(int(y - margin), 0)
    x1, y1 = min(int(x + w + margin) + 1, width), min(int(y + h + margin) + 1, height)
    x0, y0 = min(x0, width - 1), min(y0, height - 1)
    part = image[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
    scale = _SIDE / max(part.shape[:2])
    size = [max(round(side * scale), 1) for side in part.shape[1::-1]]
    part = cv2.resize(part, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    corners = [round((v - o) * scale) for v, o in ((x, x0), (y, y0), (x + w, x0), (y + h, y0))]
    return cv2.rectangle(part, corners[:2], corners[2:], (255, 255, 255), 1, cv2.LINE_AA)


def _is_exhaustive(image: Mapping, category_id: int, has_objects: bool) -> bool:
    if "neg_category_ids" not in image:
        return True
    known = has_objects or category_id in image["neg_category_ids"]
    return known and category_id not in image.get("not_exhaustive_category_ids", ())


def _by_image(rows: Iterable[Mapping]) -> dict[int, list[Mapping]]:
    grouped = defaultdict(list)
    for row in rows:
        grouped[row["image_id"]].append(row)
    return grouped
