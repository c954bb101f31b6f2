"""Errors of configs and files, told before anything expensive starts."""

import argparse
import math

import pytest
import torch

from bags_d2 import ConfigError, MissingFileError
from bags_d2.engine import check_files, process_count, setup_cfg


@pytest.fixture
def setup(tmp_path):
    """``setup(text, *opts)``: the config of a YAML of this text."""

    def make(text, *opts):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return setup_cfg(argparse.Namespace(config_file=str(path), opts=list(opts)))

    return make


def test_a_config_is_merged_frozen_and_has_our_keys(setup):
    cfg = setup(
        "MODEL:\n  BAGS:\n    OTHERS_SAMPLE_RATIO: .inf\n    GROUP_THRESHOLDS: [5, 50]\n",
        *("MODEL.ROI_HEADS.NUM_CLASSES", "12"),
        *("MODEL.TRAINABLE_PARAMS", "('a.*', 'b.*')"),
    )
    assert cfg.is_frozen()
    assert math.isinf(cfg.MODEL.BAGS.OTHERS_SAMPLE_RATIO)
    assert tuple(cfg.MODEL.BAGS.GROUP_THRESHOLDS) == (5, 50)
    assert cfg.MODEL.LONG_TAIL.COUNT_BY == "instances"
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 12
    assert cfg.MODEL.TRAINABLE_PARAMS == ("a.*", "b.*")


def test_options_may_be_absent(setup, tmp_path):
    (tmp_path / "empty.yaml").write_text("SEED: 4\n")
    args = argparse.Namespace(config_file=str(tmp_path / "empty.yaml"), opts=None)
    assert setup_cfg(args).SEED == 4


def test_a_missing_config_is_named():
    with pytest.raises(MissingFileError, match=r"'gone\.yaml' does not exist"):
        setup_cfg(argparse.Namespace(config_file="gone.yaml", opts=[]))


def test_no_config_is_an_error_that_shows_the_option():
    with pytest.raises(ConfigError, match="--config-file configs/"):
        setup_cfg(argparse.Namespace(config_file="", opts=[]))


@pytest.mark.parametrize(
    ("text", "opts", "message"),
    [
        ("MODEL:\n  BAGS:\n    BETA: 8.0\n", [], "BETA"),
        ("SEED: 1\n", ["MODEL.BAGS.BETA", "8.0"], "BETA"),
        ("MODEL:\n  BAGS:\n    OTHERS_SAMPLE_RATIO: 8\n", [], "OTHERS_SAMPLE_RATIO"),
        ("SEED: 1\n", ["MODEL.BAGS.OTHERS_SAMPLE_RATIO", "8"], "OTHERS_SAMPLE_RATIO"),
        ("SEED: 1\n", ["MODEL.LONG_TAIL.COUNT_BY"], "COUNT_BY"),
        ("MODEL: [1, 2\n", [], r"config\.yaml"),
        ("MODEL:\n\t- 1\n", [], r"config\.yaml"),
        ("- 1\n- 2\n", [], r"config\.yaml"),
        ("", [], r"config\.yaml"),
    ],
    ids=[
        "unknown key",
        "unknown option",
        "whole number for a float",
        "option of the wrong type",
        "option without value",
        "no YAML",
        "tab",
        "a list",
        "empty",
    ],
)
def test_a_faulty_config_is_named(setup, text, opts, message):
    with pytest.raises(ConfigError, match=message) as caught:
        setup(text, *opts)
    assert "config.yaml" in str(caught.value)


def test_a_missing_base_is_named(setup):
    with pytest.raises((ConfigError, MissingFileError), match=r"Base-gone\.yaml"):
        setup("_BASE_: Base-gone.yaml\n")


# Data sets and checkpoints


