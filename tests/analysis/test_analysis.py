import numpy as np
import pytest
import torch
from matplotlib import image as mpl_image

from bags_d2 import ClassGroups, DataError
from bags_d2.analysis import (
    class_weight_norms,
    draw_comparison,
    label_detections,
    plot_ap_bins,
    plot_weight_norms,
)


def test_weight_norms_of_a_softmax_leave_the_background_out():
    weight = torch.tensor([[3.0, 4.0], [0.0, 2.0], [100.0, 0.0]])
    norms = class_weight_norms({"roi_heads.box_predictor.cls_score.weight": weight})
    assert norms.tolist() == [5.0, 2.0]


def test_weight_norms_of_groups_are_in_class_order():
    groups = ClassGroups.from_counts([2000, 5, 50, 7])
    weight = torch.zeros(groups.num_logits, 3)
    for c, column in enumerate(groups.class_to_column.tolist()):
        weight[column, 0] = c + 1
    state = {"roi_heads.box_predictor.cls_score.weight": weight}
    state |= {f"roi_heads.box_predictor.groups.{k}": v for k, v in groups.state_dict().items()}
    assert class_weight_norms(state).tolist() == [1.0, 2.0, 3.0, 4.0]


def test_weight_norms_of_a_cascade_are_the_mean_over_its_stages():
    state = {
        f"roi_heads.box_predictor.{i}.cls_score.weight": torch.full((2, 1), float(i))
        for i in range(3)
    }
    assert class_weight_norms(state).tolist() == [1.0]


def test_a_checkpoint_without_a_classifier_is_refused():
    with pytest.raises(DataError, match="not a box classifier"):
        class_weight_norms({"backbone.weight": torch.zeros(1)})


def test_each_object_makes_one_detection_right():
    truth = np.array([[0, 0, 10, 10], [20, 20, 10, 10]])
    boxes = np.array([[0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 10, 10], [21, 20, 10, 10]])
    right = label_detections(boxes, [1, 1, 2, 1], truth, [1, 1])
    # A second box on the same object and another class on the other object are wrong.
    assert right.tolist() == [True, False, False, True]


def test_detections_without_objects_are_wrong():
    boxes = np.array([[0, 0, 10, 10]])
    assert label_detections(boxes, [1], np.zeros((0, 4)), []).tolist() == [False]
    assert label_detections(np.zeros((0, 4)), [], boxes, [1]).tolist() == []


def test_charts_are_written(tmp_path):
    measures = {"AP1": 1.0, "AP2": 2.0, "AP3": 3.0, "AP4": None, "bAP": 2.0}
    plot_ap_bins({"a": measures, "b": measures}, tmp_path / "bins.png")
    plot_weight_norms({"a": [0.1, 0.5, 1.0]}, [0, 10, 1000], tmp_path / "norms.svg")
    pixels = mpl_image.imread(tmp_path / "bins.png")
    assert pixels.shape[:2] == (600, 1200)
    assert pixels[..., :3].std() > 0.05
    svg = (tmp_path / "norms.svg").read_text()
    assert "<svg" in svg


def test_comparison_has_a_column_for_each_model(tmp_path):
    mpl_image.imsave(tmp_path / "0.png", np.full((32, 32, 3), 200, dtype=np.uint8))
    box = {"bbox": [4, 4, 10, 10], "category_id": 1, "score": 0.9}
    draw_comparison(
        [{"id": 0, "file_name": str(tmp_path / "0.png")}],
        {0: [box]},
        {"one": {0: [box]}, "two": {}},
        {1: "Я"},
        frozenset({1}),
        tmp_path / "out.png",
    )
    height, width = mpl_image.imread(tmp_path / "out.png").shape[:2]
    assert width / height > 2
