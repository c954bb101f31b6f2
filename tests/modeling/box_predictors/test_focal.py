"""Focal loss against a slow reference, and what it degenerates to."""

import math

import pytest
import torch
from classifier_checks import (
    FEATURES,
    check_loss_and_gradient,
    long,
    make_predictor,
    random_logits,
)
from detectron2.layers import ShapeSpec
from torch.nn import functional as F

from bags_d2 import ConfigError, build_box_predictor
from bags_d2.modeling.box_predictors.focal import FocalOutputLayers, focal_loss

K = 5
NAME = ("MODEL.ROI_BOX_PREDICTOR.NAME", "FocalOutputLayers")


def slow_loss(labels, num_classes, gamma, alpha):
    def loss(rows):
        total = 0.0
        for row, label in zip(rows, labels, strict=True):
            for c, z in enumerate(row):
                p = 1 / (1 + math.exp(-z))
                p_t, alpha_t = (p, alpha) if c == label else (1 - p, 1 - alpha)
                total -= (alpha_t if alpha >= 0 else 1.0) * (1 - p_t) ** gamma * math.log(p_t)
        return total / max(sum(y < num_classes for y in labels), 1)

    return loss


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (1.0, 0.9), (0.0, -1.0), (5.0, 0.0)])
@pytest.mark.parametrize(
    "labels", [[0, 3, 1, K, K, 2, 4], [K, K, K], [2]], ids=["all", "no foreground", "one RoI"]
)
def test_loss_and_gradient(labels, gamma, alpha):
    predictor = make_predictor(FocalOutputLayers, num_classes=K, gamma=gamma, alpha=alpha)
    check_loss_and_gradient(
        lambda logits: predictor.classification_loss(logits, long(labels)),
        slow_loss(labels, K, gamma, alpha),
        random_logits(len(labels), K),
    )


def test_one_class():
    labels = [0, 1, 0, 1]
    predictor = make_predictor(FocalOutputLayers, num_classes=1)
    check_loss_and_gradient(
        lambda logits: predictor.classification_loss(logits, long(labels)),
        slow_loss(labels, 1, 2.0, 0.25),
        random_logits(4, 1),
    )


def test_without_focus_and_balance_it_is_binary_cross_entropy():
    logits, labels = random_logits(6, K).float(), long([0, 1, 4, K, K, K])
    targets = torch.zeros(6, K)
    targets[0, 0] = targets[1, 1] = targets[2, 4] = 1
    torch.testing.assert_close(
        focal_loss(logits, labels, gamma=0.0, alpha=-1.0),
        F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / 3,
    )


def test_background_rois_leave_the_divisor_alone():
    logits = torch.full((8, K), -20.0)  # the easiest of negatives
    logits[0, 2] = 0.0
    alone = focal_loss(logits[:1], long([2]))
    assert alone == pytest.approx(0.25 * 0.25 * math.log(2))
    torch.testing.assert_close(focal_loss(logits, long([2] + [K] * 7)), alone)


# Predictor


def test_a_new_classifier_thinks_every_class_improbable(tiny_cfg):
    predictor = build_box_predictor(tiny_cfg(*NAME), ShapeSpec(channels=FEATURES))
    assert predictor.cls_score.out_features == 6
    probs = predictor.class_probs(predictor(torch.zeros(1, FEATURES))[0])
    torch.testing.assert_close(probs, torch.tensor([[0.01] * 6 + [0.99]]))


def test_background_is_what_the_best_class_leaves():
    predictor = make_predictor(FocalOutputLayers, num_classes=3)
    logits = torch.tensor([[0.25, 0.75, 0.5], [0.2, 0.1, 0.1]]).logit()
    torch.testing.assert_close(
        predictor.class_probs(logits),
        torch.tensor([[0.25, 0.75, 0.5, 0.25], [0.2, 0.1, 0.1, 0.8]]),
    )
    assert predictor.class_probs(logits[:0]).shape == (0, 4)


def test_the_config_is_read(tiny_cfg):
    cfg = tiny_cfg(*NAME, "MODEL.FOCAL_LOSS.GAMMA", 1.5, "MODEL.FOCAL_LOSS.ALPHA", 0.75)
    predictor = build_box_predictor(cfg, ShapeSpec(channels=FEATURES))
    assert type(predictor) is FocalOutputLayers
    assert (predictor.gamma, predictor.alpha) == (1.5, 0.75)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("GAMMA", 0.5), ("GAMMA", -1.0), ("GAMMA", float("nan"))),
        *(("ALPHA", 1.5), ("ALPHA", float("nan"))),
    ],
)
def test_options_without_a_meaning_are_refused(tiny_cfg, key, value):
    cfg = tiny_cfg(*NAME, f"MODEL.FOCAL_LOSS.{key}", value)
    with pytest.raises(ConfigError, match=rf"MODEL\.FOCAL_LOSS\.{key} must be"):
        build_box_predictor(cfg, ShapeSpec(channels=FEATURES))
