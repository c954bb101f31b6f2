#!/usr/bin/env python
"""Convert a checkpoint of the BAGS authors (mmdetection 1.x); see docs/mmdet_checkpoints.md."""

import argparse
import os
from pathlib import Path

import torch
from detectron2.modeling import build_model

from bags_d2 import DataError, MissingFileError
from bags_d2.checkpoint.files import read_tensor, read_torch
from bags_d2.checkpoint.mmdet import GroupLayout, convert_state_dict
from bags_d2.data.class_statistics import ClassStatistics, training_class_counts
from bags_d2.engine import LongTailCheckpointer, setup_cfg
from bags_d2.errors import exit_on_user_error
from bags_d2.utils.files import write_atomically


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", type=Path, help="the authors' .pth")
    parser.add_argument("output", type=Path, help="the file to write")
    parser.add_argument("--config-file", required=True, help="its config in configs/mmdet/")
    parser.add_argument("--method", help="bags for checkpoints of BAGS")
    parser.add_argument("--label2binlabel", type=Path, help="the authors' file of class groups")
    parser.add_argument("--pred-slice", type=Path, help="the authors' pred_slice_with0.pt")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config KEY VALUE")
    return parser.parse_args()


def group_layout(args, cfg) -> GroupLayout:
    """From the authors' files, checked with the training counts where both are there."""
    thresholds = tuple(cfg.MODEL.BAGS.GROUP_THRESHOLDS)
    try:
        counts, reason = training_class_counts(cfg, by="instances"), ""
    except FileNotFoundError as error:
        counts, reason = None, str(error)
    if args.label2binlabel and args.pred_slice:
        files = read_tensor(args.label2binlabel), read_tensor(args.pred_slice)
        return GroupLayout.from_files(*files, thresholds, counts)
    if counts is None:
        raise MissingFileError(
            "The class groups are unknown: give the authors' --label2binlabel and --pred-slice, or "
            f"the training counts ({reason})"
        )
    return GroupLayout.from_counts(counts, thresholds)


def main() -> None:
    args = parse_args()
    cfg = setup_cfg(args)
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    checkpoint = read_torch(args.input)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise DataError(f"'{args.input}' has no 'state_dict': not a checkpoint of mmdetection.")
    is_grouped = cfg.MODEL.ROI_BOX_PREDICTOR.NAME == "BAGSOutputLayers"
    layout = group_layout(args, cfg) if is_grouped else None
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    weights, left_out = convert_state_dict(checkpoint["state_dict"], num_classes, layout)
    partial = args.output.with_name(f".{args.output.name}.{os.getpid()}.pth")
    classes = ClassStatistics.from_training_set(cfg).for_checkpoint()
    with write_atomically(partial, "wb") as file:
        torch.save({"model": weights, **classes, "__author__": "BAGS, converted"}, file)
    try:
        # Whatever does not fit the model of the config is an error here, not at evaluation.
        LongTailCheckpointer(build_model(cfg), evaluating=True).load(str(partial))
    except BaseException:
        partial.unlink()
        raise
    partial.replace(args.output)
    print(f"{args.output}: {len(weights)} tensors; left out: {len(left_out)} BatchNorm counters.")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
