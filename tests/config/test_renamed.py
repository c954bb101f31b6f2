"""Keys of MODEL.LONG_TAIL under their former names in MODEL.BAGS."""

import argparse

import pytest
from detectron2.config import get_cfg

from bags_d2 import BAGSTrainer, ConfigError, add_bags_config
from bags_d2.config import current_name, former_names, long_tail
from bags_d2.engine import setup_cfg

CONFLICT = (
    r"MODEL\.BAGS\.COUNT_BY is 'images' but MODEL\.LONG_TAIL\.COUNT_BY, its name now, is '.*'; set "
    r"the latter alone"
)


@pytest.fixture
def setup(tmp_path):
    def run(text, *opts):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return setup_cfg(argparse.Namespace(config_file=str(path), opts=list(opts)))

    return run


@pytest.mark.parametrize("name", former_names())
def test_a_former_name_is_the_current_one_in_files_commands_and_programs(setup, name):
    key = name.rpartition(".")[2]
    assert current_name(name) == f"MODEL.LONG_TAIL.{key}"
    in_file = setup(f"MODEL:\n  BAGS:\n    {key}: other\n")
    in_command = setup("SEED: 1\n", name, "other")
    in_program = get_cfg()
    add_bags_config(in_program)
    in_program.merge_from_list([name, "other"])
    for cfg in (in_file, in_command, in_program):
        assert long_tail(cfg)[key] == "other"
    for cfg in (in_file, in_command):
        assert cfg.MODEL.LONG_TAIL[key] == "other"
        assert cfg.MODEL.BAGS[key] == ""


def test_the_command_line_takes_precedence_whatever_the_names(setup):
    for in_file in ("LONG_TAIL", "BAGS"):
        for in_command in ("LONG_TAIL", "BAGS"):
            text = f"MODEL:\n  {in_file}:\n    COUNT_BY: images\n"
            cfg = setup(text, f"MODEL.{in_command}.COUNT_BY", "instances")
            assert long_tail(cfg).COUNT_BY == "instances"


def test_a_later_file_takes_precedence_whatever_the_names(setup, tmp_path):
    (tmp_path / "base.yaml").write_text("MODEL: {LONG_TAIL: {COUNT_BY: images}}\n")
    cfg = setup("_BASE_: base.yaml\nMODEL: {BAGS: {COUNT_BY: instances}}\n")
    assert long_tail(cfg).COUNT_BY == "instances"


def test_two_values_for_one_key_are_refused(setup, tiny_cfg):
    with pytest.raises(ConfigError, match=CONFLICT):
        setup("MODEL: {BAGS: {COUNT_BY: images}, LONG_TAIL: {COUNT_BY: instances}}\n")
    names = ("MODEL.BAGS.COUNT_BY", "images", "MODEL.LONG_TAIL.COUNT_BY")
    with pytest.raises(ConfigError, match=CONFLICT):
        setup("SEED: 1\n", *names, "instances")
    assert setup("SEED: 1\n", *names, "images").MODEL.LONG_TAIL.COUNT_BY == "images"
    with pytest.raises(ConfigError, match=CONFLICT):
        long_tail(tiny_cfg(*names, "pixels"))


def test_a_trainer_reads_what_a_program_set_under_a_former_name(tiny_cfg):
    counts = tiny_cfg().MODEL.LONG_TAIL.CLASS_COUNTS_FILE
    cfg = tiny_cfg("MODEL.LONG_TAIL.CLASS_COUNTS_FILE", "")
    cfg.MODEL.BAGS.CLASS_COUNTS_FILE = counts
    cfg.MODEL.ROI_BOX_PREDICTOR.NAME = "BAGSOutputLayers"
    groups = BAGSTrainer.build_model(cfg).roi_heads.box_predictor.groups
    assert groups.class_counts.tolist() == [3, 12, 150, 2000, 7, 40]
