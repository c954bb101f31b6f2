"""Convert a checkpoint of the BAGS authors (mmdetection 1.x).

See docs/mmdet_checkpoints.md.

Example:
    bags-d2 convert gs_mask_rcnn_r50_fpn_1x_lvis.pth ours.pth --method bags \\
        --config-file configs/mmdet/lvis_v0.5_baseline_mask_R50.yaml
"""

import argparse
from pathlib import Path

from .flags import add_config_flags, add_options_flag


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, help="the authors' .pth")
    parser.add_argument("output", type=Path, help="the file to write")
    add_config_flags(parser, "its config in configs/mmdet/")
    parser.add_argument("--label2binlabel", type=Path, help="the authors' file of class groups")
    parser.add_argument("--pred-slice", type=Path, help="the authors' pred_slice_with0.pt")
    add_options_flag(parser)


def run(args: argparse.Namespace) -> None:
    from ..checkpoint.mmdet import convert_checkpoint
    from ..engine import setup_cfg

    files = (args.label2binlabel, args.pred_slice)
    tensors, left_out = convert_checkpoint(args.input, args.output, setup_cfg(args), *files)
    print(f"{args.output}: {tensors} tensors; left out: {left_out} BatchNorm counters.")
