import csv
import json
import math
import uuid

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import launch
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bags_d2.evaluation import LongTailCOCOEvaluator

CATEGORY_IDS = (4, 9, 2, 30, 17, 11)  # in contiguous class order, not ascending
COUNTS = (5, 9, 10, 150, 5000, 20)  # of those classes
WITHOUT_GROUND_TRUTH = 11


@pytest.fixture
def coco_set(tmp_path):
    """A random COCO-format set and the model's inputs and outputs on it."""
    rng = np.random.default_rng(0)
    annotations, results = [], []
    for image_id in range(8):
        boxes, classes = [], []
        for _ in range(6):
            x, y, w, h = (float(v) for v in rng.integers(10, 90, size=4))
            category_id = int(rng.choice([c for c in CATEGORY_IDS if c != WITHOUT_GROUND_TRUTH]))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
            if rng.random() < 0.7:
                boxes.append(np.array([x, y, x + w, y + h]) + rng.normal(0, 2, size=4))
                classes.append(CATEGORY_IDS.index(category_id))
        boxes.append(np.array([0, 0, 50, 50]))
        classes.append(int(rng.integers(len(CATEGORY_IDS))))
        instances = Instances((200, 200))
        instances.pred_boxes = Boxes(torch.tensor(np.array(boxes), dtype=torch.float32))
        instances.scores = torch.from_numpy(rng.random(len(boxes)))
        instances.pred_classes = torch.tensor(classes)
        results.append(([{"image_id": image_id}], [{"instances": instances}]))

    json_file = tmp_path / "coco.json"
    json_file.write_text(
        json.dumps(
            {
                "info": {},
                "images": [{"id": i, "height": 200, "width": 200} for i in range(8)],
                "annotations": annotations,
                "categories": [{"id": c, "name": f"class_{c}"} for c in sorted(CATEGORY_IDS)],
            }
        )
    )
    name = f"test_coco_{uuid.uuid4().hex}"
    MetadataCatalog.get(name).set(
        json_file=str(json_file),
        evaluator_type="coco",
        thing_dataset_id_to_contiguous_id={c: i for i, c in enumerate(CATEGORY_IDS)},
    )
    return name, json_file, results


def run(evaluator, results):
    evaluator.reset()
    for inputs, outputs in results:
        evaluator.process(inputs, outputs)
    return evaluator.evaluate()


def ap_of_one_category(json_file, detections, category_id):
    """AP by a run of pycocotools over this category alone."""
    truth = COCO(str(json_file))
    evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
    evaluation.params.catIds = [category_id]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return 100 * evaluation.stats[0] if evaluation.stats[0] >= 0 else math.nan


