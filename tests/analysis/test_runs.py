"""What runs left behind, and which group won where an object is."""

import csv
import json
import os
import re
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pytest
from commands import bags_d2, bags_d2_here
from detectron2.data import DatasetCatalog, MetadataCatalog
from run_folders import write_run

from bags_d2 import ConfigError, DataError, MissingFileError
from bags_d2.analysis.demo import draw_comparison
from bags_d2.analysis.detections import winning_classes, winning_groups
from bags_d2.analysis.plots import plot_ap_bins, plot_class_ap_change, plot_winning_groups
from bags_d2.analysis.runs import configured_thresholds, loss_history, read_ground_truth, read_run

COUNT_OF = {3: 5, 8: 50, 20: 7, 21: 5000}
GROUP_OF = {3: 0, 8: 1, 20: 0, 21: 3}
THRESHOLDS = (10, 100, 1000)


def _iou(a, b):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    return inter / (a[2] * a[3] + b[2] * b[3] - inter)


def _slow_winning_groups(truth, detections):
    """The definition, in loops."""
    matrix = np.zeros((4, 6), dtype=int)
    for obj in truth:
        best = None
        for det in detections:
            is_near = det["image_id"] == obj["image_id"] and _iou(det["bbox"], obj["bbox"]) >= 0.5
            if is_near and (best is None or det["score"] > best["score"]):
                best = det
        row = GROUP_OF[obj["category_id"]]
        if best is None:
            matrix[row, 5] += 1
        elif best["category_id"] == obj["category_id"]:
            matrix[row, 0] += 1
        else:
            matrix[row, 1 + GROUP_OF[best["category_id"]]] += 1
    return matrix


@pytest.mark.parametrize("seed", range(20))
def test_winners_are_those_of_the_definition(seed):
    rng = np.random.default_rng(seed)

    def make(n, **extra):
        return [
            {
                "image_id": int(rng.integers(4)),
                "category_id": int(rng.choice([*COUNT_OF])),
                "bbox": [*rng.uniform(0, 10, 2), *rng.uniform(4, 12, 2)],
                **{k: v() for k, v in extra.items()},
            }
            for _ in range(n)
        ]

    truth = make(15)
    # Few different scores, so that there are ties.
    detections = make(40, score=lambda: float(rng.integers(5)) / 5)
    expected = _slow_winning_groups(truth, detections)
    winners = winning_classes(truth, detections)
    assert np.array_equal(winning_groups(truth, winners, COUNT_OF, THRESHOLDS), expected)
    assert expected.sum() == 15


def test_crowds_are_no_objects_and_nothing_detected_is_missed(make_run):
    path = Path(make_run.annotations)
    content = json.loads(path.read_text())
    content["annotations"][0]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    run = read_run(make_run("one", [1.0, 2.0, 3.0, 4.0]))
    objects = [a for image in read_ground_truth(run).values() for a in image["annotations"]]
    matrix = winning_groups(objects, winning_classes(objects, []), COUNT_OF, THRESHOLDS)
    assert matrix[:, -1].tolist() == [1, 1, 0, 2]
    assert matrix.sum() == 4


@pytest.fixture
def make_run(tmp_path, write_lvis, register):
    """``make_run(name, aps)``: the folder of a run evaluated on a registered data set."""
    names = {3: "ant", 8: "bee", 20: "çat", 21: "dog"}
    annotations = write_lvis(names, [(1, 3), (1, 8), (2, 20), (2, 21), (2, 21)])
    dataset = register("runs_val", annotations, str(tmp_path))

    def make(name, aps, task="bbox"):
        measures = {"AP": 30.0, "AP1": 10.0, "AP2": None, "AP3": None, "AP4": 50.0, "bAP": 30.0}
        rows = [
            {"image_id": 1, "category_id": 8, "bbox": [1, 2, 3, 4], "score": 0.5},
            {"image_id": 2, "category_id": 21, "bbox": [1, 2, 3, 4], "score": 0.5},
        ]
        folder = tmp_path / name
        return write_run(folder, dataset, names, COUNT_OF, aps, rows, measures, task)

    make.annotations = annotations
    return make


