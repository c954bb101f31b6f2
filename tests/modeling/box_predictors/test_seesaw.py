"""Seesaw loss against a slow reference, and what it degenerates to."""

import math

import pytest
import torch
from classifier_checks import (
    FEATURES,
    check_loss_and_gradient,
    long,
    make_predictor,
    random_logits,
    slow_cross_entropy,
)
from detectron2.layers import ShapeSpec
from detectron2.utils.events import EventStorage
from torch.nn import functional as F

from bags_d2 import ConfigError, build_box_predictor
from bags_d2.modeling.box_predictors.fast_rcnn import NormalizedLinear
from bags_d2.modeling.box_predictors.seesaw import SeesawOutputLayers, seesaw_loss

K = 4
NAME = ("MODEL.ROI_BOX_PREDICTOR.NAME", "SeesawOutputLayers")
SEEN = [1000, 3, 40, 0]


def slow_probs(row):
    top = max(row)
    return [math.exp(z - top) / sum(math.exp(x - top) for x in row) for z in row]


def slow_loss(labels, seen, p, q, constant):
    """Of the factors S, which have no gradient, those at the logits ``constant``."""

    def loss(rows):
        total = 0.0
        for row, fixed, label in zip(rows, constant, labels, strict=True):
            classes, objectness = row[:-2], row[-2:]
            num_classes = len(classes)
            total += slow_cross_entropy(objectness, 1 if label == num_classes else 0)
            if label == num_classes:
                continue
            probs = slow_probs(fixed[:-2])
            denominator = math.exp(classes[label])
            for j in range(num_classes):
                if j == label:
                    continue
                mitigation = min(1.0, (max(seen[j], 1) / max(seen[label], 1)) ** p)
                compensation = max(1.0, (probs[j] / max(probs[label], 0.01)) ** q)
                denominator += mitigation * compensation * math.exp(classes[j])
            total -= math.log(math.exp(classes[label]) / denominator)
        return total / len(labels)

    return loss


def make(p=0.8, q=2.0, seen=SEEN):
    predictor = make_predictor(SeesawOutputLayers, num_classes=len(seen), p=p, q=q)
    predictor.num_samples += long(seen)
    return predictor


@pytest.mark.parametrize(("p", "q"), [(0.8, 2.0), (0.0, 2.0), (0.8, 0.0), (2.0, 1.0)])
@pytest.mark.parametrize("labels", [[0, 3, 1, K, K, 2, 1], [K, K, K], [2]])
def test_loss_and_gradient(labels, p, q):
    logits = random_logits(len(labels), K + 2)
    seen = [n + labels.count(c) for c, n in enumerate(SEEN)]  # the batch is counted first
    check_loss_and_gradient(
        lambda x: make(p, q).classification_loss(x, long(labels)),
        slow_loss(labels, seen, p, q, logits.tolist()),
        logits,
    )


def test_one_class():
    logits = random_logits(3, 3)
    check_loss_and_gradient(
        lambda x: make(seen=[5]).classification_loss(x, long([0, 1, 0])),
        slow_loss([0, 1, 0], [7], 0.8, 2.0, logits.tolist()),
        logits,
    )


def test_without_factors_it_is_the_softmax():
    logits, labels = random_logits(5, K), long([0, 1, 2, 3, 0])
    expected = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(seesaw_loss(logits, labels, long(SEEN), p=0.0, q=0.0), expected)
    # Equal counts mitigate nothing, and a right answer compensates nothing.
    sure = torch.eye(K, dtype=torch.float64)[labels] * 9
    torch.testing.assert_close(
        seesaw_loss(sure, labels, long([7] * K)), F.cross_entropy(sure, labels, reduction="none")
    )


def test_a_frequent_class_does_not_push_a_rare_one_down():
    logits = torch.zeros(1, 2, requires_grad=True)
    seesaw_loss(logits, long([0]), long([10**6, 1]), q=0.0).sum().backward()
    assert 0 < logits.grad[0, 1] < 1e-4
    logits.grad = None
    seesaw_loss(logits, long([1]), long([10**6, 1]), q=0.0).sum().backward()
    assert logits.grad[0, 0] == pytest.approx(0.5)


def test_samples_are_counted_over_the_steps_and_travel_with_the_weights():
    predictor = make(seen=[0] * K)
    for labels in ([0, 0, K], [2, K, 3], []):
        predictor.classification_loss(random_logits(len(labels), K + 2), long(labels))
    assert predictor.num_samples.tolist() == [2, 0, 1, 1]
    other = make(seen=[0] * K)
    other.load_state_dict(predictor.state_dict())
    assert other.num_samples.tolist() == [2, 0, 1, 1]
    predictor.eval()
    with torch.no_grad(), EventStorage():
        predictor.class_probs(random_logits(3, K + 2))
    assert predictor.num_samples.tolist() == [2, 0, 1, 1]


def test_scores_are_those_of_classes_times_objectness():
    logits = random_logits(3, K + 2)
    probs = make().class_probs(logits)
    for row, of_row in zip(logits.tolist(), probs.tolist(), strict=True):
        objectness = slow_probs(row[-2:])
        classes = slow_probs(row[:-2])
        assert of_row == pytest.approx([*(c * objectness[0] for c in classes), objectness[1]])


def test_the_config_is_read(tiny_cfg):
    cfg = tiny_cfg(*NAME, "MODEL.SEESAW.P", 0.5, "MODEL.SEESAW.Q", 1.5)
    cfg.MODEL.ROI_BOX_PREDICTOR.NORMALIZED = True
    predictor = build_box_predictor(cfg, ShapeSpec(channels=FEATURES))
    assert (predictor.p, predictor.q) == (0.5, 1.5)
    assert isinstance(predictor.cls_score, NormalizedLinear)
    assert predictor.cls_score.out_features == 6 + 2
    with pytest.raises(ConfigError, match=r"MODEL\.SEESAW\.Q must be"):
        build_box_predictor(tiny_cfg(*NAME, "MODEL.SEESAW.Q", -1.0), ShapeSpec(channels=FEATURES))