def test_bins_and_table(coco_set, tmp_path):
    name, json_file, results = coco_set
    out = tmp_path / "out"
    evaluator = LongTailCOCOEvaluator(name, output_dir=str(out), class_counts=COUNTS)
    metrics = run(evaluator, results)["bbox"]

    detections = json.loads((out / "coco_instances_results.json").read_text())
    ap = {c: ap_of_one_category(json_file, detections, c) for c in CATEGORY_IDS}
    assert math.isnan(ap[WITHOUT_GROUND_TRUTH])
    # Counts 5 and 9; 10 (20 has no ground truth); 150; 5000.
    expected = [(ap[4] + ap[9]) / 2, ap[2], ap[30], ap[17]]
    assert [metrics[f"AP{i}"] for i in (1, 2, 3, 4)] == pytest.approx(expected)
    assert metrics["bAP"] == pytest.approx(sum(expected) / 4)
    assert 0 < metrics["bAP"] < 100

    annotations = json.loads(json_file.read_text())["annotations"]
    with (out / "per_class_bbox.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["category_id"]) for row in rows] == sorted(CATEGORY_IDS)
    for row in rows:
        category_id = int(row["category_id"])
        assert row["name"] == f"class_{category_id}"
        assert int(row["training_instances"]) == COUNTS[CATEGORY_IDS.index(category_id)]
        assert int(row["validation_instances"]) == sum(
            a["category_id"] == category_id and not a["iscrowd"] for a in annotations
        )
        assert float(row["AP"] or "nan") == pytest.approx(ap[category_id], abs=1e-4, nan_ok=True)


def test_the_rest_is_detectron2(coco_set):
    name, _, results = coco_set
    stock = run(COCOEvaluator(name), results)["bbox"]
    ours = run(LongTailCOCOEvaluator(name, class_counts=COUNTS), results)["bbox"]
    assert {key: ours[key] for key in stock} == pytest.approx(stock, nan_ok=True)
    # Detectron2 reports AP of each class where the metadata have names; here the file has.
    added = {measure for measure in ours if not measure.startswith("AP-")} - set(stock)
    assert added == {"AP1", "AP2", "AP3", "AP4", "bAP"}
    without_counts = run(LongTailCOCOEvaluator(name), results)["bbox"]
    assert set(ours) - set(without_counts) == added


def test_no_detections(coco_set, tmp_path):
    name, _, results = coco_set
    for _, outputs in results:
        outputs[0]["instances"] = outputs[0]["instances"][:0]
    evaluator = LongTailCOCOEvaluator(name, output_dir=str(tmp_path), class_counts=COUNTS)
    metrics = run(evaluator, results)["bbox"]
    assert math.isnan(metrics["AP"])
    assert math.isnan(metrics["bAP"])
    assert (tmp_path / "per_class_bbox.csv").exists()


def test_faulty_counts(coco_set):
    with pytest.raises(ValueError, match="class_counts has shape"):
        LongTailCOCOEvaluator(coco_set[0], class_counts=[1, 2, 3])
    with pytest.raises(ValueError, match="strictly ascending"):
        LongTailCOCOEvaluator(coco_set[0], class_counts=COUNTS, count_thresholds=(5, 5))


def test_no_metadata_stay_behind(coco_set, tmp_path):
    before = set(MetadataCatalog.list())
    for _ in range(2):
        LongTailCOCOEvaluator(coco_set[0], output_dir=str(tmp_path))
    assert set(MetadataCatalog.list()) == before


def _evaluate_shard(json_file, results, folder):
    """Every second image, each found by its id in the file."""
    name = f"test_coco_{uuid.uuid4().hex}"
    MetadataCatalog.get(name).set(json_file=str(json_file))
    evaluator = LongTailCOCOEvaluator(name, output_dir=str(folder))
    evaluator.reset()
    for inputs, outputs in results[comm.get_rank() :: comm.get_world_size()]:
        evaluator.process([{"image_id": f"image {inputs[0]['image_id']}"}], outputs)
    metrics = evaluator.evaluate()
    if comm.is_main_process():
        (folder / "metrics.json").write_text(json.dumps(metrics))
    else:
        assert metrics == {}


@pytest.mark.slow
@pytest.mark.parametrize("annotated", [True, False])
def test_two_processes_give_the_results_of_one(coco_set, tmp_path, annotated):
    """With the ids of the file in results files, also of a test set without annotations."""
    _, json_file, results = coco_set
    data = json.loads(json_file.read_text())
    for image in data["images"]:
        image["id"] = f"image {image['id']}"
    for annotation in data["annotations"]:
        annotation["image_id"] = f"image {annotation['image_id']}"
    if not annotated:
        del data["annotations"]
    json_file.write_text(json.dumps(data))
    # The model's classes are in the order of category ids here.
    for _, outputs in results:
        classes = [
            sorted(CATEGORY_IDS).index(CATEGORY_IDS[c])
            for c in outputs[0]["instances"].pred_classes
        ]
        outputs[0]["instances"].pred_classes = torch.tensor(classes)

    metrics, detections = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        launch(_evaluate_shard, processes, dist_url="auto", args=(json_file, results, folder))
        metrics.append(json.loads((folder / "metrics.json").read_text()))
        found = json.loads((folder / "coco_instances_results.json").read_text())
        detections.append(sorted(found, key=lambda d: (d["image_id"], d["score"])))
    assert detections[0] == detections[1]
    assert len(detections[0]) == sum(len(outputs[0]["instances"]) for _, outputs in results)
    assert {d["image_id"] for d in detections[0]} == {f"image {i}" for i in range(8)}
    assert {d["category_id"] for d in detections[0]} <= set(CATEGORY_IDS)
    if annotated:
        assert metrics[0]["bbox"]["AP"] > 0
        assert metrics[1]["bbox"] == pytest.approx(metrics[0]["bbox"], nan_ok=True)
    else:
        assert metrics == [{}, {}]
