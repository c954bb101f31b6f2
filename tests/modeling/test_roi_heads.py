"""Faster, Mask and Cascade R-CNN with a classifier from the registry."""

import pytest
import reference
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference_single_image
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from bags_d2 import (
    BAGSOutputLayers,
    ClassGroups,
    ConfigError,
    LongTailCascadeROIHeads,
    LongTailROIHeads,
)

BAGS = ["MODEL.ROI_BOX_PREDICTOR.NAME", "BAGSOutputLayers"]
MASK = ["MODEL.MASK_ON", True]
CASCADE = [
    *("MODEL.ROI_HEADS.NAME", "LongTailCascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
]
DETECTORS = {
    "faster": [],
    "mask": MASK,
    "cascade": CASCADE,
    "cascade-mask": [*CASCADE, *MASK],
}
COUNTS = [3, 12, 150, 2000, 7, 40]  # those of the fixture tiny_cfg
THRESHOLDS = (10, 100, 1000)
K = len(COUNTS)


def _build(cfg, seed=0):
    torch.manual_seed(seed)
    return build_model(cfg)


def _train_step(model, batch, seed=0):
    """Losses of one training step after backward, and the names of what was logged."""
    model.train()
    torch.manual_seed(seed)
    with EventStorage() as storage:
        losses = model(batch)
        sum(losses.values()).backward()
        return losses, set(storage.latest())


def _predictors(model):
    found = model.roi_heads.box_predictor
    return list(found) if isinstance(found, torch.nn.ModuleList) else [found]


def _make_confident(model, std, box_std):
    """Weights under which scores and boxes differ clearly between RoIs, classes and stages."""
    torch.manual_seed(5)
    for predictor in _predictors(model):
        torch.nn.init.normal_(predictor.cls_score.weight, std=std)
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=box_std)


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("name", ["BAGSOutputLayers", "FastRCNNOutputLayers"])
def test_a_detector_takes_a_training_step(tiny_cfg, make_batch, detector, name):
    model = _build(tiny_cfg("MODEL.ROI_BOX_PREDICTOR.NAME", name, *DETECTORS[detector]))
    losses, logged = _train_step(model, make_batch())
    cascade = "cascade" in detector
    stages = [f"_stage{i}" for i in range(3)] if cascade else [""]
    expected = {f"{kind}{s}" for kind in ("loss_cls", "loss_box_reg") for s in stages}
    expected |= {"loss_mask"} if "mask" in detector else set()
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc", *expected}
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert len(_predictors(model)) == len(stages)
    for predictor in _predictors(model):
        assert predictor.cls_score.weight.grad.abs().sum() > 0
    for parameter in model.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()
    scopes = [f"stage{i}/" for i in range(3)] if cascade else [""]
    grouped = name == "BAGSOutputLayers"
    for scope in scopes:
        assert f"{scope}fast_rcnn/cls_accuracy" in logged
        for g in range(5):
            assert (f"{scope}bags/loss_group{g}" in logged) == grouped


@pytest.mark.parametrize(
    ("detector", "stock"),
    [("mask", "StandardROIHeads"), ("cascade-mask", "CascadeROIHeads")],
)
def test_with_the_stock_classifier_the_heads_are_the_stock_heads(
    tiny_cfg, make_batch, detector, stock
):
    options = ["MODEL.ROI_BOX_PREDICTOR.NAME", "FastRCNNOutputLayers", *DETECTORS[detector]]
    options += ["MODEL.LONG_TAIL.CASCADE_AVERAGE", "probs"]
    ours = _build(tiny_cfg(*options))
    theirs = _build(tiny_cfg(*options, "MODEL.ROI_HEADS.NAME", stock))
    assert type(theirs.roi_heads).__name__ == stock
    theirs.load_state_dict(ours.state_dict())  # strict: the names agree
    losses, _ = _train_step(ours, make_batch())
    expected, _ = _train_step(theirs, make_batch())
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name])
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        found, other = (m.eval()(make_batch(1))[0]["instances"] for m in (ours, theirs))
    assert len(found) > 0
    torch.testing.assert_close(found.scores, other.scores)
    torch.testing.assert_close(found.pred_boxes.tensor, other.pred_boxes.tensor)


