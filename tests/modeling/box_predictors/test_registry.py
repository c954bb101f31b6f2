"""What every registered box predictor has to do, whatever its method."""

import copy

import pytest
import torch
from classifier_checks import DETECTORS, FEATURES, make_proposals, never_waits
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from bags_d2 import ROI_BOX_PREDICTOR_REGISTRY, BAGSTrainer, ConfigError, build_box_predictor
from bags_d2.modeling import FastRCNNOutputLayers
from bags_d2.modeling.box_predictors import NearestMeanOutputLayers, NormalizedLinear

K = 6  # of the fixture tiny_cfg
SHAPE = ShapeSpec(channels=FEATURES)
NAMES = sorted(name for name, _ in ROI_BOX_PREDICTOR_REGISTRY)
TRAINED = [name for name in NAMES if name != "NearestMeanOutputLayers"]  # which is fitted
OWN_LOSS = [name for name in NAMES if name != "FastRCNNOutputLayers"]

every = pytest.mark.parametrize("name", NAMES)
every_trained = pytest.mark.parametrize("name", TRAINED)
every_with_its_own_loss = pytest.mark.parametrize("name", sorted({*TRAINED} & {*OWN_LOSS}))


@pytest.fixture
def cfg_of(tiny_cfg, write_lvis, register):
    """``cfg_of(name, *opts)``: a config of a predictor, with a training set for those that ask."""
    path = write_lvis({i + 1: f"c{i}" for i in range(K)}, [(1, c) for c in range(1, K + 1)])
    train = register("registry_train", path)

    def make(name, *opts):
        name = ("MODEL.ROI_BOX_PREDICTOR.NAME", name)
        return tiny_cfg(*name, "DATASETS.TRAIN", (train,), *opts)

    return make


@pytest.fixture
def build(cfg_of):
    """``build(name, *opts)``: a predictor whose weights tell classes apart."""

    def make(name, *opts):
        torch.manual_seed(0)
        predictor = build_box_predictor(cfg_of(name, *opts), SHAPE)
        torch.nn.init.normal_(predictor.cls_score.weight)
        return _ready(predictor)

    return make


def _ready(predictor):
    if isinstance(predictor, NearestMeanOutputLayers):
        features = torch.randn(K, predictor.class_means.shape[1])
        predictor.fit_features([(features, torch.arange(K))])
    return predictor


def _predictors(model):
    found = model.roi_heads.box_predictor
    return [_ready(p) for p in (found if isinstance(found, torch.nn.ModuleList) else [found])]


def _features(num_rois):
    return torch.randn(num_rois, FEATURES, generator=torch.Generator().manual_seed(num_rois))


def _losses(predictor, labels, features=None, start_iter=0):
    features = _features(len(labels)) if features is None else features
    with EventStorage(start_iter) as storage:
        losses = predictor.losses(predictor(features), make_proposals(labels))
        return losses, set(storage.latest())


# Training


@every_trained
@pytest.mark.parametrize("labels", [[0, 1, 3, 5, K, K], [K, K], [2]])
def test_a_step_has_finite_losses_and_gradients(build, name, labels):
    if name == "BAGSWithoutBackgroundGroupOutputLayers" and set(labels) == {K}:
        pytest.skip("background alone is in no group, so nothing is to be learned from it")
    predictor = build(name)
    features = _features(len(labels)).requires_grad_()
    losses, _ = _losses(predictor, labels, features)
    assert set(losses) == {"loss_cls", "loss_box_reg"}
    assert all(loss.isfinite() and loss >= 0 for loss in losses.values())
    assert losses["loss_cls"] > 0
    sum(losses.values()).backward()
    for parameter in (features, predictor.cls_score.weight, predictor.cls_score.bias):
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


@every_with_its_own_loss  # Detectron2's own fails without an image
@pytest.mark.parametrize("images", [0, 1])
def test_a_batch_without_rois_loses_nothing(build, name, images):
    predictor = build(name)
    with EventStorage() as storage:
        proposals = [make_proposals([])[0]] * images
        losses = predictor.losses(predictor(_features(0)), proposals)
        assert not storage.latest()
    assert losses["loss_cls"] == losses["loss_box_reg"] == 0
    sum(losses.values()).backward()
    assert not predictor.cls_score.weight.grad.any()


