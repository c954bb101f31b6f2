#!/usr/bin/env python
"""Draw what the joint merge corrects: an object, the verdict of each group, and both merges.

Writes docs/images/joint_merge.png from the carried BAGS detector and the glyphs' validation set.
"""

import argparse
import unicodedata
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from detectron2.data import build_detection_test_loader
from detectron2.structures import Boxes, pairwise_iou

from bags_d2 import ClassGroups, merge_group_probs
from bags_d2.analysis.palette import bin_color
from bags_d2.data.loader import LongTailDatasetMapper
from bags_d2.engine import load_for_evaluation, setup_cfg
from bags_d2.evaluation.ground_truth import GroundTruth
from bags_d2.utils.files import write_atomically

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
SHOWN = 4  # classes of a bar chart


class Example(NamedTuple):
    picture: np.ndarray  # (H, W, 3) RGB
    name: str
    label: int
    logits: torch.Tensor  # (C,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", default=str(ROOT / "configs" / "glyphs_bags.yaml"))
    parser.add_argument("--output", default=str(ROOT / "docs" / "images" / "joint_merge.png"))
    parser.add_argument("--examples", type=int, default=3)
    args = parser.parse_args()
    cfg = setup_cfg(
        argparse.Namespace(
            config_file=args.config_file,
            method=None,
            opts=["MODEL.WEIGHTS", str(ROOT / "checkpoints/glyphs_bags/model_final.pth")],
        )
    )
    model = load_for_evaluation(cfg).eval()
    groups = model.roi_heads.box_predictor.groups
    examples, counts = find_examples(cfg, model, groups)
    print(
        "{rois} objects found: right by both merges {both}, by the joint merge alone {joint}, by "
        "the paper's alone {paper}".format(**counts)
    )
    draw(examples[: args.examples], groups, cfg, args.output)


@torch.no_grad()
def find_examples(cfg, model, groups):
    """Objects that the joint merge alone gets right, the surest mistakes of the paper's first."""
    dataset = cfg.DATASETS.TEST[0]
    truth = GroundTruth.of_dataset(dataset, None, False)
    names = [_symbol(category["name"]) for category in truth.categories]
    classes = {category["id"]: c for c, category in enumerate(truth.categories)}
    loader = build_detection_test_loader(cfg, dataset, mapper=LongTailDatasetMapper(cfg, False))
    found, counts = [], dict.fromkeys(("rois", "both", "joint", "paper"), 0)
    for inputs in loader:
        image = inputs[0]["image"]
        images = model.preprocess_image(inputs)
        features = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, features)
        heads = model.roi_heads
        pooled = heads.box_pooler(
            [features[f] for f in heads.box_in_features], [proposals[0].proposal_boxes]
        )
        logits, _ = heads.box_predictor(heads.box_head(pooled))
        objects = truth.truths(truth.image_position(inputs[0]["image_id"]), "bbox", lvis=True)
        scale = image.shape[1] / inputs[0]["height"]
        boxes = torch.tensor([o["bbox"] for o in objects]) * scale
        boxes[:, 2:] += boxes[:, :2]
        best, roi = pairwise_iou(Boxes(boxes), proposals[0].proposal_boxes).max(dim=1)
        merged = {how: merge_group_probs(logits, groups, how)[:, :-1] for how in ("paper", "joint")}
        for o, box, overlap, r in zip(objects, boxes, best, roi, strict=True):
            if overlap < 0.7:
                continue
            label = classes[o["category_id"]]
            right = {how: int(scores[r].argmax()) == label for how, scores in merged.items()}
            counts["rois"] += 1
            counts["both"] += all(right.values())
            counts["joint"] += right["joint"] and not right["paper"]
            counts["paper"] += right["paper"] and not right["joint"]
            if right["joint"] and not right["paper"]:
                scores = merged["paper"][r]
                margin = float(scores.max() - scores[label])
                picture = _crop(image, box)
                found.append((margin, Example(picture, names[label], label, logits[r])))
    surest = {}  # of each class
    for _, example in sorted(found, key=lambda pair: -pair[0]):
        surest.setdefault(example.label, example)
    return list(surest.values()), counts


