"""Balanced Group Softmax as Detectron2 output layers."""

import pytest
import reference
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from bags_d2 import (
    ROI_BOX_PREDICTOR_REGISTRY,
    BAGSOutputLayers,
    ClassGroups,
    ConfigError,
    build_box_predictor,
)
from bags_d2.modeling import FastRCNNOutputLayers

COUNTS = [5, 12, 2000, 7, 150]
THRESHOLDS = (10, 100, 1000)
K = len(COUNTS)
FEATURES = 16
SHAPE = ShapeSpec(channels=FEATURES)


def _predictor(cls=BAGSOutputLayers, **kwargs):
    if cls is BAGSOutputLayers:
        kwargs.setdefault("groups", ClassGroups.from_counts(COUNTS))
        kwargs.setdefault("others_sample_ratio", float("inf"))
    kwargs.setdefault("num_classes", K)
    transform = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
    torch.manual_seed(0)
    predictor = cls(SHAPE, box2box_transform=transform, **kwargs)
    torch.nn.init.normal_(predictor.cls_score.weight, std=1.0)
    torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.1)
    return predictor


def _proposals(labels_of_images, with_gt_boxes=True):
    generator = torch.Generator().manual_seed(1)
    proposals = []
    for labels in labels_of_images:
        corners = 20 * torch.rand(len(labels), 4, generator=generator)
        corners[:, 2:] += corners[:, :2] + 5
        p = Instances((64, 64), proposal_boxes=Boxes(corners))
        p.gt_classes = torch.tensor(labels, dtype=torch.long)
        if with_gt_boxes:
            p.gt_boxes = Boxes(corners + 2 * torch.rand(len(labels), 4, generator=generator))
        proposals.append(p)
    return proposals


def _features(proposals):
    total = sum(len(p) for p in proposals)
    return torch.randn(total, FEATURES, generator=torch.Generator().manual_seed(2))


def _losses(predictor, proposals, features=None, start_iter=0):
    """The losses, the scalars that were logged, and the predictions."""
    features = _features(proposals) if features is None else features
    with EventStorage(start_iter) as storage:
        predictions = predictor(features)
        losses = predictor.losses(predictions, proposals)
        logged = {name: value for name, (value, _) in storage.latest().items()}
    return losses, logged, predictions


# Construction


def test_registry_holds_both_classifiers():
    assert ROI_BOX_PREDICTOR_REGISTRY.get("BAGSOutputLayers") is BAGSOutputLayers
    assert ROI_BOX_PREDICTOR_REGISTRY.get("FastRCNNOutputLayers") is FastRCNNOutputLayers


@pytest.mark.parametrize(
    ("name", "cls", "width"),
    [("BAGSOutputLayers", BAGSOutputLayers, 12), ("FastRCNNOutputLayers", FastRCNNOutputLayers, 7)],
)
def test_config_names_the_classifier(tiny_cfg, name, cls, width):
    predictor = build_box_predictor(tiny_cfg("MODEL.ROI_BOX_PREDICTOR.NAME", name), SHAPE)
    assert type(predictor) is cls
    assert predictor.cls_score.out_features == width


def test_an_unknown_name_is_an_error_that_lists_the_known_ones(tiny_cfg):
    cfg = tiny_cfg("MODEL.ROI_BOX_PREDICTOR.NAME", "Softmax")
    with pytest.raises(
        ConfigError,
        match=r"ROI_BOX_PREDICTOR\.NAME is 'Softmax'.*BAGSOutputLayers.*FastRCNNOutputLayers",
    ):
        build_box_predictor(cfg, SHAPE)


def test_every_key_of_the_config_is_used(tiny_cfg):
    predictor = BAGSOutputLayers(
        tiny_cfg(
            *("MODEL.BAGS.GROUP_THRESHOLDS", (100,)),
            *("MODEL.BAGS.OTHERS_SAMPLE_RATIO", 3.5),
            *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.125),
            *("MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.25),
            *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
            *("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT", 2.0),
            *("TEST.DETECTIONS_PER_IMAGE", 17),
        ),
        SHAPE,
    )
    assert predictor.groups.sizes == (4, 2)
    assert predictor.groups.class_counts.tolist() == [3, 12, 150, 2000, 7, 40]
    assert predictor.others_sample_ratio == 3.5
    assert predictor.test_score_thresh == 0.125
    assert predictor.test_nms_thresh == 0.25
    assert predictor.test_topk_per_image == 17
    assert predictor.bbox_pred.out_features == 4
    assert predictor.loss_weight["loss_box_reg"] == 2.0


def test_keyword_arguments_override_the_config(tiny_cfg):
    transform = Box2BoxTransform(weights=(1.0, 2.0, 3.0, 4.0))
    predictor = build_box_predictor(
        tiny_cfg("MODEL.ROI_BOX_PREDICTOR.NAME", "BAGSOutputLayers"),
        SHAPE,
        box2box_transform=transform,
    )
    assert predictor.box2box_transform is transform


