"""On a full disk, what a command would have replaced stays, and one sentence says so.

A file that may grow no further fails as a full disk does; the last test fills a real one.
"""

import contextlib
import json
import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch
from commands import bags_d2_here, run_command
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import DatasetEvaluator

from bags_d2 import BagsError, BAGSTrainer
from bags_d2.analysis.comparison import write_comparison
from bags_d2.analysis.method_runs import BASELINE, Comparison

ROOT = Path(__file__).resolve().parents[1]
GLYPHS = ROOT / "configs" / "glyphs_baseline.yaml"
BEFORE = "the one before"
CLASSIFIER = "roi_heads.box_predictor.cls_score.weight"


@contextlib.contextmanager
def full_disk(size=300):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "in" / "model.pth"
    path.parent.mkdir()
    torch.save({"model": {CLASSIFIER: torch.ones(5, 200), "x": torch.ones(10_000)}}, path)
    return path


def test_a_checkpoint(checkpoint, tmp_path):
    output = tmp_path / "out" / "model.pth"
    output.parent.mkdir()
    output.write_text(BEFORE)
    with full_disk(), pytest.raises(BagsError, match=r"model\.pth' could not be written .*free"):
        run_command("publish", checkpoint, output)
    assert output.read_text() == BEFORE
    assert list(output.parent.iterdir()) == [output]
    run_command("publish", checkpoint, output)
    assert torch.load(output, weights_only=True)["model"].keys() == {CLASSIFIER, "x"}


def test_files_of_a_comparison(tmp_path):
    run = Comparison(GLYPHS, tmp_path / "compare").run(BASELINE, 1)
    run.results_file.parent.mkdir(parents=True)
    run.results_file.write_text(json.dumps({"bbox": {"AP": 10.0}}))
    names = ("comparison.md", "comparison.json", "comparison.csv")
    for name in names:
        (tmp_path / name).write_text(BEFORE)
    with full_disk(), pytest.raises(BagsError, match=r"comparison\.md' could not be written"):
        write_comparison([run], tmp_path, "Title")
    assert {(tmp_path / name).read_text() for name in names} == {BEFORE}
    (run.folder / "settings.json").write_text("{}")
    comparison = Comparison(GLYPHS, tmp_path / "compare")
    with full_disk(), pytest.raises(BagsError, match=r"settings\.json' could not be written"):
        comparison.make(run, None)
    assert (run.folder / "settings.json").read_text() == "{}"


def test_results(tiny_cfg, tmp_path, monkeypatch):
    """Those before are gone before an evaluation starts: they would be of other detections."""

    def evaluate(*_):
        assert not results.exists()
        return {"bbox": {"AP": [1.0] * 500}}

    monkeypatch.setattr(DefaultTrainer, "test", evaluate)
    cfg = tiny_cfg("OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", ())
    results = tmp_path / "inference" / "results.json"
    results.parent.mkdir()
    results.write_text(BEFORE)
    with full_disk(), pytest.raises(BagsError, match=r"results\.json' could not be written"):
        BAGSTrainer.test(cfg, None, [DatasetEvaluator()])
    assert not list(results.parent.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk")
def test_a_disk_that_is_full(checkpoint, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        output = disk / "model.pth"
        output.write_text(BEFORE)
        done = bags_d2_here("publish", checkpoint, output)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert "model.pth' could not be written (No space left on device); free" in done.stderr
        assert output.read_text() == BEFORE
        assert list(disk.iterdir()) == [output]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
