"""Choice of the parameters that train, and frozen normalisation."""

import copy

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from bags_d2 import ConfigError
from bags_d2.engine import select_trainable_params
from bags_d2.engine.freezing import freeze_norm_statistics


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.plain = nn.BatchNorm2d(4, affine=False)
        self.score = nn.Linear(4, 2)

    def forward(self, x):
        return self.score(self.plain(self.head(self.trunk(x))).mean(dim=(2, 3)))


def _trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        (["score.*"], {"score.weight", "score.bias"}),
        (("score.weight",), {"score.weight"}),
        (["*.bias"], {"trunk.0.bias", "trunk.1.bias", "head.0.bias", "head.1.bias", "score.bias"}),
        (["head.[01].weight", "score.?ias"], {"head.0.weight", "head.1.weight", "score.bias"}),
        (["score*", "score.weight"], {"score.weight", "score.bias"}),
    ],
)
def test_globs_choose_what_trains(globs, expected):
    model = _Net()
    names = select_trainable_params(model, globs)
    assert set(names) == _trainable(model) == expected
    assert len(names) == len(set(names))
    assert names == [name for name, _ in model.named_parameters() if name in expected]


def test_no_globs_leave_the_model_alone():
    model = _Net()
    model.trunk[0].weight.requires_grad_(False)
    names = select_trainable_params(model, ())
    assert "trunk.0.weight" not in names
    assert set(names) == _trainable(model)
    assert len(names) == len(list(model.parameters())) - 1


def test_what_the_model_has_frozen_stays_frozen():
    model = _Net()
    model.trunk[0].weight.requires_grad_(False)
    assert select_trainable_params(model, ["trunk.0.*"]) == ["trunk.0.bias"]
    assert _trainable(model) == {"trunk.0.bias"}


@pytest.mark.parametrize("globs", [["scores.*"], ["score.*", "scores.*"], ["SCORE.*", "scores.*"]])
def test_a_glob_without_a_match_is_named_and_nothing_is_frozen(globs):
    model = _Net()
    before = _trainable(model)
    with pytest.raises(ConfigError, match=r"TRAINABLE_PARAMS: '(scores|SCORE)\.\*' matches no"):
        select_trainable_params(model, globs)
    assert _trainable(model) == before


def test_a_glob_of_frozen_parameters_alone_is_an_error():
    model = _Net()
    for parameter in model.trunk.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"'trunk\.\*' matches no trainable parameter"):
        select_trainable_params(model, ["trunk.*"])


def test_the_choice_is_logged_with_its_size(log_lines):
    lines = log_lines("bags_d2.engine.freezing")
    model = _Net()
    total = sum(p.numel() for p in model.parameters())
    select_trainable_params(model, ["score.*"])
    assert len(lines) == 1
    assert f"Training 10 of {total} parameters" in lines[0]
    assert "score.weight (8), score.bias (2)" in lines[0]


def test_gradients_reach_the_chosen_alone():
    model = _Net()
    select_trainable_params(model, ["score.*"])
    model(torch.randn(4, 3, 5, 5)).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == _trainable(model)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            [],
            ["roi_heads.box_predictor.cls_score.weight", "roi_heads.box_predictor.cls_score.bias"],
        ),
        (
            [
                *("MODEL.ROI_HEADS.NAME", "LongTailCascadeROIHeads"),
                *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
            ],
            [
                f"roi_heads.box_predictor.{i}.cls_score.{kind}"
                for i in range(3)
                for kind in ("weight", "bias")
            ],
        ),
    ],
    ids=["faster", "cascade"],
)
def test_one_glob_chooses_the_classifier_of_every_detector(tiny_cfg, options, expected):
    model = build_model(tiny_cfg(*options))
    assert select_trainable_params(model, ["roi_heads.box_predictor*cls_score.*"]) == expected


# Normalisation


def _with_statistics(model):
    """Statistics other than the initial ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model


def test_frozen_layers_keep_their_statistics_in_training():
    torch.manual_seed(0)
    model = _with_statistics(_Net())
    select_trainable_params(model, ["head.*", "score.*"])
    freeze_norm_statistics(model)
    before = copy.deepcopy(model.state_dict())
    model.train()
    model(3 + torch.randn(8, 3, 5, 5))
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        "head.1.running_mean",
        "head.1.running_var",
        "head.1.num_batches_tracked",
    }
    assert isinstance(model.trunk[1], FrozenBatchNorm2d)
    assert isinstance(model.plain, FrozenBatchNorm2d)
    assert isinstance(model.head[1], nn.BatchNorm2d)


def test_a_layer_with_one_trainable_parameter_goes_on_learning():
    model = _Net()
    select_trainable_params(model, ["trunk.1.bias"])
    freeze_norm_statistics(model)
    assert isinstance(model.trunk[1], nn.BatchNorm2d)
    assert isinstance(model.head[1], FrozenBatchNorm2d)


def test_freezing_changes_neither_outputs_nor_checkpoint_names():
    torch.manual_seed(0)
    model = _with_statistics(_Net()).eval()
    frozen = copy.deepcopy(model)
    select_trainable_params(frozen, ["score.*"])
    freeze_norm_statistics(frozen)
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(frozen(x), model(x))
    torch.testing.assert_close(frozen.train()(x), model(x))
    missing, unexpected = frozen.load_state_dict(model.state_dict(), strict=False)
    # A layer without weights gets neutral ones, which Detectron2's frozen layer always has.
    assert missing == ["plain.weight", "plain.bias"]
    assert (frozen.plain.weight == 1).all()
    assert (frozen.plain.bias == 0).all()
    assert all(name.endswith("num_batches_tracked") for name in unexpected)


def test_every_norm_of_a_detector_is_frozen(tiny_cfg, make_batch):
    torch.manual_seed(0)
    model = build_model(tiny_cfg())
    select_trainable_params(model, ["roi_heads.box_predictor.cls_score.*"])
    freeze_norm_statistics(model)
    before = copy.deepcopy(model.state_dict())
    model.train()
    with EventStorage():
        sum(model(make_batch()).values()).backward()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
