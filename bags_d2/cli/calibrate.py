"""Calibrate a trained classifier without training it.

Writes OUTPUT_DIR/model_final.pth, which is evaluated with the same config. docs/after_training.md
says which classifiers a calibration has a meaning for.

Example:
    bags-d2 calibrate --calibration fracal --config-file configs/glyphs_baseline.yaml \\
        MODEL.WEIGHTS checkpoints/glyphs_baseline/model_final.pth OUTPUT_DIR output/glyphs_fracal
"""

import argparse

from .flags import add_cache_flags, add_config_flags, add_trailing_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration",
        required=True,
        metavar="NAME",
        help="norcal, fracal, logn, tau_norm or temperature",
    )
    parser.add_argument(
        "--strength",
        type=float,
        help="gamma of norcal, lambda of fracal, tau of tau_norm; default: 0.6, 2 and 1",
    )
    parser.add_argument("--max-count", type=int, help="only classes with fewer training instances")
    add_cache_flags(parser)
    add_config_flags(parser)
    add_trailing_options(parser)


def run(args: argparse.Namespace) -> None:
    from detectron2.utils.logger import setup_logger

    from ..engine import check_files, setup_cfg
    from ..fitting.calibration import calibrate

    cfg = setup_cfg(args)
    check_files(cfg)
    setup_logger(cfg.OUTPUT_DIR, name="bags_d2")
    calibrate(
        cfg,
        args.calibration,
        strength=args.strength,
        max_count=args.max_count,
        folder=args.cache,
        detector=args.detector,
    )
