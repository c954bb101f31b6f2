"""Exact top-k detection against Detectron2's own inference."""

import itertools
import random

import pytest
import torch
from detectron2 import modeling as d2_modeling
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import fast_rcnn
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, Instances
from torchvision.ops import nms

from bags_d2 import ROI_BOX_PREDICTOR_REGISTRY, BAGSOutputLayers, BAGSTrainer, ClassGroups
from bags_d2.layers import BoxDeltas, fast_rcnn_inference_topk, topk_nms
from bags_d2.modeling import FastRCNNOutputLayers, roi_heads, test_time_augmentation

SIZE = (60, 80)
TRANSFORM = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def exact_nms(monkeypatch):
    """Detectron2's inference with NMS class by class in float64, and ties in order.

    Its own NMS moves the classes apart in float32, which changes IoUs in their fourth decimal, and
    may leave equal scores in any order.
    """

    def by_class(boxes, scores, classes, nms_thresh):
        keep = []
        for c in classes.unique():
            members = (classes == c).nonzero().flatten()
            members = members[scores[members].argsort(descending=True, stable=True)]
            ranks = torch.arange(len(members), 0, -1).double()
            keep.append(members[nms(boxes[members].double(), ranks, nms_thresh)])
        keep = torch.cat(keep).sort().values if keep else classes
        return keep[scores[keep].argsort(descending=True, stable=True)]

    monkeypatch.setattr(fast_rcnn, "batched_nms", by_class)


def _assert_equal(found, expected):
    """Detections and kept RoIs of every image are the same numbers in the same order."""
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert ours.image_size == theirs.image_size
        assert ours.get_fields().keys() == theirs.get_fields().keys()
        assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
        assert torch.equal(ours.scores, theirs.scores)
        assert ours.scores.dtype == theirs.scores.dtype
        assert torch.equal(ours.pred_classes, theirs.pred_classes)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert torch.equal(ours, theirs)


def _check(boxes, scores, score_thresh=0.0, nms_thresh=0.5, topk=50):
    """Compare on one image and return what was found."""
    options = ([SIZE], score_thresh, nms_thresh, topk)
    found = fast_rcnn_inference_topk([boxes], [scores], *options)
    decoded = boxes.decode() if isinstance(boxes, BoxDeltas) else boxes
    _assert_equal(found, fast_rcnn_inference([decoded.clone()], [scores.clone()], *options))
    return found[0][0]


def _random_scores(num_rois, num_classes, seed=0, peakedness=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rois, num_classes + 1, generator=generator)
    return (peakedness * logits).softmax(dim=1)


def _random_boxes(num_rois, num_boxes=1, seed=0, clusters=None):
    """Boxes (R, 4 * B), some beyond the image; ``clusters`` makes them overlap a lot."""
    generator = torch.Generator().manual_seed(seed)
    centres = 80 * torch.rand(num_rois, 1, 2, generator=generator)
    if clusters:
        centres = centres[torch.arange(num_rois) % clusters]
    centres = centres + 2 * torch.randn(num_rois, num_boxes, 2, generator=generator)
    sizes = 5 + 20 * torch.rand(num_rois, num_boxes, 2, generator=generator)
    return torch.cat([centres - sizes / 2, centres + sizes / 2], dim=2).flatten(1)


def _random_deltas(num_rois, num_boxes, seed=0, std=1.0):
    generator = torch.Generator().manual_seed(seed)
    deltas = std * torch.randn(num_rois, 4 * num_boxes, generator=generator)
    return BoxDeltas(deltas, _random_boxes(num_rois, seed=seed), TRANSFORM)


# The function


