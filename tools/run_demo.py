#!/usr/bin/env python
"""The main job on the built-in data set: softmax against Balanced Group Softmax, in one table.

Every number comes from the tools that a user would run: train_net.py and, for stage 2, which
trains classifiers alone, tools/fit_classifier.py.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from bags_d2.analysis.demo import report_demo
from bags_d2.errors import exit_on_user_error
from bags_d2.utils.files import lock_folder
from bags_d2.utils.processes import run_logged

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "configs" / "glyphs_baseline.yaml")
STAGE_2 = ("softmax_retrained", "bags", "bags_joint")


def run(script: str, output_dir: Path, *options: str) -> float:
    """Run a script, show its progress, and return the seconds that it took."""
    command = [sys.executable, str(ROOT / script), "--config-file", CONFIG, *options]
    command += ["OUTPUT_DIR", str(output_dir)]
    print(f"\n$ {' '.join(command[1:])}", flush=True)
    return run_logged(command, output_dir / "console.txt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/demo"))
    parser.add_argument("--seed", type=int, default=1, help="seed of stage 2")
    parser.add_argument(
        "--from-scratch", action="store_true", help="train the softmax baseline as well (~6 min)"
    )
    parser.add_argument(
        "--online", action="store_true", help="train stage 2 from images, not cached features"
    )
    args = parser.parse_args()

    sys.stdout.reconfigure(errors="replace")
    with lock_folder(args.output):
        run_demo(args)


def run_demo(args: argparse.Namespace) -> None:
    # Stale as soon as a run of this demo writes.
    (args.output / "results.json").unlink(missing_ok=True)
    start = time.perf_counter()
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    script = str(ROOT / "datasets" / "prepare_glyphs.py")
    prepare = [sys.executable, script, "glyphs", "--root", root]
    if subprocess.run(prepare).returncode:
        sys.exit("The data set could not be built (see above).")
    seconds = {"dataset": time.perf_counter() - start}

    weights = ROOT / "checkpoints" / "glyphs_baseline" / "model_final.pth"
    seed = ("SEED", str(args.seed))
    if args.from_scratch:
        # --resume: an interrupted training is continued.
        folder = args.output / "glyphs_baseline"
        seconds["softmax_training"] = run("train_net.py", folder, "--resume", *seed)
        weights = folder / "model_final.pth"
    detector = ("MODEL.WEIGHTS", str(weights))
    seconds["softmax"] = run("train_net.py", args.output / "softmax", "--eval-only", *detector)
    for name in STAGE_2:
        folder, method = args.output / name, ("--method", name)
        if args.online:
            seconds[name] = run("train_net.py", folder, *method, *seed, *detector)
            continue
        cache = ("--cache", str(args.output / "features"))
        fitted = ("MODEL.WEIGHTS", str(folder / "model_final.pth"))
        seconds[name] = run("tools/fit_classifier.py", folder, *method, *cache, *seed, *detector)
        seconds[name] += run("train_net.py", folder, *method, "--eval-only", *fitted)
    print(f"\n{report_demo(args.output, seconds)}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
