"""Class groups: binning, column layout, and the way of the grouping through checkpoints."""

import copy
import json
import math
import pickle
from importlib import resources

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from bags_d2 import ClassGroups, ConfigError

THRESHOLDS_OF_8 = (5, 10, 50, 100, 500, 1000, 5000)

counts_lists = st.lists(st.integers(0, 6000), min_size=1, max_size=30)
threshold_tuples = st.sets(st.integers(1, 6000), max_size=7).map(lambda s: tuple(sorted(s)))


@pytest.fixture(scope="module")
def lvis_v1():
    file = resources.files("bags_d2.data").joinpath("lvis_v1_train_counts.json")
    return json.loads(file.read_text())


@pytest.mark.parametrize(
    ("count", "group"),
    [(0, 1), (9, 1), (10, 2), (99, 2), (100, 3), (999, 3), (1000, 4), (1_270_141, 4)],
)
def test_bins_are_half_open(count, group):
    assert ClassGroups.from_counts([count]).class_to_group.tolist() == [group]


@pytest.mark.parametrize(
    ("thresholds", "sizes"),
    [
        ((10, 100, 1000), (200, 412, 334, 257)),
        ((100,), (612, 591)),
        (THRESHOLDS_OF_8, (128, 72, 280, 132, 251, 83, 184, 73)),
    ],
)
def test_group_sizes_of_lvis_v1(lvis_v1, thresholds, sizes):
    groups = ClassGroups.from_counts(lvis_v1["instance_count"], thresholds)
    assert groups.sizes == sizes
    assert groups.num_logits == 1203 + len(sizes) + 2


def test_binning_by_images_gives_other_groups(lvis_v1):
    by_images = ClassGroups.from_counts(lvis_v1["image_count"])
    assert sum(by_images.sizes) == 1203
    assert by_images.sizes != (200, 412, 334, 257)
    assert by_images.sizes[0] > 200  # a class has no more images than instances


def test_example_of_the_contract():
    groups = ClassGroups.from_counts([5, 12, 2000, 7, 150], thresholds=(10, 100, 1000))
    assert groups.num_classes == 5
    assert groups.num_groups == 4
    assert groups.sizes == (2, 1, 1, 1)
    assert groups.num_logits == 11
    assert groups.class_to_group.tolist() == [1, 2, 4, 1, 3]
    assert groups.class_to_group.dtype == torch.long
    # bg, fg | others, 0, 3 | others, 1 | others, 4 | others, 2
    assert groups.class_to_column.tolist() == [3, 6, 10, 4, 8]
    assert groups.label_to_slots.tolist() == [
        [1, 1, 1, 1, 1, 0],
        [1, 0, 0, 2, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 1, 0, 0, 0],
    ]
    assert groups.group_slices == (slice(0, 2), slice(2, 5), slice(5, 7), slice(7, 9), slice(9, 11))
    assert groups.describe() == ["[0, 10): 2", "[10, 100): 1", "[100, 1000): 1", "[1000, inf): 1"]


@given(counts_lists, threshold_tuples)
def test_layout_agrees_with_the_reference(counts, thresholds):
    groups = ClassGroups.from_counts(counts, thresholds)
    expected = reference.make_groups(counts, thresholds)
    columns = reference.make_columns(expected)
    assert groups.sizes == tuple(map(len, expected))
    assert groups.num_logits == len(columns) == len(counts) + len(thresholds) + 3
    for c, column in enumerate(groups.class_to_column.tolist()):
        assert columns[column] == ("class", c)
    for g, part in enumerate(groups.group_slices):
        in_order = reference.group_columns(columns, expected, g)
        assert list(range(part.start, part.stop)) == in_order


@given(counts_lists, threshold_tuples)
def test_class_columns_are_a_bijection_onto_all_but_the_shared_columns(counts, thresholds):
    groups = ClassGroups.from_counts(counts, thresholds)
    shared = {0, 1} | {s.start for s in groups.group_slices[1:]}
    assert sorted([*shared, *groups.class_to_column.tolist()]) == list(range(groups.num_logits))
    starts = torch.tensor([s.start for s in groups.group_slices])
    slots = groups.label_to_slots[groups.class_to_group, torch.arange(len(counts))]
    assert torch.equal(starts[groups.class_to_group] + slots, groups.class_to_column)


def test_counts_may_be_a_mapping_in_class_order():
    named = ClassGroups.from_counts({"a": 5, "b": 2000, "c": 12})
    listed = ClassGroups.from_counts([5, 2000, 12])
    assert torch.equal(named.class_to_group, listed.class_to_group)
    with pytest.raises(ConfigError, match="whole number"):
        ClassGroups.from_counts({"a": 5, "b": -1})


def test_a_group_may_be_empty_and_keeps_its_others_column():
    groups = ClassGroups.from_counts([50, 5000])
    assert groups.sizes == (0, 1, 0, 1)
    assert groups.group_slices == (slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 6), slice(6, 8))


def test_without_thresholds_there_is_one_group():
    groups = ClassGroups.from_counts([0, 10, 10_000], thresholds=())
    assert groups.sizes == (3,)
    assert groups.class_to_column.tolist() == [3, 4, 5]
    assert groups.describe() == ["[0, inf): 3"]


@pytest.mark.parametrize("counts", [torch.tensor([3, 30]), torch.tensor([3.0, 30.0]), (3, 30)])
def test_counts_of_any_container_and_dtype(counts):
    groups = ClassGroups.from_counts(counts)
    assert groups.class_to_group.tolist() == [1, 2]
    assert groups.class_counts.tolist() == [3, 30]


