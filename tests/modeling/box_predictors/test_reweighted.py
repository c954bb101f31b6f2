"""Softmax with re-weighted classes against slow references, and what it degenerates to."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bags_d2 import ConfigError, build_box_predictor
from bags_d2.modeling.box_predictors.reweighted import (
    ReweightedOutputLayers,
    class_weights,
    reweighted_softmax_loss,
)

COUNTS = [3, 12, 150, 2000, 0]
K = len(COUNTS)
NAME = ("MODEL.ROI_BOX_PREDICTOR.NAME", "ReweightedOutputLayers")


def slow_weights(counts, scheme, beta, clip):
    if scheme == "inverse":
        raw = [1 / max(n, 1) for n in counts]
    else:  # the effective number of samples is a geometric series
        raw = [1 / sum(beta**i for i in range(max(n, 1))) for n in counts]
    mean = sum(raw) / len(raw)
    return [*(min(max(w / mean, clip[0]), clip[1]) for w in raw), 1.0]


def slow_loss(labels, weights):
    def loss(rows):
        terms = [weights[y] * slow_cross_entropy(z, y) for z, y in zip(rows, labels, strict=True)]
        return sum(terms) / len(labels)

    return loss


# Weights


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=8),
    st.sampled_from(["inverse", "effective_number"]),
    st.sampled_from([0.0, 0.9, 0.999, 0.9999]),
    st.sampled_from([(0.1, 5.0), (1.0, 1.0), (0.0, float("inf"))]),
)
def test_weights(counts, scheme, beta, clip):
    weights = class_weights(long(counts), scheme, beta, clip)
    expected = torch.tensor(slow_weights(counts, scheme, beta, clip), dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=0)


def test_weights_by_hand():
    # 1/n is 1, 0.1 and 0.001, of mean 0.367: 2.7248, 0.27248 and 0.0027248, which is clipped.
    weights = class_weights(long([1, 10, 1000]))
    torch.testing.assert_close(
        weights, torch.tensor([2.7248, 0.27248, 0.1, 1.0]).double(), rtol=1e-4, atol=0
    )


def test_effective_numbers_lie_between_equal_and_inverse_weights():
    counts, no_clip = long(COUNTS), (0.0, float("inf"))
    inverse = class_weights(counts, "inverse", clip=no_clip)
    equal = class_weights(counts, "effective_number", 0.0, no_clip)
    torch.testing.assert_close(equal, torch.ones(K + 1).double())
    near_one = class_weights(counts, "effective_number", 1 - 1e-9, no_clip)
    torch.testing.assert_close(near_one, inverse, rtol=1e-5, atol=0)


# Loss


@pytest.mark.parametrize("scheme", ["inverse", "effective_number"])
@pytest.mark.parametrize(
    "labels", [[0, 3, 1, K, K, 2, 4], [K, K, K], [2]], ids=["all", "no foreground", "one RoI"]
)
def test_loss_and_gradient(labels, scheme):
    weights = slow_weights(COUNTS, scheme, 0.999, (0.1, 5.0))
    predictor = make_predictor(ReweightedOutputLayers, COUNTS, scheme=scheme)
    check_loss_and_gradient(
        lambda logits: predictor.classification_loss(logits, long(labels)),
        slow_loss(labels, weights),
        random_logits(len(labels), K + 1),
    )


def test_one_class_is_a_plain_softmax():
    labels = [0, 1, 0]
    predictor = make_predictor(ReweightedOutputLayers, [7])
    check_loss_and_gradient(
        lambda logits: predictor.classification_loss(logits, long(labels)),
        slow_loss(labels, [1.0, 1.0]),
        random_logits(3, 2),
    )


@pytest.mark.parametrize(
    ("counts", "options"),
    [
        ([30] * K, {}),
        ([30] * K, {"scheme": "effective_number"}),
        (COUNTS, {"clip": (1.0, 1.0)}),
        (COUNTS, {"scheme": "effective_number", "beta": 0.0}),
    ],
    ids=["equal counts", "equal effective numbers", "clipped to 1", "beta 0"],
)
def test_equal_weights_are_a_plain_softmax(counts, options):
    predictor = make_predictor(ReweightedOutputLayers, counts, **options)
    logits, labels = random_logits(9, K + 1), long([0, 1, 2, 3, 4, K, K, K, K])
    torch.testing.assert_close(
        predictor.classification_loss(logits, labels), F.cross_entropy(logits, labels)
    )


def test_a_batch_of_one_class_is_reweighted_too():
    logits, labels = random_logits(4, K + 1), long([2, 2, 2, 2])
    loss = reweighted_softmax_loss(logits, labels, torch.tensor([1.0, 1, 3, 1, 1, 1]))
    torch.testing.assert_close(loss, 3 * F.cross_entropy(logits, labels))


# Predictor


def test_probabilities_are_a_softmax():
    predictor = make_predictor(ReweightedOutputLayers, COUNTS)
    logits = random_logits(5, K + 1)
    torch.testing.assert_close(predictor.class_probs(logits), F.softmax(logits, dim=1))


def test_the_config_is_read(tiny_cfg):
    options = ("MODEL.REWEIGHT.SCHEME", "effective_number", "MODEL.REWEIGHT.BETA", 0.5)
    cfg = tiny_cfg(*NAME, *options, "MODEL.REWEIGHT.CLIP", (0.5, 2.0))
    predictor = build_box_predictor(cfg, ShapeSpec(channels=FEATURES))
    assert type(predictor) is ReweightedOutputLayers
    assert predictor.options == ("effective_number", 0.5, (0.5, 2.0))
    assert predictor.counts.class_counts.tolist() == [3, 12, 150, 2000, 7, 40]
    assert predictor.cls_score.out_features == 7


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("SCHEME", "square"), ("BETA", 1.0), ("BETA", -0.1), ("BETA", float("nan"))),
        *(("CLIP", (5.0, 0.1)), ("CLIP", (1.0,)), ("CLIP", (-1.0, 1.0))),
    ],
)
def test_options_without_a_meaning_are_refused(tiny_cfg, key, value):
    cfg = tiny_cfg(*NAME, f"MODEL.REWEIGHT.{key}", value)
    with pytest.raises(ConfigError, match=rf"MODEL\.REWEIGHT\.{key} must be"):
        build_box_predictor(cfg, ShapeSpec(channels=FEATURES))
    options = {"scheme": "inverse", "beta": 0.9, "clip": (0.1, 5.0), key.lower(): value}
    with pytest.raises(ConfigError, match=key):
        class_weights(long(COUNTS), **options)


def test_missing_counts_stop_training_and_not_inference(tiny_cfg):
    cfg = tiny_cfg(*NAME, "MODEL.LONG_TAIL.CLASS_COUNTS_FILE", "gone.json")
    predictor = build_box_predictor(cfg, ShapeSpec(channels=FEATURES))
    logits = torch.zeros(2, 7)
    with pytest.raises(ConfigError, match=r"counts are unknown.*gone\.json"):
        predictor.classification_loss(logits, long([0, 6]))
    assert predictor.class_probs(logits).shape == (2, 7)


def test_counts_of_a_checkpoint_decide_the_weights():
    predictor = make_predictor(ReweightedOutputLayers, [10, 1000])
    other = make_predictor(ReweightedOutputLayers, [1000, 10])
    logits, labels = random_logits(4, 3), long([0, 0, 1, 2])
    expected = other.classification_loss(logits, labels)
    assert not torch.isclose(predictor.classification_loss(logits, labels), expected)
    predictor.load_state_dict(other.state_dict())
    torch.testing.assert_close(predictor.classification_loss(logits, labels), expected)
