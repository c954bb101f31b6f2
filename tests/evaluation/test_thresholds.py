"""Score thresholds of classes against plain searches."""

import json
from statistics import NormalDist

import numpy as np
import pytest
import torch
from detectron2.structures import Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from bags_d2 import ConfigError, DataError
from bags_d2.data.annotations import read_annotations
from bags_d2.evaluation.ground_truth import GroundTruth
from bags_d2.evaluation.thresholds import (
    DETECTION,
    ScoreThresholds,
    choose_thresholds,
    held_out_summary,
    judge,
    precisions,
)

NAMES = ("a", "b", "c")


def _lower_bound(right, n, confidence):
    """Of Wilson's interval, by bisection of its definition: (p - q)^2 = z^2 q (1 - q) / n."""
    z, p = NormalDist().inv_cdf(confidence), right / n
    low, high = 0.0, p
    for _ in range(100):
        q = (low + high) / 2
        low, high = (q, high) if (p - q) ** 2 > z**2 * q * (1 - q) / n else (low, q)
    return high


def _slow_threshold(found, precision, min_detections, confidence):
    best = None
    for least in sorted({float(d["score"]) for d in found}, reverse=True):
        kept = [d for d in found if d["score"] >= least]
        right = sum(bool(d["right"]) for d in kept)
        if (
            len(kept) >= min_detections
            and _lower_bound(right, len(kept), confidence) >= precision - 1e-9
        ):
            best = least
    return best


@st.composite
def detections(draw):
    row = st.tuples(st.integers(0, 2), st.integers(0, 12), st.integers(0, 5), st.integers(0, 5))
    rows = draw(st.lists(row, max_size=60))
    # Right more often where the score is high.
    return np.array([(c, s / 12, 2 * r + s > 8, i) for c, s, r, i in rows], dtype=DETECTION)


@settings(deadline=None, max_examples=150)
@given(
    detections(), st.sampled_from([0.5, 0.7, 0.83]), st.integers(1, 6), st.sampled_from([0.5, 0.8])
)
def test_thresholds_are_the_least_that_hold(found, precision, min_detections, confidence):
    options = (precision, min_detections, confidence)
    own = [_slow_threshold(found[found["class"] == c], *options) for c in range(3)]
    abstaining = [c for c in range(3) if own[c] is None]
    pooled = _slow_threshold(found[np.isin(found["class"], abstaining)], *options)
    pooled = _slow_threshold(found, *options) if pooled is None else pooled
    if pooled is None:
        with pytest.raises(DataError, match="No score holds a precision"):
            choose_thresholds(found, NAMES, *options)
        return
    chosen = choose_thresholds(found, NAMES, *options)
    assert chosen.abstaining == [NAMES[c] for c in abstaining]
    assert chosen.pooled == pooled
    assert chosen.of_classes(NAMES).tolist() == [pooled if t is None else t for t in own]
    measured = precisions(found, chosen.of_classes(NAMES))
    assert all(measured[c] >= precision - 1e-9 for c in range(3) if own[c] is not None)


@pytest.mark.parametrize("options", [(0.0, 1, 0.9), (1.0, 1, 0.9), (0.9, 0, 0.9), (0.9, 1, 0.4)])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="--precision must lie"):
        choose_thresholds(np.zeros(3, dtype=DETECTION), NAMES, *options)


def test_the_held_out_half_is_measured():
    rng = np.random.default_rng(0)
    rows = [(c, s, s > 0.5, i) for i in range(40) for c in range(3) for s in rng.random(4)]
    text = held_out_summary(np.array(rows, dtype=DETECTION), NAMES, 0.9, 10, 0.9)
    assert "Chosen on 20 images and measured on the other 20" in text
    assert "of 3 classes with detections" in text


def test_files(tmp_path):
    chosen = ScoreThresholds(0.9, 0.8, 5, 0.75, {"a": 0.25, "b": 0.5}, ["b"])
    chosen.save(tmp_path / "x.thresholds.json")
    assert ScoreThresholds.load(tmp_path / "x.thresholds.json") == chosen
    assert ScoreThresholds.of_checkpoint(tmp_path / "x.pth") == chosen
    assert ScoreThresholds.of_checkpoint(tmp_path / "x.pth", "none") is None
    assert ScoreThresholds.of_checkpoint(tmp_path / "y.pth") is None
    assert (
        ScoreThresholds.of_checkpoint(tmp_path / "y.pth", tmp_path / "x.thresholds.json") == chosen
    )
    for content in ([], {"a": 0.5}, vars(chosen) | {"thresholds": {"a": "x"}}):
        (tmp_path / "bad.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match="has no thresholds; write it again"):
            ScoreThresholds.load(tmp_path / "bad.json")


def test_detections_are_selected_by_class():
    chosen = ScoreThresholds(0.9, 0.8, 5, 0.75, {"a": 0.25, "b": 0.1}, [])
    scores = torch.tensor([0.3, 0.2, 0.7, 0.8, float(np.float32(0.1))])
    found = Instances((9, 9), scores=scores, pred_classes=torch.tensor([0, 0, 2, 2, 1]))
    assert chosen.select(found, NAMES).scores.tolist() == scores[[0, 3, 4]].tolist()


def test_what_is_right_is_what_the_evaluators_count(write_lvis):
    # Image 1 has one object of class a; image 2 one of b, and c is not annotated there.
    path = write_lvis({1: "a", 2: "b", 3: "c"}, [(1, 1), (2, 2)])
    truth = GroundTruth(read_annotations(path), class_names=NAMES)
    box = (1, 2, 3, 4)
    rows = [(1, *box, 0.9, 1), (1, *box, 0.8, 1), (2, 10, 10, 3, 3, 0.7, 2), (2, *box, 0.6, 3)]
    found = judge(truth, np.array(rows, dtype=float), lvis=False)
    assert sorted(found.tolist()) == [
        *((0, 0.8, False, 1), (0, 0.9, True, 1), (1, 0.7, False, 2), (2, 0.6, False, 2))
    ]
    federated = judge(truth, np.array(rows, dtype=float), lvis=True)
    assert sorted(federated.tolist()) == sorted(found.tolist())[:3]
