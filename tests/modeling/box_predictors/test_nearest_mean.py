"""Nearest class mean against a slow reference."""

import math

import pytest
import torch
from classifier_checks import FEATURES, long, make_predictor
from detectron2.layers import ShapeSpec

from bags_d2 import ConfigError, DataError, build_box_predictor
from bags_d2.modeling.box_predictors.nearest_mean import NearestMeanOutputLayers

K = 4
NAME = ("MODEL.ROI_BOX_PREDICTOR.NAME", "NearestMeanOutputLayers")


def make():
    return make_predictor(NearestMeanOutputLayers, num_classes=K, mean_temperature=5.0)


def rois(number, seed):
    return torch.randn(number, FEATURES, generator=torch.Generator().manual_seed(seed))


def fitted():
    predictor = make()
    # Two parts of a cache; class 3 has no RoI.
    predictor.fit_features([(rois(4, 1).half(), long([0, 1, K, 0])), (rois(2, 2), long([2, K]))])
    return predictor


def test_means_are_those_of_the_rois_of_each_class():
    predictor = fitted()
    first = rois(4, 1).half().float()
    expected = [(first[0] + first[3]) / 2, first[1], rois(2, 2)[0], torch.zeros(FEATURES)]
    torch.testing.assert_close(predictor.class_means, torch.stack(expected))
    other = make()
    other.load_state_dict(predictor.state_dict())
    assert torch.equal(other.class_means, predictor.class_means)


def test_scores_are_those_of_the_formula():
    predictor = fitted()
    features = rois(3, 3)
    logits, deltas = predictor(features)
    assert logits.shape == (3, 2 * K + 1)
    assert deltas.shape == (3, 4 * K)
    probs = predictor.class_probs(logits)
    softmax = predictor.cls_score(features).softmax(1)
    for r, x in enumerate(features.tolist()):
        similarity = []
        for mean in predictor.class_means[:3].tolist():
            dot = sum(a * b for a, b in zip(x, mean, strict=True))
            lengths = [math.sqrt(sum(a * a for a in v)) for v in (x, mean)]
            similarity.append(math.exp(5.0 * dot / (lengths[0] * lengths[1])))
        background = softmax[r, -1].item()
        expected = [(1 - background) * s / sum(similarity) for s in similarity]
        assert probs[r].tolist() == pytest.approx([*expected, 0.0, background], abs=1e-6)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match="is not trained: fit it with bags-d2 fit"):
        make().classification_loss(torch.zeros(1, 2 * K + 1), long([0]))
    with pytest.raises(ConfigError, match=r"\(MODEL\.WEIGHTS\) has no class means"):
        make().class_probs(torch.zeros(1, 2 * K + 1))
    with pytest.raises(DataError, match="no foreground RoI"):
        make().fit_features([(rois(2, 0), long([K, K]))])


def test_the_config_is_read(tiny_cfg):
    cfg = tiny_cfg(*NAME, "MODEL.ROI_BOX_PREDICTOR.TEMPERATURE", 7.0)
    predictor = build_box_predictor(cfg, ShapeSpec(channels=FEATURES))
    assert predictor.mean_temperature == 7.0
    assert predictor.class_means.shape == (6, FEATURES)
