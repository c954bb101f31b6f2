"""Loading of checkpoints: what may be new, what must not be, and whose groups count."""

import copy
import json

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.catalog import ModelCatalog
from detectron2.modeling import build_model
from detectron2.utils.file_io import Detectron2Handler
from torch import nn

from bags_d2 import ClassGroups, ConfigError, MissingFileError
from bags_d2.engine import LongTailCheckpointer, select_trainable_params
from bags_d2.engine.freezing import freeze_norm_statistics

SOFTMAX = ["MODEL.ROI_BOX_PREDICTOR.NAME", "FastRCNNOutputLayers"]
BAGS = ["MODEL.ROI_BOX_PREDICTOR.NAME", "BAGSOutputLayers"]
CASCADE = [
    *("MODEL.ROI_HEADS.NAME", "LongTailCascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
]
CLASSIFIER = "roi_heads.box_predictor*cls_score.*"
PREDICTOR = "roi_heads.box_predictor"


@pytest.fixture
def build(tiny_cfg):
    """``build(*opts, seed, stage2)``: a detector, in stage 2 frozen but for its classifier."""

    def make(*opts, seed=0, stage2=False):
        torch.manual_seed(seed)
        model = build_model(tiny_cfg(*opts))
        if stage2:
            select_trainable_params(model, [CLASSIFIER])
            freeze_norm_statistics(model)
        return model

    return make


@pytest.fixture
def save(tmp_path):
    """``save(model, drop, prefix)``: path of its checkpoint, without the dropped names.

    With the prefix "module" it is a checkpoint of the model wrapped for parallel training.
    """

    def write(model, drop=(), prefix=""):
        state = nn.ModuleDict({prefix: model}).state_dict() if prefix else model.state_dict()
        for name in drop:
            del state[name]  # and the versions of the modules stay, as in any checkpoint
        path = tmp_path / "checkpoint.pth"
        torch.save({"model": state}, path)
        return str(path)

    return write


@pytest.fixture
def logs(log_lines):
    """Lines of every logger that has a say in loading, in one function."""
    lists = [
        log_lines(name)
        for name in (
            "fvcore.common.checkpoint",
            "detectron2.checkpoint.detection_checkpoint",
            "bags_d2.checkpoint.checkpointer",
            "bags_d2.modeling.class_groups",
        )
    ]
    return lambda: [line for lines in lists for line in lines]


def _warnings(lines):
    return [line for line in lines if not line.startswith("INFO")]


@pytest.mark.parametrize("detector", [[], CASCADE], ids=["faster", "cascade"])
def test_stage_2_starts_from_a_softmax_checkpoint_with_one_line(build, save, logs, detector):
    stage1 = build(*SOFTMAX, *detector, seed=1)
    model = build(*BAGS, *detector, seed=2, stage2=True)
    fresh = copy.deepcopy(model.state_dict())
    LongTailCheckpointer(model, stage2=True).load(save(stage1))
    told = [line for line in logs() if "Newly initialised" in line]
    assert len(told) == 1
    assert told[0].startswith("INFO")
    new = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(new) == (6 if detector else 2)
    for name, _ in model.named_parameters():
        assert (name in told[0]) == (name in new)
    assert _warnings(logs()) == []
    # Everything but the classifier is stage 1's, to the bit, running statistics included.
    state, before = model.state_dict(), stage1.state_dict()
    for name, tensor in state.items():
        if name in new or ".groups." in name:
            assert torch.equal(tensor, fresh[name])
        elif not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, before[name]), name


def test_a_checkpoint_of_the_same_model_loads_in_silence(build, save, logs):
    saved = build(*BAGS, seed=1)
    for options in ({"evaluating": True}, {"stage2": True}, {}):
        model = build(*BAGS, seed=2)
        LongTailCheckpointer(model, **options).load(save(saved))
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, saved.state_dict()[name])
    assert _warnings(logs()) == []
    assert not any("Newly" in line for line in logs())


@pytest.mark.parametrize(
    "lost",
    [
        "roi_heads.box_head.fc1.weight",
        "backbone.fpn_lateral2.weight",
        f"{PREDICTOR}.bbox_pred.bias",
    ],
)
@pytest.mark.parametrize("evaluating", [False, True])
def test_a_frozen_parameter_without_weights_is_an_error(build, save, lost, evaluating):
    path = save(build(*BAGS), drop=[lost])
    model = build(*BAGS, stage2=True)
    with pytest.raises(ConfigError, match=f"no weights for 1 parameters.*{lost}") as caught:
        LongTailCheckpointer(model, stage2=True, evaluating=evaluating).load(path)
    assert path in str(caught.value)
    assert "MODEL.WEIGHTS" in str(caught.value)


