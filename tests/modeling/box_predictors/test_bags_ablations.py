"""BAGS without each of its parts, against one RoI and one group at a time in plain Python."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.utils.events import EventStorage

from bags_d2 import BAGSOutputLayers, ClassGroups, build_box_predictor
from bags_d2.modeling.box_predictors.bags_ablations import (
    BAGSWithoutBackgroundGroupOutputLayers,
    BAGSWithoutOthersOutputLayers,
    ReweightedBAGSOutputLayers,
    group_weights,
)

COUNTS = [5, 12, 2000, 7, 150, 3]
K = len(COUNTS)
# Groups of these counts: classes 0, 3 and 5; class 1; class 4; class 2.
MEMBERS = [[0, 3, 5], [1], [4], [2]]
VARIANTS = [
    BAGSWithoutBackgroundGroupOutputLayers,
    BAGSWithoutOthersOutputLayers,
    ReweightedBAGSOutputLayers,
]
LABELS = torch.tensor([0, K, 5, 2, K, 1, 4, 3, 0, K])


def make(cls, thresholds=(10, 100, 1000), counts=COUNTS, **kwargs):
    torch.manual_seed(0)
    return cls(
        ShapeSpec(channels=8),
        box2box_transform=Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
        groups=ClassGroups.from_counts(counts, thresholds),
        others_sample_ratio=math.inf,
        num_classes=len(counts),
        **kwargs,
    )


def random_logits(rois=10, width=K + 6, scale=2.0):
    generator = torch.Generator().manual_seed(3)
    return scale * torch.randn(rois, width, generator=generator, dtype=torch.float64)


def loss_and_gradient(predictor, logits, labels=LABELS):
    logits = logits.clone().requires_grad_()
    with EventStorage(1):
        loss = predictor.classification_loss(logits, labels)
    loss.backward()
    return loss.item(), logits.grad


def columns_of(members):
    """Columns of "others" and of the classes, for each group."""
    start, columns = 2, []
    for classes in members:
        columns.append((start, [start + 1 + i for i in range(len(classes))]))
        start += 1 + len(classes)
    return columns


def reference_loss(logits, labels, weights=None, with_others=True, with_background=True):
    """The sum over groups, as a function of leaf logits that autograd can differentiate."""
    logits = logits.clone().requires_grad_()
    total = 0.0 * logits.sum()
    if with_background:
        for row, label in zip(logits, labels, strict=True):
            total = total - row[:2].log_softmax(0)[0 if label == K else 1] / len(labels)
    for g, (classes, (others, columns)) in enumerate(
        zip(MEMBERS, columns_of(MEMBERS), strict=True)
    ):
        inside = [label in classes for label in labels.tolist()]
        if not any(inside):
            continue
        used = len(labels) if with_others else sum(inside)
        for row, label, is_inside in zip(logits, labels.tolist(), inside, strict=True):
            if not with_others and not is_inside:
                continue
            kept = [others, *columns] if with_others else columns
            slot = classes.index(label) + with_others if is_inside else 0
            weight = 1.0 if weights is None or not is_inside else weights[g][classes.index(label)]
            total = total - weight * row[kept].log_softmax(0)[slot] / used
    total.backward()
    return total.item(), logits.grad


@pytest.mark.parametrize("labels", [LABELS, torch.full((4,), K), torch.tensor([2, 2])])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (BAGSOutputLayers, {}),
        (BAGSWithoutBackgroundGroupOutputLayers, {"with_background": False}),
        (BAGSWithoutOthersOutputLayers, {"with_others": False}),
    ],
)
def test_loss_and_gradient_are_those_of_the_definition(cls, options, labels):
    logits = random_logits(len(labels))
    loss, gradient = loss_and_gradient(make(cls), logits, labels)
    expected, expected_gradient = reference_loss(logits, labels, **options)
    assert loss == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-9)


def test_reweighted_loss_and_gradient_are_those_of_the_definition():
    inverse = [1 / 5, 1 / 7, 1 / 3]
    mean = sum(inverse) / 3
    weights = [[min(max(w / mean, 0.1), 5.0) for w in inverse], [1.0], [1.0], [1.0]]
    loss, gradient = loss_and_gradient(make(ReweightedBAGSOutputLayers), random_logits())
    expected, expected_gradient = reference_loss(random_logits(), LABELS, weights)
    assert loss == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-9)


def test_weights_of_a_group_have_mean_one_and_are_clipped():
    groups = ClassGroups.from_counts([1, 2, 4, 0, 50], (10, 100))
    rare = torch.tensor([1, 1 / 2, 1 / 4, 1], dtype=torch.float64)
    own = group_weights(groups, (0.0, 100.0))
    torch.testing.assert_close(own[1], torch.cat([torch.ones(1).double(), rare / rare.mean()]))
    assert [len(w) for w in own] == list(groups.widths)
    assert own[0].tolist() == [1, 1]
    assert own[2].tolist() == [1, 1]
    assert own[3].tolist() == [1]  # an empty group has "others" alone
    assert group_weights(groups, (0.9, 1.1))[1].tolist() == pytest.approx([1, 1.1, 0.9, 0.9, 1.1])


def test_equal_counts_are_not_reweighted():
    counts = [20] * 4
    logits = random_logits(5, 4 + 4)
    labels = torch.tensor([0, 1, 2, 3, 4])
    plain = make(BAGSOutputLayers, (10,), counts)
    weighted = make(ReweightedBAGSOutputLayers, (10,), counts)
    loss, gradient = loss_and_gradient(plain, logits, labels)
    same_loss, same_gradient = loss_and_gradient(weighted, logits, labels)
    assert same_loss == pytest.approx(loss)
    torch.testing.assert_close(same_gradient, gradient)


def test_probabilities_without_the_background_group():
    logits = random_logits(3)
    probs = make(BAGSWithoutBackgroundGroupOutputLayers).class_probs(logits)
    for row, of_row in zip(logits, probs, strict=True):
        of_others = []
        for classes, (others, columns) in zip(MEMBERS, columns_of(MEMBERS), strict=True):
            of_group = row[[others, *columns]].softmax(0)
            of_others.append(of_group[0].item())
            for c, p in zip(classes, of_group[1:].tolist(), strict=True):
                assert of_row[c].item() == pytest.approx(p)
        assert of_row[K].item() == pytest.approx(min(of_others))


def test_probabilities_without_others_sum_to_p_foreground_in_each_group():
    logits = random_logits(3)
    probs = make(BAGSWithoutOthersOutputLayers).class_probs(logits)
    foreground = logits[:, :2].softmax(1)[:, 1]
    for classes, (_, columns) in zip(MEMBERS, columns_of(MEMBERS), strict=True):
        expected = logits[:, columns].softmax(1) * foreground[:, None]
        torch.testing.assert_close(probs[:, classes], expected)
    torch.testing.assert_close(probs[:, K], 1 - foreground)


@pytest.mark.parametrize("cls", VARIANTS)
def test_hard_input_stays_finite(cls):
    predictor = make(cls, (1, 10, 100, 1000))  # the first group is empty
    width = K + 7
    for logits in (
        random_logits(len(LABELS), width, 1e4),
        random_logits(len(LABELS), width).half(),
    ):
        loss, gradient = loss_and_gradient(predictor, logits)
        assert math.isfinite(loss)
        assert gradient.isfinite().all()
        probs = predictor.class_probs(logits)
        assert probs.dtype in (torch.float32, torch.float64)
        assert probs.isfinite().all()
    empty = torch.empty(0, width, requires_grad=True)
    with EventStorage(0):
        loss = predictor.classification_loss(empty, torch.empty(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("cls", VARIANTS)
def test_config_builds_it_with_the_layout_of_the_whole_method(tiny_cfg, cls):
    cfg = tiny_cfg("MODEL.ROI_BOX_PREDICTOR.NAME", cls.__name__)
    predictor = build_box_predictor(cfg, ShapeSpec(channels=8))
    assert type(predictor) is cls
    cfg = tiny_cfg("MODEL.ROI_BOX_PREDICTOR.NAME", "BAGSOutputLayers")
    whole = build_box_predictor(cfg, ShapeSpec(channels=8))
    assert predictor.state_dict().keys() == whole.state_dict().keys()
    predictor.load_state_dict(whole.state_dict())
