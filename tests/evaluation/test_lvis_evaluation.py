import csv
import errno
import json
import logging
import math
import uuid
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pycocotools.mask as mask_utils
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import launch
from detectron2.evaluation import print_csv_format
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from lvis_reference import HEIGHT, WIDTH, evaluate_with_lvis_api, random_lvis_set
from test_bins import slow_ap_per_bin

from bags_d2 import DataError, MissingFileError
from bags_d2.evaluation import (
    AnnotationError,
    LongTailLVISEvaluator,
    PredictionError,
    evaluate_lvis_predictions,
)

LVIS_MEASURES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"]
LVIS_MEASURES += [f"AR{size}@300" for size in ("", "s", "m", "l")]


def sizes(seed):
    return {"num_images": 5 + seed % 4, "num_classes": 8 + seed % 8}


def in_percent(value):
    return 100 * value if value > -1 else math.nan


def register(json_file, **metadata):
    name = f"test_lvis_{uuid.uuid4().hex}"
    MetadataCatalog.get(name).set(json_file=str(json_file), evaluator_type="lvis", **metadata)
    return name


def category_ids_of(json_file):
    return sorted(c["id"] for c in json.loads(json_file.read_text())["categories"])


def model_results(json_file, detections, masks=True, class_of=None, seed=0):
    """The model inputs and outputs behind some detections, image by image in random order."""
    class_of = class_of or {c: i for i, c in enumerate(category_ids_of(json_file))}
    by_image = defaultdict(list)
    for detection in detections:
        by_image[detection["image_id"]].append(detection)
    images = json.loads(json_file.read_text())["images"]
    for i in np.random.default_rng(seed).permutation(len(images)):
        image_id = images[i]["id"]
        found = by_image[image_id]
        boxes = torch.tensor([d["bbox"] for d in found], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances = Instances((HEIGHT, WIDTH))
        instances.pred_boxes = Boxes(boxes)
        instances.scores = torch.tensor([d["score"] for d in found])
        instances.pred_classes = torch.tensor(
            [class_of[d["category_id"]] for d in found], dtype=torch.int64
        )
        if masks:
            decoded = [mask_utils.decode(d["segmentation"]) for d in found]
            instances.pred_masks = torch.from_numpy(
                np.array(decoded, dtype=bool).reshape(-1, HEIGHT, WIDTH)
            )
        yield [{"image_id": image_id}], [{"instances": instances}]


def run(evaluator, results):
    evaluator.reset()
    for inputs, outputs in results:
        evaluator.process(inputs, outputs)
    return evaluator.evaluate()


def assert_equals_lvis_api(metrics, reference):
    expected = {name: in_percent(reference[name]) for name in LVIS_MEASURES}
    got = {name: metrics[name] for name in LVIS_MEASURES}
    assert got == pytest.approx(expected, rel=0, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("seed", range(14))
def test_evaluator_equals_lvis_api(seed, tmp_path):
    json_file, detections = random_lvis_set(seed, tmp_path, **sizes(seed))
    num_classes = len(category_ids_of(json_file))
    counts = np.random.default_rng(seed).choice([3, 9, 10, 99, 100, 999, 1000], num_classes)
    output_dir = tmp_path / "out"
    evaluator = LongTailLVISEvaluator(
        register(json_file), output_dir=str(output_dir), class_counts=counts.tolist()
    )
    results = run(evaluator, model_results(json_file, detections, seed=seed))
    assert list(results) == ["bbox", "segm"]

    for task, metrics in results.items():
        reference, precision = evaluate_with_lvis_api(json_file, detections, task)
        assert_equals_lvis_api(metrics, reference)
        ap = [
            100 * p.mean() if p.min() > -1 else math.nan
            for p in np.moveaxis(precision, 2, 0)[:, :, :, 0]
        ]
        expected = slow_ap_per_bin(ap, counts, (10, 100, 1000))
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, nan_ok=True)
        defined = [value for value in expected.values() if not math.isnan(value)]
        assert metrics["bAP"] == pytest.approx(sum(defined) / len(defined))
        with (output_dir / f"per_class_{task}.csv").open() as file:
            written = [float(row["AP"] or "nan") for row in csv.DictReader(file)]
        assert written == pytest.approx(ap, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("max_dets", [300, 40])
def test_function_equals_lvis_api(task, max_dets, tmp_path):
    json_file, detections = random_lvis_set(20, tmp_path)
    reference, _ = evaluate_with_lvis_api(json_file, detections, task, max_dets)
    metrics = evaluate_lvis_predictions(json_file, detections, task, max_dets_per_image=max_dets)
    names = [name.replace("@300", f"@{max_dets}") for name in LVIS_MEASURES]
    assert list(metrics) == names
    assert metrics == pytest.approx(
        {name: in_percent(reference[name]) for name in names}, rel=0, abs=1e-6, nan_ok=True
    )


def test_random_sets_have_the_hard_cases(tmp_path):
    """The comparison above is worth what the data contain."""
    json_file, detections = random_lvis_set(1, tmp_path)
    data = json.loads(json_file.read_text())
    per_image = defaultdict(list)
    for detection in detections:
        per_image[detection["image_id"]].append(detection["score"])
    assert max(map(len, per_image.values())) > 300
    assert len(per_image) < len(data["images"])
    assert any(len(set(scores)) < len(scores) for scores in per_image.values())
    assert any(a["area"] == 0 for a in data["annotations"])
    assert any(
        a["ignore"]
        for s in range(14)
        for a in json.loads(random_lvis_set(s, tmp_path)[0].read_text())["annotations"]
    )
    assert any(d["bbox"][2] * d["bbox"][3] == 0 for d in detections)
    assert any(image["not_exhaustive_category_ids"] for image in data["images"])
    assert {a["category_id"] for a in data["annotations"]} < set(category_ids_of(json_file))


def test_class_order_of_metadata(tmp_path):
    """Contiguous classes in another order than the category ids change no result."""
    json_file, detections = random_lvis_set(3, tmp_path)
    ids = category_ids_of(json_file)
    counts = np.arange(len(ids)) * 37
    shuffled = np.random.default_rng(0).permutation(ids).tolist()
    class_of = {category: i for i, category in enumerate(shuffled)}
    shuffled_counts = torch.zeros(len(ids), dtype=torch.int64)
    for category, count in zip(ids, counts, strict=True):
        shuffled_counts[class_of[category]] = int(count)
    evaluator = LongTailLVISEvaluator(
        register(json_file, thing_dataset_id_to_contiguous_id=class_of),
        tasks=("bbox",),
        output_dir=str(tmp_path / "out"),
        class_counts=shuffled_counts,
    )
    metrics = run(evaluator, model_results(json_file, detections, class_of=class_of))["bbox"]
    assert metrics == pytest.approx(
        evaluate_lvis_predictions(json_file, detections, class_counts=counts), nan_ok=True
    )
    with (tmp_path / "out" / "per_class_bbox.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["category_id"]) for row in rows] == ids
    assert [int(row["training_instances"]) for row in rows] == counts.tolist()


def test_written_files(tmp_path):
    json_file, detections = random_lvis_set(4, tmp_path)
    evaluator = LongTailLVISEvaluator(register(json_file), output_dir=str(tmp_path / "out"))
    metrics = run(evaluator, model_results(json_file, detections))
    written = json.loads((tmp_path / "out" / "lvis_instances_results.json").read_text())
    assert len(written) == len(detections)
    for task in ("bbox", "segm"):
        assert evaluate_lvis_predictions(json_file, written, task) == pytest.approx(
            metrics[task], nan_ok=True
        )

    data = json.loads(json_file.read_text())
    with (tmp_path / "out" / "per_class_segm.csv").open() as file:
        rows = {int(row["category_id"]): row for row in csv.DictReader(file)}
    for category in data["categories"]:
        row = rows[category["id"]]
        instances = sum(
            a["category_id"] == category["id"] and a["area"] > 0 for a in data["annotations"]
        )
        assert row["name"] == category["name"]
        assert row["frequency"] == category["frequency"]
        assert row["training_instances"] == ""
        assert int(row["validation_instances"]) == instances
        if not instances:
            assert row["AP"] == row["AP50"] == ""


def test_results_file_appears_whole(tmp_path):
    """And an evaluation that ends early leaves that of the one before."""
    json_file, detections = random_lvis_set(4, tmp_path)
    out = tmp_path / "out"
    path = out / "lvis_instances_results.json"
    evaluator = LongTailLVISEvaluator(register(json_file), output_dir=str(out))
    results = list(model_results(json_file, detections))
    evaluator.reset()
    for inputs, outputs in results:
        evaluator.process(inputs, outputs)
        assert not path.exists()
    evaluator.evaluate()
    whole = path.read_text()
    assert len(json.loads(whole)) == len(detections)

    for _ in range(2):
        evaluator.reset()
        evaluator.process(*results[0])
    assert path.read_text() == whole
    evaluator.reset()
    evaluator.evaluate()
    assert json.loads(path.read_text()) == []
    files = ["lvis_instances_results.json", "per_class_bbox.csv", "per_class_segm.csv"]
    assert sorted(p.name for p in out.iterdir()) == files


def test_full_disk(tmp_path, monkeypatch):
    json_file, detections = random_lvis_set(4, tmp_path)
    out = tmp_path / "out"
    evaluator = LongTailLVISEvaluator(register(json_file), output_dir=str(out))
    evaluator.reset()

    def write(text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evaluator._results_file, "_file", SimpleNamespace(write=write))
    results = model_results(json_file, detections)
    inputs, outputs = next(r for r in results if len(r[1][0]["instances"]))
    with pytest.raises(DataError, match=r"results\.json' could not be written \(No space left"):
        evaluator.process(inputs, outputs)
    assert list(out.iterdir()) == []


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    json_file, detections = random_lvis_set(4, tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    run(LongTailLVISEvaluator(register(json_file)), model_results(json_file, detections))
    assert sorted(tmp_path.rglob("*")) == before


def test_evaluate_twice_and_reset(tmp_path):
    json_file, detections = random_lvis_set(5, tmp_path)
    evaluator = LongTailLVISEvaluator(register(json_file), output_dir=str(tmp_path / "out"))
    first = run(evaluator, model_results(json_file, detections))
    again = evaluator.evaluate()
    after_reset = run(evaluator, model_results(json_file, detections))
    for task, metrics in first.items():
        assert again[task] == pytest.approx(metrics, nan_ok=True)
        assert after_reset[task] == pytest.approx(metrics, nan_ok=True)
    assert json.loads((tmp_path / "out" / "lvis_instances_results.json").read_text())


def test_no_detections(tmp_path):
    json_file, _ = random_lvis_set(6, tmp_path)
    num_classes = len(category_ids_of(json_file))
    evaluator = LongTailLVISEvaluator(
        register(json_file), output_dir=str(tmp_path / "out"), class_counts=[5] * num_classes
    )
    results = run(evaluator, model_results(json_file, [], masks=False))
    assert list(results) == ["bbox"]
    metrics = results["bbox"]
    assert metrics["AP"] == metrics["AR@300"] == metrics["AP1"] == metrics["bAP"] == 0.0
    assert all(value == 0.0 or math.isnan(value) for value in metrics.values())
    assert json.loads((tmp_path / "out" / "lvis_instances_results.json").read_text()) == []
    print_csv_format(results)

    with_empty_masks = run(evaluator, model_results(json_file, [], masks=True))
    assert with_empty_masks["segm"]["AP"] == 0.0
    assert run(evaluator, [])["bbox"]["AP"] == 0.0


def test_unprocessed_images_count_as_empty(tmp_path, caplog):
    json_file, detections = random_lvis_set(7, tmp_path)
    results = list(model_results(json_file, detections))[:3]
    processed = {inputs[0]["image_id"] for inputs, _ in results}
    with caplog.at_level(logging.WARNING, "bags_d2"):
        metrics = run(LongTailLVISEvaluator(register(json_file)), results)["bbox"]
    assert "3 of 6 images were not processed" in caplog.text
    kept = [d for d in detections if d["image_id"] in processed]
    assert_equals_lvis_api(metrics, evaluate_with_lvis_api(json_file, kept, "bbox")[0])


def test_an_image_given_twice_counts_once(tmp_path, caplog):
    json_file, detections = random_lvis_set(7, tmp_path)
    results = list(model_results(json_file, detections))
    again = list(model_results(json_file, []))
    with caplog.at_level(logging.WARNING, "bags_d2"):
        metrics = run(LongTailLVISEvaluator(register(json_file)), results + again)["bbox"]
    assert "came twice" in caplog.text
    assert_equals_lvis_api(metrics, evaluate_with_lvis_api(json_file, detections, "bbox")[0])


def test_bins_need_counts_and_say_so(tmp_path, caplog):
    json_file, detections = random_lvis_set(8, tmp_path)
    with caplog.at_level(logging.INFO, "bags_d2"):
        evaluator = LongTailLVISEvaluator(register(json_file), tasks=("bbox",))
    assert "they need class_counts" in caplog.text
    assert list(run(evaluator, model_results(json_file, detections))["bbox"]) == LVIS_MEASURES


def test_set_without_annotations(tmp_path, caplog):
    json_file, detections = random_lvis_set(9, tmp_path)
    data = json.loads(json_file.read_text())
    del data["annotations"]
    for image in data["images"]:
        del image["neg_category_ids"]
    test_set = tmp_path / "test.json"
    test_set.write_text(json.dumps(data))
    evaluator = LongTailLVISEvaluator(register(test_set), output_dir=str(tmp_path / "out"))
    with caplog.at_level(logging.INFO, "bags_d2"):
        assert run(evaluator, model_results(test_set, detections)) == {}
    assert "no annotations, so nothing is evaluated" in caplog.text
    written = json.loads((tmp_path / "out" / "lvis_instances_results.json").read_text())
    assert len(written) == len(detections)
    with pytest.raises(AnnotationError, match="no annotations to evaluate against"):
        evaluate_lvis_predictions(test_set, detections)


def evaluate_shard(json_file, detections, output_file, counts):
    """One process's part: every second image, and masks on the second process only."""
    evaluator = LongTailLVISEvaluator(
        register(json_file), output_dir=str(output_file.parent), class_counts=counts
    )
    evaluator.reset()
    for i, (inputs, outputs) in enumerate(model_results(json_file, detections)):
        if i % comm.get_world_size() == comm.get_rank():
            evaluator.process(inputs, outputs)
    results = evaluator.evaluate()
    if comm.is_main_process():
        output_file.write_text(json.dumps(results))
    else:
        assert results == {}


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(tmp_path):
    json_file, detections = random_lvis_set(10, tmp_path)
    counts = [7 * i**3 for i in range(len(category_ids_of(json_file)))]
    for num_processes, folder in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        folder.mkdir()
        launch(
            evaluate_shard,
            num_processes,
            dist_url="auto",
            args=(json_file, detections, folder / "metrics.json", counts),
        )
    one, two = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("one", "two"))
    assert set(one) == set(two) == {"bbox", "segm"}
    for task in one:
        assert two[task] == pytest.approx(one[task], rel=0, abs=0, nan_ok=True)
        assert (tmp_path / "two" / f"per_class_{task}.csv").read_text() == (
            tmp_path / "one" / f"per_class_{task}.csv"
        ).read_text()
    parts = [
        json.loads((tmp_path / "two" / f"lvis_instances_results_rank{i}.json").read_text())
        for i in range(2)
    ]
    assert sum(map(len, parts)) == len(detections)


@pytest.fixture
def small_set(tmp_path):
    return random_lvis_set(11, tmp_path)


def corrupt(json_file, change):
    data = json.loads(json_file.read_text())
    change(data)
    path = json_file.with_name("corrupt.json")
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["images"][3].pop("neg_category_ids"), "no 'neg_category_ids'"),
        (
            lambda d: d["images"][3].pop("not_exhaustive_category_ids"),
            "no 'not_exhaustive_category_ids'",
        ),
        (lambda d: d["categories"][1].pop("frequency"), "no 'frequency'"),
        (lambda d: d["categories"][1].update(frequency="x"), "no 'frequency'"),
        (lambda d: d["annotations"][2].update(category_id=999), "category_id 999, which is not"),
        (lambda d: d["annotations"][2].update(image_id=999), "image_id 999, which is not"),
        (lambda d: d.pop("categories"), "no list 'categories'"),
    ],
)
def test_faulty_annotations(small_set, change, message):
    json_file = corrupt(small_set[0], change)
    with pytest.raises(AnnotationError, match=message) as error:
        LongTailLVISEvaluator(register(json_file))
    assert str(json_file) in str(error.value)


