#!/usr/bin/env python
"""How far exported detectors are from the detectors themselves, for every box predictor.

Each detector is tiny and of random weights. It is exported by one image and compared on others of
several sizes, so with other numbers of proposals. A cell of the table holds the largest deviations
of boxes (pixels), scores and masks, and how many detections had no counterpart.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from tabulate import tabulate

from bags_d2 import ROI_BOX_PREDICTOR_REGISTRY, add_bags_config
from bags_d2.engine.export import SUFFIXES, compare, detect, export_model, load_exported

TINY = Path(__file__).resolve().parents[1] / "tests" / "tiny.yaml"
CASCADE = (
    *("MODEL.ROI_HEADS.NAME", "LongTailCascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
)
MASK = ("MODEL.MASK_ON", True)
DETECTORS = {"faster": (), "mask": MASK, "cascade": CASCADE, "cascade_mask": (*CASCADE, *MASK)}
NAMES = sorted(name for name, _ in ROI_BOX_PREDICTOR_REGISTRY)
SIZES = ((96, 128), (160, 96), (32, 48))  # of images, the first of which is the example


def make_model(predictor, detector, *options, num_classes=6):
    """A tiny detector whose scores tell classes apart."""
    cfg = get_cfg()
    add_bags_config(cfg)
    cfg.merge_from_file(str(TINY))
    cfg.merge_from_list(["MODEL.ROI_BOX_PREDICTOR.NAME", predictor, *DETECTORS[detector]])
    cfg.merge_from_list(["MODEL.ROI_HEADS.NUM_CLASSES", num_classes, *options])
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump([1 + 7 * i % 2000 for i in range(num_classes)], file)
        file.flush()
        cfg.MODEL.LONG_TAIL.CLASS_COUNTS_FILE = file.name
        torch.manual_seed(0)
        model = build_model(cfg).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("cls_score.weight"):
            torch.nn.init.normal_(parameter, std=0.02)
    for module in model.modules():
        if hasattr(module, "class_means"):
            torch.nn.init.normal_(module.class_means)
    return model


def measure(model, format, sizes=SIZES):
    """The worst deviation over the images, and how many detections were compared."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, *size), generator=generator) for size in sizes]
    expected = [detect(model, image) for image in images]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{SUFFIXES[format]}"
        export_model(model, images[0], path)
        worst = compare(expected, map(load_exported(path), images))
    return worst, sum(len(found["scores"]) for found in expected)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--predictors", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=list(DETECTORS))
    parser.add_argument("--num-classes", type=int, default=6)
    args = parser.parse_args()
    rows, columns = [], [(d, f) for d in args.detectors for f in SUFFIXES]
    faulty = 0
    for name in args.predictors:
        merges = ("paper", "joint") if name == "BAGSOutputLayers" else ("paper",)
        for merge in merges:
            row = [f"{name}, {merge}" if len(merges) > 1 else name]
            for detector, format in columns:
                options = ("MODEL.BAGS.MERGE", merge)
                model = make_model(name, detector, *options, num_classes=args.num_classes)
                worst, count = measure(model, format)
                faulty += not worst.is_small
                parts = [f"{x:.0e}" for x in (worst.boxes, worst.scores, worst.masks)]
                row.append(f"{' '.join(parts)}, {worst.unmatched} of {count}")
            rows.append(row)
            print(row, flush=True)
    print(tabulate(rows, ["predictor", *(f"{d}, {f}" for d, f in columns)], "pipe"))
    raise SystemExit(f"{faulty} cells are beyond 0.01 pixels or 0.0001." if faulty else 0)


if __name__ == "__main__":
    main()
