"""Whatever a run's folder holds: the project's own errors or a report, and nothing is run."""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import time

import cv2
import numpy as np
import pytest
from run_folders import write_run

from bags_d2 import BagsError, DataError
from bags_d2.analysis.detections import winning_classes, winning_groups
from bags_d2.analysis.report import write_html_report
from bags_d2.analysis.runs import (
    configured_thresholds,
    loss_history,
    read_ground_truth,
    read_run,
    register_data_sets,
)
from bags_d2.data import register_lvis_format

NAMES = {
    3: "$x_{1$ ant",
    8: "bee\nor\u202ewasp",
    20: "<script>alert(1)</script>" * 8,
    21: "שלום",
}
COUNTS = {3: 0, 8: 50, 20: 700, 21: 5000}
CSV, RESULTS = "inference/fuzz_val/per_class_bbox.csv", "inference/results.json"
DETECTIONS = "inference/fuzz_val/lvis_instances_results.json"
LABELS = "inference/fuzz_val/label_check.csv"
FILES = ["config.yaml", "metrics.json", "model_final.pth", CSV, RESULTS, DETECTIONS, LABELS]

BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(c + 1)}: &{chr(c + 1)} [{', '.join([f'*{chr(c)}'] * 9)}]\n" for c in range(97, 110)
)
HOSTILE = [
    b"",
    b"\x00\xff\xfe\x80" * 50,
    b"null",
    b"[]",
    b"{}",
    b'"text"',
    b"7",
    b"[1, [2], {}, null]",
    b"[" * 100_000,
    b"a: {" * 5000,
    b"1" * 6000,
    b'{"bbox": 5}',
    b'{"bbox": {"AP": "\\ud800", "AP1": NaN, "AP2": Infinity, "AP3": [1], "AP4": 1e999}}',
    b'{"fuzz_val": [], "bbox": []}',
    b'{"iteration": 5, "loss_cls": NaN}\n{"iteration": "x", "total_loss": 1}\n{"iter',
    b'{"iteration": 1e300, "loss_a": 1}\n{"iteration": 5, "loss_b": [1], "loss_c": ' + b"9" * 400,
    b'{"iteration": 3, "loss_\\ud800$_{": 1e5, "total_loss": -2}\n[1]\n7\nnull\n' + b"[" * 9999,
    b'[{"image_id": "1", "category_id": "8", "bbox": [1, 2, 3, 4], "score": 0.5}]',
    b'[{"image_id": 1, "category_id": 8, "bbox": [1e300, NaN, -3, 4], "score": 0.5}]',
    b'[{"image_id": [1], "category_id": {}, "bbox": [1, 2, 3, 4], "score": "high"}]',
    b'[{"image_id": 1, "category_id": 77, "bbox": [9e11, -9e11, 0, 0], "score": -9e11}]',
    b'[{"image_id": 1, "category_id": 3, "bbox": [9e11, -9e11, 9e11, 1], "score": 1}]',
    b"category_id,name\n1,a\n",
    b"category_id,name,frequency,training_instances,validation_instances,AP,AP50\n",
    b"category_id,name,frequency,training_instances,validation_instances,AP,AP50\n"
    b"x,a,,1e400,1,inf,\nx,b,,-5,1,1,1\n",
    b'category_id,name,frequency,training_instances,validation_instances,AP,AP50\n"'
    + b"a" * 140_000,
    "category_id,name,frequency,training_instances,validation_instances,AP,AP50\n"
    "cat,\u202eevil,,5,1,1,1\n_d,$\\frac{,,,1,,\n".encode(),
    BOMB.encode(),
    b"MODEL: {BAGS: {GROUP_THRESHOLDS: [5, 1]}, WEIGHTS: 7}\n? [1, 2]\n: x\n",
    b"MODEL: {BAGS: {GROUP_THRESHOLDS: [.nan, {}]}, WEIGHTS: [x]}\nDATASETS: {REGISTER: [[1]]}\n",
    b"MODEL: {WEIGHTS: /dev/zero}\nDATASETS: {REGISTER: {a: b}}\n",
    b"DATASETS: 3\nMODEL: [\xff\n",
]
TAGS = [
    "!!python/object/apply:os.system ['touch {marker}']",
    "MODEL: {WEIGHTS: !!python/object/apply:os.mkdir ['{marker}']}",
    "OUTPUT_DIR: !!python/object/new:os.system ['touch {marker}']",
]


@pytest.fixture
def run(tmp_path, write_lvis, register):
    for i in (1, 2):
        cv2.imwrite(str(tmp_path / f"{i}.jpg"), np.full((20, 30, 3), 99, np.uint8))
    annotations = write_lvis(NAMES, [(1, 3), (1, 8), (2, 20), (2, 21)])
    dataset = register("fuzz_val", annotations, str(tmp_path))
    boxes = [
        {"image_id": 1, "category_id": 8, "bbox": [1, 2, 3, 4], "score": 0.5},
        {"image_id": 2, "category_id": 20, "bbox": [15, 10, 3, 4], "score": 0.9},
    ]
    measures = {"AP": 10.0, "AP50": None}
    folder = tmp_path / "$run_\udcff"
    write_run(folder, dataset, NAMES, COUNTS, [1.0, None, 30.0, 40.0], boxes, measures)
    (folder / "config.yaml").write_text("MODEL: {BAGS: {GROUP_THRESHOLDS: [5, 50]}}\n")
    (folder / "metrics.json").write_text('{"iteration": 1, "total_loss": 2.0}\n')
    header = "annotation_id,name,probability,model_name,model_probability,contradiction"
    (folder / LABELS).write_text(f"{header}\n1,ant,0.1,bee,0.9,2.5\n")
    return folder