def test_missing_annotations(tmp_path):
    with pytest.raises(MissingFileError, match=r"nowhere\.json' does not exist"):
        LongTailLVISEvaluator(register(tmp_path / "nowhere.json"))
    with pytest.raises(AnnotationError, match="has no json_file"):
        LongTailLVISEvaluator("test_lvis_unregistered")


def test_masks_need_mask_annotations(small_set):
    json_file, detections = small_set
    without_masks = corrupt(json_file, lambda d: [a.pop("segmentation") for a in d["annotations"]])
    with pytest.raises(AnnotationError, match="has no mask"):
        run(LongTailLVISEvaluator(register(without_masks)), model_results(json_file, detections))
    boxes = LongTailLVISEvaluator(register(without_masks), tasks=("bbox",))
    reference, _ = evaluate_with_lvis_api(json_file, detections, "bbox")
    assert_equals_lvis_api(run(boxes, model_results(json_file, detections))["bbox"], reference)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ()}, "tasks must be"),
        ({"tasks": "bbox"}, "tasks must be"),
        ({"tasks": ("bbox", "keypoints")}, "tasks must be"),
        ({"max_dets_per_image": 0}, "TEST.DETECTIONS_PER_IMAGE"),
        ({"max_dets_per_image": 301}, "TEST.DETECTIONS_PER_IMAGE"),
        ({"class_counts": [1, 2]}, "class_counts has shape"),
        ({"class_counts": [1] * 9 + [-1]}, "must not be negative"),
        ({"class_counts": [1] * 10, "count_thresholds": (100, 10)}, "strictly ascending"),
    ],
)
def test_faulty_arguments(small_set, arguments, message):
    with pytest.raises(ValueError, match=message):
        LongTailLVISEvaluator(register(small_set[0]), **arguments)


