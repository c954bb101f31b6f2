"""Add a class to a trained BAGS detector, with all else frozen.

Its column is fitted to the box features of the new images. Writes OUTPUT_DIR/model_final.pth, a
detector of one class more, which is evaluated with MODEL.ROI_HEADS.NUM_CLASSES raised by one.

Example:
    bags-d2 add-class --name owl --data coco owls/train.json owls/images \\
        --config-file configs/mine_baseline.yaml --method bags \\
        MODEL.WEIGHTS output/mine_bags/model_final.pth OUTPUT_DIR output/mine_with_owls
"""

import argparse

from .flags import add_cache_flags, add_config_flags, add_trailing_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", required=True, help="the class, as the annotations call it")
    parser.add_argument(
        "--data",
        nargs=3,
        required=True,
        metavar=("KIND", "JSON", "IMAGES"),
        help="the new images: coco or lvis, annotation file, folder",
    )
    add_cache_flags(parser, "objects in them are negatives too; default: none")
    add_config_flags(parser)
    add_trailing_options(parser)


def run(args: argparse.Namespace) -> None:
    from detectron2.utils.logger import setup_logger

    from ..engine import check_files, setup_cfg
    from ..fitting.add_class import add_class

    cfg = setup_cfg(args)
    check_files(cfg, eval_only=True)
    setup_logger(cfg.OUTPUT_DIR, name="bags_d2")
    _, changes = add_class(cfg, args.name, args.data, folder=args.cache, detector=args.detector)
    print("| group | RoIs | P before | P after | taken by the new class |\n|---|---|---|---|---|")
    for name, rois, before, after, taken in changes:
        print(f"| {name} | {rois} | {before:.3f} | {after:.3f} | {taken:.1%} |")
