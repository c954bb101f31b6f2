"""Converted checkpoints compute what the authors' code computes from the same weights."""

import mmdet_reference as reference
import numpy as np
import pytest
import torch
from commands import bags_d2_here
from conftest import CONFIGS, TINY_COUNTS
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ImageList, Instances

from bags_d2 import ClassGroups, DataError
from bags_d2.checkpoint.mmdet import GroupLayout, convert_state_dict
from bags_d2.engine import LongTailCheckpointer
from bags_d2.modeling.roi_heads import LongTailCascadeROIHeads

K = len(TINY_COUNTS)
THRESHOLDS = (10, 100, 1000)
SIZES = {"stem": 8, "width": 8, "out": 32, "fpn": 16, "fc": 32}
STDS = (0.1, 0.1, 0.2, 0.2)
CASCADE = (
    *("MODEL.ROI_HEADS.NAME", "LongTailCascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
)
KINDS = {
    "faster": ({}, ()),
    "mask": ({"masks": 8}, ("MODEL.MASK_ON", True)),
    "cascade": ({"stages": 3}, CASCADE),
}
# Their last pixel is this package's edge: a box of pixels x1..x2 covers [x1, x2 + 1).
INCLUSIVE = np.array([0, 0, 1, 1])
RNG = np.random.default_rng(5)


@pytest.fixture
def make_cfg(tiny_cfg):
    """``make_cfg(*opts)``: the tiny detector under mmdetection's conventions."""

    def make(*opts):
        cfg = tiny_cfg()
        cfg.merge_from_file(str(CONFIGS / "mmdet" / "Base-mmdet.yaml"))
        norms = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "")
        sizes = ("MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]])
        cfg.merge_from_list([*norms, *sizes, *opts])
        return cfg

    return make


def layout_of(files):
    return GroupLayout.from_files(*map(torch.from_numpy, files), THRESHOLDS)


@pytest.fixture(params=["softmax", "bags"])
def grouped(request):
    return request.param == "bags"


@pytest.fixture
def convert(make_cfg, tmp_path, grouped):
    """``convert(kind)``: weights under the authors' names, and the detector made of them."""

    def make(kind="faster"):
        extra, opts = KINDS[kind]
        weights = reference.state_dict(K, **SIZES, grouped=5 if grouped else 0, **extra)
        name = "BAGSOutputLayers" if grouped else "FastRCNNOutputLayers"
        model = build_model(make_cfg("MODEL.ROI_BOX_PREDICTOR.NAME", name, *opts))
        layout = layout_of(reference.intermediate_files(TINY_COUNTS)) if grouped else None
        converted, left_out = convert_state_dict(weights, K, layout)
        assert all("num_batches_tracked" in n for n in left_out)
        torch.save({"model": converted}, tmp_path / "converted.pth")
        # An error if anything that the model needs is missing or of another shape.
        LongTailCheckpointer(model, evaluating=True).load(str(tmp_path / "converted.pth"))
        unknown = set(converted) - set(model.state_dict())
        assert not unknown
        return weights, model.eval()

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_used_once(convert, kind):
    weights, model = convert(kind)
    used = sum(v.numel() for k, v in model.state_dict().items() if "groups." not in k)
    given = {k: v.numel() for k, v in weights.items() if "num_batches" not in k}
    unused = 0
    if kind != "cascade":
        unused += 4 * (SIZES["fc"] + 1)  # box deltas of the background
    if kind == "mask":
        unused += 8 + 1  # its mask
    own = sum(v.numel() for k, v in model.state_dict().items() if "num_batches_tracked" in k)
    assert used - own == sum(given.values()) - unused


def test_backbone_and_rpn(convert):
    weights, model = convert()
    image = torch.from_numpy(RNG.normal(size=(1, 3, 64, 96))).float()
    expected = reference.fpn_features(weights, image)
    with torch.no_grad():
        features = [model.backbone(image)[f"p{i}"] for i in range(2, 7)]
        objectness, deltas = model.proposal_generator.rpn_head(features)
    for ours, theirs in zip(features, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for i, x in enumerate(expected):
        hidden = torch.relu(reference.conv(weights, "rpn_head.rpn_conv", x, padding=1))
        for name, ours in (("rpn_cls", objectness[i]), ("rpn_reg", deltas[i])):
            theirs = reference.conv(weights, f"rpn_head.{name}", hidden)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_anchors_are_theirs_but_for_rounding(convert):
    _, model = convert()
    generator = model.proposal_generator.anchor_generator
    for cell, stride in zip(generator.cell_anchors, (4, 8, 16, 32, 64), strict=True):
        # Cells start at half a stride here.
        ours = cell.numpy() + 0.5 * stride - INCLUSIVE
        difference = np.abs(ours - reference.base_anchors(stride))
        assert difference.max() <= 0.5
        assert np.allclose(ours[1], reference.base_anchors(stride)[1]), "squares are exact"


def _rois(count=40, size=(60, 90)):
    low = RNG.uniform(0, 40, (count, 2))
    return np.hstack([low, low + RNG.uniform(0, 40, (count, 2))]).round()


def _proposals(rois, size=(60, 90)):
    """Inclusive pixels as this package's boxes."""
    proposals = Instances(size)
    proposals.proposal_boxes = Boxes(torch.from_numpy(rois + INCLUSIVE).float())
    return proposals


def _expected_scores(logits, grouped):
    if not grouped:
        return reference.softmax(logits)
    return reference.merged_scores(logits, *reference.intermediate_files(TINY_COUNTS))


def _background_last(scores):
    return np.roll(scores, -1, axis=1)


def test_box_head_scores_and_boxes(convert, grouped):
    weights, model = convert()
    pooled, rois = RNG.normal(size=(40, 16, 7, 7)), _rois()
    logits, deltas = reference.box_head(weights, pooled)
    predictor = model.roi_heads.box_predictor
    with torch.no_grad():
        predictions = predictor(model.roi_heads.box_head(torch.from_numpy(pooled).float()))
        (probs,) = predictor.predict_probs(predictions, [_proposals(rois)])
        (boxes,) = predictor.predict_boxes(predictions, [_proposals(rois)])
    expected = _background_last(_expected_scores(logits, grouped))
    assert np.abs(probs.numpy() - expected).max() < 1e-5
    for c in range(K):
        theirs = reference.decode(rois, deltas[:, 4 * (c + 1) : 4 * (c + 2)], STDS)
        ours = boxes[:, 4 * c : 4 * c + 4].numpy() - INCLUSIVE
        assert np.abs(ours - theirs).max() < 1e-2 * np.abs(theirs).max()
        assert np.allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_cascade_averages_logits_and_refines_boxes(convert, grouped):
    weights, model = convert("cascade")
    heads = model.roi_heads
    assert isinstance(heads, LongTailCascadeROIHeads)
    rois = _rois()
    stds = (STDS, (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
    pooled = RNG.normal(size=(3, 40, 16, 7, 7))
    outputs, total = [], 0.0
    for stage in range(3):
        logits, deltas = reference.box_head(weights, pooled[stage], f"bbox_head.{stage}.")
        total = total + logits / 3
        theirs = reference.decode(rois, deltas, stds[stage])
        predictor = heads.box_predictor[stage]
        with torch.no_grad():
            x = heads.box_head[stage](torch.from_numpy(pooled[stage]).float())
            predictions = predictor(x)
            (ours,) = predictor.predict_boxes(predictions, [_proposals(rois)])
        assert np.allclose(ours.numpy() - INCLUSIVE, theirs, rtol=1e-4, atol=1e-3)
        outputs.append((predictor, predictions, [_proposals(rois)]))
    (scores,) = heads._average_scores(outputs)
    expected = _background_last(_expected_scores(total, grouped))
    assert np.abs(scores.numpy() - expected).max() < 1e-5


def test_masks(convert):
    weights, model = convert("mask")
    pooled = torch.from_numpy(RNG.normal(size=(5, 16, 14, 14))).float()
    expected = reference.mask_logits(weights, pooled)
    with torch.no_grad():
        logits = model.roi_heads.mask_head.layers(pooled)
    torch.testing.assert_close(logits, expected[:, 1:], rtol=1e-4, atol=1e-5)


def test_the_whole_detector_runs(convert):
    _, model = convert("mask")
    image = torch.from_numpy(RNG.uniform(0, 255, (3, 64, 96))).float()
    with torch.no_grad():
        (output,) = model([{"image": image, "height": 64, "width": 96}])
    assert output["instances"].has("pred_masks")
    assert isinstance(model.preprocess_image([{"image": image}]), ImageList)


def test_any_order_of_bins_and_slots_is_followed():
    label2binlabel, pred_slice = reference.intermediate_files(TINY_COUNTS)
    # The first foreground bin goes to the end, and its two classes change places.
    shuffled = label2binlabel.copy()
    shuffled[1, label2binlabel[1] == 1], shuffled[1, label2binlabel[1] == 2] = 2, 1
    moved = pred_slice.copy()
    moved[2:, 0] -= pred_slice[1, 1]
    moved[1, 0] = pred_slice[:, 1].sum() - pred_slice[1, 1]
    layout = layout_of((shuffled, moved))
    logits = RNG.normal(size=(9, K + 6))
    expected = _background_last(reference.merged_scores(logits, shuffled, moved))
    from bags_d2 import merge_group_probs

    ours = merge_group_probs(torch.from_numpy(logits)[:, layout.columns], layout.groups)
    assert np.abs(ours.numpy() - expected).max() < 1e-6


def test_counts_give_the_layout_of_the_authors_scripts():
    from_files = layout_of(reference.intermediate_files(TINY_COUNTS))
    from_counts = GroupLayout.from_counts(torch.tensor(TINY_COUNTS), THRESHOLDS)
    assert torch.equal(from_files.columns, from_counts.columns)
    assert torch.equal(from_files.groups.class_to_group, from_counts.groups.class_to_group)
    assert isinstance(from_files.groups, ClassGroups)


def _broken(change):
    label2binlabel, pred_slice = reference.intermediate_files(TINY_COUNTS)
    change(label2binlabel, pred_slice)
    return torch.from_numpy(label2binlabel), torch.from_numpy(pred_slice)


def _set(array, index, value):
    array[index] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, s: _set(b, (1, 2), 5), "every class into one bin"),
        (lambda b, s: _set(b, (0, 1), 0), "every class into one bin"),
        (lambda b, s: _set(b, (1, 0), 1), "every class into one bin"),
        (lambda b, s: _set(s, (1, 1), 9), "pred_slice has bins of"),
        (lambda b, s: _set(s, (1, 0), 0), "do not share out all logits"),
    ],
)
def test_files_that_contradict_each_other_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        GroupLayout.from_files(*_broken(change), THRESHOLDS)


def test_files_of_other_groups_or_counts_are_refused():
    files = _broken(lambda b, s: None)
    with pytest.raises(DataError, match="are not of 3 groups"):
        GroupLayout.from_files(*files, (10, 100))
    with pytest.raises(DataError, match="groups 1 classes differently from the training"):
        GroupLayout.from_files(*files, THRESHOLDS, torch.tensor([30, *TINY_COUNTS[1:]]))
    with pytest.raises(DataError, match="is of 6 classes, the training counts of 5"):
        GroupLayout.from_files(*files, THRESHOLDS, torch.tensor(TINY_COUNTS[1:]))


@pytest.mark.parametrize(
    "name",
    [
        "semantic_head.conv_embedding.conv.weight",
        "mask_head.0.convs.0.conv.weight",
        "backbone.layer2.0.conv2_offset.weight",
    ],
)
def test_other_architectures_are_refused(name):
    weights = reference.state_dict(K, **SIZES) | {name: torch.zeros(1)}
    with pytest.raises(DataError, match=f"'{name}' is no part of"):
        convert_state_dict(weights, K)


def test_a_classifier_of_another_kind_is_refused():
    weights = reference.state_dict(K, **SIZES, grouped=5)
    with pytest.raises(DataError, match="has 12 logits where 7 were expected"):
        convert_state_dict(weights, K)


@pytest.mark.slow
def test_the_tool_converts_checks_and_leaves_nothing_half_done(tmp_path, make_cfg):
    (tmp_path / "config.yaml").write_text(
        make_cfg("MODEL.ROI_BOX_PREDICTOR.NAME", "BAGSOutputLayers", "DATASETS.TRAIN", ()).dump()
    )
    weights = reference.state_dict(K, **SIZES, grouped=5)
    torch.save({"state_dict": weights, "meta": {"epoch": 12}}, tmp_path / "theirs.pth")
    for name, array in zip(
        ("bins", "slices"), reference.intermediate_files(TINY_COUNTS), strict=True
    ):
        torch.save(torch.from_numpy(array), tmp_path / f"{name}.pt")
    ours = tmp_path / "new" / "ours.pth"

    def run(source, *options):
        config = ("--config-file", tmp_path / "config.yaml")
        return bags_d2_here("convert", source, ours, *config, *options)

    files = ("--label2binlabel", f"{tmp_path}/bins.pt", "--pred-slice", f"{tmp_path}/slices.pt")
    done = run(tmp_path / "theirs.pth", *files)
    assert done.returncode == 0, done.stderr
    first = torch.load(ours, weights_only=True)
    assert run(tmp_path / "theirs.pth").returncode == 0  # groups from the counts file
    second = torch.load(ours, weights_only=True)
    assert all(torch.equal(first["model"][k], v) for k, v in second["model"].items())
    assert second["classes"]["training_instances"] == TINY_COUNTS

    ours.unlink()
    del weights["neck.fpn_convs.0.conv.bias"]
    torch.save({"state_dict": weights}, tmp_path / "damaged.pth")
    torch.save({"model": weights}, tmp_path / "other.pth")
    for source, words in (
        ("damaged.pth", "backbone.fpn_output2.bias"),
        ("other.pth", "has no 'state_dict'"),
        ("none.pth", "does not exist"),
    ):
        done = run(tmp_path / source, *files)
        assert done.returncode == 1
        assert words in done.stderr.splitlines()[-1]
        assert not list(ours.parent.iterdir())
