#!/usr/bin/env python
"""Train the classifier of stage 2 from cached box features instead of images (docs/fitting.md).

Both passes resume where they stopped if the same command is run again.
"""

from pathlib import Path

from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from bags_d2.engine import argument_parser, check_files, launch, setup_cfg
from bags_d2.errors import exit_on_user_error
from bags_d2.fitting.extract import extract_features
from bags_d2.fitting.train import fit_classifier


def parse_args():
    parser = argument_parser(__doc__)
    parser.add_argument("--views", type=int, default=1, help="augmented views of every image")
    parser.add_argument(
        "--rois-per-image", type=int, help="RoIs to keep of an image; default: all proposals"
    )
    parser.add_argument(
        "--cache",
        help="folder of the features; default: OUTPUT_DIR/../<folder of WEIGHTS>_features",
    )
    return parser.parse_args()


def default_cache(cfg) -> Path:
    """One folder for all classifiers of a detector."""
    return Path(cfg.OUTPUT_DIR).parent / f"{Path(cfg.MODEL.WEIGHTS).parent.name}_features"


def extract(cfg, folder, views, rois_per_image):
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="bags_d2")
    extract_features(cfg, folder, views, rois_per_image)


def main(args):
    cfg = setup_cfg(args)
    check_files(cfg)
    default_setup(cfg, args)
    folder = args.cache or default_cache(cfg)
    launch(extract, args, (cfg, folder, args.views, args.rois_per_image))
    if args.machine_rank == 0:
        # With the very arguments of above: others would add a second handler.
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="bags_d2")
        fit_classifier(cfg, folder)


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_args())
