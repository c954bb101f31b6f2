"""Small pictures of what a run found, mistook and missed, class by class."""

import base64
import io
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from ..data.images import read_image
from ..errors import BagsError
from .detections import corners, group_by, label_detections

__all__ = ["Crop", "choose_crops", "cut_crops"]

_CONSIDERED = 500  # the best detections of a class
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
        return self.kind if self.score is None else f"{self.kind}, score {self.score:.2f}"


def choose_crops(
    category_id: Hashable,
    objects: Sequence[Mapping],
    detections: Sequence[Mapping],
    images: Mapping[Hashable, Mapping],
    per_kind: int,
    min_score: float = 0.3,
) -> list[Crop]:
    """The best right and wrong detections of a class, and objects of it that were missed.

    Where a data set says in which images a class was annotated (LVIS), nothing is called wrong in
    others, nor where not all of its instances are annotated. An object is missed if no right
    detection of it scores ``min_score``.

    Args:
        objects, detections: those of the class.
        images: all images by id, as of :func:`.runs.read_ground_truth`.
    """
    best = sorted(detections, key=lambda d: -d["score"])[:_CONSIDERED]
    of_image, truth = group_by(best, "image_id"), group_by(objects, "image_id")
    found, missed = {"right": [], "wrong": []}, []
    for image_id, rows in of_image.items():
        of_class = truth.get(image_id, ())
        is_exhaustive = _is_exhaustive(images.get(image_id, {}), category_id, bool(of_class))
        for row, is_right in zip(rows, label_detections(rows, of_class), strict=True):
            if is_right or is_exhaustive:
                found["right" if is_right else "wrong"].append(row)
    for image_id, rows in truth.items():
        confident = [d for d in of_image.get(image_id, ()) if d["score"] >= min_score]
        # Objects take detections here as detections take objects above: one each.
        is_found = label_detections(rows, confident)
        missed += [row for row, hit in zip(rows, is_found, strict=True) if not hit]
    return [
        *(
            Crop(kind, d["image_id"], tuple(d["bbox"]), d["score"])
            for kind, rows in found.items()
            for d in sorted(rows, key=lambda d: -d["score"])[:per_kind]
        ),
        *(Crop("missed", a["image_id"], tuple(a["bbox"])) for a in missed[:per_kind]),
    ]


def cut_crops(crops: Iterable[Crop], images: Mapping[Hashable, Mapping]) -> dict[Crop, str]:
    """Cut boxes out of their images ("file_name" of each by id), with some context.

    Returns:
        For each crop whose image can be read, a data URI of a JPEG.
    """
    of_image: dict[Hashable, list[Crop]] = {}
    for crop in crops:
        of_image.setdefault(crop.image_id, []).append(crop)
    cut = {}
    for image_id in of_image.keys() & images.keys():
        try:
            image = Image.fromarray(read_image(images[image_id]["file_name"], format="RGB"))
        except (BagsError, OSError):
            continue
        for crop in of_image[image_id]:
            jpeg = io.BytesIO()
            _cut(image, crop).save(jpeg, "JPEG", quality=80)
            cut[crop] = f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"
    return cut


def _cut(image: Image.Image, crop: Crop) -> Image.Image:
    box = np.sort(corners([{"bbox": crop.box}]).reshape(2, 2), axis=0)
    margin = _CONTEXT * (box[1] - box[0]).max() + 2
    low = np.clip(box[0] - margin, 0, np.subtract(image.size, 1)).astype(int)
    high = np.clip(box[1] + margin + 1, low + 1, image.size).astype(int)
    scale = _SIDE / max(high - low)
    size = np.maximum((high - low) * scale, 1).round().astype(int)
    part = image.crop((*low.tolist(), *high.tolist())).resize(size.tolist())
    # Far outside, a corner is as good as just outside.
    outline = np.clip((box - low) * scale, -_SIDE, 2 * _SIDE)
    ImageDraw.Draw(part).rectangle(outline.ravel().tolist(), outline="white")
    return part


def _is_exhaustive(image: Mapping, category_id: Hashable, has_objects: bool) -> bool:
    """Whether all objects of a class are annotated in an image."""
    if "neg_category_ids" not in image:
        return True
    known = has_objects or category_id in image["neg_category_ids"]
    return known and category_id not in image.get("not_exhaustive_category_ids", ())