@pytest.fixture
def cfg_of(tiny_cfg, register, write_lvis, tmp_path):
    """``cfg_of(*opts)``: a config whose data sets exist: setup_train and setup_val."""
    path = write_lvis({1: "a"}, [(1, 1)])
    register("setup_train", path, str(tmp_path))
    register("setup_val", path, str(tmp_path))

    def make(*opts):
        return tiny_cfg(
            *("DATASETS.TRAIN", ("setup_train",), "DATASETS.TEST", ("setup_val",)),
            *("MODEL.ROI_HEADS.NUM_CLASSES", 1, "OUTPUT_DIR", str(tmp_path / "output"), *opts),
        )

    return make


@pytest.mark.parametrize("eval_only", [False, True])
def test_files_that_exist_pass(cfg_of, tmp_path, eval_only):
    weights = tmp_path / "model.pth"
    torch.save({}, weights)
    for value in ("", str(weights), "https://host/model.pkl", "detectron2://R-50.pkl"):
        assert check_files(cfg_of("MODEL.WEIGHTS", value), eval_only=eval_only) is None


def test_training_needs_a_training_set_and_evaluation_does_not(cfg_of):
    with pytest.raises(ConfigError, match=r"DATASETS\.TRAIN is empty"):
        check_files(cfg_of("DATASETS.TRAIN", ()))
    check_files(cfg_of("DATASETS.TRAIN", ()), eval_only=True)
    check_files(cfg_of("DATASETS.TRAIN", ("never_registered",)), eval_only=True)


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_an_unregistered_data_set_is_named(cfg_of, key):
    cfg = cfg_of(f"DATASETS.{key}", ("never_registered",))
    with pytest.raises(ConfigError, match=r"'never_registered'.*not registered"):
        check_files(cfg)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("lvis_missing_train", r"https://www\.lvisdataset\.org"),
        ("coco_missing_train", r"https://cocodataset\.org"),
        ("birds_train", "correct the path"),
    ],
)
@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_missing_annotations_are_named_with_their_source(cfg_of, register, name, remedy, key):
    register(name, "gone/annotations.json")
    with pytest.raises(MissingFileError, match=rf"'gone/annotations\.json'.*'{name}'.*{remedy}"):
        check_files(cfg_of(f"DATASETS.{key}", (name,)))


def test_missing_glyphs_are_named_with_the_command_that_builds_them(cfg_of, register):
    register("glyphs_absent_train", "gone/annotations.json")
    with pytest.raises(MissingFileError, match=r"bags-d2 prepare glyphs glyphs_absent'"):
        check_files(cfg_of("DATASETS.TRAIN", ("glyphs_absent_train",)))


def test_missing_images_are_named(cfg_of, register, write_lvis):
    register("birds_train", write_lvis({1: "a"}, [(1, 1)]), "gone/images")
    with pytest.raises(MissingFileError, match=r"'gone/images' of data set 'birds_train'"):
        check_files(cfg_of("DATASETS.TRAIN", ("birds_train",)))


def test_a_missing_stage_1_checkpoint_comes_with_the_command_that_makes_it(
    cfg_of, request, monkeypatch
):
    monkeypatch.chdir(request.config.rootpath)
    cfg = cfg_of("MODEL.WEIGHTS", "output/lvis_baseline_R50/model_final.pth")
    with pytest.raises(
        MissingFileError,
        match=r"'output/lvis_baseline_R50/model_final\.pth' \(MODEL\.WEIGHTS\) does not exist; "
        r"train stage 1 first: bags-d2 train --config-file configs/lvis_baseline_R50\.yaml",
    ):
        check_files(cfg)


@pytest.mark.parametrize("weights", ["gone.pth", "output/no_such_config/model_final.pth"])
def test_another_missing_checkpoint_is_named(cfg_of, weights):
    for eval_only in (False, True):
        with pytest.raises(
            MissingFileError, match=f"'{weights}'.* does not exist; correct the path"
        ):
            check_files(cfg_of("MODEL.WEIGHTS", weights), eval_only=eval_only)