def test_cascade_stages_have_their_own_regression_weights_and_groups(tiny_cfg):
    cfg = tiny_cfg(*BAGS, *CASCADE)
    model = _build(cfg)
    weights = [p.box2box_transform.weights for p in _predictors(model)]
    assert weights == list(cfg.MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS)
    for predictor in _predictors(model):
        assert predictor.groups.sizes == (2, 2, 1, 1)
    names = [n for n in model.state_dict() if n.endswith("groups.class_to_group")]
    assert names == [f"roi_heads.box_predictor.{i}.groups.class_to_group" for i in range(3)]


def _direct_cascade(model, features, proposals, average):
    """Detections of one image by going through the stages one at a time."""
    heads = model.roi_heads
    features = [features[f] for f in heads.box_in_features]
    boxes = proposals[0].proposal_boxes
    all_logits, size = [], proposals[0].image_size
    for i, predictor in enumerate(heads.box_predictor):
        logits, deltas = predictor(heads.box_head[i](heads.box_pooler(features, [boxes])))
        moved = predictor.box2box_transform.apply_deltas(deltas, boxes.tensor)
        boxes = Boxes(moved.clone())
        boxes.clip(size)
        all_logits.append(logits.double())
    if average == "logits":
        mean = sum(all_logits) / 3
        scores = torch.tensor(reference.merge(mean.tolist(), COUNTS, THRESHOLDS))
    else:
        per_stage = [reference.merge(x.tolist(), COUNTS, THRESHOLDS) for x in all_logits]
        scores = torch.tensor(per_stage).mean(dim=0)
    return fast_rcnn_inference_single_image(moved, scores, size, 0.0, 1.0, -1)[0]


@pytest.fixture
def cascade_parts(tiny_cfg):
    """``cascade_parts(average)``: a cascade, features of one image and proposals on it."""

    def make(average, *options):
        options = [*BAGS, *CASCADE, "MODEL.LONG_TAIL.CASCADE_AVERAGE", average, *options]
        nms = ["MODEL.ROI_HEADS.NMS_THRESH_TEST", 1.0, "TEST.DETECTIONS_PER_IMAGE", -1]
        model = _build(tiny_cfg(*options, *nms)).eval()
        _make_confident(model, std=3.0, box_std=1.0)
        generator = torch.Generator().manual_seed(3)
        features = {
            f"p{level}": torch.randn(1, 16, 64 >> level, 64 >> level, generator=generator)
            for level in range(2, 6)
        }
        corners = 30 * torch.rand(9, 4, generator=generator)
        corners[:, 2:] += corners[:, :2] + 4
        return model, features, [Instances((64, 64), proposal_boxes=Boxes(corners))]

    return make


@pytest.mark.parametrize("average", ["logits", "probs"])
def test_cascade_averages_over_its_stages(cascade_parts, average):
    model, features, proposals = cascade_parts(average)
    with torch.no_grad():
        found = model.roi_heads._forward_box(features, proposals)[0]
        expected = _direct_cascade(model, features, proposals, average)
        other = {"logits": "probs", "probs": "logits"}[average]
        contrast = _direct_cascade(model, features, proposals, other)
    assert len(found) == 9 * K
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=1e-4)
    assert (found.scores - contrast.scores).abs().max() > 0.01  # the two ways do differ here
    top = expected.scores > 0.01
    assert torch.equal(found.pred_classes[top], expected.pred_classes[top])
    torch.testing.assert_close(
        found.pred_boxes.tensor[top], expected.pred_boxes.tensor[top], atol=1e-3, rtol=1e-4
    )


