"""What a checkpoint remembers of its classes."""

import json

import pytest
import torch
from conftest import TINY_COUNTS

from bags_d2 import ConfigError, DataError
from bags_d2.data.class_statistics import ClassStatistics

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]


def test_the_training_set_gives_names_and_counts(tiny_cfg, write_lvis, register):
    categories = {10 * i + 5: name for i, name in enumerate(NAMES)}
    path = write_lvis(categories, [(1, 5), (1, 5), (2, 25)])
    name = register("record_train", path)
    cfg = tiny_cfg("DATASETS.TRAIN", (name,), "MODEL.LONG_TAIL.CLASS_COUNTS_FILE", "")
    record = ClassStatistics.from_training_set(cfg)
    assert record == ClassStatistics(tuple(NAMES), (2, 0, 1, 0, 0, 0))
    # Counted by images or not, the record tells instances.
    cfg.MODEL.LONG_TAIL.COUNT_BY = "images"
    assert ClassStatistics.from_training_set(cfg) == record


def test_what_is_not_there_is_left_empty(tiny_cfg):
    cfg = tiny_cfg("DATASETS.TRAIN", ("no_such_set",))
    assert ClassStatistics.from_training_set(cfg) == ClassStatistics(None, tuple(TINY_COUNTS))
    cfg.MODEL.LONG_TAIL.CLASS_COUNTS_FILE = ""
    assert ClassStatistics.from_training_set(cfg) == ClassStatistics()
    assert ClassStatistics().for_checkpoint() == {}


def test_contradictions_are_not_left_out(tiny_cfg):
    cfg = tiny_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 7)
    with pytest.raises(ConfigError, match="NUM_CLASSES is 7"):
        ClassStatistics.from_training_set(cfg)


@pytest.mark.parametrize(
    "record",
    [
        ClassStatistics(),
        ClassStatistics(("a", "b"), (0, 3)),
        ClassStatistics(None, (1,)),
        ClassStatistics(("Я",), None),
    ],
)
def test_records_go_through_checkpoints_and_json(record, tmp_path):
    content = {"model": {}, **record.for_checkpoint()}
    torch.save(content, tmp_path / "x.pth")
    for read in (
        torch.load(tmp_path / "x.pth", weights_only=True),
        json.loads(json.dumps(content)),
    ):
        assert ClassStatistics.from_checkpoint(read) == record


@pytest.mark.parametrize(
    "content",
    [
        3,
        ["a"],
        {"names": ["a"]},
        {"names": "ab", "training_instances": [1, 2]},
        {"names": None, "training_instances": [1.5]},
        {"names": [1], "training_instances": None},
    ],
)
def test_faulty_records_are_refused(content):
    with pytest.raises(DataError, match="'classes' must hold lists"):
        ClassStatistics.from_checkpoint({"classes": content})