@every_with_its_own_loss
def test_statistics_are_logged_every_20_iterations(build, name):
    predictor = build(name)
    for iteration, logs in ((20, True), (39, False)):
        _, logged = _losses(predictor, [0, K], start_iter=iteration)
        assert ("fast_rcnn/cls_accuracy" in logged) == bool(logged) == logs


@every_trained
def test_box_regression_can_be_left_out(build, name):
    predictor = build(name)
    whole, _ = _losses(copy.deepcopy(predictor), [0, 1, 2, K, K])
    predictor.classification_only = True
    torch.manual_seed(0)
    short, _ = _losses(predictor, [0, 1, 2, K, K])
    assert set(short) == {"loss_cls"}
    torch.testing.assert_close(short["loss_cls"], whole["loss_cls"])
    assert not predictor(_features(3))[1].any()
    predictor.eval()
    assert predictor(_features(3))[1].any()


@every_with_its_own_loss
@pytest.mark.parametrize("option", ["USE_SIGMOID_CE", "USE_FED_LOSS"])
def test_options_of_the_stock_loss_are_refused(cfg_of, name, option):
    cfg = cfg_of(name)
    cfg.MODEL.ROI_BOX_HEAD[option] = True
    with pytest.raises(ConfigError, match=rf"{name} has a loss of its own.*{option}=True"):
        build_box_predictor(cfg, SHAPE)


@every_with_its_own_loss
def test_half_precision_and_autocast_are_computed_in_float32(build, name):
    predictor = build(name, "MODEL.BAGS.OTHERS_SAMPLE_RATIO", float("inf"))
    labels = torch.tensor([0, 1, 2, 3, 4, 5, K] * 2)
    exact, _ = predictor(_features(len(labels)))
    for dtype in (torch.float16, torch.bfloat16):
        logits = exact.detach().to(dtype).requires_grad_()
        with EventStorage(1), torch.autocast("cpu", dtype=torch.bfloat16):
            # Copies, since some losses count what they have seen.
            value = copy.deepcopy(predictor).classification_loss(logits, labels)
            scores = predictor.class_probs(logits)
        with EventStorage(1):
            same = copy.deepcopy(predictor)
            expected = same.classification_loss(logits.detach().float(), labels)
        value.backward()
        assert value.dtype == scores.dtype == torch.float32
        assert logits.grad.dtype == dtype
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(scores, predictor.class_probs(logits.detach().float()))


@every_with_its_own_loss
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits_stay_finite(build, name, size):
    predictor = build(name)
    labels = torch.tensor([0, 1, 2, 3, 4, 5, K] * 2)
    logits = (predictor(_features(len(labels)))[0].detach().sign() * size).requires_grad_()
    with EventStorage(1):
        loss = predictor.classification_loss(logits, labels)
    loss.backward()
    assert loss.isfinite()
    assert loss > 0
    assert logits.grad.isfinite().all()
    scores = predictor.class_probs(logits)
    assert ((scores >= 0) & (scores <= 1)).all()


@every_with_its_own_loss
def test_the_loss_never_waits_for_the_device(build, name):
    predictor = build(name)
    num_logits = predictor.cls_score.out_features
    with never_waits(), EventStorage(1):
        predictor = predictor.to("cuda")
        logits = torch.zeros(7, num_logits, device="cuda", requires_grad=True)
        loss = predictor.classification_loss(logits, torch.zeros(7, dtype=int, device="cuda"))
    assert loss.device.type == "cuda"
    assert loss.shape == ()


# Inference


@every
def test_probabilities_are_probabilities(build, name):
    predictor = build(name).eval()
    proposals = [make_proposals([0] * n)[0] for n in (3, 0, 4)]
    predictions = predictor(_features(7))
    probs = predictor.predict_probs(predictions, proposals)
    assert [tuple(p.shape) for p in probs] == [(n, K + 1) for n in (3, 0, 4)]
    assert all(((p >= 0) & (p <= 1)).all() for p in probs)
    # Each RoI for itself, whatever the others are.
    alone = predictor.predict_probs((predictions[0][3:], predictions[1][3:]), proposals[2:])
    torch.testing.assert_close(probs[2], alone[0])


