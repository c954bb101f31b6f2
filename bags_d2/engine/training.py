"""Training or evaluating by a config file, from the command line's arguments on."""

import argparse
import contextlib
import functools

from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..config import BASELINE
from ..utils.files import lock_folder
from .evaluate import evaluate_classifiers, load_for_evaluation
from .launch import launch, process_count
from .setup import check_files, log_changed_settings, setup_cfg, setup_run
from .trainer import BAGSTrainer

__all__ = ["evaluate", "main", "train"]


def train(args: argparse.Namespace) -> None:
    """``bags-d2 train``: check everything, and run :func:`main` in every process."""
    # Once before processes are launched: one sentence instead of one traceback for each.
    check_files(setup_cfg(args), args.eval_only, args.resume, process_count(args))
    launch(main, args)


def main(args: argparse.Namespace) -> dict:
    """Train, or evaluate with ``args.eval_only``, in this process; the metrics by task."""
    cfg = setup_cfg(args)
    # A checkpoint may be evaluated while the training goes on.
    folder = f"{cfg.OUTPUT_DIR}/inference" if args.eval_only else cfg.OUTPUT_DIR
    with lock_folder(folder) if comm.is_main_process() else contextlib.nullcontext():
        return _run(cfg, args)


def evaluate(args: argparse.Namespace) -> None:
    """``bags-d2 evaluate``: classifiers of one detector, in every process."""
    cfgs = []
    for method, weights, folder in args.run:
        opts = [*args.opts, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", folder]
        overlay = None if method == BASELINE else method
        cfg = setup_cfg(argparse.Namespace(config_file=args.config_file, method=overlay, opts=opts))
        check_files(cfg, eval_only=True, num_processes=process_count(args))
        cfgs.append(cfg)
    launch(_evaluate, args, (cfgs,))


def _evaluate(cfgs: list[CfgNode]) -> None:
    setup_logger(cfgs[0].OUTPUT_DIR, distributed_rank=comm.get_rank(), name="bags_d2")
    setup_logger(cfgs[0].OUTPUT_DIR, distributed_rank=comm.get_rank())
    evaluate_classifiers(cfgs)


def _run(cfg: CfgNode, args: argparse.Namespace) -> dict:
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="bags_d2")
    if args.resume and not args.eval_only and comm.is_main_process():
        log_changed_settings(cfg)
    setup_run(cfg, args)
    if args.eval_only:
        model = load_for_evaluation(cfg, args.resume)
        results = BAGSTrainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(BAGSTrainer.test_with_tta(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    trainer = BAGSTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if cfg.TEST.AUG.ENABLED:
        tta = functools.partial(BAGSTrainer.test_with_tta, cfg, trainer.model)
        trainer.register_hooks([hooks.EvalHook(0, tta)])
    return trainer.train()
