"""Draw what a model detects in images, a video or a webcam.

Flags are those of Detectron2's demo.py. Without MODEL.WEIGHTS among the --opts, the weights are
what training with the config left in its OUTPUT_DIR, or else what this package carries for it.

Example:
    bags-d2 draw --config-file glyphs_bags.yaml --input photos/*.jpg --output output/pictures
"""

import argparse
from pathlib import Path

from .flags import add_config_flags, add_input_flag, add_options_flag, add_thresholds_flag


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_flags(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--webcam", action="store_true", help="take input from the webcam")
    source.add_argument("--video-input", type=Path, metavar="FILE", help="a video file")
    add_input_flag(source, required=False)
    parser.add_argument(
        "--output", type=Path, help="file or folder to save to; without it a window is shown"
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        metavar="SCORE",
        help="least score; default: the thresholds, if any, or else 0.3, since long-tailed "
        "detectors score lower than those of COCO",
    )
    add_thresholds_flag(parser)
    parser.add_argument("--top", type=int, default=20, help="detections drawn at most")
    parser.add_argument(
        "--compare", metavar="FILE", help="config of a second model, drawn beside the first"
    )
    parser.add_argument("--compare-weights", metavar="FILE", help="checkpoint of the second model")
    add_options_flag(parser)


def run(args: argparse.Namespace) -> None:
    from ..analysis.media import draw

    draw(args)