def test_faulty_class_map(small_set):
    name = register(small_set[0], thing_dataset_id_to_contiguous_id={1: 0})
    with pytest.raises(ValueError, match="thing_dataset_id_to_contiguous_id"):
        LongTailLVISEvaluator(name)


def _set(field, index, value):
    def change(inputs, outputs):
        tensor = getattr(outputs[0]["instances"], field)
        (tensor.tensor if isinstance(tensor, Boxes) else tensor)[index] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda inputs, outputs: inputs[0].update(image_id=-5), "image -5, which .* does not list"),
        (_set("pred_classes", 0, 10), "set MODEL.ROI_HEADS.NUM_CLASSES to 10"),
        (_set("pred_classes", 0, -1), "set MODEL.ROI_HEADS.NUM_CLASSES to 10"),
        (_set("scores", 2, math.nan), "not finite"),
        (_set("pred_boxes", (1, 2), math.inf), "not finite"),
        (lambda inputs, outputs: outputs[0].pop("instances"), "no 'instances'"),
    ],
)
def test_faulty_predictions(small_set, change, message):
    json_file, detections = small_set
    evaluator = LongTailLVISEvaluator(register(json_file))
    evaluator.reset()
    results = model_results(json_file, detections)
    inputs, outputs = next(r for r in results if len(r[1][0]["instances"]) > 3)
    change(inputs, outputs)
    with pytest.raises(PredictionError, match=message):
        evaluator.process(inputs, outputs)


