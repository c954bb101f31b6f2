"""A small data set in COCO format as somebody else would have made it."""

import json

import cv2
import numpy as np

# Category ids with gaps and out of order; "washer" never occurs in training.
NAMES = {90: "bolt", 3: "nut", 200: "washer", 7: "gear", 41: "spring", 12: "clip", 11: "pin"}
# How often each occurs in training.
COUNTS = {90: 120, 3: 60, 200: 0, 7: 25, 41: 9, 12: 4, 11: 2}
SIDE = 96


def build(folder, seed=0):
    """Write ``train.json``, ``val.json`` and ``images/`` to a folder.

    Every class is a shape of its own; a picture shows up to four objects on noise.
    """
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    train = [c for c, n in COUNTS.items() for _ in range(n)]
    rng.shuffle(train)
    val = [c for c in NAMES for _ in range(6)]
    rng.shuffle(val)
    first = 1
    for split, classes in (("train", train), ("val", val)):
        images, annotations = [], []
        for start in range(0, len(classes), 4):
            image_id = 1000 + first
            name = f"{split}_{image_id}.png"
            picture = rng.integers(60, 130, (SIDE, SIDE, 3), dtype=np.uint8)
            for quadrant, c in enumerate(classes[start : start + 4]):
                bbox, polygon = _draw(picture, c, quadrant, rng)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": c,
                        "bbox": bbox,
                        "area": bbox[2] * bbox[3],
                        "iscrowd": 0,
                        "segmentation": [polygon],
                    }
                )
            cv2.imwrite(str(folder / "images" / name), picture)
            images.append({"id": image_id, "file_name": name, "height": SIDE, "width": SIDE})
            first += 1
        content = {
            "info": {"description": "hardware"},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i, "name": n} for i, n in NAMES.items()],
        }
        (folder / f"{split}.json").write_text(json.dumps(content))


def build_one_class(folder, name):
    """Images of which the gears alone are annotated, under another name."""
    build(folder, seed=1)
    content = json.loads((folder / "train.json").read_text())
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 7]
    content["categories"] = [{"id": 7, "name": name}]
    (folder / "train.json").write_text(json.dumps(content))


def _draw(picture, category, quadrant, rng):
    """A regular polygon in a quarter of the picture; sides and colour follow the class."""
    index = list(NAMES).index(category)
    half = SIDE // 2
    radius = rng.uniform(14, 21)
    center = np.array([half * (quadrant % 2 + 0.5), half * (quadrant // 2 + 0.5)])
    turn = rng.uniform(0, 2 * np.pi)
    angles = turn + np.linspace(0, 2 * np.pi, index + 3, endpoint=False)
    corners = center + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    color = cv2.cvtColor(np.uint8([[[index * 25, 220, 250]]]), cv2.COLOR_HSV2BGR)[0, 0]
    cv2.fillPoly(picture, [corners.round().astype(np.int32)], color.tolist())
    low, high = corners.min(axis=0), corners.max(axis=0)
    return [*low.tolist(), *(high - low).tolist()], corners.flatten().tolist()