@pytest.mark.parametrize("seed", range(200))
def test_a_random_case_equals_detectron2(exact_nms, seed):
    choose = random.Random(seed).choice
    num_rois, num_classes = choose([1, 15, 16, 40, 90]), choose([1, 3, 20, 70])
    scores = _random_scores(num_rois, num_classes, seed, peakedness=choose([0.3, 1.0, 3.0]))
    num_boxes = choose([1, num_classes])
    boxes = _random_boxes(num_rois, num_boxes, seed, clusters=choose([None, 1, 5]))
    if choose([False, False, True]):  # equal scores, and IoUs that are simple fractions
        scores, boxes = (16 * scores).round() / 16, (boxes / 8).round() * 8
    if choose([False, False, True]):
        boxes[random.Random(seed).randrange(num_rois), choose([0, -1])] = choose([NAN, INF, -INF])
        scores[random.Random(-seed).randrange(num_rois), choose([0, -1])] = choose([NAN, INF])
    score_thresh = choose([0.0, 0.0, 1e-3, 0.05, 1.0])
    nms_thresh = choose([0.0, 0.1, 0.5, 0.6, 0.9, 1.0])
    _check(boxes, scores, score_thresh, nms_thresh, topk=choose([-1, 0, 1, 10, 100, 10_000]))


@pytest.mark.parametrize(
    ("agnostic", "topk"), [(False, 100), (True, 100), (False, -1), (True, -1), (False, 2_000)]
)
def test_a_large_vocabulary_at_threshold_zero(exact_nms, agnostic, topk):
    num_classes = 500
    scores = _random_scores(200, num_classes)
    boxes = _random_boxes(200, 1 if agnostic else num_classes, clusters=20)
    found = _check(boxes, scores, topk=topk)
    assert len(found) == topk if topk > 0 else len(found) > 10_000


@pytest.mark.parametrize("shape", [(0, 5, 20), (0, 5, 4), (3, 5, 20), (40, 60, 4)])
def test_without_proposals_or_candidates(shape):
    num_rois, num_classes, width = shape
    boxes = torch.zeros(num_rois, width)
    scores = torch.zeros(num_rois, num_classes + 1)
    for topk in (-1, 0, 7):
        assert len(_check(boxes, scores, topk=topk)) == 0


def test_without_images():
    assert fast_rcnn_inference_topk([], [], [], 0.0, 0.5, 10) == ([], [])


def test_several_images_of_their_own_shapes(exact_nms):
    sizes = [(60, 80), (20, 30), (10, 10)]
    scores = [_random_scores(n, 40, seed=n) for n in (50, 0, 30)]
    boxes = [_random_boxes(n, 40, seed=n) for n in (50, 0, 30)]
    found = fast_rcnn_inference_topk(boxes, scores, sizes, 0.0, 0.5, 20)
    _assert_equal(found, fast_rcnn_inference(boxes, scores, sizes, 0.0, 0.5, 20))
    assert [len(f) for f in found[0]] == [20, 0, 20]


@pytest.mark.parametrize("limit", [0, 300, 10**9])
def test_one_call_of_nms_and_one_for_each_class_agree(monkeypatch, exact_nms, limit):
    monkeypatch.setattr(topk_nms, "SINGLE_NMS_LIMIT", limit)
    monkeypatch.setattr(topk_nms, "batched_nms", fast_rcnn.batched_nms)
    scores = _random_scores(20, 100, peakedness=1.0)
    _check(_random_boxes(20, 100, clusters=1), scores, topk=1_500)


def test_classes_far_apart_keep_their_ious(exact_nms):
    # Boxes whose IoU exceeds the threshold by 2e-5, in the last of 20,000 classes: moved by
    # 20,000 x 81 pixels, float32 would round their coordinates to eighths of a pixel.
    boxes = torch.tensor([[0.0, 0, 10, 10], [2.4998, 0, 12.4998, 10]])
    scores = torch.zeros(2, 20_001)
    scores[:, -2] = torch.tensor([0.9, 0.8])
    assert len(_check(boxes, scores, nms_thresh=0.6)) == 1
    assert len(_check(boxes, scores, nms_thresh=0.60004)) == 2


