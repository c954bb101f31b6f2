#!/usr/bin/env python
"""A training step of a frozen detector: Detectron2's, with its frozen parts skipped, bare forward.

Sides, in turn in one process on one thread, on the same images and the same random numbers:
  stock    forward, backward and SGD step with MODEL.SKIP_FROZEN False, as Detectron2 does
  skipping the same with MODEL.SKIP_FROZEN True
  forward  backbone, proposals, sampling of RoIs, RoIAlign and box head alone, without gradients

The classifiers must be equal, bit for bit, after the steps. Models are R50-FPN with random weights
and 1,203 classes; images are noise with random objects, around which the RPN is made to propose
boxes, so that about a hundred RoIs of an image are foreground. Times are medians of all steps;
memory is what a step adds to the process at its peak, measured in a fork of it (Linux).
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from detectron2.config import get_cfg
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from memory import added_memory
from tabulate import tabulate

from bags_d2 import BAGSTrainer, add_bags_config
from bags_d2.config import merge_config_file
from bags_d2.data.lvis_v1 import lvis_v1_counts
from bags_d2.fitting.extract import propose_only, roi_features

ROOT = Path(__file__).resolve().parents[1]
SIZE = (480, 640)
OBJECTS = 12
SIDES = ("stock", "skipping", "forward")
CONFIGS = {
    "Faster R-CNN": "lvis_baseline_R50",
    "Mask R-CNN": "lvis_baseline_mask_R50",
    "Cascade Mask R-CNN": "lvis_baseline_cascade_mask_X101_32x8d",
}


def build(name, skip, counts_file):
    cfg = get_cfg()
    add_bags_config(cfg)
    merge_config_file(cfg, ROOT / "configs" / f"{CONFIGS[name]}.yaml", "bags")
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.SKIP_FROZEN", skip),
            *("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.NUM_GROUPS", 1),
            *("MODEL.RESNETS.WIDTH_PER_GROUP", 64),
            *("MODEL.LONG_TAIL.CLASS_COUNTS_FILE", counts_file),
        ]
    )
    torch.manual_seed(0)
    return BAGSTrainer.build_model(cfg).train()


def make_batch(num_images, num_classes=1203):
    generator = torch.Generator().manual_seed(0)
    height, width = SIZE
    batch = []
    for _ in range(num_images):
        corners = torch.rand(OBJECTS, 2, generator=generator) * torch.tensor([400.0, 280.0])
        sizes = 40 + torch.rand(OBJECTS, 2, generator=generator) * 160
        boxes = torch.cat([corners, corners + sizes], dim=1)
        masks = torch.zeros(OBJECTS, height, width, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        instances = Instances(SIZE, gt_boxes=Boxes(boxes), gt_masks=BitMasks(masks))
        instances.gt_classes = torch.randint(num_classes, (OBJECTS,), generator=generator)
        image = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8, generator=generator)
        batch.append({"image": image, "height": height, "width": width, "instances": instances})
    return batch


def propose_objects(model, batch, per_object=8):
    """Let a random RPN propose what a trained one would: several boxes around each object.

    Without them hardly any RoI were foreground, and the mask head, which sees foreground alone,
    had nothing to do. The RPN's own work stays.
    """
    generator = torch.Generator().manual_seed(1)
    near = []
    for record in batch:
        boxes = record["instances"].gt_boxes.tensor.repeat(per_object, 1)
        sizes = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        near.append(boxes + 0.05 * sizes * torch.randn(boxes.shape, generator=generator))
    propose = model.proposal_generator.predict_proposals

    def predict_proposals(*args):
        proposals = propose(*args)
        for boxes, of_image in zip(near, proposals, strict=True):
            of_image.proposal_boxes.tensor[: len(boxes)] = boxes[: len(of_image)]
        return proposals

    model.proposal_generator.predict_proposals = predict_proposals


class Step:
    """One side: a model, its optimizer, and how many steps it has taken."""

    def __init__(self, model, batch, train):
        propose_objects(model, batch)
        self.model = model
        self.batch = batch
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.01) if train else None
        self.count = 0

    def __call__(self):
        torch.manual_seed(self.count)
        self.count += 1
        with EventStorage(1):
            if self.optimizer is None:
                roi_features(self.model, self.batch)
                return
            losses = sum(self.model(self.batch).values())
            self.optimizer.zero_grad()
            losses.backward()
            self.optimizer.step()


def measure(name, options):
    batch = make_batch(options.images)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as counts:
        json.dump(lvis_v1_counts()["instance_count"], counts)
        counts.flush()
        models = {skip: build(name, skip, counts.name) for skip in (False, True)}
    bare = copy.deepcopy(models[True])
    propose_only(bare.proposal_generator)
    sides = {
        "stock": Step(models[False], batch, True),
        "skipping": Step(models[True], batch, True),
        "forward": Step(bare, batch, False),
    }
    peaks = {side: added_memory(step) for side, step in sides.items()}
    seconds = {side: [] for side in sides}
    for _ in range(options.repeats):
        for side, step in sides.items():
            start = time.perf_counter()
            step()
            seconds[side].append(time.perf_counter() - start)
    trained = [
        {n: p for n, p in sides[side].model.named_parameters() if p.requires_grad}
        for side in ("stock", "skipping")
    ]
    equal = all(torch.equal(p, trained[1][n]) for n, p in trained[0].items())
    median = {side: statistics.median(times) for side, times in seconds.items()}
    return {
        "detector": name,
        **{f"{side} s": f"{median[side]:.2f}" for side in SIDES},
        "stock / skipping": f"{median['stock'] / median['skipping']:.2f}",
        "skipping / forward": f"{median['skipping'] / median['forward']:.2f}",
        "equal": equal,
        **{f"{side} MB": f"{peaks[side]:.0f}" for side in SIDES},
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="steps of each side")
    parser.add_argument("--images", type=int, default=2, help="images of a batch")
    parser.add_argument("--detectors", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.detectors:
        rows.append(measure(name, options))
        print(*rows[-1].values(), file=sys.stderr, flush=True)
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))
    if not all(row["equal"] for row in rows):
        sys.exit("The classifiers differ.")


if __name__ == "__main__":
    main()
