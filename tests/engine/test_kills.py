"""Killed at any moment, a run goes on to the result that it would have had.

Runs take place in processes of their own, which are killed with SIGKILL at random moments. They are
forked from a server that has one thread, since a fork of many threads may wait for ever.
"""

import functools
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
from prepare_glyphs import build_glyphs

from bags_d2 import BAGSTrainer
from bags_d2.engine import setup_cfg
from bags_d2.fitting import extract_features, fit_classifier

TINY = str(Path(__file__).resolve().parents[1] / "tiny.yaml")
pytestmark = pytest.mark.slow

KILLS = 6  # of each kind of run; the tests of this file make 26 with the two of building data

CASCADE = (
    *("MODEL.ROI_HEADS.NAME", "LongTailCascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"),
)


def run_with_kills(target, folder, kills, seed, check):
    """Run a function to its end, again and again, until its processes were killed often enough.

    Args:
        target: what to run, given a folder; must go on where it was in that folder. It can be
            pickled.
        folder: for the folders of the runs.
        kills: number of kills in all.
        seed: of their moments.
        check: given the folder of a run that was not killed, and of one that was.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bags_d2"])
    rng = random.Random(seed)

    def start(run):
        process = context.Process(target=target, args=(run,))
        process.start()
        return process

    # The server's own start is not to be counted as a run's.
    warm = context.Process(target=int)
    warm.start()
    warm.join()
    began = time.monotonic()
    process = start(folder / "whole")
    process.join(120)
    assert process.exitcode == 0
    longest = 0.4 * (time.monotonic() - began)
    killed = 0
    for run in (folder / f"killed{i}" for i in range(kills)):
        while True:
            process = start(run)
            is_last = killed >= kills
            process.join(120 if is_last else rng.uniform(0.02, longest))
            if is_last or not process.is_alive():
                break
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += 1
        assert process.exitcode == 0
        check(folder / "whole", run)
        if killed == kills:
            return
    raise AssertionError(f"only {killed} kills in {kills} runs")


def make_cfg(root, folder, *opts):
    """The tiny detector on the tiny data set."""
    rows = [["kills_train", "lvis", f"{root}/annotations/glyphs_tiny_train.json", str(root)]]
    options = [
        *("DATASETS.REGISTER", str(rows)),
        *("DATASETS.TRAIN", "('kills_train',)", "DATASETS.TEST", "()"),
        *("OUTPUT_DIR", str(folder), "MODEL.ROI_BOX_PREDICTOR.NAME", "BAGSOutputLayers"),
        *("SOLVER.MAX_ITER", "24", "SOLVER.STEPS", "(16,)", "SOLVER.CHECKPOINT_PERIOD", "3"),
        *("INPUT.MIN_SIZE_TRAIN", "(64, 80, 96)", "SEED", "3"),
        *opts,
    ]
    args = default_argument_parser().parse_args(["--config-file", TINY, *options])
    return setup_cfg(args)


def train(root, opts, folder):
    torch.set_num_threads(1)
    cfg = make_cfg(root, folder, *opts)
    torch.manual_seed(cfg.SEED)  # default_setup's part of it
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    trainer = BAGSTrainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()


def cache_and_fit(root, opts, stage1, folder):
    torch.set_num_threads(1)
    cfg = make_cfg(
        root,
        folder / "out",
        *opts,
        *("MODEL.WEIGHTS", f"{stage1}/model_final.pth", "SOLVER.MAX_ITER", "400"),
        *("SOLVER.STEPS", "(300,)", "SOLVER.CHECKPOINT_PERIOD", "20"),
        *("MODEL.TRAINABLE_PARAMS", "('roi_heads.box_predictor*cls_score.*',)"),
    )
    extract_features(cfg, folder / "cache", views=2)
    fit_classifier(cfg, folder / "cache")


def build(folder):
    build_glyphs("glyphs_tiny", folder, num_workers=1, progress=False)


@pytest.fixture
def root(datasets_root):
    return datasets_root / "glyphs_tiny"


def final(folder):
    return torch.load(Path(folder) / "model_final.pth", weights_only=True)


def assert_equal(first, second):
    assert first["model"].keys() == second["model"].keys()
    for name, tensor in first["model"].items():
        assert torch.equal(tensor, second["model"][name]), name


@pytest.mark.parametrize(
    "opts", [(), ("DATALOADER.NUM_WORKERS", "2", "DATALOADER.ASPECT_RATIO_GROUPING", "False")]
)
def test_training(root, tmp_path, opts):
    def check(whole, killed):
        assert_equal(final(whole), final(killed))
        states = [final(f)["trainer"]["_trainer"]["optimizer"]["state"] for f in (whole, killed)]
        for key, state in states[0].items():
            assert torch.equal(state["momentum_buffer"], states[1][key]["momentum_buffer"])
        for path in killed.glob("model_*.pth"):
            torch.load(path, weights_only=True)  # every checkpoint is whole

    run_with_kills(functools.partial(train, root, opts), tmp_path, KILLS, 1, check)


@pytest.mark.parametrize("opts", [(), CASCADE], ids=["faster", "cascade"])
def test_caching_and_fitting(root, tmp_path, opts):
    stage1 = tmp_path / "stage1"
    softmax = ("MODEL.ROI_BOX_PREDICTOR.NAME", "FastRCNNOutputLayers", "SOLVER.MAX_ITER", "6")
    train(root, (*opts, *softmax, "SOLVER.STEPS", "()"), stage1)

    def check(whole, killed):
        assert_equal(final(whole / "out"), final(killed / "out"))

    run = functools.partial(cache_and_fit, root, opts, stage1)
    run_with_kills(run, tmp_path, KILLS, 2, check)


def test_building_data(tmp_path):
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