@pytest.mark.parametrize("topk", [10, 300])
def test_the_search_grows_until_enough_survive(monkeypatch, exact_nms, topk):
    # Class 0 is sure of every RoI, but all its boxes are one, so the best candidates leave one
    # detection; the rest must come from further and further down.
    seen = []
    original = topk_nms._best_candidates
    monkeypatch.setattr(
        topk_nms,
        "_best_candidates",
        lambda scores, thresh, wanted: seen.append(wanted) or original(scores, thresh, wanted),
    )
    scores = 0.1 * _random_scores(3_000, 30, peakedness=1.0)
    scores[:, 0] = torch.linspace(0.8, 0.9, 3_000)
    boxes = torch.tensor([[10.0, 10.0, 30.0, 30.0]]).repeat(3_000, 1)
    boxes[-4:] += torch.tensor([[0.0], [30.0], [60.0], [90.0]])
    found = _check(boxes, scores, topk=topk)
    assert len(seen) > 1
    assert all(b == 2 * a for a, b in itertools.pairwise(seen))
    if topk == 300:
        assert len(found) < topk  # and at the end of the candidates it stops


def test_equal_scores_keep_the_order_of_rois_and_classes(exact_nms):
    scores = _random_scores(100, 80, peakedness=1.0)
    scores = (scores / scores.max() * 4).ceil() / 4  # 8,000 candidates, four values
    found = _check(_random_boxes(100, 80), scores, topk=100)
    lowest = found.scores[-1]
    assert (found.scores == lowest).sum() < (scores[:, :-1] == lowest).sum()  # some stay behind


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_classes", [10, 100])
def test_other_precisions(exact_nms, dtype, num_classes):
    scores = _random_scores(60, num_classes, peakedness=0.5).to(dtype)
    boxes = _random_boxes(60, num_classes)
    _check(boxes.to(dtype), scores.float())
    # Scores that are not float32 Detectron2 refuses on the CPU; they mean what they do in float32.
    found = fast_rcnn_inference_topk([boxes], [scores], [SIZE], 1e-3, 0.5, 50)
    expected = fast_rcnn_inference([boxes], [scores.float()], [SIZE], 1e-3, 0.5, 50)
    assert found[0][0].scores.dtype == dtype
    found[0][0].scores = found[0][0].scores.float()
    _assert_equal(found, expected)


def test_the_arguments_are_left_alone():
    boxes, scores = _random_boxes(50, 40), _random_scores(50, 40)
    before = boxes.clone(), scores.clone()
    fast_rcnn_inference_topk([boxes], [scores], [SIZE], 0.0, 0.5, 10)
    assert torch.equal(boxes, before[0])
    assert torch.equal(scores, before[1])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_trace_serves_other_inputs():
    def detect(boxes, scores):
        (found,), _ = fast_rcnn_inference_topk([boxes], [scores], [SIZE], 0.05, 0.5, 30)
        return found.pred_boxes.tensor, found.scores, found.pred_classes

    inputs = [(_random_boxes(n, 20, seed=n), _random_scores(n, 20, seed=n)) for n in (10, 40)]
    traced = torch.jit.trace(detect, inputs[0])
    for found, expected in zip(traced(*inputs[1]), detect(*inputs[1]), strict=True):
        assert torch.equal(found, expected)


# Boxes decoded on demand


@pytest.mark.parametrize("seed", range(20))
def test_decoding_on_demand_equals_decoding_all(exact_nms, seed):
    choose = random.Random(seed).choice
    num_rois, num_classes = choose([0, 1, 30, 100]), choose([1, 30, 101])
    deltas = _random_deltas(num_rois, choose([1, num_classes]), seed, std=choose([0.1, 2.0, 50.0]))
    if choose([False, True]):
        deltas = BoxDeltas(deltas.deltas.half(), deltas.proposals, TRANSFORM)
    _check(deltas, _random_scores(num_rois, num_classes, seed), topk=choose([-1, 20, 100]))


BAD_DELTAS = [NAN, INF, -INF, 1e14, 1e20, 3e38, -3e38]


@pytest.mark.parametrize(("value", "column"), list(itertools.product(BAD_DELTAS, range(4))))
def test_deltas_that_are_not_finite_or_enormous(exact_nms, value, column):
    # Not every infinite delta is an infinite box (sizes are clamped), nor is every finite delta
    # a finite one: what counts is the decoded box.
    deltas = _random_deltas(40, 30, std=0.1)
    deltas.deltas[3, 8 + column] = value
    deltas.deltas[17, column] = value
    _check(deltas, _random_scores(40, 30))


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e14, 1e20, 3e38])
def test_proposals_that_are_not_finite_or_enormous(exact_nms, value):
    deltas = _random_deltas(40, 30, std=0.1)
    deltas.proposals[5, 2] = value
    _check(deltas, _random_scores(40, 30))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("column", [4, -1])
