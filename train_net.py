#!/usr/bin/env python
"""Train or evaluate a detector of bags_d2; flags are Detectron2's, and --method."""

import contextlib
import functools

from detectron2.engine import default_setup, hooks
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from bags_d2 import BAGSTrainer
from bags_d2.engine import (
    LongTailCheckpointer,
    argument_parser,
    check_files,
    launch,
    load_for_evaluation,
    log_changed_settings,
    process_count,
    setup_cfg,
)
from bags_d2.errors import exit_on_user_error
from bags_d2.utils.files import lock_folder


def main(args):
    cfg = setup_cfg(args)
    # A checkpoint may be evaluated while the training goes on.
    folder = f"{cfg.OUTPUT_DIR}/inference" if args.eval_only else cfg.OUTPUT_DIR
    with lock_folder(folder) if comm.is_main_process() else contextlib.nullcontext():
        return run(cfg, args)


def run(cfg, args):
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="bags_d2")
    if args.resume and not args.eval_only and comm.is_main_process():
        log_changed_settings(cfg)
    default_setup(cfg, args)
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


if __name__ == "__main__":
    args = argument_parser().parse_args()
    with exit_on_user_error():
        # Once before processes are launched: one sentence instead of one traceback for each.
        check_files(setup_cfg(args), args.eval_only, args.resume, process_count(args))
        launch(main, args)