def test_a_run_is_read(make_run):
    run = read_run(make_run("one", [10.0, None, 30.0, 40.0]))
    assert (run.label, run.dataset, run.task) == ("one", "runs_val", "bbox")
    assert run.category_ids == [3, 8, 20, 21]
    assert run.names == ["ant", "bee", "çat", "dog"]
    assert run.training_instances.tolist() == [5, 50, 7, 5000]
    assert np.isnan(run.ap[1])
    assert run.ap[[0, 2, 3]].tolist() == [10, 30, 40]
    assert len(run.detections()) == 2
    truth = [a for image in read_ground_truth(run).values() for a in image["annotations"]]
    winners = winning_classes(truth, run.detections())
    matrix = winning_groups(truth, winners, COUNT_OF, THRESHOLDS)
    assert matrix.tolist() == [
        [0, 0, 1, 0, 1, 0],
        [1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [2, 0, 0, 0, 0, 0],
    ]


def test_bins_follow_the_thresholds(make_run):
    folder = make_run("one", [10.0, None, 30.0, 40.0])
    run = read_run(folder)
    # Counts 5, 50, 7, 5000; the class with 50 is not evaluated.
    assert run.bin_measures((6, 60)) == {"AP1": 10.0, "AP2": 30.0, "AP3": 40.0, "bAP": 80 / 3}
    expected = {"AP1": 20.0, "AP2": None, "AP3": None, "AP4": 40.0, "bAP": 30.0}
    assert run.bin_measures(THRESHOLDS) == expected
    assert configured_thresholds([run]) == THRESHOLDS
    (folder / "config.yaml").write_text("MODEL: {BAGS: {GROUP_THRESHOLDS: [6, 60]}}\n")
    assert configured_thresholds([run]) == (6, 60)


def test_empty_bins_have_a_dash_and_no_zero(tmp_path):
    path = tmp_path / "bins.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_ap_bins({"$a_{b$": {"AP1": 0.0, "AP2": None, "bAP": 0.0}}, path, (5,))
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())
    assert texts.count("-") == 1
    assert texts.count("0.0") == 2
    assert {"0-4", "5+", "$a_{b$"} <= set(texts)


def test_losses_are_the_last_logged_numbers(tmp_path):
    lines = [
        '{"iteration": 20, "total_loss": 1.0, "bags/loss_group0": 0.5, "lr": 0.1}',
        '{"iteration": 40, "total_loss": NaN, "loss_cls": "x"}',
        '{"iteration": 20, "total_loss": 2.0}',
        '{"iteration": 60, "total_lo',
    ]
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    expected = {"total_loss": {20: 2.0}, "bags/loss_group0": {20: 0.5}}
    assert loss_history(tmp_path) == expected
    assert loss_history(tmp_path / "none") == {}


def test_what_is_not_there_is_named(make_run, tmp_path):
    folder = make_run("one", [1.0, 2.0, 3.0, 4.0])
    with pytest.raises(MissingFileError, match="has no bbox evaluation"):
        read_run(tmp_path / "none")
    with pytest.raises(MissingFileError, match="of 'other_val'"):
        read_run(folder, dataset="other_val")
    with pytest.raises(MissingFileError, match="no segm evaluation"):
        read_run(folder, task="segm")
    second = folder / "inference" / "other_val"
    second.mkdir()
    (second / "per_class_bbox.csv").write_text("category_id\n1\n")
    with pytest.raises(ConfigError, match="evaluations of other_val, runs_val; name one"):
        read_run(folder)
    with pytest.raises(DataError, match="is not what evaluation writes"):
        read_run(folder, dataset="other_val")
    (folder / "inference" / "runs_val" / "lvis_instances_results.json").unlink()
    with pytest.raises(MissingFileError, match="has no detections"):
        read_run(folder, dataset="runs_val").detections()


def test_pictures_of_odd_runs_are_drawn(tmp_path):
    nan = float("nan")
    for name, counts, before, after in (
        ("none evaluated", [1, 2], [nan, nan], [nan, nan]),
        ("one class, no instance", [0], [1.0], [2.0]),
        ("no change", [5, 5000], [1.0, 2.0], [1.0, 2.0]),
    ):
        plot_class_ap_change(counts, before, after, ("a", "b"), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    plot_class_ap_change([3], [1.0], [2.0], ("a", "b"), tmp_path / "one_bin.png", ())
    plot_winning_groups({"a": np.zeros((4, 6), int)}, THRESHOLDS, tmp_path / "zeros.png")


def test_the_ground_truth_of_a_loader_of_ones_own(make_run):
    run = read_run(make_run("one", [1.0, 2.0, 3.0, 4.0]))
    expected = read_ground_truth(run)
    assert [len(image["annotations"]) for image in expected.values()] == [2, 3]
    loader = DatasetCatalog.pop(run.dataset)
    DatasetCatalog.register(run.dataset, lambda: loader())
    assert read_ground_truth(run) == expected
    MetadataCatalog.pop(run.dataset)
    with pytest.raises(DataError, match="no json_file"):
        read_ground_truth(run)


@pytest.mark.slow
def test_the_tool_compares_two_runs(make_run, tmp_path):
    first = make_run("one", [10.0, None, 30.0, 40.0])
    second = make_run("two", [20.0, None, 25.0, 40.0])
    config = tmp_path / "data.yaml"
    config.write_text(
        "DATASETS:\n  REGISTER:\n"
        f'    - ["runs_val", "lvis", "{make_run.annotations}", "{tmp_path}"]\n'
    )
    out = tmp_path / "out"
    # In the C locale, whose encoding is ASCII.
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    arguments = ("runs", first, second, "--output", out, "--config-file", config)
    environment = {**os.environ, **locale}
    done = bags_d2(*arguments, env=environment)
    assert done.returncode == 0, done.stderr
    assert "10.0" in done.stdout
    assert {p.name for p in out.iterdir()} == {
        "class_ap.png",
        "class_ap.csv",
        "ap_per_bin.png",
        "winning_groups.png",
        "winning_groups.csv",
    }
    assert "\\xe7at" in done.stdout
    assert "20,çat,7,30.0,25.0" in (out / "class_ap.csv").read_text("utf-8").splitlines()
    rows = list(csv.reader((out / "winning_groups.csv").read_text().splitlines()))
    assert rows[1] == ["one", "0-9", "0", "0", "1", "0", "1", "0"]
    without = bags_d2(*arguments[:-2], env=environment)
    assert "'runs_val' of" in without.stderr
    assert "add --config-file" in without.stderr
    same = bags_d2_here("runs", first, first, "--output", out)
    assert "Runs share a name among one, one" in same.stderr


def test_pictures_of_runs_have_a_column_for_each_and_one_for_the_truth(make_run, tmp_path):
    for i in (1, 2):
        cv2.imwrite(str(tmp_path / f"{i}.jpg"), np.full((32, 32, 3), 200, dtype=np.uint8))
    names = ["one", "two"]
    runs = [read_run(make_run(name, [1.0, 2.0, 3.0, 4.0])) for name in names]
    labels = dict.fromkeys(COUNT_OF, "Я")
    draw_comparison(runs, labels, tmp_path / "out.png")
    height, width = cv2.imread(str(tmp_path / "out.png")).shape[:2]
    assert 1.3 < width / height < 1.5  # 3 columns, 2 rows with a title and a legend
    draw_comparison(runs, labels, tmp_path / "out.png", rows=1)
    height, width = cv2.imread(str(tmp_path / "out.png")).shape[:2]
    assert width / height > 2
