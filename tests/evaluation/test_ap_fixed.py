"""AP-fixed against lvis-api on the best detections of each class, chosen the obvious way."""

import json
import math
from collections import defaultdict

import pytest
from detectron2.engine import launch
from detectron2.utils import comm
from lvis_reference import evaluate_with_lvis_api, random_lvis_set
from test_lvis_evaluation import category_ids_of, model_results, register, run

from bags_d2 import BAGSTrainer, ConfigError
from bags_d2.evaluation import LongTailLVISEvaluator
from bags_d2.evaluation.ap_fixed import BestDetections
from bags_d2.evaluation.detections import to_rows

NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"]
NO_CAP = 10**6


def best_of_classes(detections, per_class):
    """Of each class the best, ties by image and then as the detector gave them.

    Some are without area, and take a place all the same.
    """
    of_class = defaultdict(list)
    for position, d in enumerate(detections):
        of_class[d["category_id"]].append((-d["score"], d["image_id"], position, d))
    return [
        row[-1]
        for rows in of_class.values()
        for row in sorted(rows, key=lambda row: row[:3])[:per_class]
    ]


@pytest.mark.parametrize("per_class", [5, 20, 10_000])
@pytest.mark.parametrize("seed", range(4))
def test_boxes_equal_lvis_api_on_the_best_of_each_class(seed, per_class, tmp_path):
    json_file, detections = random_lvis_set(seed, tmp_path)
    evaluator = LongTailLVISEvaluator(
        register(json_file), ("bbox",), detections_per_class=per_class
    )
    metrics = run(evaluator, model_results(json_file, detections, masks=False, seed=seed))
    kept = best_of_classes(detections, per_class)
    reference, _ = evaluate_with_lvis_api(json_file, kept, "bbox", NO_CAP)
    expected = {n: 100 * reference[n] if reference[n] > -1 else math.nan for n in NAMES}
    got = {n: metrics["bbox_fixed"][n] for n in NAMES}
    assert got == pytest.approx(expected, rel=0, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("per_class", [5, 20, 10_000])
@pytest.mark.parametrize("seed", [4, 5])
def test_masks_equal_lvis_api(seed, per_class, tmp_path):
    json_file, detections = random_lvis_set(seed, tmp_path)
    evaluator = LongTailLVISEvaluator(register(json_file), detections_per_class=per_class)
    metrics = run(evaluator, model_results(json_file, detections, seed=seed))
    assert list(metrics) == ["bbox", "bbox_fixed", "segm", "segm_fixed"]
    kept = best_of_classes(detections, per_class)
    for task in ("bbox", "segm"):
        reference, _ = evaluate_with_lvis_api(json_file, kept, task, NO_CAP)
        expected = {n: 100 * reference[n] if reference[n] > -1 else math.nan for n in NAMES}
        got = {n: metrics[f"{task}_fixed"][n] for n in NAMES}
        assert got == pytest.approx(expected, rel=0, abs=1e-6, nan_ok=True)


def test_the_usual_measures_still_take_300_of_an_image(tmp_path):
    json_file, detections = random_lvis_set(2, tmp_path)
    per_image = defaultdict(int)
    for detection in detections:
        per_image[detection["image_id"]] += 1
    assert max(per_image.values()) > 300
    usual = run(
        LongTailLVISEvaluator(register(json_file), ("bbox",)),
        model_results(json_file, detections, masks=False),
    )
    both = run(
        LongTailLVISEvaluator(register(json_file), ("bbox",), detections_per_class=10_000),
        model_results(json_file, detections, masks=False),
    )
    assert both["bbox"] == pytest.approx(usual["bbox"], nan_ok=True)
    assert both["bbox_fixed"]["AP"] != both["bbox"]["AP"]


def test_bins_and_the_table_of_classes_are_there_too(tmp_path):
    json_file, detections = random_lvis_set(7, tmp_path)
    counts = [3**i for i in range(len(category_ids_of(json_file)))]
    evaluator = LongTailLVISEvaluator(
        register(json_file),
        ("bbox",),
        output_dir=str(tmp_path / "out"),
        class_counts=counts,
        detections_per_class=50,
    )
    metrics = run(evaluator, model_results(json_file, detections, masks=False))
    assert {"AP1", "AP4", "bAP"} <= metrics["bbox_fixed"].keys()
    assert (tmp_path / "out" / "per_class_bbox_fixed.csv").is_file()


def test_no_detections(tmp_path):
    json_file, _ = random_lvis_set(8, tmp_path)
    evaluator = LongTailLVISEvaluator(register(json_file), ("bbox",), detections_per_class=50)
    metrics = run(evaluator, model_results(json_file, [], masks=False))
    assert metrics["bbox_fixed"]["AP"] == metrics["bbox"]["AP"] == 0


def _evaluate_shard(json_file, detections, output_file):
    evaluator = LongTailLVISEvaluator(register(json_file), ("bbox",), detections_per_class=7)
    evaluator.reset()
    for i, (inputs, outputs) in enumerate(model_results(json_file, detections, masks=False)):
        if i % comm.get_world_size() == comm.get_rank():
            evaluator.process(inputs, outputs)
    results = evaluator.evaluate()
    if comm.is_main_process():
        output_file.write_text(json.dumps(results))


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(tmp_path):
    json_file, detections = random_lvis_set(9, tmp_path)
    for processes in (1, 2):
        arguments = (json_file, detections, tmp_path / f"{processes}.json")
        launch(_evaluate_shard, processes, dist_url="auto", args=arguments)
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    assert two["bbox_fixed"] == pytest.approx(one["bbox_fixed"], rel=0, abs=0, nan_ok=True)


def test_what_is_kept_does_not_depend_on_the_order_and_stays_small():
    def detection(image, category, x):
        score = 0.1 * (image % 5)
        return {"image_id": image, "category_id": category, "score": score, "bbox": [x, 0, 1, 1]}

    images = {i: [detection(i, c, x) for x, c in enumerate((1, 1, 2))] for i in range(40)}
    orders = [list(images), list(images)[::-1]]
    kept = []
    for order in orders:
        best = BestDetections(per_class=6)
        for image in order:
            best.add(*to_rows(images[image], ()))
            assert sum(map(len, [best._kept[0], *(rows for rows, _ in best._new)])) < 2 * 2 * 6
        rows, _ = best.detections()
        kept.append(rows.tolist())
        assert best.num_full_classes() == 2
    assert kept[0] == kept[1]
    of_class = {c: [(row[0], row[1]) for row in kept[0] if row[6] == c] for c in (1, 2)}
    assert of_class[1] == [(4, 0), (4, 1), (9, 0), (9, 1), (14, 0), (14, 1)]
    assert of_class[2] == [(4, 2), (9, 2), (14, 2), (19, 2), (24, 2), (29, 2)]


def test_an_image_that_two_processes_saw_counts_once():
    parts = []
    for images in ((1, 2), (2, 3)):
        parts.append(BestDetections(per_class=10))
        for image in images:
            found = {"image_id": image, "category_id": 1, "score": 0.5, "bbox": [image, 0, 1, 1]}
            parts[-1].add(*to_rows([found], ()))
    rows, _ = BestDetections.merge(parts, [{1, 2}, {2, 3}]).detections()
    assert rows[:, 0].tolist() == [1, 2, 3]


def test_the_config_switches_it_on(tiny_cfg, tmp_path):
    json_file, _ = random_lvis_set(0, tmp_path)
    name = register(json_file)
    cfg = tiny_cfg("TEST.LVIS_AP_FIXED", True, "TEST.DETECTIONS_PER_CLASS", 77)
    evaluator = BAGSTrainer.build_evaluator(cfg, name, str(tmp_path))
    assert evaluator._detections_per_class == 77
    cfg = tiny_cfg("TEST.LVIS_AP_FIXED", True, "TEST.DETECTIONS_PER_CLASS", 0)
    with pytest.raises(ConfigError, match=r"TEST\.DETECTIONS_PER_CLASS\) is 0"):
        BAGSTrainer.build_evaluator(cfg, name, str(tmp_path))
    with pytest.raises(ConfigError, match=r"TEST\.LVIS_AP_FIXED is a measure of LVIS"):
        BAGSTrainer.build_evaluator(
            tiny_cfg("TEST.LVIS_AP_FIXED", True), "coco_2017_val", str(tmp_path)
        )
