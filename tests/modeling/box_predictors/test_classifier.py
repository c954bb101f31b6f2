"""What classifiers share: counts that travel with the weights, cosine logits, the base class."""

import math

import pytest
import torch
from classifier_checks import FEATURES, long
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from bags_d2 import ConfigError, build_box_predictor
from bags_d2.modeling import ClassCounts
from bags_d2.modeling.box_predictors import NormalizedLinear

SHAPE = ShapeSpec(channels=FEATURES)


def rois(labels):
    corners = torch.tensor([[1.0, 2.0, 20.0, 30.0]]).repeat(len(labels), 1)
    proposals = Instances((64, 64), proposal_boxes=Boxes(corners), gt_boxes=Boxes(corners + 1))
    proposals.gt_classes = long(labels)
    return [proposals]


# Counts


def test_counts_are_saved_and_win_over_those_of_the_config(log_lines):
    lines = log_lines("bags_d2.modeling.class_groups")
    trained, new = ClassCounts.from_counts([5, 7, 9]), ClassCounts.from_counts([5, 8, 9])
    new.load_state_dict(trained.state_dict())
    assert new.class_counts.tolist() == [5, 7, 9]
    assert len(lines) == 1
    assert "class counts of 1 of 3 classes differ" in lines[0]
    new.load_state_dict(trained.state_dict())
    assert len(lines) == 1


def test_unknown_counts_are_an_error_until_a_checkpoint_has_them():
    counts = ClassCounts.undetermined(3, "'train.json' does not exist.")
    with pytest.raises(ConfigError, match=r"unknown: 'train\.json' does not exist\. Load a"):
        counts.require_determined()
    assert "unknown" in repr(counts)
    counts.load_state_dict(ClassCounts.from_counts([1, 2, 3]).state_dict())
    counts.require_determined()
    assert counts.class_counts.tolist() == [1, 2, 3]
    # A checkpoint that does not know them either leaves them unknown.
    counts = ClassCounts.undetermined(3, "reason")
    counts.load_state_dict(ClassCounts.undetermined(3, "other").state_dict())
    assert not counts.is_determined


@pytest.mark.parametrize("counts", [[1, -1], [[1, 2]], [0.5, 1.0]])
def test_counts_that_are_none_are_refused(counts):
    with pytest.raises(ConfigError, match="one whole number of 0 or more"):
        ClassCounts.from_counts(counts)


def test_counts_of_other_classes_are_refused(tiny_cfg):
    with pytest.raises(ConfigError, match=r"counts are of 2 classes but.*NUM_CLASSES is 6"):
        build_box_predictor(
            tiny_cfg("MODEL.ROI_BOX_PREDICTOR.NAME", "ReweightedOutputLayers"),
            SHAPE,
            counts=ClassCounts.from_counts([1, 2]),
        )


# Cosine classifier


def test_cosine_logits():
    layer = NormalizedLinear(3, 2, temperature=20.0)
    torch.nn.init.constant_(layer.bias, 0.5)
    x = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    logits = layer(x)
    for c, weight in enumerate(layer.weight.tolist()):
        dot = sum(a * b for a, b in zip(weight, (1.0, 2.0, 2.0), strict=True))
        norm = 3.0 * math.sqrt(sum(a * a for a in weight))
        assert logits[0, c].item() == pytest.approx(20 * dot / norm + 0.5, abs=1e-5)
    assert logits[1].tolist() == [0.5, 0.5]  # a RoI without features has no direction
    scaled = NormalizedLinear(3, 2, temperature=20.0)
    scaled.load_state_dict({"weight": layer.weight * 7, "bias": layer.bias})
    torch.testing.assert_close(scaled(x * 3), logits)
    with pytest.raises(ConfigError, match=r"TEMPERATURE must be above 0"):
        NormalizedLinear(3, 2, temperature=0.0)


# Classification only


def test_federated_loss_counts_the_images_of_any_data_set(tiny_cfg, register, write_lvis):
    path = write_lvis({i + 1: f"c{i}" for i in range(3)}, [(1, 1), (1, 1), (2, 1), (3, 2)])
    cfg = tiny_cfg(
        *("MODEL.ROI_BOX_PREDICTOR.NAME", "FastRCNNOutputLayers"),
        *("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True, "MODEL.ROI_BOX_HEAD.USE_FED_LOSS", True),
        *("DATASETS.TRAIN", (register("federated", path),), "MODEL.ROI_HEADS.NUM_CLASSES", 3),
        *("MODEL.LONG_TAIL.CLASS_COUNTS_FILE", "", "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES", 2),
    )
    predictor = build_box_predictor(cfg, SHAPE)
    torch.testing.assert_close(predictor.fed_loss_cls_weights, torch.tensor([2.0, 1.0, 0.0]).sqrt())
    with EventStorage(1):
        losses = predictor.losses(predictor(torch.randn(3, FEATURES)), rois([0, 1, 3]))
    assert losses["loss_cls"].isfinite()
