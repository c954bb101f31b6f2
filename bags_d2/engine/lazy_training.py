"""Training or evaluating by a LazyConfig (configs/lazy), from the command line's arguments on.

The configs run with Detectron2's own script too. This adds what its checkpointer does not know:
which new weights are intended, and which would be a mistake.
"""

import argparse
import contextlib
import weakref

from detectron2.config import LazyConfig, instantiate
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    create_ddp_model,
    hooks,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from ..checkpoint import LongTailCheckpointer
from ..config import find_config
from ..errors import ConfigError, MissingFileError
from ..utils.events import default_writers
from ..utils.files import lock_folder
from .launch import launch
from .setup import setup_run

__all__ = ["main", "train"]


def train(args: argparse.Namespace) -> None:
    """``bags-d2 train`` of a config in Python: :func:`main` in every process."""
    if args.method:
        raise ConfigError("--method is laid over a YAML; a LazyConfig names its own classes.")
    _load(args)
    launch(main, args)


def _test(cfg, model):
    evaluator = instantiate(cfg.dataloader.evaluator)
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), evaluator)
    print_csv_format(results)
    return results


def _train(cfg, resume):
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
            hooks.EvalHook(cfg.train.eval_period, lambda: _test(cfg, model)),
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


def _load(args: argparse.Namespace) -> DictConfig:
    try:
        cfg = LazyConfig.load(find_config(args.config_file)[0])
    except FileNotFoundError:
        raise MissingFileError(f"Config file '{args.config_file}' does not exist.") from None
    return LazyConfig.apply_overrides(cfg, args.opts)


def main(args: argparse.Namespace):
    """Train, or evaluate with ``args.eval_only``, in this process."""
    cfg = _load(args)
    # A checkpoint may be evaluated while the training goes on.
    is_locked = comm.is_main_process() and not args.eval_only
    with lock_folder(cfg.train.output_dir) if is_locked else contextlib.nullcontext():
        return _run(cfg, args)


def _run(cfg, args):
    setup_run(cfg, args)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="bags_d2")
    if not args.eval_only:
        return _train(cfg, args.resume)
    model = instantiate(cfg.model).to(cfg.train.device)
    LongTailCheckpointer(model, evaluating=True).load(cfg.train.init_checkpoint)
    return _test(cfg, create_ddp_model(model))