@pytest.mark.parametrize("kind", ["weight", "bias", "running_mean", "running_var"])
def test_a_frozen_norm_without_weights_or_statistics_is_an_error(build, save, kind):
    lost = f"backbone.fpn_lateral2.norm.{kind}"
    stage1 = build(*SOFTMAX)
    assert lost in stage1.state_dict()
    model = build(*BAGS, stage2=True)
    with pytest.raises(ConfigError, match=lost):
        LongTailCheckpointer(model, stage2=True).load(save(stage1, drop=[lost]))


@pytest.mark.parametrize(
    "lost", [f"{PREDICTOR}.cls_score.bias", "proposal_generator.rpn_head.conv.weight"]
)
def test_evaluation_wants_every_parameter(build, save, lost):
    path = save(build(*BAGS), drop=[lost])
    with pytest.raises(ConfigError, match=f"evaluated without training, the first being {lost}"):
        LongTailCheckpointer(build(*BAGS), evaluating=True).load(path)


def test_evaluating_a_softmax_checkpoint_with_groups_is_an_error(build, save):
    path = save(build(*SOFTMAX))
    with pytest.raises(
        ConfigError,
        match=r"2 parameters.*cls_score\.weight \(shape \(7, 32\) in the checkpoint, \(12, 32\)",
    ):
        LongTailCheckpointer(build(*BAGS), evaluating=True).load(path)


def test_stage_1_may_start_from_another_head_and_warns(build, save, logs, tmp_path):
    counts = tmp_path / "counts_of_9.json"
    counts.write_text(json.dumps([5] * 9))
    other = build(*SOFTMAX, *("MODEL.ROI_HEADS.NUM_CLASSES", 9))
    model = build(*SOFTMAX)
    LongTailCheckpointer(model).load(save(other))
    warned = " ".join(_warnings(logs()))
    assert f"Skip loading parameter '{PREDICTOR}.cls_score.weight'" in warned
    assert f"Skip loading parameter '{PREDICTOR}.bbox_pred.weight'" in warned


# Groups


@pytest.mark.parametrize("options", [{}, {"stage2": True}, {"evaluating": True}])
@pytest.mark.parametrize("prefix", ["", "module"], ids=["plain", "wrapped"])
def test_another_number_of_groups_is_an_error(build, save, options, prefix):
    path = save(build(*BAGS, *("MODEL.BAGS.GROUP_THRESHOLDS", (100,))), prefix=prefix)
    model = build(*BAGS)
    with pytest.raises(ConfigError, match=r"at \(100,\) and the model has \(10, 100, 1000\)"):
        LongTailCheckpointer(model, **options).load(path)


# Class 1 has 12 instances: 4 groups at these edges as well, but class 1 lies in another one.
OTHER_GROUPING = ["MODEL.BAGS.GROUP_THRESHOLDS", (20, 100, 1000)]


def test_training_with_another_grouping_is_an_error(build, save):
    path = save(build(*BAGS, *OTHER_GROUPING))
    with pytest.raises(ConfigError, match=r"groups the classes differently.*GROUP_THRESHOLDS"):
        LongTailCheckpointer(build(*BAGS), stage2=True).load(path)


@pytest.mark.parametrize("detector", [[], CASCADE], ids=["faster", "cascade"])
def test_evaluation_adopts_the_grouping_of_the_checkpoint_and_warns(
    build, save, logs, make_batch, detector
):
    saved = build(*BAGS, *OTHER_GROUPING, *detector, seed=1)
    model = build(*BAGS, *detector, seed=2)
    LongTailCheckpointer(model, evaluating=True).load(save(saved))
    warned = _warnings(logs())
    assert len(warned) == (3 if detector else 1)
    assert all("class groups of 1 of 6 classes differ" in line for line in warned)
    groups = [m for m in model.modules() if isinstance(m, ClassGroups)]
    assert all(g.class_to_group.tolist() == [1, 1, 3, 4, 1, 2] for g in groups)
    with torch.no_grad():
        found, expected = (m.eval()(make_batch(1))[0]["instances"] for m in (model, saved))
    assert len(found) > 0
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.pred_classes, expected.pred_classes)


def test_evaluation_needs_no_counts(build, save, logs, make_batch):
    saved = build(*BAGS, seed=1)
    path = save(saved)
    model = build(*BAGS, *("MODEL.LONG_TAIL.CLASS_COUNTS_FILE", "gone.json"), seed=2)
    LongTailCheckpointer(model, evaluating=True).load(path)
    assert _warnings(logs()) == []
    assert model.roi_heads.box_predictor.groups.class_counts.tolist() == [3, 12, 150, 2000, 7, 40]
    with torch.no_grad():
        found, expected = (m.eval()(make_batch(1))[0]["instances"] for m in (model, saved))
    assert torch.equal(found.scores, expected.scores)


