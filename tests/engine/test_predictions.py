"""Results of many images as files, whatever the images, the batches and the interruptions."""

import csv
import json
import shutil

import numpy as np
import pytest
from commands import bags_d2, run_command
from PIL import Image
from pycocotools.coco import COCO

from bags_d2 import ConfigError, DataError, LongTailPredictor
from bags_d2.engine import predictions
from bags_d2.evaluation.thresholds import ScoreThresholds

CONFIG = ("--config-file", "glyphs_bags.yaml")


@pytest.fixture
def photos(datasets_root, tmp_path, monkeypatch):
    """A folder of six pictures, one of another size, in the folder of the test."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in sorted((datasets_root / "glyphs_tiny" / "val").iterdir())[:6]:
        shutil.copy(path, folder)
    first = min(folder.iterdir())
    Image.open(first).crop((0, 0, 120, 90)).save(first)
    return folder


def _predict(*arguments, output="out"):
    run_command("predict", *CONFIG, "--output", output, *arguments)


def test_results_are_those_of_the_predictor(photos, tmp_path):
    _predict("--input", photos, "--batch-size", 4, "--min-score", 0.05)
    images = json.loads((tmp_path / "out" / "images.json").read_text())
    paths = sorted(map(str, photos.iterdir()))
    assert [row["file_name"] for row in images["images"]] == paths
    assert [row["id"] for row in images["images"]] == [int(p[-16:-4]) for p in paths]
    predictor = LongTailPredictor.from_config_file("glyphs_bags.yaml")
    outputs = predictor(paths)
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    by_image = {row["id"]: [] for row in images["images"]}
    for row in found:
        by_image[row["image_id"]].append(row)
    names = {row["id"]: row["name"] for row in images["categories"]}
    assert list(names.values()) == predictor.class_names
    for path, output, rows in zip(paths, outputs, by_image.values(), strict=True):
        alone = predictor(path)["instances"]
        for instances in (output["instances"], alone):
            instances = instances[instances.scores >= 0.05]
            np.testing.assert_allclose([r["score"] for r in rows], instances.scores, atol=1e-4)
            assert [r["category_id"] - 1 for r in rows] == instances.pred_classes.tolist()
    lines = (tmp_path / "out" / "detections.csv").read_text().splitlines()
    table = list(csv.DictReader(lines))
    assert [row["class"] for row in table] == [names[row["category_id"]] for row in found]
    truth = COCO()
    truth.dataset = images
    truth.createIndex()
    assert len(truth.loadRes(found).anns) == len(found) > 20


def test_folders_globs_and_lists_give_each_image_once(photos, tmp_path):
    paths = sorted(photos.iterdir())
    (tmp_path / "list.txt").write_text(f"{paths[3]}\n\n photos/{paths[4].name}\n")
    _predict("--input", paths[0], "photos/*1.jpg", "list.txt", photos)
    rows = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert len({photos / row["file_name"] for row in rows}) == len(paths)


def test_what_cannot_be_read_is_told_and_left_out(photos, tmp_path, log_lines):
    (photos / "a.jpg").write_text("no image")
    (tmp_path / "list.txt").write_text("gone.jpg\n")
    lines = log_lines("bags_d2.engine.predictions")
    with pytest.raises(DataError, match=r"2 of 8 images could not be read.*a\.jpg"):
        _predict("--input", photos, "list.txt")
    warned = [line for line in lines if line.startswith("WARNING")]
    assert len(warned) == 2
    assert all(any(name in line for line in warned) for name in ("a.jpg", "gone.jpg"))
    rows = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert len(rows) == 6
    # Not all names are numbers, so images are numbered.
    assert [row["id"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_was_stopped_goes_on(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "PART_SIZE", 2)
    _predict("--input", photos, output="whole")
    detect, seen = LongTailPredictor.detect, []

    def stop_at_third(self, inputs):
        seen.append(len(inputs))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return detect(self, inputs)

    monkeypatch.setattr(LongTailPredictor, "detect", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        _predict("--input", photos)
    assert not (tmp_path / "out" / "detections.json").exists()
    _predict("--input", photos)
    assert seen == [2, 2, 2, 2]  # two parts, the one that was stopped, and that again
    for name in ("detections.json", "detections.csv", "images.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("detections.json", "detections.csv", "images.json", ".lock")
    }
    # Of another run nothing is taken.
    _predict("--input", photos, "--opts", "MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.3)
    assert len(seen) == 7


@pytest.mark.slow
def test_processes_share_the_images(photos, tmp_path):
    _predict("--input", photos)
    command = ("predict", *CONFIG, "--input", photos, "--output", "both", "--processes", 2)
    done = bags_d2(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "6 images at" in done.stdout
    found, expected = (
        json.loads((tmp_path / d / "detections.json").read_text()) for d in ("both", "out")
    )
    assert [row["image_id"] for row in found] == [row["image_id"] for row in expected]
    np.testing.assert_allclose(*([r["score"] for r in x] for x in (found, expected)), atol=1e-4)


def test_thresholds_are_chosen_stored_and_used(photos, tmp_path, datasets_root, capsys):
    carried = LongTailPredictor.from_config_file("glyphs_bags.yaml").cfg.MODEL.WEIGHTS
    shutil.copy(carried, tmp_path / "mine.pth")
    weights = ("MODEL.WEIGHTS", "mine.pth")
    # The pictures of glyphs_tiny show some of the classes that the model knows.
    root = datasets_root / "glyphs_tiny"
    rows = [["chosen_on", "lvis", f"{root}/annotations/glyphs_tiny_val.json", str(root)]]
    given = (*("--dataset", "chosen_on", *weights), "DATASETS.REGISTER", str(rows))
    with pytest.raises(ConfigError, match=r"TEST\.COMMON_CLASSES_ONLY"):
        run_command("thresholds", *CONFIG, *given)
    path = ScoreThresholds.path_of("mine.pth")
    assert path.name == "mine.thresholds.json"
    assert not path.exists()
    lenient = ("--precision", 0.2, "--confidence", 0.5, "--min-detections", 1)
    run_command("thresholds", *CONFIG, *lenient, *given, "TEST.COMMON_CLASSES_ONLY", True)
    assert "classes with detections" in capsys.readouterr().out
    assert len(ScoreThresholds.load(path).thresholds) == 40

    names = LongTailPredictor.from_config_file("glyphs_bags.yaml").class_names
    thresholds = dict.fromkeys(names[1:], 0.5)
    ScoreThresholds(0.9, 0.9, 10, 0.8, thresholds, []).save(path)
    _predict("--input", photos, "--opts", *weights)
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert found
    assert all(r["score"] >= (0.8 if r["category_id"] == 1 else 0.5) for r in found)
    _predict("--input", photos, "--thresholds", "none", "--opts", *weights)
    everything = json.loads((tmp_path / "out" / "detections.json").read_text())
    kept = [r for r in everything if r["score"] >= (0.8 if r["category_id"] == 1 else 0.5)]
    assert len(kept) == len(found) < len(everything)
