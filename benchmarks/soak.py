#!/usr/bin/env python
"""Does memory grow in a long training? 2,000 steps of the tests' tiny detector, memory recorded.

Prints the resident memory after every tenth of the steps, and fails if it grows by more than 5%
from the end of warm-up on.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from detectron2.engine import HookBase, default_argument_parser
from memory import process_memory

from bags_d2 import BAGSTrainer
from bags_d2.engine import setup_cfg

ROOT = Path(__file__).resolve().parents[1]
ALLOWED_GROWTH = 1.05


class Recorder(HookBase):
    """Resident memory of this process in MB, ten times in a run."""

    def __init__(self, steps: int) -> None:
        self.period = max(steps // 10, 1)
        self.megabytes: list[float] = []

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self.period == 0:
            self.megabytes.append(process_memory("VmRSS"))
            print(f"{self.trainer.iter + 1:6d} steps: {self.megabytes[-1]:8.1f} MB", flush=True)


def train(steps: int, folder: Path) -> list[float]:
    """Train BAGS for so many steps.

    Returns:
        Resident memory in MB after every tenth of them.
    """
    prepare = [sys.executable, str(ROOT / "datasets" / "prepare_glyphs.py"), "glyphs_tiny"]
    subprocess.run([*prepare, "--root", str(folder), "--quiet"], check=True)
    root = folder / "glyphs_tiny"
    rows = [["soak_train", "lvis", f"{root}/annotations/glyphs_tiny_train.json", str(root)]]
    options = [
        *("DATASETS.REGISTER", str(rows), "DATASETS.TRAIN", "('soak_train',)"),
        *("DATASETS.TEST", "()", "OUTPUT_DIR", str(folder / "out"), "SEED", "1"),
        *("MODEL.ROI_BOX_PREDICTOR.NAME", "BAGSOutputLayers", "SOLVER.STEPS", "()"),
        *("SOLVER.MAX_ITER", str(steps), "SOLVER.CHECKPOINT_PERIOD", str(max(steps // 4, 1))),
    ]
    arguments = ["--config-file", str(ROOT / "tests" / "tiny.yaml"), *options]
    (folder / "out").mkdir()
    trainer = BAGSTrainer(setup_cfg(default_argument_parser().parse_args(arguments)))
    recorder = Recorder(steps)
    trainer.register_hooks([recorder])
    trainer.train()
    return recorder.megabytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        megabytes = train(args.steps, Path(folder))
    # Warm-up: the first three tenths, in which caches and allocators fill.
    growth = max(megabytes[3:]) / megabytes[2]
    print(f"After warm-up memory changed by {growth - 1:+.1%} at most.")
    if growth > ALLOWED_GROWTH:
        sys.exit("Memory grows.")


if __name__ == "__main__":
    main()
