"""Balanced softmax against a slow reference, and what it degenerates to."""

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
from bags_d2.modeling.box_predictors.balanced_softmax import (
    BalancedSoftmaxOutputLayers,
    balanced_softmax_loss,
    log_priors,
)

COUNTS = [3, 12, 150, 2000, 0]
K = len(COUNTS)
NAME = ("MODEL.ROI_BOX_PREDICTOR.NAME", "BalancedSoftmaxOutputLayers")


def slow_loss(labels, counts, tau):
    counts = [max(n, 1) for n in counts]
    priors = [n * len(counts) / sum(counts) for n in counts] + [1.0]

    def loss(rows):
        total = 0.0
        for row, label in zip(rows, labels, strict=True):
            terms = [prior**tau * math.exp(z) for prior, z in zip(priors, row, strict=True)]
            total -= math.log(terms[label] / sum(terms))
        return total / len(labels)

    return loss


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.5])
@pytest.mark.parametrize(
    "labels", [[0, 3, 1, K, K, 2, 4], [K, K, K], [2]], ids=["all", "no foreground", "one RoI"]
)
def test_loss_and_gradient(labels, tau):
    predictor = make_predictor(BalancedSoftmaxOutputLayers, COUNTS, tau=tau)
    check_loss_and_gradient(
        lambda logits: predictor.classification_loss(logits, long(labels)),
        slow_loss(labels, COUNTS, tau),
        random_logits(len(labels), K + 1),
    )


def test_one_class_is_a_plain_softmax():
    logits, labels = random_logits(3, 2), long([0, 1, 0])
    torch.testing.assert_close(
        balanced_softmax_loss(logits, labels, long([7])), F.cross_entropy(logits, labels)
    )


@pytest.mark.parametrize(("counts", "tau"), [([30] * K, 1.0), (COUNTS, 0.0)])
def test_equal_counts_or_no_adjustment_are_a_plain_softmax(counts, tau):
    predictor = make_predictor(BalancedSoftmaxOutputLayers, counts, tau=tau)
    logits, labels = random_logits(9, K + 1), long([0, 1, 2, 3, 4, K, K, K, K])
    torch.testing.assert_close(
        predictor.classification_loss(logits, labels), F.cross_entropy(logits, labels)
    )


def test_priors_by_hand():
    priors = log_priors(long([1, 0, 10, 28])).exp()
    torch.testing.assert_close(priors, torch.tensor([0.1, 0.1, 1.0, 2.8, 1.0]).double())


def test_frequencies_are_left_to_the_priors():
    # Features that say nothing: the loss is least where all classes are equally probable at test
    # time, and background is as probable as its RoIs are many of an average class's.
    counts = [2, 5, 23]
    labels = long([0] * 2 + [1] * 5 + [2] * 23 + [3] * 40)
    logits = torch.tensor([0.0, 0.0, 0.0, math.log(40 / 10)], requires_grad=True)
    balanced_softmax_loss(logits.expand(70, 4), labels, long(counts)).backward()
    torch.testing.assert_close(logits.grad, torch.zeros(4), atol=1e-6, rtol=0)


# Predictor


def test_probabilities_are_a_softmax_without_priors():
    predictor = make_predictor(BalancedSoftmaxOutputLayers, COUNTS)
    logits = random_logits(5, K + 1)
    torch.testing.assert_close(predictor.class_probs(logits), F.softmax(logits, dim=1))


def test_the_config_is_read(tiny_cfg):
    cfg = tiny_cfg(*NAME, "MODEL.BALANCED_SOFTMAX.TAU", 0.75)
    predictor = build_box_predictor(cfg, ShapeSpec(channels=FEATURES))
    assert type(predictor) is BalancedSoftmaxOutputLayers
    assert predictor.tau == 0.75
    assert predictor.counts.class_counts.tolist() == [3, 12, 150, 2000, 7, 40]
    assert predictor.cls_score.out_features == 7


@pytest.mark.parametrize("tau", [-0.5, float("nan")])
def test_options_without_a_meaning_are_refused(tiny_cfg, tau):
    cfg = tiny_cfg(*NAME, "MODEL.BALANCED_SOFTMAX.TAU", tau)
    with pytest.raises(ConfigError, match=r"MODEL\.BALANCED_SOFTMAX\.TAU must be"):
        build_box_predictor(cfg, ShapeSpec(channels=FEATURES))


def test_missing_counts_stop_training_and_not_inference(tiny_cfg):
    cfg = tiny_cfg(*NAME, "MODEL.LONG_TAIL.CLASS_COUNTS_FILE", "gone.json")
    predictor = build_box_predictor(cfg, ShapeSpec(channels=FEATURES))
    logits = torch.zeros(2, 7)
    with pytest.raises(ConfigError, match=r"counts are unknown.*gone\.json"):
        predictor.classification_loss(logits, long([0, 6]))
    assert predictor.class_probs(logits).shape == (2, 7)