def read_all(folder):
    """All that report and compare_runs read of a run."""
    register_data_sets(folder)
    run = read_run(folder)
    thresholds = configured_thresholds([run])
    loss_history(folder)
    if run.label_check_file.exists():
        run.label_check(most=5)
    truth = [a for image in read_ground_truth(run).values() for a in image["annotations"]]
    if run.is_counted:
        run.bin_measures(thresholds)
        winning_groups(truth, winning_classes(truth, run.detections()), run.count_of, thresholds)
    return run


@contextlib.contextmanager
def limited_memory(megabytes):
    """Memory beyond what is in use that may be asked for."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def hostile_files(folder, seed):
    """Replace files of a folder, one after the other; put them back."""
    rng = random.Random(seed)
    marker = folder.parent / "marker"
    contents = [*HOSTILE, *(tag.replace("{marker}", str(marker)).encode() for tag in TAGS)]
    for name in FILES:
        path = folder / name
        good = path.read_bytes() if path.is_file() else None
        cuts = [good[: rng.randrange(len(good))] for _ in range(3)] if good else []
        flips = [bytearray(good) for _ in range(6)] if good else []
        for flipped in flips:
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        for content in [*contents, *cuts, *map(bytes, flips), "folder", "fifo"]:
            path.unlink(missing_ok=True)
            if content == "folder":
                path.mkdir()
            elif content == "fifo":
                os.mkfifo(path)
            else:
                path.write_bytes(content)
            yield f"{name}: {content[:60]!r}"
            path.rmdir() if content == "folder" else path.unlink()
            if good is not None:
                path.write_bytes(good)
    assert not marker.exists()


def test_nothing_but_own_errors_comes_out_of_a_run_folder(run, tmp_path):
    tried, refused, sentences = 0, 0, ""
    with limited_memory(1500):
        for what in hostile_files(run, seed=0):
            tried += 1
            try:
                read_all(run)
            except BagsError as error:
                refused += 1
                sentences = str(error)
            except Exception as error:
                pytest.fail(f"{what}: {error!r}")
            assert "\n" not in sentences, what
    assert tried > 200
    assert 0.2 < refused / tried < 0.9
    read_all(run)  # all was put back


def test_reports_on_hostile_folders_are_written_or_refused(run, tmp_path):
    page = tmp_path / "report.html"
    written = 0
    rng = random.Random(1)
    for what in hostile_files(run, seed=1):
        if rng.random() > 0.04:
            continue
        try:
            write_html_report([read_run(run)], page, max_crops=3)
        except BagsError:
            continue
        except Exception as error:
            pytest.fail(f"{what}: {error!r}")
        written += 1
        assert "<script>alert" not in page.read_text(encoding="utf-8")
    assert written >= 5


def test_ids_may_be_text(tmp_path, register):
    annotations = tmp_path / "text.json"
    content = {
        "categories": [{"id": "owl", "name": "Owl"}, {"id": "7", "name": "Seven"}],
        "images": [{"id": "first", "file_name": "1.jpg", "height": 20, "width": 30}],
        "annotations": [
            {"id": i, "image_id": "first", "category_id": c, "bbox": [1, 2, 3, 4], "iscrowd": 0}
            for i, c in enumerate(("owl", "7"))
        ],
    }
    annotations.write_text(json.dumps(content))
    register("text_val", str(annotations), str(tmp_path))
    box = {"image_id": "first", "category_id": "owl", "bbox": [1, 2, 3, 4], "score": 0.9}
    names, counts = {"owl": "Owl", "7": "Seven"}, {"owl": 5, "7": 50}
    folder = tmp_path / "run"
    write_run(folder, "text_val", names, counts, [50.0, 0.0], [box], {"AP": 25.0})
    run = read_all(folder)
    assert run.category_ids == ["owl", 7]
    truth = read_ground_truth(run)["first"]["annotations"]
    winners = winning_classes(truth, run.detections())
    matrix = winning_groups(truth, winners, run.count_of, (10,))
    assert matrix.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]


def _write_for_ever(folder, annotations, page):
    register_lvis_format("fuzz_val", annotations, os.path.dirname(annotations))
    run = read_run(folder)
    while True:
        write_html_report([run], page)


@pytest.mark.slow
def test_a_killed_report_leaves_the_one_before_it_whole(run, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bags_d2.analysis.report"])
    page = tmp_path / "report.html"
    page.write_text("before</html>")
    rng = random.Random(0)
    versions = set()
    for _ in range(5):
        arguments = (run, str(tmp_path / "annotations.json"), page)
        process = context.Process(target=_write_for_ever, args=arguments)
        process.start()
        before, deadline = page.stat().st_mtime_ns, time.monotonic() + 120
        while page.stat().st_mtime_ns == before and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.join()
        content = page.read_text(encoding="utf-8").rstrip()
        assert content.endswith("</html>")
        versions.add(content)
    assert versions != {"before</html>"}


def test_a_full_disk_leaves_the_report_before_it(run, tmp_path):
    page = tmp_path / "report.html"
    write_html_report([read_run(run)], page)
    before = page.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"'.*report\.html' could not be written"):
            write_html_report([read_run(run)], page)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert page.read_bytes() == before
    assert [path.name for path in tmp_path.glob("*.partial")] == []
