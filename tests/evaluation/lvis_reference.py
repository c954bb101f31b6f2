"""lvis-api's own evaluation, and random data sets in LVIS format to compare with it on."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import lvis.eval
import numpy as np
import pycocotools.mask as mask_utils
from lvis import LVIS, LVISEval, LVISResults

HEIGHT, WIDTH = 140, 200


class _NumpyWithFloat:
    """numpy as lvis-api 0.5.3 expects it: `np.float` left numpy in 1.24."""

    float = float

    def __getattr__(self, name: str):
        return getattr(np, name)


@contextlib.contextmanager
def _numpy_float_in_lvis_only() -> Iterator[None]:
    # Only the name `np` inside lvis.eval is replaced: adding an attribute to numpy itself would
    # hide the same fault everywhere else in the test run.
    with mock.patch.object(lvis.eval, "np", _NumpyWithFloat()):
        yield


def evaluate_with_lvis_api(
    json_file: str | Path, detections: list[dict], iou_type: str, max_dets: int = 300
) -> tuple[dict[str, float], np.ndarray]:
    """Evaluate as lvis-api does, after Detectron2's preparation of mask results.

    Args:
        json_file: LVIS annotations.
        detections: LVIS results format; at least one, since lvis-api cannot take none.
        iou_type: "bbox" or "segm".
        max_dets: detections kept per image, over all classes.

    Returns:
        The measures as fractions (-1 where lvis-api finds no class to average over), and
        `eval["precision"]` of shape (IoU thresholds, recalls, classes in id order, areas).
    """
    logging.getLogger("lvis").setLevel(logging.ERROR)
    detections = copy.deepcopy(detections)
    if iou_type == "segm":
        # With a box present, lvis-api takes the box's area for a mask's size.
        for detection in detections:
            detection.pop("bbox", None)
    ground_truth = LVIS(str(json_file))
    results = LVISResults(ground_truth, detections, max_dets=max_dets)
    evaluation = LVISEval(ground_truth, results, iou_type)
    evaluation.params.max_dets = max_dets
    with _numpy_float_in_lvis_only():
        evaluation.run()
    return dict(evaluation.get_results()), evaluation.eval["precision"]


def _box(rng: np.random.Generator) -> np.ndarray:
    """A random XYWH box in whole pixels, of any of the three LVIS sizes."""
    side = rng.choice([12, 50, 120])
    w, h = rng.integers(4, side + 1, size=2)
    return np.array([rng.integers(0, WIDTH - w + 1), rng.integers(0, HEIGHT - h + 1), w, h])


def rectangle_rle(box: np.ndarray) -> dict:
    """Run-length code of the image-sized mask that fills an XYWH box of whole pixels."""
    x, y, w, h = (max(0, int(v)) for v in box)
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    rle = mask_utils.encode(mask)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def random_lvis_set(
    seed: int, folder: Path, num_images: int = 6, num_classes: int = 10
) -> tuple[Path, list[dict]]:
    """Write a random LVIS annotation file and draw detections for it.

    There are classes without ground truth, classes listed as absent or as not exhaustively
    annotated, ground truth to ignore, ground truth and detections without area, equal scores, an
    image without detections and one with more than 300.

    Returns:
        The annotation file and detections in LVIS results format, boxes and masks both.
    """
    rng = np.random.default_rng(seed)
    # Ids with gaps and out of order, since nothing promises 1..K and ascending.
    category_ids = rng.permutation(np.arange(1, 2 * num_classes + 1))[:num_classes].tolist()
    image_ids = rng.permutation(np.arange(100, 100 + 5 * num_images))[:num_images].tolist()
    with_ground_truth = category_ids[: max(1, num_classes - 2)]

    images, annotations, detections = [], [], []
    for order, image_id in enumerate(image_ids):
        truths = []
        for _ in range(int(rng.integers(0, 9))):
            box = _box(rng)
            if rng.random() < 0.08:
                box[2] = 0
            truths.append((int(rng.choice(with_ground_truth)), box))
        for category_id, box in truths:
            x, y, w, h = (float(v) for v in box)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "ignore": int(rng.random() < 0.05),
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
        present = {category_id for category_id, _ in truths}
        absent = [c for c in category_ids if c not in present]
        images.append(
            {
                "id": image_id,
                "height": HEIGHT,
                "width": WIDTH,
                "file_name": f"{image_id}.jpg",
                "neg_category_ids": [c for c in absent if rng.random() < 0.4],
                "not_exhaustive_category_ids": [c for c in present if rng.random() < 0.3],
            }
        )

        boxes = []
        for category_id, box in truths:
            for _ in range(int(rng.integers(0, 4))):
                moved = box + rng.integers(-3, 4, size=4)
                moved[2:] = np.maximum(moved[2:], 0)
                moved[:2] = np.maximum(moved[:2], 0)
                label = category_id if rng.random() < 0.8 else int(rng.choice(category_ids))
                boxes.append((label, moved))
        extra = 330 if order == 0 else 0 if order == 1 else int(rng.integers(0, 25))
        boxes += [(int(rng.choice(category_ids)), _box(rng)) for _ in range(extra)]
        if order == 1 and seed % 2:
            boxes = []
        rng.shuffle(boxes)
        for category_id, box in boxes:
            if rng.random() < 0.03:
                box = box * np.array([1, 1, 1, 0])
            # A mask much smaller than its box, which may fall in another range of sizes.
            masked = box // np.array([1, 1, 1, 3]) if rng.random() < 0.3 else box
            detections.append(
                {
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": [float(v) for v in box],
                    # Few decimals, so that equal scores meet inside images and across them.
                    "score": float(np.float32(np.round(rng.random(), 1 + seed % 2))),
                    "segmentation": rectangle_rle(masked),
                }
            )

    categories = [
        {"id": c, "name": f"class_{c}", "frequency": "rcf"[int(rng.integers(0, 3))]}
        for c in category_ids
    ]
    path = folder / f"lvis_{seed}.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return path, detections
