"""Reading configs: bases, older versions, and that Detectron2 reads the same from them."""

import math
from pathlib import Path

import pytest
from detectron2.config import get_cfg

from bags_d2 import ConfigError, MissingFileError, add_bags_config
from bags_d2.config import merge_config_file, read_config_file, scale_schedule

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml"))[::8], ids=lambda p: p.stem)
def test_files_are_merged_as_detectron2_merges_them(path):
    theirs = get_cfg()
    add_bags_config(theirs)
    theirs.merge_from_file(str(path))
    scale_schedule(theirs)
    ours = get_cfg()
    add_bags_config(ours)
    merge_config_file(ours, path)
    if theirs.OUTPUT_DIR == get_cfg().OUTPUT_DIR:
        theirs.OUTPUT_DIR = f"output/{path.stem}"
    assert ours == theirs
    assert "!!" not in ours.dump(), "what a run writes of its config is data"


def test_files_of_detectron2s_first_version_are_upgraded(tmp_path):
    (tmp_path / "old.yaml").write_text("VERSION: 1\nTEST:\n  DETECTIONS_PER_IMG: 77\n")
    cfg = get_cfg()
    add_bags_config(cfg)
    merge_config_file(cfg, tmp_path / "old.yaml")
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 77
    assert cfg.VERSION == 2


def test_of_several_bases_later_ones_take_precedence_and_the_file_over_all(tmp_path):
    (tmp_path / "a.yaml").write_text("SEED: 1\nMODEL: {DEVICE: a, MASK_ON: true, WEIGHTS: a}\n")
    (tmp_path / "b.yaml").write_text("MODEL: {DEVICE: b, WEIGHTS: b}\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.yaml").write_text(
        f"_BASE_: [../a.yaml, {tmp_path}/b.yaml]\nMODEL: {{WEIGHTS: c}}\n"
    )
    expected = {"SEED": 1, "MODEL": {"DEVICE": "b", "MASK_ON": True, "WEIGHTS": "c"}}
    expected["OUTPUT_DIR"] = "output/c"
    assert read_config_file(tmp_path / "sub" / "c.yaml") == expected


def test_one_base_may_be_reached_in_two_ways(tmp_path):
    (tmp_path / "a.yaml").write_text("SEED: 1\n")
    (tmp_path / "b.yaml").write_text("_BASE_: a.yaml\n")
    (tmp_path / "c.yaml").write_text("_BASE_: [a.yaml, b.yaml]\n")
    assert read_config_file(tmp_path / "c.yaml") == {"SEED": 1, "OUTPUT_DIR": "output/c"}


def test_bases_from_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("SEED: 1\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.yaml").write_text("_BASE_: ~/a.yaml\n")
    content = read_config_file(tmp_path / "sub" / "b.yaml")
    assert content == {"SEED": 1, "OUTPUT_DIR": "output/b"}


def test_keys_below_a_value_of_the_base_are_an_error(tmp_path):
    (tmp_path / "a.yaml").write_text("MODEL: 1\n")
    (tmp_path / "b.yaml").write_text("_BASE_: a.yaml\nMODEL: {DEVICE: cpu}\n")
    with pytest.raises(ConfigError, match=r"b\.yaml' has keys below 'MODEL', which is a value"):
        read_config_file(tmp_path / "b.yaml")


def test_a_method_that_is_built_on_itself_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("bags_d2.config.files.CONFIGS", tmp_path)
    (tmp_path / "methods").mkdir()
    (tmp_path / "my_baseline.yaml").write_text("SEED: 1\n")
    (tmp_path / "methods" / "x.yaml").write_text("_BASE_: ../my_x.yaml\n")  # which has no file
    with pytest.raises(ConfigError, match=r"x\.yaml' is its own _BASE_"):
        read_config_file(tmp_path / "my_baseline.yaml", "x")


def test_methods_are_laid_over_each_other_from_left_to_right():
    baseline = CONFIGS / "lvis_baseline_R50.yaml"
    content = read_config_file(baseline, "crt+cosine+SOLVER.BASE_LR=0.5")
    assert content["DATALOADER"]["SAMPLER_TRAIN"] == "ClassBalancedTrainingSampler"
    assert content["MODEL"]["ROI_BOX_PREDICTOR"]["NORMALIZED"] is True
    assert content["SOLVER"]["BASE_LR"] == 0.5
    assert content["OUTPUT_DIR"] == "output/lvis_crt+cosine+SOLVER.BASE_LR=0.5_R50"
    # A method of several is one of stage 2 if any of them is.
    assert content["MODEL"]["WEIGHTS"] == "output/lvis_baseline_R50/model_final.pth"
    later = read_config_file(baseline, "crt+DATALOADER.SAMPLER_TRAIN=TrainingSampler")
    assert later["DATALOADER"]["SAMPLER_TRAIN"] == "TrainingSampler"
    groups = read_config_file(baseline, "bags+MODEL.BAGS.GROUP_THRESHOLDS=[5, 50]")
    assert groups["MODEL"]["BAGS"]["GROUP_THRESHOLDS"] == [5, 50]


@pytest.mark.parametrize(
    ("former", "ratio"), [("beta8", 8.0), ("beta0.5", 0.5), ("beta0", 0.0), ("beta_all", math.inf)]
)
def test_former_names_of_beta_still_work(former, ratio):
    content = read_config_file(CONFIGS / "lvis_baseline_R50.yaml", f"bags_{former}")
    assert content["MODEL"]["BAGS"]["OTHERS_SAMPLE_RATIO"] == ratio
    assert isinstance(content["MODEL"]["BAGS"]["OTHERS_SAMPLE_RATIO"], float)


@pytest.mark.parametrize("method", ["crt+nothing", "+crt", "crt+", "nothing+SOLVER.BASE_LR=1.0"])
def test_a_part_that_is_no_method_is_an_error(method):
    with pytest.raises(MissingFileError, match="There is no method"):
        read_config_file(CONFIGS / "lvis_baseline_R50.yaml", method)


def test_a_value_that_is_no_yaml_is_an_error():
    with pytest.raises(ConfigError, match="value of 'SEED=\\[1' cannot be read"):
        read_config_file(CONFIGS / "lvis_baseline_R50.yaml", "crt+SEED=[1")
