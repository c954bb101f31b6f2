"""Choose score thresholds of classes for a target precision.

Detects in a validation set and writes the thresholds beside the checkpoint, where "bags-d2 predict"
and "bags-d2 draw" find them. What they are worth is told from the set itself: chosen on half of its
images, they are measured on the other half.

Example:
    bags-d2 thresholds --config-file glyphs_bags.yaml --precision 0.9
"""

import argparse

from .flags import add_config_flags, add_trailing_options

INTERRUPTED = "Nothing was written; run the same command again to start over."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_flags(parser)
    parser.add_argument("--dataset", metavar="NAME", help="default: the first of DATASETS.TEST")
    parser.add_argument("--precision", type=float, default=0.9, help="of each class, at IoU 0.5")
    parser.add_argument(
        "--confidence", type=float, default=0.9, help="that a class has it; 0.5: as measured"
    )
    parser.add_argument(
        "--min-detections", type=int, default=10, help="with fewer a class takes a pooled threshold"
    )
    parser.add_argument("--output", metavar="FILE", help="default: beside the checkpoint")
    add_trailing_options(parser)


def run(args: argparse.Namespace) -> None:
    from detectron2.utils.logger import setup_logger

    from ..engine.predictions import judged_detections
    from ..engine.predictor import LongTailPredictor, predictor_cfg
    from ..evaluation.thresholds import ScoreThresholds, choose_thresholds, held_out_summary

    setup_logger(name="bags_d2")
    cfg = predictor_cfg(args.config_file, opts=args.opts, method=args.method)
    predictor = LongTailPredictor(cfg)
    found = judged_detections(predictor, args.dataset)
    options = (predictor.class_names, args.precision, args.min_detections, args.confidence)
    chosen = choose_thresholds(found, *options)
    path = args.output or ScoreThresholds.path_of(cfg.MODEL.WEIGHTS)
    chosen.save(path)
    print(held_out_summary(found, *options))
    print(
        f"{len(chosen.thresholds) - len(chosen.abstaining)} classes have a threshold of their own, "
        f"{len(chosen.abstaining)} the pooled one, {chosen.pooled:.3f}; written to {path}."
    )