def test_a_path_with_a_query_is_that_of_its_file(cfg_of, tmp_path):
    weights = tmp_path / "model.pth"
    torch.save({}, weights)
    check_files(cfg_of("MODEL.WEIGHTS", f"{weights}?matching_heuristics=True"))
    with pytest.raises(MissingFileError, match="gone"):
        check_files(cfg_of("MODEL.WEIGHTS", "gone.pth?matching_heuristics=True"))


def test_resuming_needs_no_initial_checkpoint(cfg_of, tmp_path):
    cfg = cfg_of("MODEL.WEIGHTS", "gone.pth", "OUTPUT_DIR", str(tmp_path))
    with pytest.raises(MissingFileError):
        check_files(cfg, resume=True)
    (tmp_path / "last_checkpoint").write_text("model_0000999.pth")
    check_files(cfg, resume=True)
    with pytest.raises(MissingFileError):
        check_files(cfg)


def test_processes_share_a_batch_evenly(cfg_of):
    for count in (1, 2, 4):
        check_files(cfg_of("SOLVER.IMS_PER_BATCH", 4), num_processes=count)
    with pytest.raises(ConfigError, match="4, which 3 processes"):
        check_files(cfg_of("SOLVER.IMS_PER_BATCH", 4), num_processes=3)
    check_files(cfg_of("SOLVER.IMS_PER_BATCH", 4), eval_only=True, num_processes=3)


def test_processes_are_counted_over_machines_and_as_torchrun_says(monkeypatch):
    args = argparse.Namespace(num_gpus=4, num_machines=2)
    assert process_count(args) == 8
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert process_count(args) == 6


def test_a_method_is_laid_under_the_command_line(tmp_path):
    path = tmp_path / "detector.yaml"
    path.write_text("SOLVER: {MAX_ITER: 100, STEPS: [80, 90]}\nSTAGE2: {MAX_ITER: 50}\n")
    opts = ["SOLVER.SCHEDULE_FACTOR", "0.1", "OUTPUT_DIR", "here"]
    cfg = setup_cfg(argparse.Namespace(config_file=str(path), method="baseline_2x", opts=opts))
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (20, (16, 18))
    assert (cfg.SOLVER.SCHEDULE_FACTOR, cfg.OUTPUT_DIR) == (1.0, "here")
    opts = ["SOLVER.MAX_ITER", "7"]
    cfg = setup_cfg(argparse.Namespace(config_file=str(path), method="baseline_2x", opts=opts))
    assert cfg.SOLVER.MAX_ITER == 7
    with pytest.raises(
        ConfigError, match=r"STAGE2\.\* has no effect on the command line; set MODEL"
    ):
        setup_cfg(argparse.Namespace(config_file=str(path), opts=["STAGE2.MAX_ITER", "5"]))


def test_stage_2_without_its_stage_1_says_so(cfg_of):
    opts = ("MODEL.WEIGHTS", "output/mine/model_final.pth")
    with pytest.raises(MissingFileError, match="does not exist; correct the path"):
        check_files(cfg_of(*opts))
    cfg = cfg_of(*opts)
    cfg.STAGE2.ENABLED = True
    with pytest.raises(MissingFileError, match=r"train stage 1 first \(the baseline's config"):
        check_files(cfg)
    cfg.MODEL.WEIGHTS = "output/lvis_seesaw_R50/model_final.pth"
    command = r"--config-file configs/lvis_baseline_R50\.yaml --method seesaw --num-gpus 8"
    with pytest.raises(MissingFileError, match=command):
        check_files(cfg)


def test_repeat_factors_of_nothing_are_refused(cfg_of):
    opts = ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler")
    check_files(cfg_of(*opts))
    opts += ("DATALOADER.REPEAT_THRESHOLD", 0.0)
    with pytest.raises(ConfigError, match=r"REPEAT_THRESHOLD is 0.*LVIS: 0\.001"):
        check_files(cfg_of(*opts))
