"""Calibration by counts against a slow reference, and what it degenerates to."""

import math

import pytest
import torch
from classifier_checks import (
    FEATURES,
    long,
    make_predictor,
    random_logits,
)
from detectron2.layers import ShapeSpec
from torch.nn import functional as F

from bags_d2 import ConfigError, build_box_predictor
from bags_d2.modeling.box_predictors.norcal import NorCalOutputLayers, calibrated_probs

COUNTS = [2000, 3, 40, 0]
K = len(COUNTS)
NAME = ("MODEL.ROI_BOX_PREDICTOR.NAME", "NorCalOutputLayers")


@pytest.mark.parametrize("gamma", [0.3, 0.6, 1.0, 2.0])
def test_probabilities_are_those_of_the_formula(gamma):
    logits = random_logits(5, K + 1)
    probs = calibrated_probs(logits, long(COUNTS), gamma)
    for row, of_row in zip(logits.tolist(), probs.tolist(), strict=True):
        parts = [math.exp(z) / max(n, 1) ** gamma for z, n in zip(row, COUNTS, strict=False)]
        parts.append(math.exp(row[-1]))
        assert of_row == pytest.approx([part / sum(parts) for part in parts])


def test_without_gamma_or_with_one_instance_each_it_is_the_softmax():
    logits = random_logits(5, K + 1)
    torch.testing.assert_close(calibrated_probs(logits, long(COUNTS), 0.0), logits.softmax(1))
    torch.testing.assert_close(calibrated_probs(logits, long([1] * K), 0.9), logits.softmax(1))


def test_it_trains_as_a_softmax():
    predictor = make_predictor(NorCalOutputLayers, COUNTS)
    logits, labels = random_logits(6, K + 1), long([0, 1, 2, 3, K, K])
    torch.testing.assert_close(
        predictor.classification_loss(logits, labels), F.cross_entropy(logits, labels)
    )


def test_a_softmax_checkpoint_fits_and_brings_no_counts(tiny_cfg):
    shape = ShapeSpec(channels=FEATURES)
    softmax = tiny_cfg("MODEL.ROI_BOX_PREDICTOR.NAME", "FastRCNNOutputLayers")
    weights = build_box_predictor(softmax, shape).state_dict()
    predictor = build_box_predictor(tiny_cfg(*NAME, "MODEL.NORCAL.GAMMA", 0.9), shape)
    assert predictor.gamma == 0.9
    missing, unexpected = predictor.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["counts.class_counts"], [])
    cfg = tiny_cfg(*NAME, "MODEL.LONG_TAIL.CLASS_COUNTS_FILE", "", "DATASETS.TRAIN", ("absent",))
    without_counts = build_box_predictor(cfg, shape)
    with pytest.raises(ConfigError, match=r"class counts are unknown.*'absent'"):
        without_counts.class_probs(random_logits(2, 7))
    without_counts.load_state_dict(predictor.state_dict())  # one with counts serves alone
    logits = random_logits(2, 7)
    without_counts.gamma = 0.9
    assert torch.equal(without_counts.class_probs(logits), predictor.class_probs(logits))


def test_a_negative_gamma_is_refused(tiny_cfg):
    with pytest.raises(ConfigError, match=r"MODEL\.NORCAL\.GAMMA must be"):
        build_box_predictor(tiny_cfg(*NAME, "MODEL.NORCAL.GAMMA", -0.1), ShapeSpec(channels=8))
