"""Labels that a model contradicts: the score, the file, and how many wrong labels it finds."""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.evaluation import inference_on_dataset
from detectron2.structures import Boxes
from prepare_glyphs import build_glyphs

from bags_d2 import BAGSTrainer
from bags_d2.engine import load_for_evaluation, setup_cfg
from bags_d2.evaluation import LabelCheck, bin_index
from bags_d2.evaluation.label_check import contradictions

ROOT = Path(__file__).resolve().parents[2]


def _slow_contradictions(labels, probs):
    """The definition, object by object, from all probabilities."""
    usual = []
    for c in range(probs.shape[1]):
        own = [p[c] for y, p in zip(labels, probs, strict=True) if y == c]
        usual.append(np.mean(own) if own else 1.0)
    scores, others = [], []
    for y, p in zip(labels, probs, strict=True):
        ratio = [np.log((p[c] + 1e-4) / (usual[c] + 1e-3)) for c in range(len(p))]
        other = max((c for c in range(len(p)) if c != y), key=lambda c: ratio[c])
        scores.append(ratio[other] - ratio[y])
        others.append(other)
    return scores, others


@pytest.mark.parametrize("seed", range(5))
def test_contradictions_are_those_of_the_definition(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, 40)
    probs = rng.dirichlet(np.full(6, 0.3), 40)
    top, classes = np.sort(probs)[:, ::-1], np.argsort(probs)[:, ::-1]
    own = probs[np.arange(40), labels]
    scores, columns = contradictions(labels, own, top, classes)
    expected, others = _slow_contradictions(labels, probs)
    np.testing.assert_allclose(scores, expected)
    assert classes[np.arange(40), columns].tolist() == others


def test_objects_of_a_class_that_the_model_never_names_are_no_errors():
    # Ten objects of class 2 get 0.01 for it, like any of them; one of class 0 gets as little.
    labels = np.array([0] * 10 + [2] * 10)
    probs = np.array([[0.98, 0.01, 0.01]] * 9 + [[0.04, 0.95, 0.01]] + [[0.5, 0.49, 0.01]] * 10)
    top, classes = np.sort(probs)[:, ::-1], np.argsort(probs)[:, ::-1]
    scores, _ = contradictions(labels, probs[np.arange(20), labels], top, classes)
    assert scores.argmax() == 9


def _rows(folder):
    return list(csv.DictReader((folder / "label_check.csv").open(encoding="utf-8")))


def test_the_file_lists_all_objects_with_the_probabilities_at_their_boxes(
    tiny_cfg, datasets_root, register, tmp_path
):
    folder = datasets_root / "glyphs_tiny"
    annotations = tmp_path / "val.json"
    content = json.loads((folder / "annotations" / "glyphs_tiny_val.json").read_text())
    content["annotations"][0]["bbox"][2:] = [1e149, 1e9]  # far beyond its image
    annotations.write_text(json.dumps(content))
    name = register("label_check_val", str(annotations), str(folder))
    cfg = tiny_cfg("DATASETS.TEST", (name,), "DATALOADER.NUM_WORKERS", 0)
    torch.manual_seed(0)
    model = BAGSTrainer.build_model(cfg).eval()
    BAGSTrainer.test(cfg, model, output_folder=str(tmp_path))
    rows = _rows(tmp_path / name)
    of_id = {annotation["id"]: annotation for annotation in content["annotations"]}
    assert sorted(int(row["annotation_id"]) for row in rows) == sorted(of_id)
    scores = [float(row["contradiction"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    for row in rows:
        annotation = of_id[int(row["annotation_id"])]
        assert int(row["category_id"]) == annotation["category_id"]
        assert row["model_category_id"] != row["category_id"]
    assert not model.roi_heads._forward_pre_hooks

    # The probability of one, from proposals that are its box alone.
    first, loader = content["annotations"][0], BAGSTrainer.build_test_loader(cfg, name)
    row = next(row for row in rows if int(row["annotation_id"]) == first["id"])
    inputs = next(x for x in loader if x[0]["image_id"] == int(row["image_id"]))
    corners = torch.tensor([[*first["bbox"][:2], inputs[0]["width"], inputs[0]["height"]]])
    scale = inputs[0]["image"].shape[1] / inputs[0]["height"]
    with torch.no_grad():
        images = model.preprocess_image(inputs)
        pyramid = model.backbone(images.tensor)
        heads = model.roi_heads
        boxes = Boxes(corners * scale)
        pooled = heads.box_pooler([pyramid[f] for f in heads.box_in_features], [boxes])
        logits, _ = heads.box_predictor(heads.box_head(pooled))
    category = sorted(c["id"] for c in content["categories"]).index(int(row["category_id"]))
    expected = logits.softmax(1)[0, category].item()
    assert float(row["probability"]) == pytest.approx(expected, abs=2e-6)


def test_models_without_a_box_head_are_left_alone():
    assert LabelCheck.heads_of(torch.nn.Linear(1, 1)) is None


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory):
    """The folder of the data set "glyphs", which is built unless there is one."""
    root = ROOT / "datasets"
    if not (root / "glyphs" / "glyphs.json").is_file():
        root = tmp_path_factory.mktemp("glyphs")
    return build_glyphs("glyphs", root, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "least"), [("baseline", 0.5), ("bags", 0.9)])
def test_flipped_labels_come_first(method, least, glyphs, register, tmp_path):
    """Of 5% labels that are flipped, 80% are among the first 20%; in each bin ``least``."""
    content = json.loads((glyphs / "annotations" / "glyphs_val.json").read_text())
    objects, rng = content["annotations"], np.random.default_rng(0)
    ids = [category["id"] for category in content["categories"]]
    flipped = {}
    for i in rng.choice(len(objects), len(objects) // 20, replace=False):
        flipped[objects[i]["id"]] = objects[i]["category_id"]
        others = [c for c in ids if c != objects[i]["category_id"]]
        objects[i]["category_id"] = int(rng.choice(others))
    for image in content["images"]:  # an image may now show what it was said to lack
        image["neg_category_ids"] = []
    path = tmp_path / "flipped.json"
    path.write_text(json.dumps(content))
    name = register("flipped_val", str(path), str(glyphs))

    weights = str(ROOT / f"checkpoints/glyphs_{method}/model_final.pth")
    opts = ["MODEL.WEIGHTS", weights, "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0"]
    config = str(ROOT / f"configs/glyphs_{method}.yaml")
    cfg = setup_cfg(argparse.Namespace(config_file=config, opts=opts))
    model = load_for_evaluation(cfg)
    check = LabelCheck(model.roi_heads, name, str(tmp_path))
    inference_on_dataset(model, BAGSTrainer.build_test_loader(cfg, name), check)

    rows = _rows(tmp_path)
    first = {int(row["annotation_id"]) for row in rows[: len(rows) // 5]}
    found = [i in first for i in flipped]
    counts = [category["instance_count"] for category in content["categories"]]
    bins = bin_index(counts)[[ids.index(c) for c in flipped.values()]]
    by_bin = [np.array(found)[bins == i].mean() for i in range(4)]
    assert np.mean(found) >= 0.8
    assert min(by_bin) >= least