def test_masks_must_be_there_where_asked_for(small_set):
    json_file, detections = small_set
    evaluator = LongTailLVISEvaluator(register(json_file), tasks=("segm",))
    with pytest.raises(PredictionError, match=r"MODEL\.MASK_ON"):
        run(evaluator, model_results(json_file, detections, masks=False))

    some_with_masks = [
        result
        for i, results in enumerate(
            zip(
                model_results(json_file, detections),
                model_results(json_file, detections, masks=False),
                strict=True,
            )
        )
        for result in [results[i % 2]]
    ]
    with pytest.raises(PredictionError, match="and others do not"):
        run(LongTailLVISEvaluator(register(json_file)), some_with_masks)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"image_id": -1}, "image -1"),
        ({"category_id": 999}, "category 999"),
        ({"score": math.nan}, "not finite"),
        ({"bbox": [0, 0, math.inf, 1]}, "not finite"),
    ],
)
def test_function_rejects_faulty_detections(small_set, fault, message):
    json_file, detections = small_set
    with pytest.raises(PredictionError, match=message):
        evaluate_lvis_predictions(json_file, [*detections, {**detections[0], **fault}])


def test_function_rejects_missing_masks(small_set):
    json_file, detections = small_set
    for detection in detections:
        del detection["segmentation"]
    with pytest.raises(PredictionError, match="no 'segmentation'"):
        evaluate_lvis_predictions(json_file, detections, "segm")
