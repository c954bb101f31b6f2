"""Configs and checkpoints by name."""

from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode

from bags_d2 import BAGSOutputLayers, MissingFileError, model_zoo
from bags_d2.checkpoint.files import read_model_weights

ROOT = Path(__file__).resolve().parents[2]


def test_every_config_of_the_source_tree_is_in_the_zoo():
    names = model_zoo.list_configs()
    assert "lvis_bags_R50.yaml" in names
    files = {p.relative_to(ROOT / "configs") for p in (ROOT / "configs").rglob("*.yaml")}
    expected = {
        p.as_posix()
        for p in files
        if "Base-" not in p.name and p.parent.name not in ("methods", "ablations")
    }
    assert expected == {n for n in names if n.endswith(".yaml")}
    for name in names:
        assert Path(model_zoo.get_config_file(name)).samefile(ROOT / "configs" / name)


def test_names_without_a_file_stand_for_a_baseline_with_a_method():
    for name, predictor in (
        ("lvis_seesaw_R50.yaml", "SeesawOutputLayers"),
        ("ablations/lvis_bags_beta0_R50.yaml", "BAGSOutputLayers"),
        ("lvis_v0.5_bags_R50.yaml", "BAGSOutputLayers"),
    ):
        assert model_zoo.get_config(name).MODEL.ROI_BOX_PREDICTOR.NAME == predictor
        assert model_zoo.get_config_file(name).endswith(name)
    moved = model_zoo.get_config_file("lvis_v0.5_baseline_R50.yaml")
    assert Path(moved).samefile(ROOT / "configs" / "lvis_v0.5" / "lvis_v0.5_baseline_R50.yaml")


def test_a_config_is_read_with_its_bases(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = model_zoo.get_config("lvis_bags_R50.yaml")
    assert isinstance(cfg, CfgNode)
    assert cfg.MODEL.ROI_BOX_PREDICTOR.NAME == "BAGSOutputLayers"
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 1203
    cfg.MODEL.DEVICE = "cpu"  # not frozen, as Detectron2's are not


@pytest.mark.parametrize("name", ["glyphs_baseline.yaml", "glyphs_bags.yaml"])
def test_carried_checkpoints_load_anywhere(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = model_zoo.get(name, trained=True)
    assert model.training
    assert model.device.type == "cpu"
    weights = read_model_weights(model_zoo.get_checkpoint(name))
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    assert isinstance(model.roi_heads.box_predictor, BAGSOutputLayers) == ("bags" in name)


def test_an_untrained_model_has_the_weights_that_training_starts_from(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    model = model_zoo.get("glyphs_softmax_retrained.yaml")
    baseline = read_model_weights(model_zoo.get_checkpoint("glyphs_baseline.yaml"))
    key = "roi_heads.box_head.fc1.weight"
    assert torch.equal(model.state_dict()[key], baseline[key])


def test_what_is_not_there_is_named():
    with pytest.raises(MissingFileError, match=r"'none\.yaml' is no config"):
        model_zoo.get_config_file("none.yaml")
    with pytest.raises(
        MissingFileError, match=r"no checkpoint of 'lvis_bags_R50\.yaml'.*glyphs_bags"
    ):
        model_zoo.get_checkpoint("lvis_bags_R50.yaml")
    with pytest.raises(MissingFileError, match="no checkpoint"):
        model_zoo.get("lvis_bags_R50.yaml", trained=True)