@pytest.mark.parametrize(
    ("counts", "thresholds"),
    [(COUNTS, THRESHOLDS), (COUNTS, ()), ([50] * 80, (10, 100, 1000)), ([1], (5, 10))],
)
def test_classifier_has_k_plus_g_plus_2_logits_and_starts_small(counts, thresholds):
    torch.manual_seed(0)
    predictor = BAGSOutputLayers(
        ShapeSpec(channels=256),
        box2box_transform=Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
        num_classes=len(counts),
        groups=ClassGroups.from_counts(counts, thresholds),
    )
    assert predictor.cls_score.weight.shape == (len(counts) + len(thresholds) + 3, 256)
    assert predictor.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert abs(predictor.cls_score.weight.mean().item()) < 0.002
    assert (predictor.cls_score.bias == 0).all()
    assert predictor.others_sample_ratio == 8.0


def test_the_checkpoint_holds_the_groups_next_to_the_classifier():
    state = _predictor().state_dict()
    assert state["groups.class_to_group"].tolist() == [1, 2, 4, 1, 3]
    assert state["groups.class_counts"].tolist() == COUNTS
    assert state["groups.thresholds"].tolist() == list(THRESHOLDS)


def test_groups_of_another_number_of_classes_are_refused(tiny_cfg):
    with pytest.raises(ConfigError, match=r"5 classes but MODEL\.ROI_HEADS\.NUM_CLASSES is 7"):
        _predictor(num_classes=7)
    cfg = tiny_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 7)
    with pytest.raises(ConfigError, match=r"6 classes but MODEL\.ROI_HEADS\.NUM_CLASSES is 7"):
        BAGSOutputLayers(cfg, SHAPE)


@pytest.mark.parametrize("ratio", [-1.0, float("nan")])
def test_a_negative_ratio_is_refused(ratio):
    with pytest.raises(ConfigError, match="OTHERS_SAMPLE_RATIO must be 0 or more"):
        _predictor(others_sample_ratio=ratio)


def test_missing_counts_are_an_error_of_use_and_not_of_construction(tiny_cfg):
    predictor = BAGSOutputLayers(tiny_cfg("MODEL.LONG_TAIL.CLASS_COUNTS_FILE", "gone.json"), SHAPE)
    assert predictor.cls_score.out_features == 12
    proposals = _proposals([[0, 6]])
    predictions = predictor(_features(proposals))
    with pytest.raises(ConfigError, match=r"unknown: .*'gone\.json' does not exist"):
        predictor.predict_probs(predictions, proposals)
    with EventStorage(), pytest.raises(ConfigError, match=r"'gone\.json' does not exist"):
        predictor.losses(predictions, proposals)


# Training


@pytest.mark.parametrize("agnostic", [False, True])
def test_losses_are_the_groups_sum_and_the_parents_box_loss(agnostic):
    options = {
        "cls_agnostic_bbox_reg": agnostic,
        "smooth_l1_beta": 1.0,
        "loss_weight": {"loss_box_reg": 3.0, "loss_cls": 0.5},
    }
    predictor = _predictor(**options)
    parent = _predictor(FastRCNNOutputLayers, **options)
    parent.bbox_pred.load_state_dict(predictor.bbox_pred.state_dict())
    labels = [[0, 3, K, K], [1, 2, 2, K, K]]
    proposals = _proposals(labels)
    losses, _, (logits, _) = _losses(predictor, proposals)
    flat = [c for of_image in labels for c in of_image]
    used = reference.used_without_sampling(
        flat, reference.make_groups(COUNTS, THRESHOLDS), float("inf")
    )
    expected, _ = reference.loss_and_gradient(
        logits.tolist(), flat, COUNTS, THRESHOLDS, used, [1.0] * 5
    )
    assert set(losses) == {"loss_cls", "loss_box_reg"}
    assert losses["loss_cls"].item() == pytest.approx(0.5 * sum(expected), rel=1e-5)
    parents, _, _ = _losses(parent, proposals)
    assert parents["loss_box_reg"] > 0
    torch.testing.assert_close(losses["loss_box_reg"], parents["loss_box_reg"])


@pytest.mark.parametrize("ratio", [0.0, 1.0, 8.0])
def test_the_sampling_ratio_reaches_the_loss(ratio):
    predictor = _predictor(others_sample_ratio=ratio)
    _, logged, _ = _losses(predictor, _proposals([[0, 3, 1] + [K] * 60]))
    expected = {0: 63, 1: 2 + 2 * ratio, 2: 1 + ratio, 3: 0, 4: 0}
    assert {g: logged[f"bags/num_used_group{g}"] for g in range(5)} == expected


