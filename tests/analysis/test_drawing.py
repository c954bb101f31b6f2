"""Pictures of detections."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from bags_d2.analysis.drawing import best_instances, draw_instances, grid, place_labels

RARE, FREQUENT = (0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)


def make_instances(boxes, scores, classes, size=(64, 96), masks=None):
    instances = Instances(size)
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.scores = torch.tensor(scores)
    instances.pred_classes = torch.tensor(classes, dtype=torch.long)
    if masks is not None:
        instances.pred_masks = masks
    return instances


@given(
    boxes=st.lists(
        st.tuples(*[st.floats(0, 400), st.floats(0, 300), st.floats(1, 200), st.floats(1, 200)]),
        max_size=25,
    ),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_labels_never_cover_each_other_nor_leave_the_picture(boxes, data):
    canvas = (400, 300)
    corners = np.array([(x, y, x + w, y + h) for x, y, w, h in boxes]).reshape(-1, 4)
    side = st.tuples(st.floats(1, 450), st.floats(1, 40))
    sizes = np.array([data.draw(side) for _ in boxes]).reshape(-1, 2)
    places = place_labels(corners, sizes, canvas)
    assert len(places) == len(boxes)
    rects = [
        (*place, place[0] + w, place[1] + h)
        for place, (w, h) in zip(places, sizes, strict=True)
        if place is not None
    ]
    for i, a in enumerate(rects):
        assert a[0] >= 0
        assert a[1] >= 0
        assert a[2] <= canvas[0] + 1e-6
        assert a[3] <= canvas[1] + 1e-6
        for b in rects[:i]:
            width = min(a[2], b[2]) - max(a[0], b[0])
            height = min(a[3], b[3]) - max(a[1], b[1])
            assert width <= 1e-6 or height <= 1e-6


def test_a_label_alone_stands_above_its_box():
    assert place_labels(np.array([[50, 50, 80, 90]]), np.array([[20, 10]]), (200, 200)) == [
        (50, 40)
    ]
    assert place_labels(np.array([[50, 0, 80, 20]]), np.array([[20, 10]]), (200, 200)) == [(50, 0)]
    assert place_labels(np.array([[0, 0, 9, 9]]), np.array([[300, 10]]), (200, 200)) == [None]


def test_the_first_labels_get_the_room():
    boxes = np.tile([[10.0, 10.0, 20.0, 20.0]], (20, 1))
    places = place_labels(boxes, np.tile([[40.0, 12.0]], (20, 1)), (60, 60))
    assert places[0] is not None
    assert None in places
    assert places.index(None) >= 2


def test_best_instances_are_the_highest_scored():
    instances = make_instances(np.zeros((4, 4)), [0.2, 0.9, 0.5, 0.05], [0, 1, 2, 3])
    assert best_instances(instances, 3).pred_classes.tolist() == [1, 2, 0]
    assert best_instances(instances, 1).pred_classes.tolist() == [1]
    assert len(best_instances(instances[:0], 5)) == 0


def test_colours_tell_rare_from_frequent_and_rare_boxes_are_thick():
    image = np.zeros((64, 96, 3), dtype=np.uint8)
    instances = make_instances([[4, 24, 30, 60], [50, 24, 80, 60]], [0.9, 0.8], [0, 1])
    drawn = draw_instances(image, instances, ["rare one", "frequent"], [3, 5000])
    assert drawn.shape[1] == 960  # the shorter side is enlarged to 640
    assert drawn.shape[0] > 640  # and there is a legend below
    picture = drawn[:640]
    rare, frequent = ((picture == color).all(axis=2) for color in (RARE, FREQUENT))
    assert rare[:, :450].any()
    assert not rare[:, 480:].any()
    assert frequent[:, 480:].any()
    assert not frequent[:, :450].any()
    row = 500  # crosses the sides of both boxes and no label
    assert rare[row].sum() == 2 * frequent[row].sum() > 0


def test_without_counts_there_is_no_legend_and_one_colour():
    image = np.zeros((640, 700, 3), dtype=np.uint8)
    instances = make_instances([[40, 100, 300, 400]], [0.9], [1], size=(640, 700))
    drawn = draw_instances(image, instances, ["a", "b"])
    assert drawn.shape == image.shape
    assert (drawn == FREQUENT).all(axis=2).any()
    titled = draw_instances(image, instances, ["a", "b"], title="mine")
    assert titled.shape[0] > 640


def test_masks_tint_what_they_cover():
    image = np.full((640, 640, 3), 100, dtype=np.uint8)
    masks = torch.zeros(1, 640, 640, dtype=torch.bool)
    masks[0, 300:350, 300:350] = True
    instances = make_instances([[200, 200, 500, 500]], [0.9], [0], (640, 640), masks)
    drawn = draw_instances(image, instances, ["a"])
    expected = 100 + 0.4 * (np.array(FREQUENT) - 100)
    assert np.abs(drawn[320, 320] - expected).max() <= 1
    assert (drawn[400, 400] == 100).all()


@pytest.mark.parametrize("size", [(5, 300), (300, 5), (1, 1)])
def test_odd_sizes_and_nothing_detected(size):
    image = np.zeros((*size, 3), dtype=np.uint8)
    drawn = draw_instances(image, make_instances([], [], [], size), ["a"], [1], "title")
    assert min(drawn.shape[:2]) >= 640


def test_300_detections_of_long_names_are_drawn_quickly_and_any_script():
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 500, (300, 2))
    boxes = np.hstack([low, low + rng.uniform(5, 200, (300, 2))])
    names = [f"a_very_long_name_of_a_class_{i}_Яβ" for i in range(300)]
    instances = make_instances(boxes, rng.uniform(size=300), range(300), (700, 700))
    image = np.zeros((700, 700, 3), dtype=np.uint8)
    drawn = draw_instances(image, instances, names, range(300))
    assert drawn.shape[1] == 700


def test_pictures_side_by_side():
    a, b = np.zeros((5, 4, 3), np.uint8), np.full((5, 6, 3), 9, np.uint8)
    row = grid([[a, b]], gap=2)
    assert row.shape == (5, 12, 3)
    assert np.array_equal(row[:, :4], a)
    assert np.array_equal(row[:, 6:], b)
    assert (row[:, 4:6] == 255).all()
    assert np.array_equal(grid([[a]]), a)
