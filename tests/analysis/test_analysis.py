import csv
import pickle

import numpy as np
import pytest
import torch
from commands import bags_d2_here
from matplotlib import image as mpl_image

from bags_d2 import ClassGroups, DataError
from bags_d2.analysis.classifier import class_weight_norms, rank_correlation, remembered_counts
from bags_d2.analysis.detections import label_detections
from bags_d2.analysis.plots import plot_ap_bins, plot_weight_norms


def test_weight_norms_of_a_softmax_leave_the_background_out():
    weight = torch.tensor([[3.0, 4.0], [0.0, 2.0], [100.0, 0.0]])
    norms = class_weight_norms({"roi_heads.box_predictor.cls_score.weight": weight}, 2)
    assert norms.tolist() == [5.0, 2.0]


def test_weight_norms_of_groups_are_in_class_order():
    groups = ClassGroups.from_counts([2000, 5, 50, 7])
    weight = torch.zeros(groups.num_logits, 3)
    for c, column in enumerate(groups.class_to_column.tolist()):
        weight[column, 0] = c + 1
    state = {"roi_heads.box_predictor.cls_score.weight": weight}
    state |= {f"roi_heads.box_predictor.groups.{k}": v for k, v in groups.state_dict().items()}
    assert class_weight_norms(state, 4).tolist() == [1.0, 2.0, 3.0, 4.0]


def test_weight_norms_of_a_cascade_are_the_mean_over_its_stages():
    state = {
        f"roi_heads.box_predictor.{i}.cls_score.weight": torch.full((2, 1), float(i))
        for i in range(3)
    }
    assert class_weight_norms(state, 1).tolist() == [1.0]


def test_a_checkpoint_without_a_classifier_is_refused():
    with pytest.raises(DataError, match="not a box classifier"):
        class_weight_norms({"backbone.weight": torch.zeros(1)}, 1)


def _rows(classes, boxes):
    return [{"category_id": c, "bbox": box} for c, box in zip(classes, boxes, strict=True)]


def test_each_object_makes_one_detection_right():
    objects = _rows([1, 1], [[0, 0, 10, 10], [20, 20, 10, 10]])
    boxes = [[0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 10, 10], [21, 20, 10, 10]]
    right = label_detections(_rows([1, 1, 2, 1], boxes), objects)
    # A second box on the same object and another class on the other object are wrong.
    assert right.tolist() == [True, False, False, True]


def test_detections_without_objects_are_wrong():
    rows = _rows([1], [[0, 0, 10, 10]])
    assert label_detections(rows, []).tolist() == [False]
    assert label_detections([], rows).tolist() == []


def test_charts_are_written(tmp_path):
    measures = {"AP1": 1.0, "AP2": 2.0, "AP3": 3.0, "AP4": None, "bAP": 2.0}
    plot_ap_bins({"a": measures, "b": measures}, tmp_path / "bins.png")
    plot_weight_norms({"a": [0.1, 0.5, 1.0]}, [0, 10, 1000], tmp_path / "norms.svg")
    pixels = mpl_image.imread(tmp_path / "bins.png")
    assert pixels.shape[:2] == (600, 1200)
    assert pixels[..., :3].std() > 0.05
    svg = (tmp_path / "norms.svg").read_text()
    assert "<svg" in svg


@pytest.mark.parametrize("extra_rows", [0, 1, 2])
def test_weight_norms_of_other_layouts_follow_from_the_number_of_classes(extra_rows):
    weight = torch.arange(1.0, 4.0 + extra_rows)[:, None]
    state = {"roi_heads.box_predictor.cls_score.weight": weight}
    assert class_weight_norms(state, num_classes=3).tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(DataError, match="no classifier of 9 classes"):
        class_weight_norms(state, num_classes=9)


def test_weight_norms_follow_learned_scales():
    state = {
        "roi_heads.box_predictor.cls_score.weight": torch.ones(3, 4),
        "roi_heads.box_predictor.scale": torch.tensor([1.0, -2.0, 5.0]),
    }
    assert class_weight_norms(state, 2).tolist() == [2.0, 4.0]


