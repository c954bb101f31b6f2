"""Intervals of a comparison, from the detections that its runs left."""

import csv
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from bags_d2 import ConfigError, DataError, MissingFileError
from bags_d2.analysis.comparison import add_intervals, interval_table
from bags_d2.analysis.intervals import bootstrap_runs
from bags_d2.data import register_lvis_format

NUM_DRAWS = 40


@pytest.fixture
def compared(write_lvis, tmp_path, request):
    """``compared(method, detections)``: a run; and the name of its data set."""
    images = {i: [(i, 1 + i % 2)] for i in range(1, 9)}
    path = write_lvis({1: "a", 2: "b"}, [pair for pairs in images.values() for pair in pairs])
    name = f"intervals_{request.node.name}"
    register_lvis_format(name, path, str(tmp_path))

    def make(method, found, seed=1):
        results = tmp_path / method / f"seed{seed}" / "inference" / "results.json"
        folder = results.parent / name
        folder.mkdir(parents=True)
        detections = [
            {"image_id": i, "category_id": 1 + i % 2, "bbox": [1, 2, 3, 4], "score": 0.9}
            for i in found
        ]
        (folder / "lvis_instances_results.json").write_text(json.dumps(detections))
        with (folder / "per_class_bbox.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["name", "training_instances"], ["a", 5], ["b", 50]])
        return SimpleNamespace(method=method, results_file=results)

    yield make, name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_draws_are_the_same_for_all_and_kept(compared):
    make, name = compared
    runs = [make("all", range(1, 9)), make("half", range(1, 5), 1), make("half", range(1, 9), 2)]
    draws = bootstrap_runs(runs, name, num_draws=NUM_DRAWS)
    assert set(draws) == {"all", "half"}
    np.testing.assert_allclose(draws["all"]["AP"], 100.0)
    assert draws["all"]["bAP"].shape == (NUM_DRAWS,)
    # The mean of a seed that finds everything, and of one that finds half of it.
    halves = draws["half"]["AP"]
    assert 50.0 < halves.min() < halves.max() <= 100.0
    kept = list(Path(runs[1].results_file).parent.glob("bootstrap_bbox_*.npz"))
    assert len(kept) == 1
    again = bootstrap_runs(runs, name, num_draws=NUM_DRAWS)
    np.testing.assert_array_equal(again["half"]["AP"], halves)
    # Other detections are matched anew.
    detections = runs[1].results_file.parent / name / "lvis_instances_results.json"
    detections.write_text("[]")
    later = kept[0].stat().st_mtime + 10
    os.utime(detections, (later, later))
    assert bootstrap_runs(runs, name, num_draws=NUM_DRAWS)["half"]["AP"].mean() < halves.mean()


def test_what_is_missing_or_damaged_is_named(compared):
    make, name = compared
    run = make("all", [1])
    folder = run.results_file.parent / name
    (folder / "per_class_bbox.csv").write_text("name,training_instances\na,\n")
    with pytest.raises(DataError, match=r"per_class_bbox\.csv' has no training instances"):
        bootstrap_runs([run], name, num_draws=3)
    (folder / "lvis_instances_results.json").unlink()
    with pytest.raises(MissingFileError, match="which intervals need"):
        bootstrap_runs([run], name, num_draws=3)


def test_differences_are_paired_and_centred_on_what_was_measured():
    hard = np.linspace(-5, 5, 101)  # what the choice of images does to both methods
    draws = {m: dict.fromkeys(("AP", "bAP"), 31.0 + d + hard) for m, d in (("a", 0), ("b", 2))}
    rows = [
        {"method": m, "seeds": [1], "AP": {"mean": v}, "bAP": {"mean": v}}
        for m, v in (("a", 30.0), ("b", 32.0))
    ]
    add_intervals(rows, draws, "a")
    assert rows[1]["intervals"]["AP_difference"] == pytest.approx((2.0, 2.0))
    assert rows[1]["intervals"]["bAP"] == pytest.approx((32 - 4.75, 32 + 4.75))
    line = interval_table(rows, "a").splitlines()[-1]
    assert "32.0 [27.2, 36.8]" in line
    assert "+2.0 [+2.0, +2.0]" in line
    with pytest.raises(ConfigError, match="--against 'c' is none of the methods a, b"):
        add_intervals(rows, draws, "c")