def draw(examples, groups: ClassGroups, cfg, path: str) -> None:
    truth = GroundTruth.of_dataset(cfg.DATASETS.TEST[0], None, False)
    names = [_symbol(category["name"]) for category in truth.categories]
    num_groups = groups.num_groups
    fig, rows = plt.subplots(
        len(examples),
        1 + num_groups + 2,
        figsize=(1.7 * (3 + num_groups), 1.7 * len(examples) + 0.3),
        squeeze=False,
        gridspec_kw={"width_ratios": [0.9, *[1] * num_groups, 1.15, 1.15]},
    )
    for axes, example in zip(rows, examples, strict=True):
        first, *verdicts, paper, joint = axes
        first.imshow(example.picture)
        first.set_title(f"object: {example.name}", fontsize=9)
        first.axis("off")
        parts = example.logits.split(groups.widths)[1:]
        for g, (part, axis) in enumerate(zip(parts, verdicts, strict=True), 1):
            members = (groups.class_to_group == g).nonzero().flatten().tolist()
            probs = part.softmax(dim=0)
            order = probs[1:].argsort(descending=True)[: SHOWN - 1].tolist()
            labels = ["others", *(names[members[i]] for i in order)]
            values = [float(probs[0]), *(float(probs[1 + i]) for i in order)]
            colors = ["#BBBBBB", *[bin_color(g - 1)] * len(order)]
            of_group = [None, *(members[i] for i in order)]
            _bars(axis, labels, values, colors, [c == example.label for c in of_group])
            axis.set_title(f"group {g}: {_range_of(g, cfg)}", fontsize=9)
        for axis, how in ((paper, "paper"), (joint, "joint")):
            scores = merge_group_probs(example.logits[None], groups, how)[0, :-1]
            order = scores.argsort(descending=True)[:SHOWN].tolist()
            colors = [bin_color(int(groups.class_to_group[c]) - 1) for c in order]
            labels, values = [names[c] for c in order], [float(scores[c]) for c in order]
            _bars(axis, labels, values, colors, [c == example.label for c in order])
            axis.set_title(f"{how} merge", fontsize=9, fontweight="bold")
    fig.tight_layout()
    with write_atomically(path, "wb") as file:
        fig.savefig(file, format="png", dpi=110)
    plt.close(fig)


def _range_of(g: int, cfg) -> str:
    edges = [0, *cfg.MODEL.BAGS.GROUP_THRESHOLDS]
    return f"{edges[g - 1]} to {edges[g] - 1}" if g < len(edges) else f"{edges[-1]} and more"


def _symbol(name: str) -> str:
    """The character itself, whose Unicode name a class of glyphs has."""
    try:
        return unicodedata.lookup(name.upper())
    except KeyError:
        return name


def _bars(axis, labels, values, colors, is_right) -> None:
    places = range(len(labels))
    axis.barh(places, values, color=colors)
    axis.set_yticks(places, labels, fontsize=11)
    for tick, right in zip(axis.get_yticklabels(), is_right, strict=True):
        tick.set_fontweight("bold" if right else "normal")
    for place, value in zip(places, values, strict=True):
        axis.text(value + 0.03, place, f"{value:.2f}", va="center", fontsize=8)
    axis.set_xlim(0, 1.35)
    axis.set_xticks([])
    axis.invert_yaxis()
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def _crop(image: torch.Tensor, box: torch.Tensor, margin: int = 6) -> np.ndarray:
    _, height, width = image.shape
    left, top, right, bottom = (int(x) for x in box.round())
    rows = slice(max(top - margin, 0), min(bottom + margin, height))
    columns = slice(max(left - margin, 0), min(right + margin, width))
    return image[:, rows, columns].permute(1, 2, 0).numpy()[:, :, ::-1]


if __name__ == "__main__":
    main()