@pytest.mark.parametrize("average", ["logits", "probs"])
def test_cascade_keeps_images_apart(cascade_parts, average):
    model, features, (first,) = cascade_parts(average)
    features = {name: torch.cat([f, 2 * f.flip(3)]) for name, f in features.items()}
    second = Instances((48, 64), proposal_boxes=first.proposal_boxes[2:5])
    empty = Instances((64, 64), proposal_boxes=first.proposal_boxes[:0])
    with torch.no_grad():
        both = model.roi_heads._forward_box(features, [first, second])
        alone = model.roi_heads._forward_box({n: f[1:] for n, f in features.items()}, [second])
        with_empty = model.roi_heads._forward_box(features, [empty, second])
    assert [len(x) for x in both] == [9 * K, 3 * K]
    assert [len(x) for x in with_empty] == [0, 3 * K]
    torch.testing.assert_close(both[1].scores, alone[0].scores, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(with_empty[1].scores, alone[0].scores, atol=1e-4, rtol=1e-4)
    assert both[1].pred_boxes.tensor[:, 3].max() <= 48


def test_an_unknown_average_is_refused(tiny_cfg):
    cfg = tiny_cfg(*BAGS, *CASCADE, "MODEL.LONG_TAIL.CASCADE_AVERAGE", "mean")
    with pytest.raises(ConfigError, match=r"CASCADE_AVERAGE must be .*'mean'"):
        build_model(cfg)
    with pytest.raises(ConfigError, match="CASCADE_AVERAGE"):
        LongTailCascadeROIHeads(average="max")


@pytest.mark.parametrize("heads", [[], CASCADE], ids=["standard", "cascade"])
@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True], "USE_SIGMOID_CE"),
        (["MODEL.ROI_BOX_HEAD.USE_FED_LOSS", True], "USE_FED_LOSS"),
        (
            [
                *("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True),
                *("MODEL.ROI_BOX_HEAD.USE_FED_LOSS", True),
            ],
            "USE_SIGMOID_CE|USE_FED_LOSS",
        ),
    ],
    ids=["sigmoid", "federated", "both"],
)
def test_a_grouped_detector_refuses_options_of_a_sigmoid_one(tiny_cfg, heads, options, key):
    with pytest.raises(ConfigError, match=key):
        build_model(tiny_cfg(*BAGS, *heads, *options))


def _explicit_heads():
    head = L(FastRCNNConvFCHead)(
        input_shape=L(ShapeSpec)(channels=8, height=4, width=4), conv_dims=[], fc_dims=[16]
    )
    predictor = L(BAGSOutputLayers)(
        input_shape=L(ShapeSpec)(channels=16),
        box2box_transform=L(Box2BoxTransform)(weights=(10.0, 10.0, 5.0, 5.0)),
        num_classes=K,
        groups=L(ClassGroups.from_counts)(counts=COUNTS, thresholds=[10, 100, 1000]),
        others_sample_ratio=2.0,
    )
    return L(LongTailROIHeads)(
        num_classes=K,
        batch_size_per_image=16,
        positive_fraction=0.25,
        proposal_matcher=L(Matcher)(
            thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False
        ),
        box_in_features=["p2"],
        box_pooler=L(ROIPooler)(
            output_size=4, scales=[0.25], sampling_ratio=0, pooler_type="ROIAlignV2"
        ),
        box_head=head,
        box_predictor=predictor,
    )


def test_heads_can_be_built_from_keywords_without_a_config(make_batch):
    torch.manual_seed(0)
    heads = instantiate(_explicit_heads()).train()
    assert type(heads.box_predictor) is BAGSOutputLayers
    assert heads.box_predictor.groups.sizes == (2, 2, 1, 1)
    targets = [record["instances"] for record in make_batch(1)]
    corners = torch.tensor([[5.0, 5, 31, 41], [18, 10, 61, 50], [0, 0, 9, 9]])
    proposals = Instances((64, 64), proposal_boxes=Boxes(corners))
    proposals.objectness_logits = torch.zeros(3)
    features = {"p2": torch.randn(1, 8, 16, 16)}
    with EventStorage():
        _, losses = heads(None, features, [proposals], targets)
    sum(losses.values()).backward()
    assert set(losses) == {"loss_cls", "loss_box_reg"}
    assert heads.box_predictor.cls_score.weight.grad.abs().sum() > 0
    instances, _ = heads.eval()(None, features, [proposals])
    assert len(instances[0]) > 0


def test_without_counts_a_model_is_built_and_inference_says_why_not(tiny_cfg, make_batch):
    model = _build(tiny_cfg(*BAGS, "MODEL.LONG_TAIL.CLASS_COUNTS_FILE", "gone.json")).eval()
    with pytest.raises(ConfigError, match=r"class groups are unknown.*gone\.json"), torch.no_grad():
        model(make_batch(1))
