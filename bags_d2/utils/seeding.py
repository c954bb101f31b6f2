"""Random numbers as a function of what is being computed, not of what was computed before.

With a seed for every step and every sample, a run that is resumed goes on as if it had not been
interrupted.
"""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_generators(seed: int, device: str = "cpu") -> None:
    """Seed the global random generators, torch's for the CPU and one kind of device."""
    # Not torch.manual_seed, which remembers each call, with its traceback, for every kind of device
    # that is not in use: called for each image or step, it never frees that memory.
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - augmentations of Detectron2 draw from it
    torch.default_generator.manual_seed(seed)
    if device == "cuda":
        torch.cuda.manual_seed(seed)


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed of a step (or sample) of a run; processes have their own."""
    return seed * 1_000_003 + step + rank * 1_000_000_007


@contextlib.contextmanager
def isolated_generators(seed: int) -> Iterator[None]:
    """Seed the global generators of the CPU, and restore them afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    seed_generators(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
