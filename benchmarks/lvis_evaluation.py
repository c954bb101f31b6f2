#!/usr/bin/env python
"""LVIS evaluation here against Detectron2's LVISEvaluator, which uses lvis-api.

Both get the same Instances image by image and end with the measures, which must be equal. A fault
of lvis-api (numpy's removed `np.float`) is worked around. The data set is synthetic: objects are
drawn by the square roots of LVIS v1's class counts, 12 for an image, and an image has 300
detections, of which some lie on objects. Each side runs in a process of its own, on one thread;
memory is that process's peak above what it began with (Linux).
"""

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import lvis.eval
import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import LVISEvaluator
from detectron2.structures import Boxes, Instances
from memory import process_memory
from tabulate import tabulate

from bags_d2.data.lvis_v1 import lvis_v1_counts
from bags_d2.evaluation import LongTailLVISEvaluator

SIZE = 640
OBJECTS, DETECTIONS = 12, 300
MEASURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")


class NumpyWithFloat:
    """numpy as lvis-api expects it."""

    float = float

    def __getattr__(self, name):
        return getattr(np, name)


def write_annotations(path, num_images, rng):
    counts = np.array(lvis_v1_counts()["instance_count"])
    images_with = np.array(lvis_v1_counts()["image_count"])
    frequency = np.select([images_with <= 10, images_with <= 100], ["r", "c"], "f")
    # Square roots, or a small set would hold next to no rare class.
    shares = np.sqrt(counts) / np.sqrt(counts).sum()
    images, annotations = [], []
    for image_id in range(1, num_images + 1):
        classes = rng.choice(len(counts), OBJECTS, p=shares)
        absent = set(rng.choice(len(counts), 20).tolist()) - set(classes.tolist())
        images.append(
            {
                "id": image_id,
                "height": SIZE,
                "width": SIZE,
                "neg_category_ids": [c + 1 for c in sorted(absent)],
                "not_exhaustive_category_ids": [int(classes[0]) + 1],
            }
        )
        for c, box in zip(classes.tolist(), random_boxes(OBJECTS, rng).tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": c + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                }
            )
    categories = [
        {"id": i + 1, "name": str(i), "frequency": f} for i, f in enumerate(frequency.tolist())
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))


def random_boxes(number, rng):
    """XYWH in whole pixels."""
    sizes = np.exp(rng.uniform(np.log(8), np.log(300), (number, 2))).round()
    return np.concatenate([(rng.random((number, 2)) * (SIZE - sizes)).round(), sizes], axis=1)


def detections_of_images(path):
    """Model inputs and outputs: three detections around each object, others anywhere."""
    content = json.loads(path.read_text())
    truths = {}
    for annotation in content["annotations"]:
        truths.setdefault(annotation["image_id"], []).append(annotation)
    for image in content["images"]:
        rng = np.random.default_rng(image["id"])
        near = [a for a in truths[image["id"]] for _ in range(3)]
        boxes = random_boxes(DETECTIONS, rng)
        classes = rng.integers(len(content["categories"]), size=DETECTIONS)
        scores = rng.random(DETECTIONS) * 0.5
        around = np.array([a["bbox"] for a in near])
        boxes[: len(near)] = around * (1 + 0.08 * rng.standard_normal(around.shape))
        classes[: len(near)] = [a["category_id"] - 1 for a in near]
        scores[: len(near)] += 0.4 * rng.random(len(near))
        boxes[:, 2:] = np.maximum(boxes[:, 2:], 1) + boxes[:, :2]
        instances = Instances(
            (SIZE, SIZE),
            pred_boxes=Boxes(torch.from_numpy(boxes).float()),
            scores=torch.from_numpy(scores).float(),
            pred_classes=torch.from_numpy(classes),
        )
        yield [{"image_id": image["id"]}], [{"instances": instances}]


def evaluate(side, path, connection):
    """In a process of its own: the seconds, the peak of memory in MB, and the measures."""
    torch.set_num_threads(1)
    os.environ["RAYON_NUM_THREADS"] = "1"  # hotcoco's, read when it first runs
    logging.disable(logging.WARNING)
    name = f"benchmark_{side}"
    MetadataCatalog.get(name).set(json_file=str(path), evaluator_type="lvis")
    images = list(detections_of_images(path))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    memory = process_memory("VmRSS")
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        if side == "lvis-api":
            evaluator = LVISEvaluator(name, ("bbox",), max_dets_per_image=DETECTIONS)
        else:
            per_class = 10_000 if side == "with AP-fixed" else None
            evaluator = LongTailLVISEvaluator(name, ("bbox",), detections_per_class=per_class)
        evaluator.reset()
        for inputs, outputs in images:
            evaluator.process(inputs, outputs)
        with mock.patch.object(lvis.eval, "np", NumpyWithFloat()):
            metrics = evaluator.evaluate()["bbox"]
    seconds = time.perf_counter() - start
    connection.send((seconds, process_memory("VmHWM") - memory, metrics))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[500, 5000])
    options = parser.parse_args()
    rows, differ = [], False
    for num_images in options.images:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "annotations.json"
            write_annotations(path, num_images, np.random.default_rng(0))
            measured = {}
            for side in ("here", "with AP-fixed", "lvis-api"):
                ours, theirs = multiprocessing.Pipe()
                context = multiprocessing.get_context("fork")
                process = context.Process(target=evaluate, args=(side, path, theirs))
                process.start()
                theirs.close()
                measured[side] = ours.recv()
                process.join()
                print(num_images, side, *measured[side][:2], file=sys.stderr, flush=True)
        here, fixed, stock = (measured[s] for s in ("here", "with AP-fixed", "lvis-api"))
        gap = max(abs(here[2][m] - stock[2][m]) for m in MEASURES)
        differ |= not gap < 1e-6
        rows.append(
            {
                "images": num_images,
                "lvis-api s": f"{stock[0]:.1f}",
                "here s": f"{here[0]:.2f}",
                "ratio": f"{stock[0] / here[0]:.1f}",
                "with AP-fixed s": f"{fixed[0]:.2f}",
                "AP": f"{here[2]['AP']:.3f}",
                "largest difference": f"{gap:.0e}",
                "lvis-api MB": f"{stock[1]:.0f}",
                "here MB": f"{here[1]:.0f}",
                "with AP-fixed MB": f"{fixed[1]:.0f}",
            }
        )
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))
    if differ:
        sys.exit("The measures differ.")


if __name__ == "__main__":
    main()
