"""Detect in many images: COCO results and a table.

The folder gets detections.json (COCO and LVIS results), detections.csv (with the names of classes)
and images.json (what the ids stand for). Thresholds of classes that "bags-d2 thresholds" has left
beside the checkpoint are used unless --min-score or --thresholds says otherwise.

Example:
    bags-d2 predict --config-file glyphs_bags.yaml --input photos --output output/predictions
"""

import argparse
from pathlib import Path

from .flags import add_config_flags, add_input_flag, add_options_flag, add_thresholds_flag

INTERRUPTED = "Run the same command again to go on; finished images are not repeated."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_flags(parser)
    add_input_flag(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--min-score", type=float, metavar="SCORE", help="one for all classes")
    add_thresholds_flag(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="images of one size at once")
    parser.add_argument(
        "--processes", type=int, default=1, help="each on a GPU of its own, where there are any"
    )
    add_options_flag(parser)


def run(args: argparse.Namespace) -> None:
    from detectron2.utils.logger import setup_logger

    from ..analysis.media import image_paths
    from ..engine.predictions import PredictionJob, write_predictions
    from ..engine.predictor import predictor_cfg
    from ..evaluation.thresholds import ScoreThresholds

    setup_logger(name="bags_d2")
    images = [str(path) for path in image_paths(args.input)]
    cfg = predictor_cfg(args.config_file, opts=args.opts, method=args.method)
    choice = args.thresholds or ("none" if args.min_score is not None else None)
    thresholds = ScoreThresholds.of_checkpoint(cfg.MODEL.WEIGHTS, choice)
    job = PredictionJob(cfg, images, args.batch_size, args.min_score or 0.0, thresholds)
    write_predictions(job, args.output, args.processes)
