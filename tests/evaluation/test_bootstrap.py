"""Bootstrapped AP: equal to evaluating the data set with images left out and repeated."""

import copy
import json

import numpy as np
import pytest
from lvis_reference import evaluate_with_lvis_api, random_lvis_set

from bags_d2 import ConfigError
from bags_d2.data.annotations import read_annotations
from bags_d2.evaluation import bootstrap
from bags_d2.evaluation.bootstrap import (
    bootstrap_ap,
    bootstrap_measures,
    draw_images,
    interval,
    match_detections,
)
from bags_d2.evaluation.ground_truth import GroundTruth


def replicated(content, detections, draw):
    """A data set with image i `draw[i]` times, and its detections."""
    images, annotations, results = [], [], []
    for image, times in zip(content["images"], draw.astype(int), strict=True):
        for _ in range(times):
            new = len(images) + 1
            images.append({**image, "id": new})
            for source, target in ((content["annotations"], annotations), (detections, results)):
                for row in source:
                    if row["image_id"] == image["id"]:
                        target.append({**copy.deepcopy(row), "image_id": new})
    for i, annotation in enumerate(annotations, 1):
        annotation["id"] = i
    return {**content, "images": images, "annotations": annotations}, results


def class_ap(precision):
    """(C,) in percent from lvis-api's precision (T, R, C, A)."""
    precision = precision[..., 0]
    return np.where((precision < 0).any((0, 1)), np.nan, 100 * precision.mean((0, 1)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_a_draw_is_the_data_set_with_images_repeated(seed, task, tmp_path):
    path, detections = random_lvis_set(seed, tmp_path, num_images=7, num_classes=6)
    # Of equal scores in an image, its copies have the first ones one after another, which a weight
    # cannot imitate.
    for i, detection in enumerate(detections):
        detection["score"] += i * 1e-6
    content = json.loads(path.read_text())
    content["images"].sort(key=lambda image: image["id"])  # as they are read
    matches = match_detections(GroundTruth(read_annotations(path)), detections, task, lvis=True)
    draws = np.concatenate([np.ones((1, 7)), draw_images(7, 3, seed)])
    found = bootstrap_ap(matches, draws)
    for draw, ap in zip(draws, found, strict=True):
        content_of_draw, results = replicated(content, detections, draw)
        of_draw = tmp_path / "draw.json"
        of_draw.write_text(json.dumps(content_of_draw))
        _, precision = evaluate_with_lvis_api(of_draw, results, task)
        np.testing.assert_allclose(ap, class_ap(precision), atol=1e-4)


def test_coco_style_counts_crowds_for_nothing(tmp_path):
    boxes = [[0, 0, 20, 20], [40, 0, 20, 20]]
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 100, "height": 100}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 400, "iscrowd": i}
            for i, box in enumerate(boxes)
        ],
    }
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(content))
    detections = [
        {"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9 - i / 10}
        for i, box in enumerate(reversed(boxes))
    ]
    matches = match_detections(GroundTruth(read_annotations(path)), detections, lvis=False)
    # The better one is on the crowd, and neither true nor false; class b has no object.
    np.testing.assert_allclose(bootstrap_ap(matches, np.ones((1, 1))), [[100.0, np.nan]])


def test_draws_are_of_all_images_and_decided_by_the_seed():
    draws = draw_images(50, 400, seed=3)
    assert (draws.sum(axis=1) == 50).all()
    np.testing.assert_array_equal(draws, draw_images(50, 400, seed=3))
    assert not np.array_equal(draws, draw_images(50, 400, seed=4))
    # Of a binomial distribution of 50 draws at 1/50.
    assert draws.mean() == 1
    assert draws.var() == pytest.approx(0.98, abs=0.05)


def test_measures_average_classes_and_bins_of_each_draw():
    class_ap = np.array([[10.0, 20.0, 60.0], [np.nan, 30.0, 60.0]])
    found = bootstrap_measures(class_ap, [5, 50, 60])
    np.testing.assert_allclose(found["AP"], [30.0, 45.0])
    np.testing.assert_allclose(found["AP1"], [10.0, np.nan])
    np.testing.assert_allclose(found["AP2"], [40.0, 45.0])
    np.testing.assert_allclose(found["bAP"], [25.0, 45.0])


def test_an_interval_covers_its_share():
    assert interval(np.arange(1001.0), confidence=0.9) == pytest.approx((50.0, 950.0))
    shifted = interval(np.arange(1001.0), measured=400.0, confidence=0.9)
    assert shifted == pytest.approx((-50.0, 850.0))
    with pytest.raises(ConfigError, match="confidence"):
        interval(np.arange(3.0), confidence=1.0)
    assert bootstrap.interval(np.array([1.0, np.nan, 1.0])) == (1.0, 1.0)