@pytest.mark.parametrize("ratio", [0.0, float("inf")])
def test_logged_statistics_are_those_of_the_used_rois(ratio):
    predictor = _predictor(others_sample_ratio=ratio)
    labels = [0, 3, 1, 1, K, K]
    proposals = _proposals([labels])
    losses, logged, (logits, _) = _losses(predictor, proposals)
    groups = reference.make_groups(COUNTS, THRESHOLDS)
    columns = reference.make_columns(groups)
    used = reference.used_without_sampling(labels, groups, ratio)
    expected, _ = reference.loss_and_gradient(
        logits.tolist(), labels, COUNTS, THRESHOLDS, used, [1.0] * 5
    )
    for g in range(5):
        assert logged[f"bags/loss_group{g}"] == pytest.approx(expected[g], rel=1e-5)
        assert logged[f"bags/num_used_group{g}"] == sum(used[g])
        if not any(used[g]):
            assert f"bags/accuracy_group{g}" not in logged
            continue
        positions = reference.group_columns(columns, groups, g)
        right = [
            max(range(len(positions)), key=[row[p] for p in positions].__getitem__)
            == reference.target_slot(label, groups, g, K)
            for row, label, u in zip(logits.tolist(), labels, used[g], strict=True)
            if u
        ]
        assert logged[f"bags/accuracy_group{g}"] == pytest.approx(sum(right) / len(right))
    total = sum(logged[f"bags/loss_group{g}"] for g in range(5))
    assert losses["loss_cls"].item() == pytest.approx(total, rel=1e-5)
    merged = reference.merge(logits.tolist(), COUNTS, THRESHOLDS)
    predicted = [max(range(K + 1), key=row.__getitem__) for row in merged]
    hits = [p == label for p, label in zip(predicted, labels, strict=True)]
    assert logged["fast_rcnn/cls_accuracy"] == pytest.approx(sum(hits) / 6)
    assert logged["fast_rcnn/fg_cls_accuracy"] == pytest.approx(sum(hits[:4]) / 4)
    assert logged["fast_rcnn/false_negative"] == pytest.approx(
        sum(p == K for p in predicted[:4]) / 4
    )


def test_background_alone_needs_no_ground_truth_boxes():
    predictor = _predictor()
    losses, logged, _ = _losses(predictor, _proposals([[K, K, K]], with_gt_boxes=False))
    assert losses["loss_cls"] > 0
    assert losses["loss_box_reg"] == 0
    assert [logged[f"bags/num_used_group{g}"] for g in range(5)] == [3, 0, 0, 0, 0]


# Inference


def test_predict_probs_splits_by_image():
    predictor = _predictor()
    proposals = _proposals([[0, 1, 2], [], [K]])
    logits, deltas = predictor(_features(proposals))
    probs = predictor.predict_probs((logits, deltas), proposals)
    assert [tuple(p.shape) for p in probs] == [(3, K + 1), (0, K + 1), (1, K + 1)]
    expected = torch.tensor(reference.merge(logits.tolist(), COUNTS, THRESHOLDS))
    torch.testing.assert_close(torch.cat(probs), expected, atol=1e-5, rtol=1e-5)


def test_inference_keeps_the_best_classes_by_merged_score():
    predictor = _predictor(test_score_thresh=0.0, test_nms_thresh=1.0, test_topk_per_image=6)
    proposals = _proposals([[0, 1, 2], [K]])
    predictions = predictor(_features(proposals))
    instances, kept = predictor.inference(predictions, proposals)
    merged = reference.merge(predictions[0].tolist(), COUNTS, THRESHOLDS)
    for i, rows in enumerate([merged[:3], merged[3:]]):
        ranked = sorted(
            ((row[c], c, r) for r, row in enumerate(rows) for c in range(K)), reverse=True
        )[:6]
        assert instances[i].scores.tolist() == pytest.approx([s for s, _, _ in ranked], abs=1e-5)
        assert instances[i].pred_classes.tolist() == [c for _, c, _ in ranked]
        assert kept[i].tolist() == [r for _, _, r in ranked]
        assert instances[i].pred_boxes.tensor.shape == (len(ranked), 4)


def test_a_score_threshold_is_one_of_merged_scores():
    predictor = _predictor(test_score_thresh=0.3, test_nms_thresh=1.0)
    proposals = _proposals([[0, 1, 2, 3, 4, K]])
    predictions = predictor(_features(proposals))
    instances, _ = predictor.inference(predictions, proposals)
    merged = reference.merge(predictions[0].tolist(), COUNTS, THRESHOLDS)
    expected = sum(s > 0.3 for row in merged for s in row[:K])
    assert 0 < expected < 6 * K
    assert len(instances[0]) == expected
