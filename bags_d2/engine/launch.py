"""Starting one process for each GPU, or joining those that torchrun has started."""

import argparse
import os
from collections.abc import Callable

import torch
from detectron2 import engine
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch import distributed, multiprocessing

from ..errors import BagsError, ConfigError, one_sentence, worker_error
from ..utils.quiet import silence_dependencies

__all__ = ["launch", "process_count"]


def process_count(args: argparse.Namespace) -> int:
    """Processes of a run on all its machines."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return max(args.num_gpus, 1) * args.num_machines  # --num-gpus 0 is one on the CPU


def launch(
    main: Callable,
    args: argparse.Namespace,
    main_args: tuple | None = None,
    remedy: str = "run the same command with --resume to go on from the last checkpoint.",
) -> None:
    """Run ``main`` in every process of a training run.

    Under torchrun the processes exist and the flags of Detectron2's launcher are ignored; otherwise
    Detectron2's ``launch`` spawns them. If one fails or is killed, the others on its machine are
    stopped.

    Args:
        main: what to run; a function that can be pickled.
        args: of ``bags-d2 train``, or of Detectron2's parser.
        main_args: arguments of ``main``; None is ``(args,)``.
        remedy: what to do if a process was killed.

    Raises:
        BagsError: what a process raised, or that one was killed.
    """
    main_args = (args,) if main_args is None else main_args
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _join_torchrun()
        main(*main_args)
        # So that none is gone while another still talks to it. The group is not destroyed, as gloo
        # may abort where one process does so before another.
        comm.synchronize()
        return
    if args.num_gpus > torch.cuda.device_count() > 0:
        raise ConfigError(
            f"--num-gpus is {args.num_gpus} but this machine has {torch.cuda.device_count()}."
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        raise ConfigError("--num-machines needs --dist-url tcp://HOST:PORT, of machine 0.")
    try:
        engine.launch(
            _run,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(main, main_args),
        )
    except multiprocessing.ProcessRaisedException as error:
        message = str(worker_error(error) or one_sentence(error))
        if message == str(error):
            raise
        raise BagsError(message) from None
    except multiprocessing.ProcessExitedException as error:
        how = f"exit status {error.exit_code}"
        if error.signal_name is not None:
            how = f"signal {error.signal_name}, as when memory runs out"
        raise BagsError(
            f"Process {error.error_index} of this machine ended early ({how}), so the "
            f"others were stopped; {remedy}"
        ) from None


def _run(main: Callable, args: tuple) -> None:
    if multiprocessing.parent_process() is not None:
        silence_dependencies()
    main(*args)


def _join_torchrun() -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(backend, timeout=DEFAULT_TIMEOUT)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
