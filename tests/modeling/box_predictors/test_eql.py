"""Equalization loss against a slow reference, and what it degenerates to."""

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
from bags_d2.modeling.box_predictors.eql import EQLOutputLayers, equalization_loss

K = 4
NAME = ("MODEL.ROI_BOX_PREDICTOR.NAME", "EQLOutputLayers")
TAIL = [False, True, True, False]


def slow_loss(labels, is_tail):
    def loss(rows):
        total = 0.0
        for row, label in zip(rows, labels, strict=True):
            for c, z in enumerate(row):
                p = 1 / (1 + math.exp(-z))
                if c == label:
                    total -= math.log(p)
                elif not (label < len(is_tail) and is_tail[c]):
                    total -= math.log(1 - p)
        return total / len(labels)

    return loss


def make(is_tail=TAIL):
    return make_predictor(EQLOutputLayers, num_classes=len(is_tail), is_tail=torch.tensor(is_tail))


@pytest.mark.parametrize("labels", [[0, 3, 1, K, K, 2], [K, K, K], [2]])
def test_loss_and_gradient(labels):
    check_loss_and_gradient(
        lambda x: make().classification_loss(x, long(labels)),
        slow_loss(labels, TAIL),
        random_logits(len(labels), K),
    )


@pytest.mark.parametrize("is_tail", [[True], [False]])
def test_one_class(is_tail):
    labels = [0, 1, 0]
    check_loss_and_gradient(
        lambda x: make(is_tail).classification_loss(x, long(labels)),
        slow_loss(labels, is_tail),
        random_logits(3, 1),
    )


def test_without_a_tail_it_is_binary_cross_entropy():
    logits, labels = random_logits(5, K), long([0, 1, 2, K, K])
    targets = F.one_hot(labels, K + 1)[:, :-1].double()
    torch.testing.assert_close(
        equalization_loss(logits, labels, torch.zeros(K, dtype=torch.bool)),
        F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / 5,
    )


def test_background_is_negative_for_the_tail_and_other_classes_are_not():
    logits = torch.zeros(2, K, requires_grad=True)
    equalization_loss(logits, long([0, K]), torch.tensor(TAIL)).backward()
    torch.testing.assert_close(
        logits.grad, torch.tensor([[-0.25, 0.0, 0.0, 0.25], [0.25, 0.25, 0.25, 0.25]])
    )


def test_the_tail_is_what_few_training_images_show(tiny_cfg, write_lvis, register):
    # Class 0 is in 3 of 4 images, 1 in 1, 2 in 2 and 3 in none; 5 annotations of class 1.
    path = write_lvis(
        {i + 1: f"c{i}" for i in range(4)},
        [(1, 1), (2, 1), (3, 1), (1, 3), (4, 3), *[(2, 2)] * 5],
    )
    options = (
        *("DATASETS.TRAIN", (register("eql_images", path),)),
        *("MODEL.ROI_HEADS.NUM_CLASSES", 4, "MODEL.LONG_TAIL.CLASS_COUNTS_FILE", ""),
    )
    for threshold, tail in ((0.5, [1, 3]), (0.51, [1, 2, 3]), (0.0, []), (1.0, [0, 1, 2, 3])):
        cfg = tiny_cfg(*NAME, *options, "MODEL.EQL.FREQUENCY_THRESHOLD", threshold)
        predictor = build_box_predictor(cfg, ShapeSpec(channels=FEATURES))
        assert predictor.is_tail.nonzero().flatten().tolist() == tail
    assert "is_tail" not in predictor.state_dict()


def test_missing_annotations_are_an_error_of_training_alone(tiny_cfg):
    cfg = tiny_cfg(*NAME, "MODEL.LONG_TAIL.CLASS_COUNTS_FILE", "", "DATASETS.TRAIN", ("absent",))
    predictor = build_box_predictor(cfg, ShapeSpec(channels=FEATURES))
    assert predictor.class_probs(random_logits(2, 6)).shape == (2, 7)
    with pytest.raises(ConfigError, match=r"cannot tell rare classes.*'absent'"):
        predictor.classification_loss(random_logits(2, 6), long([0, 1]))


def test_a_threshold_that_is_no_share_is_refused(tiny_cfg):
    cfg = tiny_cfg(*NAME, "MODEL.EQL.FREQUENCY_THRESHOLD", 100.0)
    with pytest.raises(ConfigError, match=r"MODEL\.EQL\.FREQUENCY_THRESHOLD is a share"):
        build_box_predictor(cfg, ShapeSpec(channels=FEATURES))
