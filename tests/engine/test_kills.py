"""Killed at any moment, a run goes on to the result that it would have had.

Runs take place in forked processes, which are killed with SIGKILL at random moments.
"""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from detectron2.engine import default_argument_parser

from bags_d2 import BAGSTrainer
from bags_d2.data.glyphs import build_glyphs
from bags_d2.engine import extract_features, fit_classifier, setup_cfg

TINY = str(Path(__file__).resolve().parents[1] / "tiny.yaml")
KILLS = 6  # of each kind of run; the tests of this file make 26 with the two of building data


def run_with_kills(target, folder, kills, seed, check):
    """Run a function to its end, again and again, until its processes were killed often enough.

    Args:
        target: what to run, given a folder; must go on where it was in that folder.
        folder: for the folders of the runs.
        kills: number of kills in all.
        seed: of their moments.
        check: given the folder of a run that was not killed, and of one that was.
    """
    context = multiprocessing.get_context("fork")
    rng = random.Random(seed)

    def start(run):
        process = context.Process(target=target, args=(run,))
        process.start()
        return process

    began = time.monotonic()
    process = start(folder / "whole")
    process.join(120)
    assert process.exitcode == 0
    longest = 0.5 * (time.monotonic() - began)
    killed = 0
    for run in (folder / f"killed{i}" for i in range(kills)):
        while True:
            process = start(run)
            process.join(rng.uniform(0.02, longest) if killed < kills else 120)
            if not process.is_alive():
                break
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += 1
        assert process.exitcode == 0
        check(folder / "whole", run)
        if killed == kills:
            return
    raise AssertionError(f"only {killed} kills in {kills} runs")


@pytest.fixture
def make_cfg(datasets_root, register):
    """``make_cfg(folder, *opts)``: the tiny detector on the tiny data set, in float32."""
    root = datasets_root / "glyphs_tiny"
    names = [
        register(f"kills_{s}", str(root / "annotations" / f"glyphs_tiny_{s}.json"), str(root))
        for s in ("train", "val")
    ]

    def make(folder, *opts):
        options = [
            *("DATASETS.TRAIN", f"('{names[0]}',)", "DATASETS.TEST", "()"),
            *("OUTPUT_DIR", str(folder), "MODEL.ROI_BOX_PREDICTOR.NAME", "BAGSOutputLayers"),
            *("SOLVER.MAX_ITER", "24", "SOLVER.STEPS", "(16,)", "SOLVER.CHECKPOINT_PERIOD", "3"),
            *("INPUT.MIN_SIZE_TRAIN", "(64, 80, 96)", "SEED", "3"),
            *opts,
        ]
        args = default_argument_parser().parse_args(["--config-file", TINY, *options])
        return setup_cfg(args)

    return make


def train(cfg):
    torch.set_num_threads(1)
    torch.manual_seed(cfg.SEED)  # default_setup's part of it
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    trainer = BAGSTrainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()


def final(folder):
    return torch.load(Path(folder) / "model_final.pth", weights_only=True)


def assert_equal(first, second):
    assert first["model"].keys() == second["model"].keys()
    for name, tensor in first["model"].items():
        assert torch.equal(tensor, second["model"][name]), name


@pytest.mark.parametrize(
    "opts", [(), ("DATALOADER.NUM_WORKERS", "2", "DATALOADER.ASPECT_RATIO_GROUPING", "False")]
)
def test_training(make_cfg, tmp_path, opts):
    def check(whole, killed):
        assert_equal(final(whole), final(killed))
        states = [final(f)["trainer"]["_trainer"]["optimizer"]["state"] for f in (whole, killed)]
        for key, state in states[0].items():
            assert torch.equal(state["momentum_buffer"], states[1][key]["momentum_buffer"])
        for path in killed.glob("model_*.pth"):
            torch.load(path, weights_only=True)  # every checkpoint is whole

    run_with_kills(lambda run: train(make_cfg(run, *opts)), tmp_path, KILLS, 1, check)


def test_caching_and_fitting(make_cfg, tmp_path):
    stage1 = tmp_path / "stage1"
    softmax = ("MODEL.ROI_BOX_PREDICTOR.NAME", "FastRCNNOutputLayers", "SOLVER.MAX_ITER", "6")
    train(make_cfg(stage1, *softmax, "SOLVER.STEPS", "()"))

    def cache_and_fit(folder):
        torch.set_num_threads(1)
        cfg = make_cfg(
            folder / "out",
            *("MODEL.WEIGHTS", f"{stage1}/model_final.pth", "SOLVER.MAX_ITER", "400"),
            *("SOLVER.STEPS", "(300,)", "SOLVER.CHECKPOINT_PERIOD", "20"),
            *("MODEL.TRAINABLE_PARAMS", "('roi_heads.box_predictor*cls_score.*',)"),
        )
        extract_features(cfg, folder / "cache", views=2)
        fit_classifier(cfg, folder / "cache")

    def check(whole, killed):
        assert_equal(final(whole / "out"), final(killed / "out"))

    run_with_kills(cache_and_fit, tmp_path, 2 * KILLS, 2, check)


def test_building_data(tmp_path):
    def build(folder):
        build_glyphs("glyphs_tiny", folder, num_workers=1, progress=False)

    def files_of(folder):
        """Without the hidden folders of unfinished builds, which nothing reads."""
        files = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
        return {f for f in files if not f.parts[0].startswith(".")}

    def check(whole, killed):
        assert files_of(whole) == files_of(killed)
        for name in files_of(whole):
            if name.suffix == ".json":
                assert json.loads((killed / name).read_text()) == json.loads(
                    (whole / name).read_text()
                )
            else:
                assert (killed / name).read_bytes() == (whole / name).read_bytes(), name

    run_with_kills(build, tmp_path, 2, 3, check)
