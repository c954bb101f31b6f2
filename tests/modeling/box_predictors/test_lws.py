"""Learnable weight scaling: a softmax detector whose scales alone are fitted."""

from pathlib import Path

import pytest
import torch
from classifier_checks import (
    DETECTORS,
    FEATURES,
    check_loss_and_gradient,
    long,
    make_predictor,
    random_logits,
    slow_cross_entropy,
)
from detectron2.config import get_cfg
from detectron2.structures import Boxes, Instances
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch.func import functional_call

from bags_d2 import BAGSTrainer, add_bags_config
from bags_d2.fitting.extract import extract_features
from bags_d2.fitting.train import fit_classifier
from bags_d2.modeling import FastRCNNOutputLayers
from bags_d2.modeling.box_predictors.lws import LWSOutputLayers

K = 5
NAME = ("MODEL.ROI_BOX_PREDICTOR.NAME", "LWSOutputLayers")
SCALES_ALONE = ("MODEL.TRAINABLE_PARAMS", ("roi_heads.box_predictor*scale",))
TINY = Path(__file__).parents[2] / "tiny.yaml"


def slow_loss(labels):
    def loss(rows):
        terms = [slow_cross_entropy(row, label) for row, label in zip(rows, labels, strict=True)]
        return sum(terms) / len(terms)

    return loss


@pytest.mark.parametrize(
    "labels", [[0, 3, 1, K, K, 2, 4], [K, K, K], [2]], ids=["all", "no foreground", "one RoI"]
)
def test_loss_and_gradient(labels):
    predictor = make_predictor(LWSOutputLayers, num_classes=K)
    check_loss_and_gradient(
        lambda logits: predictor.classification_loss(logits, long(labels)),
        slow_loss(labels),
        random_logits(len(labels), K + 1),
    )


def test_gradient_of_the_scales():
    labels = [0, 3, 1, K, K, 2, 4]
    predictor = make_predictor(LWSOutputLayers, num_classes=K).double()
    features = random_logits(len(labels), FEATURES, scale=0.3)
    weight = predictor.cls_score.weight.detach()
    bias = predictor.cls_score.bias.detach()

    def loss(scale):
        logits, _ = functional_call(predictor, {"scale": scale[0]}, features)
        return predictor.classification_loss(logits, long(labels))

    def slow(rows):
        (scale,) = rows
        logits = [
            [f * (float(w @ x) + float(b)) for f, w, b in zip(scale, weight, bias, strict=True)]
            for x in features
        ]
        return slow_loss(labels)(logits)

    check_loss_and_gradient(loss, slow, 1 + random_logits(1, K + 1, scale=0.3))


def test_one_class():
    predictor = make_predictor(LWSOutputLayers, num_classes=1)
    check_loss_and_gradient(
        lambda logits: predictor.classification_loss(logits, long([0, 1, 0])),
        slow_loss([0, 1, 0]),
        random_logits(3, 2),
    )


@pytest.mark.parametrize("temperature", [None, 20.0], ids=["linear", "cosine"])
def test_scales_of_one_are_the_softmax_detector(temperature):
    lws, softmax = (
        make_predictor(cls, num_classes=K, temperature=temperature)
        for cls in (LWSOutputLayers, FastRCNNOutputLayers)
    )
    missing, unexpected = lws.load_state_dict(softmax.state_dict(), strict=False)
    assert (missing, unexpected) == (["scale"], [])
    boxes = Boxes(torch.tensor([[4.0, 4, 20, 20]] * 6))
    rois = Instances((64, 64), proposal_boxes=boxes, gt_boxes=boxes)
    rois.gt_classes = long([0, 1, 4, 2, K, K])
    features = random_logits(6, FEATURES).float()
    with EventStorage():
        of_lws, of_softmax = (p.losses(p(features), [rois]) for p in (lws, softmax))
    torch.testing.assert_close(of_lws, of_softmax)
    torch.testing.assert_close(
        lws.predict_probs(lws(features), [rois]), softmax.predict_probs(softmax(features), [rois])
    )


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_scales_can_be_trained_alone(tiny_cfg, detector):
    model = BAGSTrainer.build_model(tiny_cfg(*NAME, *SCALES_ALONE, *DETECTORS[detector]))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    stages = [f".{i}" for i in range(3)] if "cascade" in detector else [""]
    assert trainable == [f"roi_heads.box_predictor{stage}.scale" for stage in stages]


def test_the_scales_of_a_softmax_detector_are_fitted_from_cached_features(
    datasets_root, register, tmp_path
):
    images = datasets_root / "glyphs_tiny"
    annotations = images / "annotations" / "glyphs_tiny_train.json"
    cfg = get_cfg()
    add_bags_config(cfg)
    cfg.merge_from_file(str(TINY))
    register("lws_train", str(annotations), str(images))
    cfg.merge_from_list(["DATASETS.TRAIN", ("lws_train",), "OUTPUT_DIR", str(tmp_path)])
    seed_all_rng(3)
    softmax = BAGSTrainer.build_model(cfg).state_dict()
    # Biases that are wrong for these data, so that there is something to fit.
    softmax["roi_heads.box_predictor.cls_score.bias"].copy_(torch.arange(7.0))
    torch.save({"model": softmax}, tmp_path / "softmax.pth")
    cfg.merge_from_list([*NAME, *SCALES_ALONE, "MODEL.WEIGHTS", str(tmp_path / "softmax.pth")])
    extract_features(cfg, tmp_path / "cache")

    path = fit_classifier(cfg, tmp_path / "cache")
    fitted = torch.load(path, weights_only=True)["model"]
    scale = fitted.pop("roi_heads.box_predictor.scale")
    assert ((scale - 1).abs() > 1e-4).any()
    assert fitted.keys() == softmax.keys()
    for name, weights in fitted.items():
        torch.testing.assert_close(weights, softmax[name], rtol=0, atol=0)