_WEIGHT = "roi_heads.box_predictor.cls_score.weight"


@pytest.mark.parametrize(
    "state",
    [
        {_WEIGHT: torch.ones(3)},
        {_WEIGHT: "text"},
        {_WEIGHT: None},
        {_WEIGHT: torch.ones(3, 2), "roi_heads.box_predictor.scale": torch.ones(7, 9)},
        {_WEIGHT: torch.ones(3, 2), "roi_heads.box_predictor.groups.class_to_group": "x"},
        {_WEIGHT: torch.ones(3, 2), "roi_heads.box_predictor.0.cls_score.weight": torch.ones(9, 2)},
        {5: 6},
        {},
    ],
)
def test_damaged_classifiers_are_refused(state):
    with pytest.raises(DataError, match="classifier"):
        class_weight_norms(state, 2)


@pytest.mark.parametrize(
    "checkpoint",
    [{}, {"model": 5}, {"model": {}, "classes": [1]}, {"classes": {"training_instances": ["a"]}}],
)
def test_damaged_counts_are_refused(checkpoint):
    with pytest.raises(DataError, match="damaged"):
        remembered_counts(checkpoint)


def test_groups_of_another_number_of_classes_are_refused():
    groups = ClassGroups.from_counts([2000, 5, 50, 7])
    state = {
        "roi_heads.box_predictor.cls_score.weight": torch.zeros(groups.num_logits, 3),
        **{f"roi_heads.box_predictor.groups.{k}": v for k, v in groups.state_dict().items()},
    }
    with pytest.raises(DataError, match="is of 4 classes, but 5 were expected"):
        class_weight_norms(state, 5)


def test_rank_correlation_is_spearmans():
    assert rank_correlation([1, 2, 3, 4], [10, 100, 1000, 1e9]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # By hand: ranks 1.5, 1.5, 3, 4 and 1, 2, 4, 3.
    expected = np.corrcoef([1.5, 1.5, 3, 4], [1, 2, 4, 3])[0, 1]
    assert rank_correlation([5, 5, 6, 7], [0.1, 0.2, 0.9, 0.3]) == pytest.approx(expected)
    assert np.isnan(rank_correlation([1, 1], [1, 2]))


def test_checkpoints_tell_their_counts():
    assert remembered_counts({"model": {}}) is None
    assert remembered_counts({"model": {}, "classes": {"training_instances": [1, 2]}}) == [1, 2]
    key = "roi_heads.box_predictor.0.groups.class_counts"
    assert remembered_counts({"model": {key: torch.tensor([3, 4])}}) == [3, 4]
    assert remembered_counts({"model": {key: torch.tensor([-1, -1])}}) is None


def test_the_tool_reads_zoo_pickles_and_many_checkpoints(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for i in range(8):
        weight = rng.normal(size=(5, 3)).astype(np.float32)
        model = {"roi_heads.box_predictor.cls_score.weight": weight}
        paths.append(tmp_path / f"{i}.pkl")
        paths[-1].write_bytes(pickle.dumps({"model": model, "__author__": "zoo"}))
    counts = tmp_path / "counts.json"
    counts.write_text("[3, 30, 300, 3000]")
    tool = ("analyze", "--output", tmp_path / "out")
    done = bags_d2_here(*tool, "--counts", counts, "--checkpoint", f"first={paths[0]}", *paths[1:])
    assert done.returncode == 0, done.stderr
    assert "rank correlation" in done.stdout
    rows = list(csv.DictReader((tmp_path / "out" / "weight_norms.csv").read_text().splitlines()))
    assert [row["group"] for row in rows] == ["0-9", "10-99", "100-999", "1000+"]
    content = pickle.loads(paths[0].read_bytes())["model"]
    norms = np.linalg.norm(next(iter(content.values()))[:4], axis=1)
    assert np.allclose([float(row["first"]) for row in rows], norms)
    unknown = bags_d2_here(*tool, "--checkpoint", paths[0])
    assert "add --config-file" in unknown.stderr
