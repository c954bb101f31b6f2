"""What an epoch of each sampler shows of the classes."""

import torch
from commands import run_command

from bags_d2.analysis.exposure import class_exposure

RECORDS = [
    {"annotations": [{"category_id": 0}, {"category_id": 0}, {"category_id": 1}]},
    {"annotations": [{"category_id": 1, "iscrowd": 1}]},
    {"annotations": [{"category_id": 2}]},
]


def test_exposure_counts_instances_as_often_as_their_image_is_drawn():
    exposure = class_exposure(RECORDS, torch.tensor([2.0, 5.0, 0.5]), 4)
    assert exposure.tolist() == [4.0, 2.0, 0.5, 0.0]


def test_the_command_has_a_row_for_each_sampler(tiny_cfg, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(tiny_cfg().dump())
    table = tmp_path / "table.csv"
    run_command("exposure", "--config-file", config, "--output", table)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("|")[1:3] == [f" {'sampler':<25} ", "   images "]
    assert [line.split("|")[1].strip() for line in lines[2:6]] == [
        *("Random", "RepeatFactor", "InstanceAwareRepeatFactor", "ExponentialRepeatFactor")
    ]
    assert table.read_text().startswith("sampler,images,")
