import csv
import json
import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bags_d2.data.annotations import read_annotations
from bags_d2.evaluation import ap_per_bin, balanced_ap, bin_index
from bags_d2.evaluation.bins import ClassReport
from bags_d2.evaluation.ground_truth import GroundTruth


def slow_ap_per_bin(ap, counts, thresholds):
    """Class by class and bound by bound, the definition read aloud."""
    bounds = [0, *thresholds, math.inf]
    result = {}
    for i in range(len(bounds) - 1):
        members = []
        for class_ap, count in zip(ap, counts, strict=True):
            if bounds[i] <= count < bounds[i + 1] and not math.isnan(class_ap):
                members.append(class_ap)
        result[f"AP{i + 1}"] = sum(members) / len(members) if members else math.nan
    return result


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, 0), (9, 0), (10, 1), (99, 1), (100, 2), (999, 2), (1000, 3), (10**6, 3)],
)
def test_bins_are_half_open(count, expected):
    assert bin_index([count], (10, 100, 1000)).tolist() == [expected]


def test_counts_may_be_a_tensor():
    assert bin_index(torch.tensor([5, 12, 2000, 7, 150])).tolist() == [0, 1, 3, 0, 2]


def test_classes_without_ground_truth_are_left_out():
    ap = [10.0, np.nan, 30.0, 50.0]
    bins = ap_per_bin(ap, [1, 2, 3, 5000], (10, 100, 1000))
    assert bins["AP1"] == 20.0
    assert bins["AP4"] == 50.0
    assert math.isnan(bins["AP2"])
    assert math.isnan(bins["AP3"])
    assert balanced_ap(bins) == 35.0


def test_balanced_ap_of_nothing_is_undefined():
    assert math.isnan(balanced_ap({"AP1": math.nan}))


@given(
    classes=st.lists(
        st.tuples(st.one_of(st.just(math.nan), st.floats(0, 100)), st.integers(0, 5000)),
        max_size=40,
    ),
    thresholds=st.lists(st.integers(1, 2000), unique=True, max_size=5).map(sorted),
)
def test_ap_per_bin_is_the_slow_definition(classes, thresholds):
    ap = [class_ap for class_ap, _ in classes]
    counts = [count for _, count in classes]
    bins = ap_per_bin(ap, counts, thresholds)
    assert list(bins) == [f"AP{i + 1}" for i in range(len(thresholds) + 1)]
    assert bins == pytest.approx(slow_ap_per_bin(ap, counts, thresholds), nan_ok=True)
    defined = [value for value in bins.values() if not math.isnan(value)]
    if defined:
        # Up to rounding, a mean of means stays between the worst class and the best.
        values = [value for value in ap if not math.isnan(value)]
        assert min(values) - 1e-9 <= balanced_ap(bins) <= max(values) + 1e-9
    else:
        assert math.isnan(balanced_ap(bins))


@pytest.mark.parametrize("thresholds", [(10, 10), (100, 10), (0, 10), (-1,)])
def test_thresholds_must_ascend(thresholds):
    with pytest.raises(ValueError, match="count_thresholds must be positive"):
        bin_index([1, 2], thresholds)


def test_counts_must_fit():
    with pytest.raises(ValueError, match="must not be negative"):
        bin_index([1, -2])
    with pytest.raises(ValueError, match=r"shape \(3,\).* has 2 classes"):
        ap_per_bin([1.0, 2.0], [1, 2, 3])


CATEGORIES = [{"id": 2, "name": "cat, black", "frequency": "r"}, {"id": 5, "name": "dög"}]
CATEGORIES += [{"id": 9, "name": "cow"}]


@pytest.fixture
def truth(tmp_path):
    """Three classes, of which two have objects."""
    boxes = [{"id": i, "image_id": 1, "bbox": [0, 0, 9, 9]} for i in range(1, 6)]
    annotations = [{**box, "category_id": 2 if box["id"] < 5 else 9} for box in boxes]
    images = [{"id": 1, "width": 10, "height": 10}]
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(content))
    return GroundTruth(read_annotations(path))


@pytest.fixture
def precision():
    """(T, R, C, A, M), all sizes and the largest limit being what counts."""
    precision = np.full((10, 101, 3, 4, 2), -1.0)
    precision[:, :, 0, 0, 1] = np.linspace(0.2, 0, 10)[:, None]
    precision[:, :, 2, 0, 1] = np.linspace(1, 0, 101)
    return precision


def test_bins_of_an_evaluation(truth, precision, tmp_path, caplog):
    """And a class without ground truth has no AP, but one that is never found has 0."""
    report = ClassReport(truth, torch.tensor([5, 9, 400]), (10, 100))
    with caplog.at_level(logging.INFO, "bags_d2"):
        metrics = report.complete("bbox", {"AP": 30.0}, precision)
    expected = {"AP": 30.0, "AP1": 10.0, "AP2": math.nan, "AP3": 50.0, "bAP": 30.0}
    assert metrics == pytest.approx(expected, nan_ok=True)
    lines = caplog.messages[-1].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:]]
    assert rows[0] == ["", "training instances", "classes", "evaluated", "AP"]
    assert rows[2] == ["AP1", "[0, 10)", "2", "1", "10.000"]
    assert rows[4] == ["AP3", "[100, inf)", "1", "1", "50.000"]
    assert rows[5] == ["bAP", "", "", "", "30.000"]
    assert sorted(tmp_path.iterdir()) == [tmp_path / "truth.json"]

    precision[:, :, 0] = 0
    assert report.complete("bbox", {}, precision)["AP1"] == 0
    assert math.isnan(report.complete("bbox", {}, None)["bAP"])


def test_table_of_classes(truth, precision, tmp_path):
    out = tmp_path / "out"
    metrics = {"AP": 30.0}
    counted = ClassReport(truth, [7, 300, 1], output_dir=str(out))
    counted.complete("bbox", metrics, precision)
    with (out / "per_class_bbox.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {
        "category_id": "2",
        "name": "cat, black",
        "frequency": "r",
        "training_instances": "7",
        "validation_instances": "4",
        "AP": "10.0000",
        "AP50": "20.0000",
    }
    assert (rows[1]["name"], rows[1]["frequency"], rows[1]["AP"]) == ("dög", "", "")
    assert (rows[1]["training_instances"], rows[1]["validation_instances"]) == ("300", "0")

    assert ClassReport(truth, output_dir=str(out)).complete("segm", metrics, None) == metrics
    with (out / "per_class_segm.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["training_instances"] for row in rows} == {""}
    assert {row["AP50"] for row in rows} == {""}
