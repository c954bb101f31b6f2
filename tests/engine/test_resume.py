"""What a resumed run takes from its config, and what from its checkpoint."""

import copy

import pytest
import torch
from detectron2.engine import default_argument_parser
from torch import nn

from bags_d2 import BagsError, BAGSTrainer, ConfigError, DataError
from bags_d2.engine import LongTailCheckpointer, setup_cfg, training

TINY = "tests/tiny.yaml"


@pytest.fixture
def arguments(tmp_path, datasets_root, register, request, monkeypatch):
    """``arguments(*options, flags=())``: of a run of four steps with a checkpoint at two."""
    monkeypatch.chdir(request.config.rootpath)
    root = datasets_root / "glyphs_tiny"
    train, val = (
        register(
            f"resume_{split}", str(root / "annotations" / f"glyphs_tiny_{split}.json"), str(root)
        )
        for split in ("train", "val")
    )

    def make(*options, flags=()):
        return default_argument_parser().parse_args(
            [
                *("--config-file", TINY, *flags),
                *("DATASETS.TRAIN", f"('{train}',)", "DATASETS.TEST", f"('{val}',)", "SEED", "1"),
                *("OUTPUT_DIR", str(tmp_path / "run"), "SOLVER.STEPS", "()"),
                *("SOLVER.CHECKPOINT_PERIOD", "2", *options),
            ]
        )

    return make


@pytest.fixture
def half_way(arguments, tmp_path):
    """A run whose last checkpoint is that after two of its four steps."""
    training.main(arguments("DATASETS.TEST", "()"))
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000001.pth")
    return arguments


def resumed(args):
    trainer = BAGSTrainer(setup_cfg(args))
    trainer.resume_or_load(resume=True)
    return trainer


def test_the_optimizers_settings_are_those_of_the_config(half_way, tmp_path):
    trainer = resumed(half_way())
    assert trainer.start_iter == 2
    checkpoint = torch.load(tmp_path / "run" / "model_0000001.pth", weights_only=True)
    saved = checkpoint["trainer"]["_trainer"]["optimizer"]
    groups = copy.deepcopy(trainer.optimizer.state_dict()["param_groups"])
    assert groups == saved["param_groups"], "unchanged settings go on bit for bit"

    trainer = resumed(
        half_way("SOLVER.BASE_LR", "0.002", "SOLVER.MOMENTUM", "0.5", "SOLVER.WEIGHT_DECAY", "0.3")
    )
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.002}
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {0.002}
    assert {group["momentum"] for group in trainer.optimizer.param_groups} == {0.5}
    assert 0.3 in {group["weight_decay"] for group in trainer.optimizer.param_groups}
    state = trainer.optimizer.state_dict()["state"]
    for key, value in saved["state"].items():
        assert torch.equal(state[key]["momentum_buffer"], value["momentum_buffer"])
    trainer.train()
    assert trainer.storage.history("lr").latest() == 0.002


def test_a_run_that_starts_anew_is_as_the_config_has_it(arguments):
    cfg = setup_cfg(arguments("SOLVER.WARMUP_ITERS", "2", "SOLVER.WARMUP_FACTOR", "0.1"))
    groups = copy.deepcopy(BAGSTrainer(cfg).optimizer.state_dict()["param_groups"])
    trainer = BAGSTrainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.optimizer.state_dict()["param_groups"] == groups


def test_changed_settings_are_told(half_way, log_lines):
    lines = log_lines("bags_d2.engine.setup")
    test = ("DATASETS.TEST", "()")
    training.main(half_way(*test, flags=["--resume"]))
    assert lines == []
    options = ("SOLVER.BASE_LR", "0.002", "MODEL.WEIGHTS", "other.pth")
    training.main(half_way(*test, *options, flags=["--resume"]))
    applied, ignored = lines
    assert "in effect from here on: SOLVER.BASE_LR (0.01 -> 0.002)" in applied
    assert "not in effect in a resumed run: MODEL.WEIGHTS (its last checkpoint" in ignored


def test_an_unreadable_record_of_the_settings_is_told(half_way, tmp_path, log_lines):
    lines = log_lines("bags_d2.engine.setup")
    (tmp_path / "run" / "config.yaml").write_text("SEED: !!python/name:os.system\n")
    training.main(half_way("DATASETS.TEST", "()", flags=["--resume"]))
    (line,) = lines
    assert "unknown" in line
    assert "config.yaml" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("MODEL.ROI_BOX_HEAD.FC_DIM", "48"), r"would be resumed, the first being .*OUTPUT_DIR"),
        (("MODEL.TRAINABLE_PARAMS", "('roi_heads.*',)"), r"state of another run .*without --res"),
    ],
)
def test_another_model_is_not_resumed(half_way, options, message):
    with pytest.raises(BagsError, match=message):
        resumed(half_way(*options))


def test_other_classes_are_not_resumed(tmp_path):
    LongTailCheckpointer(nn.Linear(3, 6), str(tmp_path)).save("model_0000001")
    with pytest.raises(ConfigError, match=r"shape \(6, 3\) in the checkpoint, \(8, 3\) in the mod"):
        LongTailCheckpointer(nn.Linear(3, 8), str(tmp_path)).resume_or_load("", resume=True)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"\0", b"gone.pth", b"..", b"/etc/passwd", b"../x.pth", b"a\nb"]
)
def test_a_damaged_tag_of_the_last_checkpoint(tmp_path, content):
    (tmp_path / "run").mkdir()
    torch.save({"w": torch.ones(1)}, tmp_path / "x.pth")
    (tmp_path / "run" / "last_checkpoint").write_bytes(content)
    checkpointer = LongTailCheckpointer(nn.Linear(1, 1), str(tmp_path / "run"))
    with pytest.raises(DataError, match=r"last_checkpoint' names no checkpoint of its folder"):
        checkpointer.resume_or_load("", resume=True)


def test_evaluation_reads_no_training_annotations(arguments, tmp_path, register):
    options = ("MODEL.ROI_BOX_PREDICTOR.NAME", "BAGSOutputLayers")
    training.main(arguments(*options))
    (tmp_path / "cut.json").write_text('{"images": [')
    cut = register("resume_cut_train", str(tmp_path / "cut.json"), str(tmp_path))
    results = training.main(
        arguments(
            *(*options, "DATASETS.TRAIN", f"('{cut}',)"),
            *("MODEL.WEIGHTS", f"{tmp_path}/run/model_final.pth"),
            flags=["--eval-only"],
        )
    )
    assert "bAP" in results["bbox"]


def test_a_checkpoints_record_of_classes_is_with_the_model(tmp_path):
    content = {"model": nn.Linear(1, 1).state_dict()}
    path = str(tmp_path / "x.pth")
    classes = {"names": ["a", "b"], "training_instances": [3, 4]}
    torch.save({**content, "classes": classes}, path)
    model = nn.Linear(1, 1)
    LongTailCheckpointer(model).load(path)
    assert model.class_statistics.names == ("a", "b")
    assert model.class_statistics.training_instances == (3, 4)
    torch.save({**content, "classes": {**classes, "names": ["a", "\udc80"]}}, path)
    with pytest.raises(DataError, match=r"x\.pth' has class names that cannot be printed"):
        LongTailCheckpointer(model).load(path)
