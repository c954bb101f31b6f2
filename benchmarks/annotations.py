"""Reading, checking, counting and registering an annotation file of LVIS v1's size.

LVIS cannot be carried, so a file of its size is synthesized: 100,170 images, 1,203 classes with
LVIS v1's counts, 1,270,141 annotations with polygons (0.7 GB). Each step is timed in one process;
peak memory is that of the process.

    python benchmarks/annotations.py --file /tmp/lvis_size.json
"""

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np

from bags_d2.data.lvis_v1 import lvis_v1_counts

NUM_IMAGES = 100_170


def synthesize(path: Path, share: float) -> None:
    rng = np.random.default_rng(0)
    counts = (np.array(lvis_v1_counts()["instance_count"]) * share).astype(int).clip(1)
    classes = rng.permutation(np.repeat(np.arange(1, len(counts) + 1), counts))
    num_images = max(1, int(NUM_IMAGES * share))
    images = np.sort(rng.integers(1, num_images + 1, len(classes)))
    with path.open("w") as file:
        rows = [
            {
                "id": i,
                "coco_url": f"http://images.cocodataset.org/train2017/{i:012}.jpg",
                "height": 480,
                "width": 640,
                "neg_category_ids": rng.integers(1, 1204, 6).tolist(),
                "not_exhaustive_category_ids": [],
            }
            for i in range(1, num_images + 1)
        ]
        categories = [
            {"id": i, "name": f"class {i}", "frequency": "f"} for i in range(1, len(counts) + 1)
        ]
        file.write(f'{{"images": {json.dumps(rows)}, "categories": {json.dumps(categories)}')
        file.write(', "annotations": [')
        for i, (image, category) in enumerate(zip(images.tolist(), classes.tolist(), strict=True)):
            corners = rng.integers(4, 47)
            polygon = (rng.random((corners, 2)) * (600, 440)).round(2)
            low, high = polygon.min(0), polygon.max(0)
            row = {
                "id": i + 1,
                "image_id": image,
                "category_id": category,
                "bbox": [*low.tolist(), *(high - low).round(2).tolist()],
                "area": float((high - low).prod().round(2)),
                "segmentation": [polygon.flatten().tolist()],
            }
            file.write((", " if i else "") + json.dumps(row))
        file.write("]}")


def steps(path: Path):
    from detectron2.data import DatasetCatalog

    from bags_d2.data import count_classes, register_lvis_format

    register_lvis_format("lvis_size", str(path), "")
    yield "register"
    _check("lvis_size")
    yield "read and check"
    count_classes("lvis_size")
    count_classes("lvis_size", "images")
    yield "count"
    records = DatasetCatalog.get("lvis_size")
    yield f"records of {len(records)} images"


def _check(name: str) -> None:
    from detectron2.config import get_cfg

    from bags_d2 import add_bags_config
    from bags_d2.data.build import check_dataset

    cfg = get_cfg()
    add_bags_config(cfg)
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1203
    check_dataset(cfg, name, training=True)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, required=True, help="synthesized if it is not there")
    parser.add_argument("--share", type=float, default=1.0, help="of LVIS v1's size")
    args = parser.parse_args()
    if not args.file.exists():
        synthesize(args.file, args.share)
    start = last = time.perf_counter()
    for what in steps(args.file):
        now = time.perf_counter()
        print(f"{now - last:7.1f} s  {what}; peak memory {peak():.2f} GiB so far", flush=True)
        last = now
    print(f"{last - start:7.1f} s  in all; peak memory {peak():.2f} GiB")


if __name__ == "__main__":
    main()
