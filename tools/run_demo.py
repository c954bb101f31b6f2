#!/usr/bin/env python
"""The main job on the built-in data set: softmax against Balanced Group Softmax, in one table.

Every number comes from train_net.py, run here as a user would run it.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from bags_d2.analysis.demo import report_demo
from bags_d2.data.glyphs import build_glyphs

CONTROL = "glyphs_softmax_retrained"


def train_net(config: str, output_dir: Path, *options: str) -> float:
    """Run train_net.py, show its progress, and return the seconds that it took."""
    command = [sys.executable, "train_net.py", "--config-file", f"configs/{config}.yaml", *options]
    command += ["OUTPUT_DIR", str(output_dir)]
    print(f"\n$ {' '.join(command[1:])}", flush=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with open(output_dir / "console.txt", "w") as log:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Such small layers gain nothing from a second thread, and two threads that wait for
            # each other on busy cores lose tenfold.
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )
        for line in process.stdout:
            log.write(line)
            if any(mark in line for mark in (" iter: ", "Inference done", "Newly init", "Error:")):
                print(line.rstrip()[:160], flush=True)
    if process.wait():
        sys.exit(f"The run failed; its whole output is in {log.name}.")
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/demo"))
    parser.add_argument("--seed", type=int, default=1, help="seed of stage 2")
    parser.add_argument(
        "--from-scratch", action="store_true", help="train the softmax baseline as well (~6 min)"
    )
    args = parser.parse_args()

    seconds, options = {}, ["SEED", str(args.seed)]
    start = time.perf_counter()
    build_glyphs("glyphs", os.environ.get("DETECTRON2_DATASETS", "datasets"))
    seconds["dataset"] = time.perf_counter() - start

    weights = Path("checkpoints/glyphs_baseline/model_final.pth")
    if args.from_scratch:
        # --resume: an interrupted training goes on where it stopped.
        folder = args.output / "glyphs_baseline"
        seconds["softmax_training"] = train_net("glyphs_baseline", folder, "--resume")
        weights = folder / "model_final.pth"
    options += ["MODEL.WEIGHTS", str(weights)]
    runs = {
        "softmax": ("glyphs_baseline", ["--eval-only"]),
        "softmax_retrained": (CONTROL, []),
        "bags": ("glyphs_bags", []),
    }
    for name, (config, flags) in runs.items():
        seconds[name] = train_net(config, args.output / name, *flags, *options)
    print(f"\n{report_demo(args.output, weights, seconds)}")


if __name__ == "__main__":
    main()