@every
def test_inference_returns_the_best_classes(build, name):
    predictor = build(name, "TEST.DETECTIONS_PER_IMAGE", 5, "MODEL.ROI_HEADS.NMS_THRESH_TEST", 1.0)
    predictor.eval()
    proposals = make_proposals([0] * 8)
    predictions = predictor(_features(8))
    (found,), (rois,) = predictor.inference(predictions, proposals)
    (probs,) = predictor.predict_probs(predictions, proposals)
    best = probs[:, :-1].flatten().topk(5)
    torch.testing.assert_close(found.scores, best.values)
    assert torch.equal(probs[rois, found.pred_classes], found.scores)
    assert found.pred_boxes.tensor.isfinite().all()
    assert type(predictor).inference is FastRCNNOutputLayers.inference  # the fast one


# Weights


@every
def test_the_state_dict_makes_an_equal_predictor(build, cfg_of, name):
    predictor = build(name)
    if name in TRAINED:
        _losses(predictor, [0, 1, K])  # which fills what losses accumulate
    other = build_box_predictor(cfg_of(name), SHAPE)
    other.load_state_dict(copy.deepcopy(predictor.state_dict()))
    for key, tensor in other.state_dict().items():
        assert torch.equal(tensor, predictor.state_dict()[key])
    logits, _ = predictor(_features(4))
    assert torch.equal(other(_features(4))[0], logits)
    assert torch.equal(
        *(p.predict_probs((logits, None), make_proposals([0] * 4))[0] for p in (predictor, other))
    )


@every
def test_without_training_annotations_a_checkpoint_suffices(build, tiny_cfg, name):
    predictor = build(name)
    absent = ("MODEL.LONG_TAIL.CLASS_COUNTS_FILE", "", "DATASETS.TRAIN", ("absent",))
    other = build_box_predictor(tiny_cfg("MODEL.ROI_BOX_PREDICTOR.NAME", name, *absent), SHAPE)
    other.load_state_dict(predictor.state_dict())
    predictions, proposals = predictor(_features(4)), make_proposals([0] * 4)
    assert torch.equal(
        other.predict_probs(predictions, proposals)[0],
        predictor.predict_probs(predictions, proposals)[0],
    )


@every
def test_the_classifier_can_be_a_cosine_one(build, name):
    linear = build(name)
    cosine = build(name, "MODEL.ROI_BOX_PREDICTOR.NORMALIZED", True)
    assert not isinstance(linear.cls_score, NormalizedLinear)
    assert isinstance(cosine.cls_score, NormalizedLinear)
    shapes = [{k: v.shape for k, v in p.state_dict().items()} for p in (linear, cosine)]
    assert shapes[0] == shapes[1]
    weights = cosine.cls_score.weight
    scores = cosine.predict_probs(cosine(_features(3)), make_proposals([0] * 3))[0]
    with torch.no_grad():
        weights *= torch.rand(len(weights), 1) + 0.5  # lengths do not count
    torch.testing.assert_close(
        cosine.predict_probs(cosine(_features(3)), make_proposals([0] * 3))[0], scores
    )


# In detectors


@every_trained
@pytest.mark.parametrize("detector", DETECTORS)
def test_a_detector_trains_and_detects(cfg_of, make_batch, name, detector):
    torch.manual_seed(0)
    model = BAGSTrainer.build_model(cfg_of(name, *DETECTORS[detector])).train()
    batch = make_batch()
    with EventStorage() as storage:
        losses = model(batch)
        sum(losses.values()).backward()
        logged = storage.latest()
    num_stages = 3 if "cascade" in detector else 1
    assert all(loss.isfinite() for loss in losses.values())
    assert sum(key.startswith("loss_cls") for key in losses) == num_stages
    assert ("loss_mask" in losses) == ("mask" in detector)
    assert sum(key.endswith("fast_rcnn/cls_accuracy") for key in logged) == num_stages
    predictors = _predictors(model)
    assert [type(p).__name__ for p in predictors] == [name] * num_stages
    assert all(p.cls_score.weight.grad.any() for p in predictors)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    _check_detections(model, batch, "mask" in detector)


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_detector_of_class_means_detects(cfg_of, make_batch, detector):
    cfg = cfg_of("NearestMeanOutputLayers", *DETECTORS[detector])
    model = build_model(cfg)
    _predictors(model)  # fits them
    _check_detections(model, make_batch(), "mask" in detector)


def _check_detections(model, batch, masks):
    with torch.no_grad():
        found = model.eval()(batch[:1])[0]["instances"]
    assert len(found) > 0
    assert ((found.scores > 0) & (found.scores <= 1)).all()
    assert (found.pred_classes < K).all()
    assert found.has("pred_masks") == masks
