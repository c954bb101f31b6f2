"""Class groups of a data set: what they hold, what is odd, and what would fit."""

import json

import numpy as np
import pytest
from commands import bags_d2_here
from hypothesis import given
from hypothesis import strategies as st

from bags_d2.analysis.grouping import (
    bin_names,
    choose_thresholds,
    grouping_faults,
    propose_thresholds,
    summarize_groups,
)
from bags_d2.analysis.plots import plot_class_counts
from bags_d2.data.lvis_v1 import lvis_v1_counts

COUNTS = st.lists(st.one_of(st.integers(0, 30), st.integers(0, 100_000)), min_size=1, max_size=60)


def test_the_papers_edges_stay_unless_they_make_no_sense():
    assert choose_thresholds([3, 5, 20, 50, 300, 500, 2000, 5000]) == (10, 100, 1000)
    assert choose_thresholds([3, 5, 20, 50, 300, 500]) == (10, 100)
    assert choose_thresholds([0, 0]) == ()


@given(COUNTS)
def test_edges_are_those_that_groups_would_propose(counts):
    edges = choose_thresholds(counts)
    assert edges in ((10, 100, 1000), propose_thresholds(counts))
    assert (edges == (10, 100, 1000)) or grouping_faults(counts, (10, 100, 1000))


def test_ranges_in_words():
    assert bin_names((10, 100, 1000)) == ["0-9", "10-99", "100-999", "1000+"]
    assert bin_names(()) == ["0+"]
    assert bin_names((1, 2)) == ["0", "1", "2+"]


@given(COUNTS)
def test_groups_share_out_classes_and_instances(counts):
    groups = summarize_groups(counts, (10, 100))
    assert sorted(c for g in groups for c in g.classes) == list(range(len(counts)))
    assert sum(g.instances for g in groups) == sum(counts)
    for g, low, high in zip(groups, (0, 10, 100), (10, 100, np.inf), strict=True):
        own = [counts[c] for c in g.classes]
        assert own == sorted(own)
        assert all(low <= n < high for n in own)


@given(COUNTS)
def test_proposed_groups_ascend_and_have_two_classes_or_more(counts):
    edges = propose_thresholds(counts)
    assert list(edges) == sorted(set(edges))
    assert len(edges) <= 3
    sizes = [len(g.classes) for g in summarize_groups(counts, edges)]
    assert not edges or min(sizes) >= 2


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([3, 5, 20, 30, 200, 300, 2000, 3000], (10, 100, 1000)),
        ([0, 0, 0], ()),
        ([50] * 9, ()),
        ([110, 120, 900, 950], (500,)),  # within one power of ten, yet eightfold
        ([4, 5, 6, 7, 50_000], ()),  # the one frequent class would be alone
    ],
)
def test_proposals_are_round_numbers(counts, expected):
    assert propose_thresholds(counts) == expected


def test_lvis_v1_gets_the_papers_edges_and_no_complaint():
    counts = lvis_v1_counts()["instance_count"]
    assert propose_thresholds(counts) == (10, 100, 1000)
    assert grouping_faults(counts, (10, 100, 1000)) == []
    assert [len(g.classes) for g in summarize_groups(counts, (10, 100, 1000))] == [
        *(200, 412, 334, 257)
    ]


def test_faults_are_named():
    faults = grouping_faults([1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 5000], (10, 100, 1000))
    assert len(faults) == 4
    assert "No class has 10-99" in faults[1]
    assert "11 of 12 classes have 0-9" in faults[0]
    assert "One class alone has 1000+" in faults[3]
    assert grouping_faults([1, 2, 20, 30], ()) == []


@pytest.mark.parametrize("counts", [[0, 0], [0, 5, 5000], [7], list(range(2000))])
def test_curves_of_any_counts_are_drawn(counts, tmp_path):
    plot_class_counts(counts, (10, 100, 1000), tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text()
    assert "<svg" in text


def run(*arguments):
    return bags_d2_here("groups", *arguments)


def test_the_tool_on_a_file_of_any_ids_and_names(write_lvis, tmp_path):
    categories = {5: "ant", 17: "bee", 300: "cat", 301: "dog"}
    annotations = [(1, 17)] * 3 + [(2, 300)] * 40 + [(3, 301)] * 50
    path = write_lvis(categories, annotations)
    done = run("--json", path, "--output", tmp_path / "groups.png")
    assert done.returncode == 0, done.stderr
    assert "bee (3) | cat (40)" in done.stdout
    assert "1 class has none and cannot be learned: ant" in done.stdout
    assert "No class has 100-999" in done.stdout
    assert "MODEL.BAGS.GROUP_THRESHOLDS '(10,)'  (groups of 2, 2 classes)" in done.stdout
    assert (tmp_path / "groups.png").stat().st_size > 1000
    by_images = run("--json", path, "--by", "images", "--thresholds", "1")
    assert "training images" in by_images.stdout


def test_the_tool_refuses_faulty_input_in_one_sentence(tmp_path):
    (tmp_path / "counts.json").write_text(json.dumps([1, -2]))
    for arguments, words in (
        (("--json", "none.json"), "'none.json' does not exist"),
        (("--counts", tmp_path / "counts.json"), "whole numbers of 0 or more"),
        (("--config-file", "none.yaml"), "'none.yaml' does not exist"),
        (("--json", tmp_path / "counts.json"), "not a COCO or LVIS annotation file"),
    ):
        done = run(*arguments)
        assert done.returncode == 1
        assert words in done.stderr
        assert "Traceback" not in done.stderr
