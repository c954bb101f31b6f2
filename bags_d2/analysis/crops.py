"""Small pictures of what a run found, took for something else, and missed, class by class."""

import base64
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image
from PIL import Image

from ..utils.files import require_file
from .detections import group_by, label_detections

__all__ = ["Crop", "choose_crops", "cut_crops"]

# Of a class's detections: the best of these are looked through.
_CONSIDERED = 500
_SIDE = 112  # pixels
_CONTEXT = 0.35  # of the box's longer side, on each side


@dataclass(frozen=True)
class Crop:
    """A box to be cut out of an image."""

    kind: str  # "right", "wrong" or "missed"
    image_id: Hashable
    box: tuple[float, float, float, float]  # XYWH
    score: float | None = None  # of the detection; None for missed objects

    @property
    def text(self) -> str:
        """What to write below it."""
        return self.kind if self.score is None else f"{self.kind}, score {self.score:.2f}"


def choose_crops(
    category_id: Hashable,
    truth: Mapping[Hashable, Sequence[Mapping]],
    detections: Sequence[Mapping],
    images: Mapping[Hashable, Mapping],
    per_kind: int,
    min_score: float = 0.3,
) -> list[Crop]:
    """The best right and wrong detections of a class, and objects of it that were missed.

    Where a data set says for which images a class was annotated (LVIS), nothing is called wrong on
    others, nor where not all of its instances are annotated. An object is missed if no right
    detection of it scores ``min_score``.

    Args:
        category_id: the class.
        truth: its annotations by image id.
        detections: its detections.
        images: records of all images by id.
        per_kind: most crops of each kind.
    """
    best = group_by(sorted(detections, key=lambda d: -d["score"])[:_CONSIDERED], "image_id")
    right, wrong = [], []
    for image_id, of_image in best.items():
        objects = truth.get(image_id, ())
        is_exhaustive = _is_exhaustive(images.get(image_id, {}), category_id, bool(objects))
        for detection, is_right in zip(of_image, _match(of_image, objects), strict=True):
            if is_right:
                right.append(detection)
            elif is_exhaustive:
                wrong.append(detection)
    missed = []
    for image_id, objects in truth.items():
        confident = [d for d in best.get(image_id, ()) if d["score"] >= min_score]
        # Objects take detections here as detections take objects above: one each.
        found = _match(objects, confident)
        missed += [a for a, is_found in zip(objects, found, strict=True) if not is_found]
    crops = [
        Crop(kind, d["image_id"], tuple(d["bbox"]), d["score"])
        for kind, of_kind in (("right", right), ("wrong", wrong))
        for d in sorted(of_kind, key=lambda d: -d["score"])[:per_kind]
    ]
    return crops + [Crop("missed", a["image_id"], tuple(a["bbox"])) for a in missed[:per_kind]]


def cut_crops(crops: Iterable[Crop], files: Mapping[Hashable, str]) -> dict[Crop, str]:
    """Cut boxes out of their images (``files``: paths by id), with some context.

    Returns:
        For each crop whose image can be read a data URI of a JPEG.
    """
    of_image: dict[Hashable, list[Crop]] = {}
    for crop in crops:
        of_image.setdefault(crop.image_id, []).append(crop)
    cut = {}
    for image_id, crops_of_image in of_image.items():
        try:
            image = read_image(require_file(files[image_id]), format="BGR")
        except (KeyError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
        for crop in crops_of_image:
            _, jpeg = cv2.imencode(".jpg", _cut(image, crop.box), [cv2.IMWRITE_JPEG_QUALITY, 80])
            cut[crop] = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    return cut


def _match(rows: Sequence[Mapping], others: Sequence[Mapping]) -> np.ndarray:
    boxes, of_others = ([row["bbox"] for row in some] for some in (rows, others))
    return label_detections(boxes, [0] * len(boxes), of_others, [0] * len(of_others))


def _cut(image: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    sides = image.shape[1], image.shape[0]
    x, y, w, h = box
    margin = _CONTEXT * max(w, h) + 2
    low = [int(np.clip(v - margin, 0, side - 1)) for v, side in zip((x, y), sides, strict=True)]
    high = [
        int(np.clip(v + margin + 1, start + 1, side))
        for v, start, side in zip((x + w, y + h), low, sides, strict=True)
    ]
    part = image[low[1] : high[1], low[0] : high[0]]
    scale = _SIDE / max(part.shape[:2])
    size = [max(round(side * scale), 1) for side in part.shape[1::-1]]
    part = cv2.resize(part, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    # Far outside, a corner is as good as just outside.
    x0, y0, x1, y1 = (
        int(np.clip(round((v - start) * scale), -_SIDE, 2 * _SIDE))
        for v, start in zip((x, y, x + w, y + h), low * 2, strict=True)
    )
    return cv2.rectangle(part, (x0, y0), (x1, y1), (255, 255, 255), 1, cv2.LINE_AA)


def _is_exhaustive(image: Mapping, category_id: Hashable, has_objects: bool) -> bool:
    if "neg_category_ids" not in image:
        return True
    known = has_objects or category_id in image["neg_category_ids"]
    return known and category_id not in image.get("not_exhaustive_category_ids", ())
