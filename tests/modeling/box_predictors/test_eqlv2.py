"""Equalization loss v2 against a slow reference over several steps, and its neutral weights."""

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
from detectron2.engine import launch
from detectron2.layers import ShapeSpec
from detectron2.utils import comm
from torch.nn import functional as F

from bags_d2 import ConfigError, build_box_predictor
from bags_d2.modeling.box_predictors.eqlv2 import EQLv2OutputLayers, gradient_weights

K = 3
NAME = ("MODEL.ROI_BOX_PREDICTOR.NAME", "EQLv2OutputLayers")
BATCHES = [[0, 1, K, K], [2, 2, 0], [K], [1, 0, K, 2, 2]]


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


class SlowEQLv2:
    """One element at a time."""

    def __init__(self, num_classes, gamma=12.0, mu=0.8, alpha=4.0):
        self.num_classes = num_classes
        self.gamma, self.mu, self.alpha = gamma, mu, alpha
        self.positive = [0.0] * num_classes
        self.negative = [0.0] * num_classes

    def weights(self, c):
        if c == self.num_classes:
            return 1.0, 1.0
        if self.negative[c] == 0:
            return 1.0, 1.0
        f = sigmoid(self.gamma * (self.positive[c] / self.negative[c] - self.mu))
        return 1 + self.alpha * (1 - f), f

    def loss(self, rows, labels):
        total = 0.0
        for row, label in zip(rows, labels, strict=True):
            for c, z in enumerate(row):
                positive, negative = self.weights(c)
                p = sigmoid(z)
                total -= positive * math.log(p) if c == label else negative * math.log(1 - p)
        return total / len(labels)

    def accumulate(self, rows, labels):
        weights = [self.weights(c) for c in range(self.num_classes)]
        for row, label in zip(rows, labels, strict=True):
            for c in range(self.num_classes):
                if c == label:
                    self.positive[c] += weights[c][0] * (1 - sigmoid(row[c]))
                else:
                    self.negative[c] += weights[c][1] * sigmoid(row[c])


def make(num_classes=K, **kwargs):
    return make_predictor(EQLv2OutputLayers, num_classes=num_classes, **kwargs)


@pytest.mark.parametrize("options", [{}, {"gamma": 2.0, "mu": 0.1, "alpha": 0.5}])
def test_loss_and_gradient_over_several_steps(options):
    predictor, slow = make(**options), SlowEQLv2(K, **options)
    for step, labels in enumerate(BATCHES):
        logits = random_logits(len(labels), K + 1) + 0.3 * step
        state = predictor.accumulated_gradients.clone()
        check_loss_and_gradient(
            lambda x, labels=labels: predictor.classification_loss(x, long(labels)),
            lambda rows, labels=labels: slow.loss(rows, labels),
            logits,
        )
        slow.accumulate(logits.tolist(), labels)
        assert not torch.equal(state, predictor.accumulated_gradients)
        expected = torch.tensor([slow.positive, slow.negative], dtype=torch.float64)
        torch.testing.assert_close(predictor.accumulated_gradients, expected)


def test_one_class():
    labels = [0, 1, 1]
    check_loss_and_gradient(
        lambda x: make(1).classification_loss(x, long(labels)),
        lambda rows: SlowEQLv2(1).loss(rows, labels),
        random_logits(3, 2),
    )


def test_neutral_weights_are_binary_cross_entropy():
    labels = long([0, 2, K, K])
    logits = random_logits(4, K + 1)
    targets = F.one_hot(labels, K + 1).double()
    expected = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / 4
    predictor = make(alpha=0.0, mu=-100.0)
    for _ in range(3):
        torch.testing.assert_close(predictor.classification_loss(logits, labels), expected)


def test_weights_follow_the_ratio_of_gradients():
    accumulated = torch.tensor([[8.0, 1.0, 0.0, 5.0], [10.0, 1000.0, 3.0, 0.0]])
    positive, negative = gradient_weights(accumulated, gamma=12.0, mu=0.8, alpha=4.0)
    assert negative[0] == pytest.approx(0.5)  # a ratio of mu
    assert negative[1] < 1e-4  # swamped by negatives: spared more of them,
    assert positive[1] == pytest.approx(5.0, abs=1e-3)  # and lifted
    assert negative[2] < 1e-4
    assert (positive[3], negative[3]) == (1, 1)  # no gradients yet
    assert (positive[4], negative[4]) == (1, 1)  # background


def test_scores_are_those_of_classes_that_are_not_background():
    logits = random_logits(4, K + 1)
    probs = make().class_probs(logits)
    for row, of_row in zip(logits.tolist(), probs.tolist(), strict=True):
        background = sigmoid(row[-1])
        assert of_row == pytest.approx(
            [*(sigmoid(z) * (1 - background) for z in row[:-1]), background]
        )


def _accumulate_on_two_ranks(folder):
    predictor = make()
    labels = BATCHES[comm.get_rank()]
    logits = random_logits(len(labels), K + 1)
    predictor.classification_loss(logits, long(labels))
    torch.save(predictor.accumulated_gradients, f"{folder}/rank{comm.get_rank()}.pth")


@pytest.mark.slow
def test_two_processes_accumulate_the_same(tmp_path):
    launch(_accumulate_on_two_ranks, 2, dist_url="auto", args=(str(tmp_path),))
    both = [torch.load(tmp_path / f"rank{rank}.pth", weights_only=True) for rank in (0, 1)]
    assert torch.equal(*both)
    slow = [SlowEQLv2(K) for _ in BATCHES[:2]]
    for reference, labels in zip(slow, BATCHES[:2], strict=True):
        reference.accumulate(random_logits(len(labels), K + 1).tolist(), labels)
    expected = sum(torch.tensor([s.positive, s.negative], dtype=torch.float64) for s in slow)
    torch.testing.assert_close(both[0], expected)


def test_the_config_is_read(tiny_cfg):
    keys = ("MODEL.EQLV2.GAMMA", 3.0, "MODEL.EQLV2.MU", 0.5, "MODEL.EQLV2.ALPHA", 2.0)
    predictor = build_box_predictor(tiny_cfg(*NAME, *keys), ShapeSpec(channels=FEATURES))
    assert (predictor.gamma, predictor.mu, predictor.alpha) == (3.0, 0.5, 2.0)
    probs = predictor.cls_score(torch.zeros(1, FEATURES)).sigmoid()
    torch.testing.assert_close(probs, torch.full((1, 7), 0.01))
    for key in ("GAMMA", "ALPHA"):
        with pytest.raises(ConfigError, match=rf"MODEL\.EQLV2\.{key} must be"):
            build_box_predictor(
                tiny_cfg(*NAME, f"MODEL.EQLV2.{key}", -1.0), ShapeSpec(channels=FEATURES)
            )
