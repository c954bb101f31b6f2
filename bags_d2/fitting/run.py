"""Both passes of fitting, from the command line's arguments on."""

import argparse
import os
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..engine.launch import launch
from ..engine.setup import check_files, setup_cfg, setup_run
from .extract import extract_features
from .train import fit_classifier

__all__ = ["fit"]


def fit(args: argparse.Namespace) -> None:
    """``bags-d2 fit``: features in as many processes as asked for, then the classifier in one."""
    cfg = setup_cfg(args)
    check_files(cfg)
    setup_run(cfg, args)
    folder = args.cache or default_cache(cfg)
    options = {"views": args.views, "rois_per_image": args.rois_per_image}
    launch(_extract, args, (cfg, folder, options | {"dtype": args.cache_dtype}))
    if args.machine_rank == 0:
        # With the very arguments of _extract: others would add a second handler.
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="bags_d2")
        fit_classifier(cfg, folder)


def default_cache(cfg: CfgNode) -> Path:
    """One folder for all classifiers of a detector."""
    return Path(cfg.OUTPUT_DIR).parent / f"{Path(cfg.MODEL.WEIGHTS).parent.name}_features"


def _extract(cfg: CfgNode, folder: str | os.PathLike, options: dict) -> None:
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="bags_d2")
    extract_features(cfg, folder, **options)
