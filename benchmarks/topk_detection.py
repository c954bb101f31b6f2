#!/usr/bin/env python
"""Exact top-k detection against Detectron2's inference, from logits to instances.

Both sides are the `inference` of one box predictor on the same logits, deltas and proposals: class
scores, decoding, NMS and selection of 300 detections. They run in turn in one process on one
thread, and the table holds medians. Both must find the same detections (those of equal score in any
order). Peak memory is what a path adds to the process, measured in a fork of it (Linux).

Inputs:
  even    Every class is as likely as any other, as with an untrained classifier: the most
          candidates above a threshold.
  scene   Half the RoIs lie on 20 objects, with one sure and five confused classes each; the rest
          is background: few candidates that overlap a lot, as with a trained classifier.
"""

import argparse
import math
import statistics
import sys
import time

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import fast_rcnn
from detectron2.structures import Boxes, Instances
from memory import added_memory
from tabulate import tabulate

from bags_d2.modeling import FastRCNNOutputLayers

IMAGE_SIZE = (800, 1000)
NUM_OBJECTS = 20

# input, RoIs, classes, score threshold, ratio that is promised
CLAIMS = [
    ("even", 1000, 1203, 1e-4, 100),
    ("even", 1000, 1203, 0.0, 100),
    ("scene", 1000, 1203, 1e-4, 10),
    ("scene", 1000, 1203, 0.0, 100),
    ("even", 1000, 80, 0.05, 0.9),
    ("scene", 1000, 80, 0.05, 0.9),
    ("scene", 100, 80, 0.05, 0.9),
]
GRID = [
    ("scene", num_rois, num_classes, 1e-4, None)
    for num_classes in (80, 1203, 5000, 10000)
    for num_rois in (100, 300, 1000, 2000)
]


def random_boxes(num_boxes, smallest, largest, generator):
    corners = torch.rand(num_boxes, 2, generator=generator) * 700
    sizes = smallest + torch.rand(num_boxes, 2, generator=generator) * (largest - smallest)
    return torch.cat([corners, corners + sizes], dim=1)


def make_input(kind, num_rois, num_classes, seed):
    """Logits (R, K + 1), deltas (R, 4 * K) and proposals of one image."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rois, num_classes + 1, generator=generator)
    deltas = 0.3 * torch.randn(num_rois, 4 * num_classes, generator=generator)
    proposals = random_boxes(num_rois, 5, 200, generator)
    if kind == "even":
        logits *= 2
    else:
        logits[:, -1] += math.log(num_classes) + 4
        rois = torch.arange(num_rois // 2)
        of = torch.randint(NUM_OBJECTS, rois.shape, generator=generator)
        boxes = random_boxes(NUM_OBJECTS, 30, 300, generator)
        proposals[rois] = boxes[of] + 8 * torch.randn(len(rois), 4, generator=generator)
        proposals[:, 2:] = torch.maximum(proposals[:, 2:], proposals[:, :2] + 1)
        classes = torch.randint(num_classes, (NUM_OBJECTS, 6), generator=generator)
        sure, confused = math.log(num_classes) + 5, math.log(num_classes) + 2
        logits[rois, classes[of, 0]] += sure
        for i in range(1, 6):
            logits[rois, classes[of, i]] += confused
    return logits, deltas, [Instances(IMAGE_SIZE, proposal_boxes=Boxes(proposals))]


def make_predictor(num_classes, score_thresh):
    return FastRCNNOutputLayers(
        ShapeSpec(channels=1),
        box2box_transform=Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
        num_classes=num_classes,
        test_score_thresh=score_thresh,
        test_nms_thresh=0.5,
        test_topk_per_image=300,
    ).eval()


def rows_of(result):
    """Detections as rows of numbers, in an order that does not depend on that of equal scores."""
    (found,), (rois,) = result
    columns = [found.scores, rois, found.pred_classes, *found.pred_boxes.tensor.T]
    return sorted(zip(*(c.tolist() for c in columns), strict=True), reverse=True)


@torch.no_grad()
def measure(case, options):
    """One row of the table."""
    kind, num_rois, num_classes, score_thresh, promised = case
    predictor = make_predictor(num_classes, score_thresh)
    logits, deltas, proposals = make_input(kind, num_rois, num_classes, options.seed)
    num_candidates = int((logits.softmax(dim=1)[:, :-1] > score_thresh).sum())
    inference = {
        "Detectron2": fast_rcnn.FastRCNNOutputLayers.inference,
        "here": FastRCNNOutputLayers.inference,
    }
    if num_candidates * num_classes > options.max_stock_work:
        del inference["Detectron2"]

    def run(side):
        return inference[side](predictor, (logits, deltas), proposals)

    memory = {side: added_memory(lambda side=side: run(side)) for side in inference}
    detections = [rows_of(run(side)) for side in inference]
    seconds = {side: [] for side in inference}
    for _ in range(options.repeats):
        for side, times in seconds.items():
            if sum(times) < options.max_seconds:
                start = time.perf_counter()
                run(side)
                times.append(time.perf_counter() - start)
    milliseconds = {side: 1e3 * statistics.median(times) for side, times in seconds.items()}
    compared = "Detectron2" in inference
    return {
        "input": kind,
        "RoIs": num_rois,
        "classes": num_classes,
        "threshold": score_thresh,
        "candidates": num_candidates,
        "Detectron2 ms": milliseconds.get("Detectron2"),
        "here ms": milliseconds["here"],
        "ratio": milliseconds["Detectron2"] / milliseconds["here"] if compared else None,
        "promised": promised,
        "equal": detections[0] == detections[1] if compared else None,
        "Detectron2 MB": memory.get("Detectron2"),
        "here MB": memory["here"],
    }


FORMATS = ("", "d", "d", "g", ",d", ".1f", ".2f", ".1f", "g", "", ".0f", ".0f")


def as_text(row):
    values = zip(row.values(), FORMATS, strict=True)
    return ["-" if value is None else format(value, spec) for value, spec in values]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9, help="runs of each side (default 9)")
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=10,
        help="no more runs of a side after this (default 10)",
    )
    parser.add_argument(
        "--max-stock-work",
        type=float,
        default=2e10,
        help="leave Detectron2 out where candidates x classes exceed this (default 2e10)",
    )
    parser.add_argument("--claims-only", action="store_true", help="not the grid of sizes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)

    rows = []
    for case in CLAIMS if options.claims_only else CLAIMS + GRID:
        rows.append(measure(case, options))
        print(*as_text(rows[-1]), file=sys.stderr, flush=True)
    print(tabulate(map(as_text, rows), list(rows[0]), disable_numparse=True, tablefmt="github"))
    if any(row["equal"] is False for row in rows):
        sys.exit("Detections differ.")
    if any(row["ratio"] and row["promised"] and row["ratio"] < row["promised"] for row in rows):
        sys.exit("A ratio is below what is promised.")


if __name__ == "__main__":
    main()
