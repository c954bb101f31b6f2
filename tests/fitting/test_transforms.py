"""Tau-normalisation of a checkpoint, and its tool."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bags_d2 import ConfigError, DataError
from bags_d2.fitting.transforms import tau_normalize

ROOT = Path(__file__).resolve().parents[2]
NAME = "roi_heads.box_predictor.cls_score.weight"


def checkpoint(*names):
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(5, 8, generator=generator) for name in names}
    return {**state, "roi_heads.box_predictor.cls_score.bias": torch.randn(5)}


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0, 1.7])
def test_rows_are_divided_by_a_power_of_their_norm(tau):
    state = checkpoint(NAME)
    changed = tau_normalize(state, tau)
    for row, new in zip(state[NAME][:-1], changed[NAME][:-1], strict=True):
        norm = sum(x * x for x in row.tolist()) ** 0.5
        torch.testing.assert_close(new, row / norm**tau)
    assert torch.equal(changed[NAME][-1], state[NAME][-1])  # background
    bias = "roi_heads.box_predictor.cls_score.bias"
    assert torch.equal(changed[bias], state[bias])


def test_tau_0_leaves_the_weights_alone():
    state = checkpoint(NAME)
    assert torch.equal(tau_normalize(state, 0.0)[NAME], state[NAME])


def test_chosen_classes_alone_and_every_stage_of_a_cascade():
    names = [f"roi_heads.box_predictor.{i}.cls_score.weight" for i in range(3)]
    state = checkpoint(*names)
    changed = tau_normalize(state, 1.0, torch.tensor([True, False, False, True]))
    for name in names:
        norms = changed[name].norm(dim=1)
        torch.testing.assert_close(norms[[0, 3]], torch.ones(2))
        assert torch.equal(changed[name][[1, 2, 4]], state[name][[1, 2, 4]])


def test_what_is_no_softmax_classifier_is_refused():
    with pytest.raises(DataError, match=r"has no 'roi_heads\.box_predictor"):
        tau_normalize({"backbone.weight": torch.zeros(2)}, 1.0)
    grouped = {**checkpoint(NAME), "roi_heads.box_predictor.groups.class_to_group": torch.ones(4)}
    with pytest.raises(DataError, match="is a grouped classifier"):
        tau_normalize(grouped, 1.0)
    with pytest.raises(ConfigError, match=r"class counts are of 3 classes.*of 4"):
        tau_normalize(checkpoint(NAME), 1.0, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ConfigError, match="--tau must be 0 or more"):
        tau_normalize(checkpoint(NAME), -1.0)


@pytest.mark.slow
def test_the_tool_writes_a_checkpoint(tmp_path):
    baseline = ROOT / "checkpoints" / "glyphs_baseline" / "model_final.pth"
    command = [sys.executable, "-m", "bags_d2", "normalize"]
    command += ["--input", str(baseline), "--output", str(tmp_path / "new" / "model.pth")]
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps([9, 100, 99, *[500] * 37]))
    config = ["--config-file", str(ROOT / "configs" / "glyphs_baseline.yaml")]
    config += ["MODEL.LONG_TAIL.CLASS_COUNTS_FILE", str(counts)]
    options = ["--tau", "0.5", "--max-count", "100", *config]
    subprocess.run([*command, *options], check=True, cwd=ROOT, capture_output=True)
    before = torch.load(baseline, weights_only=True)["model"]
    after = torch.load(tmp_path / "new" / "model.pth", weights_only=True)["model"]
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == [NAME]
    changed = (before[NAME] != after[NAME]).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [0, 2]
    failed = subprocess.run(
        [*command, "--max-count", "9"], cwd=ROOT, capture_output=True, text=True
    )
    assert failed.returncode == 1
    assert "Error: --max-count needs --config-file" in failed.stderr
