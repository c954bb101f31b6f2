"""A small data set, the same in COCO and in LVIS format, for faults to be put into."""

import copy
import json

import cv2
import numpy as np

SIDE = 64
NAMES = ("red", "green", "blue")
# Of each class by split.
COUNTS = {"train": (9, 6, 3), "val": (3, 3, 3)}
COLORS = {"red": (40, 40, 220), "green": (40, 200, 40), "blue": (220, 80, 40)}  # BGR


def content(split="train", kind="coco", images=None):
    """Annotations with whole-number boxes, three objects an image."""
    rng = np.random.default_rng(split == "val")
    classes = rng.permutation(np.repeat(np.arange(1, 4), COUNTS[split])).tolist()
    rows, annotations = [], []
    for first in range(0, len(classes), 3):
        image_id = first // 3 + 1
        rows.append(
            {
                "id": image_id,
                "file_name": f"{split}{image_id}.png",
                "height": SIDE,
                "width": SIDE,
            }
        )
        present = classes[first : first + 3]
        if kind == "lvis":
            absent = sorted({1, 2, 3} - set(present))
            rows[-1].update(neg_category_ids=absent, not_exhaustive_category_ids=[])
        for column, category in enumerate(present):
            x, y = column * 21 + int(rng.integers(0, 4)), int(rng.integers(2, 40))
            w, h = int(rng.integers(12, 17)), int(rng.integers(12, 22))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
    frequency = {"frequency": "f"} if kind == "lvis" else {}
    categories = [{"id": i, "name": n, **frequency} for i, n in enumerate(NAMES, 1)]
    return {"images": rows, "annotations": annotations, "categories": categories}


def write_images(folder):
    """Pictures of both splits, objects in their class's colour on noise."""
    for split in COUNTS:
        data = content(split)
        rng = np.random.default_rng(7)
        for row in data["images"]:
            picture = rng.integers(90, 160, (SIDE, SIDE, 3), dtype=np.uint8)
            for a in data["annotations"]:
                if a["image_id"] == row["id"]:
                    x, y, w, h = a["bbox"]
                    picture[y : y + h, x : x + w] = COLORS[NAMES[a["category_id"] - 1]]
            cv2.imwrite(str(folder / row["file_name"]), picture)


def edited(edit, split="train", kind="coco"):
    """The content after ``edit(content)``."""
    data = copy.deepcopy(content(split, kind))
    edit(data)
    return data


def each(**values):
    """An edit that sets keys of every annotation."""
    return lambda data: [a.update(copy.deepcopy(values)) for a in data["annotations"]]


def write(path, data):
    path.write_text(json.dumps(data))
    return str(path)
