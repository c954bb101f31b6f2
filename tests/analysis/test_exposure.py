"""What an epoch of each sampler shows of the classes."""

import pytest
import torch

from bags_d2.analysis import exposure

RECORDS = [
    {"annotations": [{"category_id": 0}, {"category_id": 0}, {"category_id": 1}]},
    {"annotations": [{"category_id": 1, "iscrowd": 1}]},
    {"annotations": [{"category_id": 2}]},
]


def test_exposure_counts_instances_as_often_as_their_image_is_drawn():
    found = exposure.class_exposure(RECORDS, torch.tensor([2.0, 5.0, 0.5]), 4)
    assert found.tolist() == [4.0, 2.0, 0.5, 0.0]


def test_every_sampler_has_a_row(tiny_cfg, monkeypatch):
    monkeypatch.setattr(exposure, "training_records", lambda cfg: RECORDS)
    header, rows = exposure.exposure_table(tiny_cfg("MODEL.BAGS.GROUP_THRESHOLDS", "(2,)"))
    assert header == ["sampler", "images", "[0, 2): 2 classes", "[2, inf): 1 classes"]
    assert [row[0] for row in rows][:3] == ["Random", "RepeatFactor", "InstanceAwareRepeatFactor"]
    assert rows[0][1:] == [3.0, 1.0, 2.0]
    # Draws a class of three, and then its only image: each of the two images counts 1 or 2 thirds.
    balanced = next(row for row in rows if row[0] == "ClassBalanced")
    assert balanced[1:] == pytest.approx([3.0, (2.0 + 1.0) / 2, 4.0])