def test_classes_of_another_number_keep_the_config_and_its_groups(build, save, tmp_path):
    counts = tmp_path / "counts_of_9.json"
    counts.write_text(json.dumps([5] * 9))
    other = build(
        *BAGS,
        *("MODEL.ROI_HEADS.NUM_CLASSES", 9),
        *("MODEL.LONG_TAIL.CLASS_COUNTS_FILE", str(counts)),
        *("MODEL.BAGS.GROUP_THRESHOLDS", (6, 60, 600)),
    )
    model = build(*BAGS)
    fresh = copy.deepcopy(model.roi_heads.box_predictor.groups.state_dict())
    LongTailCheckpointer(model).load(save(other))
    for name, tensor in model.roi_heads.box_predictor.groups.state_dict().items():
        assert torch.equal(tensor, fresh[name]), name


# A classifier that is drawn anew


@pytest.mark.parametrize("detector", [[], CASCADE], ids=["faster", "cascade"])
def test_a_new_classifier_replaces_that_of_stage_1_but_not_that_of_a_resumed_run(
    build, save, tmp_path, detector
):
    saved = build(*SOFTMAX, *detector, seed=1)
    model = build(*SOFTMAX, *detector, seed=2, stage2=True)
    fresh = copy.deepcopy(model.state_dict())
    run = str(tmp_path / "run")
    checkpointer = LongTailCheckpointer(model, run, stage2=True, new_classifier=True)
    checkpointer.resume_or_load(save(saved), resume=True)  # there is nothing to resume yet
    for name, tensor in saved.state_dict().items():
        is_new = PREDICTOR in name and ".cls_score." in name
        assert torch.equal(model.state_dict()[name], fresh[name] if is_new else tensor), name

    (tmp_path / "run").mkdir()
    checkpointer.save("model_0")
    resumed = build(*SOFTMAX, *detector, seed=3, stage2=True)
    checkpointer = LongTailCheckpointer(resumed, run, stage2=True, new_classifier=True)
    checkpointer.resume_or_load("gone.pth", resume=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


# Files


def test_a_missing_file_is_an_error_of_one_sentence(build):
    checkpointer = LongTailCheckpointer(nn.Linear(2, 2))
    with pytest.raises(MissingFileError, match=r"'gone/model\.pth' \(MODEL\.WEIGHTS\) does not"):
        checkpointer.load("gone/model.pth")


@pytest.mark.parametrize(
    ("path", "address", "reason"),
    [
        ("detectron2://a/b.pkl", "http://127.0.0.1:9/a/b.pkl", "refused"),
        ("http://127.0.0.1:9/b.pkl", "http://127.0.0.1:9/b.pkl", "refused"),
        (
            "catalog://ImageNetPretrained/MSRA/R-50",
            "http://127.0.0.1:9/ImageNetPretrained/MSRA/R-50.pkl",
            "refused",
        ),
        ("catalog://unknown", "catalog://unknown", "not present in the catalog"),
    ],
)
def test_weights_that_cannot_be_downloaded(path, address, reason, monkeypatch, tmp_path):
    """One sentence with the address and the key, where there is no network."""
    nowhere = "http://127.0.0.1:9"  # the port that discards
    monkeypatch.setattr(Detectron2Handler, "S3_DETECTRON2_PREFIX", f"{nowhere}/")
    monkeypatch.setattr(ModelCatalog, "S3_C2_DETECTRON_PREFIX", nowhere)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    with pytest.raises(MissingFileError) as error:
        LongTailCheckpointer(nn.Linear(1, 1)).load(path)
    text = str(error.value)
    assert text.startswith(f"'{path}' could not be downloaded (")
    assert reason in text
    assert text.endswith(
        f"; fetch {address} where there is a network, and set MODEL.WEIGHTS to that file."
    )
    assert "\n" not in text


def test_no_path_loads_nothing():
    model = nn.Linear(2, 2)
    before = copy.deepcopy(model.state_dict())
    assert LongTailCheckpointer(model, evaluating=True).load("") == {}
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_queries_of_a_path_are_detectron2s(build, save):
    saved = build(*SOFTMAX, seed=1)
    model = build(*SOFTMAX, seed=2)
    LongTailCheckpointer(model, evaluating=True).load(f"{save(saved)}?matching_heuristics=True")
    assert torch.equal(model.backbone.fpn_lateral2.weight, saved.backbone.fpn_lateral2.weight)


def test_a_checkpoint_resumes_with_what_was_saved_beside_the_model(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    LongTailCheckpointer(model, str(tmp_path), optimizer=optimizer).save("model_0", iteration=7)
    other = nn.Linear(2, 2)
    fresh = torch.optim.SGD(other.parameters(), lr=0.1)
    checkpointer = LongTailCheckpointer(other, str(tmp_path), optimizer=fresh)
    assert isinstance(checkpointer, DetectionCheckpointer)
    assert checkpointer.resume_or_load("gone.pth", resume=True) == {"iteration": 7}
    assert torch.equal(other.weight, model.weight)
    assert fresh.param_groups[0]["lr"] == 0.5
