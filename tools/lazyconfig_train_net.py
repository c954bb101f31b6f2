#!/usr/bin/env python
"""Train or evaluate a LazyConfig (configs/lazy); flags as in Detectron2's script of this name.

The configs run with Detectron2's own script too. This one adds what its checkpointer does not
know: which new weights are intended, and which would be a mistake.
"""

import contextlib
import weakref

from detectron2.config import LazyConfig, instantiate
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    create_ddp_model,
    default_argument_parser,
    default_setup,
    hooks,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from bags_d2 import ConfigError, MissingFileError
from bags_d2.engine import LongTailCheckpointer, launch
from bags_d2.errors import exit_on_user_error
from bags_d2.utils.events import default_writers
from bags_d2.utils.files import lock_folder


def test(cfg, model):
    evaluator = instantiate(cfg.dataloader.evaluator)
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), evaluator)
    print_csv_format(results)
    return results


def train(cfg, resume):
    model = instantiate(cfg.model).to(cfg.train.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)  # also freezes what is not to train
    on_cpu = {"device_ids": None} if cfg.train.device == "cpu" else {}
    model = create_ddp_model(model, **cfg.train.ddp, **on_cpu)
    engine = AMPTrainer if cfg.train.amp.enabled else SimpleTrainer
    trainer = engine(model, instantiate(cfg.dataloader.train), optimizer)
    checkpointer = LongTailCheckpointer(
        model,
        cfg.train.output_dir,
        stage2=bool(cfg.optimizer.params.get("globs")),
        trainer=weakref.proxy(trainer),
    )
    is_main = comm.is_main_process()
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if is_main else None,
            hooks.EvalHook(cfg.train.eval_period, lambda: test(cfg, model)),
            hooks.PeriodicWriter(
                default_writers(cfg.train.output_dir, cfg.train.max_iter), cfg.train.log_period
            )
            if is_main
            else None,
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    trainer.train(start, cfg.train.max_iter)


def load(args):
    if not args.config_file:
        raise ConfigError("No config was given: add --config-file configs/lazy/...py.")
    try:
        return LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
    except FileNotFoundError:
        raise MissingFileError(f"Config file '{args.config_file}' does not exist.") from None


def main(args):
    cfg = load(args)
    # A checkpoint may be evaluated while the training goes on.
    is_locked = comm.is_main_process() and not args.eval_only
    with lock_folder(cfg.train.output_dir) if is_locked else contextlib.nullcontext():
        return run(cfg, args)


def run(cfg, args):
    default_setup(cfg, args)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="bags_d2")
    if not args.eval_only:
        return train(cfg, args.resume)
    model = instantiate(cfg.model).to(cfg.train.device)
    LongTailCheckpointer(model, evaluating=True).load(cfg.train.init_checkpoint)
    return test(cfg, create_ddp_model(model))


if __name__ == "__main__":
    parser = default_argument_parser()
    parser.description = (
        "Train or evaluate a LazyConfig. Such a config is a Python program, which is run: use none "
        "that you have not read. YAMLs, for train_net.py, are data."
    )
    args = parser.parse_args()
    with exit_on_user_error():
        load(args)
        launch(main, args)