def test_scores_that_are_not_finite(exact_nms, value, column):
    scores = _random_scores(40, 30)
    scores[[2, 30], column] = value
    found, rois = fast_rcnn_inference_topk([_random_deltas(40, 30)], [scores], [SIZE], 0.0, 0.5, -1)
    assert rois[0].max() <= 37  # counted without the two
    assert torch.isfinite(found[0].scores).all()
    _check(_random_deltas(40, 30), scores, topk=-1)


def test_a_transform_of_unusual_scale(exact_nms):
    deltas = _random_deltas(40, 30)
    for weights, clamp in [((1e-30, 1.0, 1.0, 1.0), 4.0), ((1.0, 1.0, 1.0, 1.0), 95.0)]:
        deltas.deltas[0] = 90.0
        unusual = Box2BoxTransform(weights=weights, scale_clamp=clamp)
        _check(BoxDeltas(deltas.deltas, deltas.proposals, unusual), _random_scores(40, 30))


def test_only_the_best_candidates_are_decoded(monkeypatch):
    decoded = []
    original = BoxDeltas.decode_at
    monkeypatch.setattr(
        BoxDeltas,
        "decode_at",
        lambda self, rois, columns: decoded.append(len(rois)) or original(self, rois, columns),
    )
    monkeypatch.setattr(BoxDeltas, "decode", lambda self: pytest.fail("decoded all boxes"))
    deltas, scores = _random_deltas(320, 200), _random_scores(320, 200)
    fast_rcnn_inference_topk([deltas], [scores], [SIZE], 0.0, 0.5, 50)
    assert sum(decoded) == 50 * topk_nms.CANDIDATES_PER_DETECTION


# Where it is used


def _predictor(cls, num_classes=60, **options):
    if issubclass(cls, BAGSOutputLayers):
        options["groups"] = ClassGroups.from_counts([1 + 7 * i for i in range(num_classes)])
    torch.manual_seed(0)
    predictor = cls(
        ShapeSpec(channels=16),
        box2box_transform=TRANSFORM,
        num_classes=num_classes,
        test_topk_per_image=30,
        **options,
    )
    torch.nn.init.normal_(predictor.cls_score.weight)
    torch.nn.init.normal_(predictor.bbox_pred.weight)
    return predictor.eval()


@pytest.mark.parametrize("cls", [BAGSOutputLayers, FastRCNNOutputLayers])
@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("rois", [(), (0,), (70, 0, 45)])
@torch.no_grad()
def test_a_predictor_infers_what_detectron2_does(exact_nms, cls, agnostic, rois):
    predictor = _predictor(cls, cls_agnostic_bbox_reg=agnostic)
    proposals = [
        Instances(SIZE, proposal_boxes=Boxes(_random_boxes(n, seed=i))) for i, n in enumerate(rois)
    ]
    predictions = predictor(torch.randn(sum(rois), 16))
    found = predictor.inference(predictions, proposals)
    parents = fast_rcnn.FastRCNNOutputLayers.inference
    _assert_equal(found, parents(predictor, predictions, proposals))
    assert [len(f) for f in found[0]] == [min(30, 60 * n) for n in rois]


@torch.no_grad()
def test_a_sigmoid_predictor_infers_what_detectron2_does(exact_nms):
    predictor = _predictor(FastRCNNOutputLayers, use_sigmoid_ce=True)
    proposals = [Instances(SIZE, proposal_boxes=Boxes(_random_boxes(80)))]
    predictions = predictor(torch.randn(80, 16))
    parents = fast_rcnn.FastRCNNOutputLayers.inference
    _assert_equal(
        predictor.inference(predictions, proposals), parents(predictor, predictions, proposals)
    )


