"""Killed at any moment, commands and evaluation leave what was there or what they were to write."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import run_command
from detectron2.engine import default_argument_parser

from bags_d2.engine import training

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "tiny.yaml"
CLASSIFIER = "roi_heads.box_predictor.cls_score.weight"

pytestmark = pytest.mark.slow


def run(root, folder, *options):
    """bags-d2 train on the tiny data set, in this process."""
    torch.set_num_threads(1)
    sets = [
        [f"tools_{split}", "lvis", f"{root}/annotations/glyphs_tiny_{split}.json", str(root)]
        for split in ("train", "val")
    ]
    training.main(
        default_argument_parser().parse_args(
            [
                *("--config-file", str(TINY), *options),
                *("DATASETS.REGISTER", str(sets), "DATASETS.TRAIN", "('tools_train',)"),
                *("OUTPUT_DIR", str(folder), "DATASETS.TEST", "('tools_val',)"),
            ]
        )
    )


def evaluate(root, folder, weights):
    run(root, folder, "--eval-only", "MODEL.WEIGHTS", str(weights))


def kill_often(target, arguments, kills, check):
    """Start a function again and again, kill it at random moments, and check after each.

    Moments are drawn up to a little more than what a run takes, so that some come to their end.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bags_d2.engine.training"])
    rng = random.Random(4)

    def start():
        process = context.Process(target=target, args=arguments)
        process.start()
        return process

    start().join(120)  # also starts the server, whose start is not to be counted
    began = time.monotonic()
    process = start()
    process.join(120)
    assert process.exitcode == 0
    length = time.monotonic() - began
    killed = 0
    while killed < kills:
        process = start()
        process.join(rng.uniform(0, 1.2 * length))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.join()
        check()
    process = start()
    process.join(120)
    assert process.exitcode == 0


def test_a_checkpoint(tmp_path):
    weights = {CLASSIFIER: torch.ones(50, 1000), "x": torch.ones(10_000_000)}
    source, output = tmp_path / "in.pth", tmp_path / "out.pth"
    torch.save({"model": weights}, source)
    seen = set()

    def check():
        content = torch.load(output, weights_only=True)["model"]
        seen.add("before" if "before" in content else "after")
        assert content.keys() in ({"before"}, weights.keys())
        torch.save({"model": {"before": torch.ones(3)}}, output)

    torch.save({"model": {"before": torch.ones(3)}}, output)
    kill_often(run_command, ("publish", source, output), 12, check)
    assert "before" in seen
    assert torch.load(output, weights_only=True)["model"].keys() == weights.keys()


def test_results_are_never_beside_other_detections(datasets_root, tmp_path):
    root = datasets_root / "glyphs_tiny"
    detectors = []
    for seed in ("1", "2"):
        run(root, tmp_path / seed, "SEED", seed)
        detectors.append(tmp_path / seed / "model_final.pth")
    folder = tmp_path / "run"
    results = folder / "inference" / "results.json"
    detections = folder / "inference" / "tools_val" / "lvis_instances_results.json"
    whole = []
    for weights in detectors:
        evaluate(root, folder, weights)
        whole.append((results.read_bytes(), detections.read_bytes()))
    assert whole[0][1] != whole[1][1]
    evaluate(root, folder, detectors[0])
    shutil.copytree(folder, tmp_path / "first")
    killed_before_results = 0

    def check():
        nonlocal killed_before_results
        if results.exists():
            assert (results.read_bytes(), detections.read_bytes()) in whole
        else:
            killed_before_results += 1
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "first", folder)

    # When a kill falls between detections and results is a matter of load.
    for _ in range(4):
        kill_often(evaluate, (root, folder, detectors[1]), 12, check)
        if killed_before_results:
            break
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "first", folder)
    assert killed_before_results
    assert (results.read_bytes(), detections.read_bytes()) == whole[1]


def children_of(folder):
    """Command lines of the processes that name a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line and path.parent.name != str(os.getpid()):
            found.append(line)
    return found


def test_a_comparison(datasets_root, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets_root))
    (tmp_path / "tiny_baseline.yaml").write_text(
        f'_BASE_: "{TINY}"\nSOLVER:\n  MAX_ITER: 30\n  CHECKPOINT_PERIOD: 5\n'
    )
    (tmp_path / "tiny_bags.yaml").write_text(
        '_BASE_: "tiny_baseline.yaml"\nMODEL:\n  WEIGHTS: "the detector"\n'
        '  ROI_BOX_PREDICTOR:\n    NAME: "BAGSOutputLayers"\n'
        '  TRAINABLE_PARAMS: ("roi_heads.box_predictor*cls_score.*",)\n'
    )

    def command(output):
        flags = ["--methods", "bags,tau_norm", "--seeds", "1", "--output", str(output)]
        command = [sys.executable, "-m", "bags_d2", "compare"]
        return [*command, "--config-file", "tiny_baseline.yaml", *flags]

    def start(output):
        return subprocess.Popen(
            command(output), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    began = time.monotonic()
    assert start(tmp_path / "whole").wait(300) == 0
    length = time.monotonic() - began
    rng = random.Random(5)
    for _ in range(6):
        process = start(tmp_path / "killed")
        try:
            process.wait(rng.uniform(0.15, 0.6) * length)
        except subprocess.TimeoutExpired:
            process.kill()
        process.wait()
        for _ in range(50):  # none goes on training
            if not children_of(tmp_path / "killed"):
                break
            time.sleep(0.1)
        assert not children_of(tmp_path / "killed")
    process = start(tmp_path / "killed")
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, output
    whole, killed = (
        json.loads((tmp_path / name / "comparison.json").read_text())
        for name in ("whole", "killed")
    )
    for rows in (whole, killed):
        for row in rows:
            row.pop("seconds")
    assert killed == whole