@pytest.mark.parametrize(
    "thresholds", [(10, 10), (100, 10), (0, 10), (-5,), (1.5,), (math.nan,), (math.inf,)]
)
def test_invalid_thresholds_are_refused(thresholds):
    with pytest.raises(ConfigError, match="GROUP_THRESHOLDS"):
        ClassGroups.from_counts([1, 2], thresholds)
    with pytest.raises(ConfigError, match="GROUP_THRESHOLDS"):
        ClassGroups.undetermined(2, thresholds, "No file.")


@pytest.mark.parametrize(
    "counts",
    [[], [[1, 2], [3, 4]], 3, [-1, 2], [1.5, 2.0], [math.nan], [math.inf, 1.0]],
)
def test_invalid_counts_are_refused(counts):
    with pytest.raises(ConfigError, match="Class counts must be"):
        ClassGroups.from_counts(counts)


def test_the_grouping_is_saved_as_integer_buffers_without_derived_ones():
    state = ClassGroups.from_counts([5, 12]).state_dict()
    assert set(state) == {"class_to_group", "class_counts", "thresholds"}
    assert all(tensor.dtype == torch.long for tensor in state.values())
    assert not list(ClassGroups.from_counts([5, 12]).parameters())


def _same(a, b):
    return (
        a.sizes == b.sizes
        and a.group_slices == b.group_slices
        and a.is_determined == b.is_determined
        and all(
            torch.equal(x, y)
            for (_, x), (_, y) in zip(a.named_buffers(), b.named_buffers(), strict=True)
        )
    )


def test_state_dict_round_trip_is_silent(log_lines):
    warnings = log_lines("bags_d2.modeling.class_groups")
    groups = ClassGroups.from_counts([5, 12, 2000, 7, 150])
    other = ClassGroups.from_counts([5, 12, 2000, 7, 150])
    other.load_state_dict(groups.state_dict())
    assert _same(groups, other)
    assert warnings == []


def test_loading_adopts_the_grouping_of_the_checkpoint_and_warns(log_lines):
    warnings = log_lines("bags_d2.modeling.class_groups")
    saved = ClassGroups.from_counts([5, 12, 2000, 7, 150], (6, 100, 1000))
    groups = ClassGroups.from_counts([5, 12, 3, 7, 150])
    groups.load_state_dict(saved.state_dict())
    assert _same(groups, saved)
    assert len(warnings) == 1
    assert warnings[0].startswith("WARNING The checkpoint's class groups of 2 of 5 classes differ")


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (ClassGroups.from_counts([5, 12]), "2 classes and the model 3.*NUM_CLASSES"),
        (ClassGroups.from_counts([5, 12, 13], (10,)), r"thresholds \(10,\).*GROUP_THRESHOLDS"),
        (ClassGroups.undetermined(3, (10, 100, 1000), "x"), r"1\.\.4, the checkpoint has 0\.\.0"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_loading_a_grouping_that_cannot_fit_raises(saved, message, strict):
    groups = ClassGroups.from_counts([5, 12, 13])
    with pytest.raises(RuntimeError, match=message):
        groups.load_state_dict(saved.state_dict(), strict=strict)
    assert _same(groups, ClassGroups.from_counts([5, 12, 13]))


@pytest.mark.parametrize("bad", [0, 5, -1])
def test_loading_groups_out_of_range_raises(bad):
    groups = ClassGroups.from_counts([5, 12, 13])
    state = {k: v.clone() for k, v in groups.state_dict().items()}
    state["class_to_group"][1] = bad
    with pytest.raises(RuntimeError, match=r"groups must lie in 1\.\.4"):
        groups.load_state_dict(state)


def test_an_undetermined_placeholder_has_the_width_and_raises_its_reason():
    groups = ClassGroups.undetermined(5, (10, 100, 1000), "The file 'x.json' is gone.")
    assert not groups.is_determined
    assert groups.num_logits == 11
    with pytest.raises(ConfigError, match=r"The file 'x\.json' is gone\..*CLASS_COUNTS_FILE"):
        groups.require_determined()
    assert "undetermined" in repr(groups)


def test_an_undetermined_placeholder_is_filled_silently_by_a_checkpoint(log_lines):
    warnings = log_lines("bags_d2.modeling.class_groups")
    saved = ClassGroups.from_counts([5, 12, 2000, 7, 150])
    groups = ClassGroups.undetermined(5, (10, 100, 1000), "Gone.")
    groups.load_state_dict(saved.state_dict())
    groups.require_determined()
    assert _same(groups, saved)
    assert warnings == []


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize(
    "groups",
    [ClassGroups.from_counts([5, 12, 2000]), ClassGroups.undetermined(3, (10, 100, 1000), "Gone.")],
    ids=["determined", "undetermined"],
)
def test_copies_are_equal_and_independent(groups, clone):
    copied = clone(groups)
    assert _same(copied, groups)
    copied.load_state_dict(ClassGroups.from_counts([2000, 5, 5]).state_dict())
    assert not torch.equal(copied.class_to_group, groups.class_to_group)
    assert copied.sizes != groups.sizes


def test_casting_the_model_keeps_the_map():
    groups = ClassGroups.from_counts([5, 12]).half()
    assert groups.class_to_column.dtype == torch.long
    assert groups.class_counts.tolist() == [5, 12]
