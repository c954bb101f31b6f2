"""The whole way through train_net.py on a tiny data set: both stages, evaluation, resuming."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser, launch

from bags_d2 import BAGSTrainer, ConfigError, cli
from bags_d2.data import register_lvis_format
from bags_d2.engine import setup_cfg, training
from bags_d2.utils.files import FolderInUseError, lock_folder

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / "tests" / "tiny.yaml")
CASCADE = (
    "MODEL.ROI_HEADS.NAME",
    "LongTailCascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
    "True",
)
MASK = ("MODEL.MASK_ON", "True")
VARIANTS = {"faster": (), "mask": MASK, "cascade": CASCADE, "cascade_mask": (*CASCADE, *MASK)}
BAGS = (
    "MODEL.ROI_BOX_PREDICTOR.NAME",
    "BAGSOutputLayers",
    "MODEL.TRAINABLE_PARAMS",
    "('roi_heads.box_predictor*cls_score.*',)",
)


@pytest.fixture(scope="module")
def tiny(datasets_root):
    """Registers the tiny set under names of its own and gives the options that select it."""
    folder = datasets_root / "glyphs_tiny"
    names = ["train_net_train", "train_net_val"]
    for name, split in zip(names, ("train", "val"), strict=True):
        register_lvis_format(
            name, str(folder / "annotations" / f"glyphs_tiny_{split}.json"), str(folder)
        )
    yield ("DATASETS.TRAIN", f"('{names[0]}',)", "DATASETS.TEST", f"('{names[1]}',)")
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def messages(caplog):
    """Messages of this package and of Detectron2, whose loggers do not propagate once set up."""
    loggers = [logging.getLogger(name) for name in ("bags_d2", "detectron2", "fvcore")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records]
    for logger in loggers:
        logger.removeHandler(caplog.handler)


def run(*options, flags=()):
    args = default_argument_parser().parse_args(["--config-file", TINY, *flags, *options])
    return training.main(args)


def results_of(folder):
    return json.loads((Path(folder) / "inference" / "results.json").read_text())


def weights_of(folder, name="model_final.pth"):
    return torch.load(Path(folder) / name, weights_only=True)["model"]


@pytest.mark.parametrize(
    "variant",
    ["faster", *(pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS if v != "faster")],
)
def test_both_stages_train_and_evaluate(variant, tiny, tmp_path, messages):
    stage1, stage2 = str(tmp_path / "stage1"), str(tmp_path / "stage2")
    common = (*tiny, *VARIANTS[variant])
    run(*common, "OUTPUT_DIR", stage1, "DATASETS.TEST", "()")
    num_before = len(messages())
    run(*common, *BAGS, "OUTPUT_DIR", stage2, "MODEL.WEIGHTS", f"{stage1}/model_final.pth")

    # One line says what is new and that this is intended; nothing warns of it a second time.
    told = set(messages()[num_before:])
    assert sum("Newly initialised, as intended" in m for m in told) == 1
    assert not any("Skip loading" in m or "not found in the checkpoint" in m for m in told)

    before, after = weights_of(stage1), weights_of(stage2)
    new = {k for k in after if "cls_score" in k or ".groups." in k}
    assert any("cls_score.weight" in k for k in new)
    for name in after.keys() - new:
        assert torch.equal(after[name], before[name]), f"{name} is frozen but changed"

    results = results_of(stage2)
    assert set(results) == ({"bbox", "segm"} if "mask" in variant else {"bbox"})
    for measures in results.values():
        assert {"AP", "AP50", "APr", "APc", "APf", "AP1", "AP2", "AP3", "AP4", "bAP"} <= set(
            measures
        )
        assert measures["AP4"] is None, "no class of the tiny set has 1000 instances"
    assert list((Path(stage2) / "inference").glob("*/per_class_bbox.csv"))


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    folder, stage1 = (tmp_path_factory.mktemp(name) for name in ("trained", "stage1"))
    steps = ("SOLVER.MAX_ITER", "60", "SOLVER.STEPS", "(50,)", "DATASETS.TEST", "()")
    run(*tiny, "OUTPUT_DIR", str(stage1), *steps)
    run(
        *tiny,
        *BAGS,
        *("MODEL.WEIGHTS", f"{stage1}/model_final.pth", "OUTPUT_DIR", str(folder)),
        *("SOLVER.MAX_ITER", "20", "SOLVER.CHECKPOINT_PERIOD", "10"),
    )
    return folder


@pytest.fixture
def trained_bags(trained, tmp_path):
    """A copy of the folder of a trained BAGS."""
    return shutil.copytree(trained, tmp_path / "trained")


def test_eval_only_needs_no_training_annotations(trained_bags, tiny, tmp_path, datasets_root):
    val = tiny[3]
    register_lvis_format("tiny_absent_train", str(tmp_path / "absent.json"), str(tmp_path))
    try:
        results = run(
            *("DATASETS.TRAIN", "('tiny_absent_train',)", "DATASETS.TEST", val, *BAGS),
            *("MODEL.WEIGHTS", f"{trained_bags}/model_final.pth"),
            *("OUTPUT_DIR", str(tmp_path / "eval")),
            flags=["--eval-only"],
        )
    finally:
        DatasetCatalog.remove("tiny_absent_train")
        MetadataCatalog.remove("tiny_absent_train")
    expected = results_of(trained_bags)["bbox"]
    assert expected["AP50"] > 0, "the comparison needs a detector that detects"
    for name, value in expected.items():
        assert results["bbox"][name] == pytest.approx(value, abs=1e-6, nan_ok=True) or value is None


def test_evaluation_uses_the_groups_of_the_checkpoint(trained_bags, tiny, tmp_path, messages):
    counts = tmp_path / "counts.json"
    counts.write_text("[2000, 2000, 2000, 1, 1, 1]")
    options = (*tiny, *BAGS, "MODEL.WEIGHTS", f"{trained_bags}/model_final.pth")
    options += ("MODEL.LONG_TAIL.CLASS_COUNTS_FILE", str(counts), "OUTPUT_DIR", str(tmp_path / "e"))
    results = run(*options, flags=["--eval-only"])
    assert any("class groups of" in m and "its own are used" in m for m in messages())
    assert results["bbox"]["AP"] == pytest.approx(results_of(trained_bags)["bbox"]["AP"])
    with pytest.raises(ConfigError, match="groups the classes differently"):
        run(*options)


def test_resume_goes_on_from_the_last_checkpoint(trained_bags, tiny, tmp_path):
    (trained_bags / "last_checkpoint").write_text("model_0000009.pth")
    options = (*tiny, *BAGS, "OUTPUT_DIR", str(trained_bags), "SOLVER.MAX_ITER", "20")
    args = default_argument_parser().parse_args(["--config-file", TINY, *options])
    trainer = BAGSTrainer(setup_cfg(args))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 10
    restored = dict(trainer.model.state_dict())
    saved = weights_of(trained_bags, "model_0000009.pth")
    assert all(torch.equal(restored[k], v) for k, v in saved.items())
    momenta = [s["momentum_buffer"] for s in trainer.optimizer.state.values()]
    assert len(momenta) == 2
    assert all(m.abs().sum() > 0 for m in momenta)


def test_one_norm_of_all_gradients_is_clipped(tiny, tmp_path):
    options = (*tiny, "OUTPUT_DIR", str(tmp_path), "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.001")
    args = default_argument_parser().parse_args(["--config-file", TINY, *options])
    cfg = setup_cfg(args)
    model = BAGSTrainer.build_model(cfg)
    optimizer = BAGSTrainer.build_optimizer(cfg, model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    direction = parameters[0].grad.clone()
    optimizer.step()
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    assert norm == pytest.approx(0.001, rel=1e-3)
    cosine = torch.nn.functional.cosine_similarity(
        direction.flatten(), parameters[0].grad.flatten(), 0
    )
    assert cosine == pytest.approx(1, abs=1e-4)


def test_augmented_evaluation_reports_its_own_metrics(trained_bags, tiny, tmp_path):
    results = run(
        *(*tiny, *BAGS, "MODEL.WEIGHTS", f"{trained_bags}/model_final.pth"),
        *("OUTPUT_DIR", str(tmp_path / "tta"), "TEST.AUG.ENABLED", "True"),
        *("TEST.AUG.MIN_SIZES", "(96, 128)", "TEST.AUG.FLIP", "False"),
        flags=["--eval-only"],
    )
    assert results["bbox_TTA"]["AP50"] > 0
    assert results["bbox_TTA"] != results["bbox"]


def _train_and_save(options, folder):
    torch.set_num_threads(1)
    args = default_argument_parser().parse_args(["--config-file", TINY, *options])
    trainer = BAGSTrainer(setup_cfg(args))
    start = {k: v.clone() for k, v in trainer.model.module.state_dict().items()}
    trainer.train()
    rank = torch.distributed.get_rank()
    torch.save({"start": start, "end": trainer.model.module.state_dict()}, f"{folder}/{rank}.pth")


@pytest.mark.slow
def test_two_processes_end_with_equal_parameters(datasets_root, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets_root))
    options = (
        *BAGS[:2],
        "OUTPUT_DIR",
        str(tmp_path),
        "SOLVER.MAX_ITER",
        "3",
        "SOLVER.STEPS",
        "(2,)",
    )
    launch(_train_and_save, 2, dist_url="auto", args=(options, str(tmp_path)))
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1))
    trained = [k for k in first["end"] if "cls_score" in k or "fpn_output2.weight" in k]
    assert trained
    for name in trained:
        assert not torch.equal(first["start"][name], first["end"][name]), f"{name} did not train"
    # Running statistics of BatchNorm are each process's own, as in Detectron2.
    parameters = [k for k in first["end"] if "running_" not in k and "num_batches" not in k]
    for name in parameters:
        assert torch.equal(first["end"][name], second["end"][name]), name


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--config-file", "configs/lvis_bags_R50.yaml"],
            ["lvis_v1_train.json", "https://www.lvisdataset.org/dataset"],
        ),
        (["--config-file", "configs/absent.yaml"], ["configs/absent.yaml", "does not exist"]),
        (["--config-file", "configs/glyphs_bags.yaml", "MODEL.BAGS.NO_KEY", "1"], ["NO_KEY"]),
    ],
)
def test_a_mistake_ends_in_one_sentence(options, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without data sets
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *options])
    assert re.match("Error: [^\n]*$", ended.value.code)
    assert all(part in ended.value.code for part in expected), ended.value.code


def test_train_net_is_the_command_train():
    command = [sys.executable, "train_net.py", "--config-file", "configs/absent.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: 'configs/absent.yaml' does not exist")
    assert "Traceback" not in done.stderr


def test_two_trainings_in_one_folder(trained_bags, tiny):
    options = (*tiny, *BAGS, "OUTPUT_DIR", str(trained_bags))
    evaluate = (*options, "MODEL.WEIGHTS", f"{trained_bags}/model_final.pth")
    with lock_folder(trained_bags):
        holder = rf"trained' is in use by process {os.getpid()} "
        with pytest.raises(FolderInUseError, match=holder):
            run(*options, flags=["--resume"])
        # The checkpoints of a training may be evaluated while it goes on, by one process.
        assert run(*evaluate, flags=["--eval-only"])
        inference = lock_folder(trained_bags / "inference")
        with inference, pytest.raises(FolderInUseError, match=r"inference' is in use"):
            run(*evaluate, flags=["--eval-only"])