@torch.no_grad()
def test_a_predictor_that_decodes_in_its_own_way_is_asked(exact_nms):
    class Shifted(FastRCNNOutputLayers):
        def predict_boxes(self, predictions, proposals):
            return [b + 3 for b in super().predict_boxes(predictions, proposals)]

    predictor = _predictor(Shifted)
    proposals = [Instances(SIZE, proposal_boxes=Boxes(_random_boxes(40)))]
    predictions = predictor(torch.randn(40, 16))
    parents = fast_rcnn.FastRCNNOutputLayers.inference
    _assert_equal(
        predictor.inference(predictions, proposals), parents(predictor, predictions, proposals)
    )


def test_every_registered_predictor_uses_it():
    for _, cls in ROI_BOX_PREDICTOR_REGISTRY:
        assert cls.inference is FastRCNNOutputLayers.inference


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call from the cascade and from test-time augmentation."""
    seen = []

    def spy(*args):
        seen.append(args)
        return fast_rcnn_inference_topk(*args)

    monkeypatch.setattr(roi_heads, "fast_rcnn_inference_topk", spy)
    monkeypatch.setattr(test_time_augmentation, "fast_rcnn_inference_topk", spy)
    return seen


@pytest.mark.parametrize("average", ["logits", "probs"])
@torch.no_grad()
def test_the_cascade_uses_it(tiny_cfg, make_batch, calls, average):
    options = [
        *("MODEL.ROI_HEADS.NAME", "LongTailCascadeROIHeads"),
        *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
        *("MODEL.LONG_TAIL.CASCADE_AVERAGE", average),
    ]
    torch.manual_seed(0)
    model = build_model(tiny_cfg(*options)).eval()
    found = model(make_batch(2))
    assert len(calls) == 1
    assert len(found) == 2
    if average == "probs":  # Detectron2's own way, with which it can be compared
        stock = build_model(tiny_cfg(*options, "MODEL.ROI_HEADS.NAME", "CascadeROIHeads")).eval()
        stock.load_state_dict(model.state_dict())
        for ours, theirs in zip(found, stock(make_batch(2)), strict=True):
            ours, theirs = ours["instances"], theirs["instances"]
            assert torch.equal(ours.scores, theirs.scores)
            assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)


@pytest.mark.parametrize("num_boxes", [0, 1, 400])
def test_merging_of_augmented_views_equals_detectron2(tiny_cfg, calls, num_boxes):
    cfg = tiny_cfg("TEST.DETECTIONS_PER_IMAGE", 50, "MODEL.ROI_HEADS.NUM_CLASSES", 20)
    torch.manual_seed(0)
    boxes = _random_boxes(num_boxes, clusters=9)
    views = (boxes, list(torch.rand(num_boxes)), list(torch.randint(20, (num_boxes,))), SIZE)
    found, expected = (
        package.GeneralizedRCNNWithTTA._merge_detections(_with_cfg(cfg), *views)
        for package in (test_time_augmentation, d2_modeling)
    )
    _assert_equal([[found], []], [[expected], []])
    assert len(calls) == 1


def _with_cfg(cfg):
    """A stand-in for a model with test-time augmentation: all that merging reads is the config."""
    return type("Tta", (), {"cfg": cfg})()


@torch.no_grad()
def test_the_trainer_evaluates_with_it(tiny_cfg, make_batch, calls, monkeypatch):
    cfg = tiny_cfg("TEST.AUG.MIN_SIZES", (48, 64), "TEST.AUG.FLIP", True, "MODEL.MASK_ON", True)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    batch = [{k: v for k, v in record.items() if k != "instances"} for record in make_batch(1)]
    used = []
    monkeypatch.setattr(
        BAGSTrainer, "test", lambda cfg, model, output_folder: used.append(model) or {"bbox": {}}
    )
    assert list(BAGSTrainer.test_with_tta(cfg, model)) == ["bbox_TTA"]
    found = used[0](batch)[0]["instances"]
    assert len(calls) == 1
    expected = d2_modeling.GeneralizedRCNNWithTTA(cfg, model)(batch)[0]["instances"]
    assert len(found) > 0
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.pred_masks, expected.pred_masks)
