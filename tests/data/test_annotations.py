"""The reader of annotation files: what it normalizes, refuses, and leaves out everywhere alike."""

import json
import re
import uuid
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import small_set
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from detectron2.utils.env import seed_all_rng
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from small_set import COUNTS, NAMES, SIDE, each, edited, write

from bags_d2 import BagsError, BAGSTrainer, ConfigError, DataError
from bags_d2.data import count_classes
from bags_d2.data.annotations import Ids, read_annotations
from bags_d2.data.build import check_dataset, check_datasets, training_records
from bags_d2.data.datasets import register_annotation_file
from bags_d2.data.loader import LongTailDatasetMapper
from bags_d2.engine import LongTailCheckpointer
from bags_d2.evaluation import LongTailCOCOEvaluator, LongTailLVISEvaluator
from bags_d2.evaluation.ground_truth import GroundTruth

EVALUATORS = {"coco": LongTailCOCOEvaluator, "lvis": LongTailLVISEvaluator}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    small_set.write_images(folder)
    return folder


@pytest.fixture
def data_set(tmp_path, images):
    """``data_set(content, kind)``: name of a registered data set."""
    names = []

    def register(data, kind="coco"):
        name = f"set_{uuid.uuid4().hex}"
        path = data if isinstance(data, str) else write(tmp_path / f"{name}.json", data)
        register_annotation_file(name, kind, path, str(images))
        names.append(name)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def cfg_of(tiny_cfg, tmp_path):
    def make(train=(), test=(), *opts):
        return tiny_cfg(
            *("DATASETS.TRAIN", tuple(train), "DATASETS.TEST", tuple(test)),
            *("MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.LONG_TAIL.CLASS_COUNTS_FILE", ""),
            *("INPUT.MIN_SIZE_TRAIN", (SIDE,), "OUTPUT_DIR", str(tmp_path / "out")),
            *opts,
        )

    return make


def counted(name):
    return Counter({c: n for c, n in enumerate(count_classes(name).tolist()) if n})


def trained_on(cfg):
    """Objects of each class that the mapper yields in one pass over the training set."""
    mapper = LongTailDatasetMapper(cfg, is_train=True)
    return Counter(
        c
        for record in training_records(cfg)
        for c in mapper(record)["instances"].gt_classes.tolist()
    )


def evaluated(name, kind, task="bbox"):
    """Objects of each class in the ground truth that an evaluator matches, ignored ones aside."""
    truth = GroundTruth.of_dataset(name)
    class_of = {row["id"]: c for row, c in zip(truth.categories, truth.classes, strict=True)}
    return Counter(
        class_of[t["category_id"]]
        for position in range(len(truth.annotations.images))
        for t in truth.truths(position, task, lvis=kind == "lvis")
        if not t["iscrowd"] and t["area"] <= 1e10
    )


def perfect_results(name, image_id=lambda record: record["image_id"]):
    """Model inputs and outputs that repeat the boxes of every object."""
    for record in DatasetCatalog.get(name):
        objects = [a for a in record["annotations"] if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in objects]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances = Instances((record["height"], record["width"]))
        instances.pred_boxes = Boxes(boxes)
        instances.scores = torch.linspace(0.9, 0.8, len(objects))
        classes = torch.tensor([a["category_id"] for a in objects], dtype=torch.int64)
        instances.pred_classes = classes
        yield [{"image_id": image_id(record)}], [{"instances": instances}]


def evaluate(name, kind, results=None, **options):
    evaluator = EVALUATORS[kind](name, **options)
    evaluator.reset()
    for inputs, outputs in results or perfect_results(name):
        evaluator.process(inputs, outputs)
    return evaluator.evaluate()["bbox"]


def renumbered(section, new_id):
    """An edit that gives the rows of a section other ids, and follows references to them."""

    def edit(data):
        reference = {"images": "image_id", "categories": "category_id"}.get(section)
        new = {row["id"]: new_id(row["id"]) for row in data[section]}
        for row in data[section]:
            row["id"] = new[row["id"]]
        for a in data["annotations"] if reference else ():
            a[reference] = new[a[reference]]
        if section == "categories":
            for image in data["images"]:
                for key in ("neg_category_ids", "not_exhaustive_category_ids"):
                    if key in image:
                        image[key] = [new[c] for c in image[key]]

    return edit


def first(**values):
    return lambda data: data["annotations"][0].update(values)


def dropped(section, key):
    return lambda data: [row.pop(key) for row in data[section]]


def half(**values):
    return lambda data: [a.update(values) for a in data["annotations"][::2]]


def flat_polygons(data):
    for a in data["annotations"]:
        a["segmentation"] = a["segmentation"][0]


def as_floats(data):
    for a in data["annotations"]:
        a["bbox"] = [float(x) for x in a["bbox"]]
        a["segmentation"] = [[float(x) for x in p] for p in a["segmentation"]]


BIG = 2**53

# What has one meaning, so that all objects are counted, trained on and evaluated: (kinds, MASK_ON,
# edit).
NORMALIZED = {
    "the plain set": (("coco", "lvis"), True, lambda data: None),
    "iscrowd null": (("coco", "lvis"), False, each(iscrowd=None)),
    "iscrowd null in half": (("coco",), False, half(iscrowd=None)),
    "iscrowd missing": (("coco", "lvis"), False, dropped("annotations", "iscrowd")),
    "iscrowd false": (("coco",), False, each(iscrowd=False)),
    "iscrowd 0.0": (("coco",), False, each(iscrowd=0.0)),
    "ignore 0": (("coco", "lvis"), False, each(ignore=0)),
    "area missing": (("coco", "lvis"), False, dropped("annotations", "area")),
    "area null": (("coco", "lvis"), False, each(area=None)),
    "area 0": (("coco", "lvis"), False, each(area=0)),
    "area 0 in half": (("coco", "lvis"), False, half(area=0)),
    "segmentation null": (("coco", "lvis"), False, each(segmentation=None)),
    "segmentation []": (("coco", "lvis"), False, each(segmentation=[])),
    "segmentation [[]]": (("coco", "lvis"), False, each(segmentation=[[]])),
    "segmentation [[]] in half": (("coco",), False, half(segmentation=[[]])),
    "segmentation missing": (("coco", "lvis"), False, dropped("annotations", "segmentation")),
    "polygon of 2 points": (("coco", "lvis"), False, each(segmentation=[[1, 2, 3, 4]])),
    "polygon flat": (("coco", "lvis"), True, flat_polygons),
    "floats": (("coco", "lvis"), True, as_floats),
    "coco_url null": (("lvis",), False, lambda d: [i.update(coco_url=None) for i in d["images"]]),
    "coco_url empty": (("lvis",), False, lambda d: [i.update(coco_url="") for i in d["images"]]),
    "license of text": (
        ("coco", "lvis"),
        False,
        lambda d: d["images"][0].update(license="CC", date_captured=3, flickr_url=[]),
    ),
    "image ids text": (("coco", "lvis"), False, renumbered("images", "image {}".format)),
    "image ids negative": (("coco", "lvis"), False, renumbered("images", lambda i: -i)),
    "image ids from 0": (("coco", "lvis"), False, renumbered("images", lambda i: i - 1)),
    "image ids of 2^53": (("coco", "lvis"), False, renumbered("images", lambda i: BIG + i)),
    "image ids of 2^70": (("coco", "lvis"), False, renumbered("images", lambda i: 2**70 + i)),
    "image ids mixed": (
        ("coco", "lvis"),
        False,
        renumbered("images", lambda i: (i - 1, str(i), -i)[i % 3]),
    ),
    "category ids text": (("coco", "lvis"), False, renumbered("categories", "c{}".format)),
    "category ids negative": (("coco", "lvis"), False, renumbered("categories", lambda i: i - 9)),
    "category ids from 0": (("coco", "lvis"), False, renumbered("categories", lambda i: i - 1)),
    "category ids of 2^53": (("coco", "lvis"), False, renumbered("categories", lambda i: BIG + i)),
    "annotation ids from 0": (("coco", "lvis"), False, renumbered("annotations", lambda i: i - 1)),
    "annotation ids text": (("coco", "lvis"), False, renumbered("annotations", str)),
    "annotation ids of 2^53": (
        ("coco", "lvis"),
        False,
        renumbered("annotations", lambda i: BIG + i),
    ),
}


@pytest.mark.parametrize(
    ("row", "kind"), [(row, kind) for row, (kinds, *_) in NORMALIZED.items() for kind in kinds]
)
def test_what_has_one_meaning_is_normalized(row, kind, data_set, cfg_of):
    _, mask_on, edit = NORMALIZED[row]
    train, val = (data_set(edited(edit, split, kind), kind) for split in COUNTS)
    cfg = cfg_of([train], [val], "MODEL.MASK_ON", mask_on)
    check_dataset(cfg, train, training=True)
    check_dataset(cfg, val, training=False)
    expected = Counter(dict(enumerate(COUNTS["train"])))
    assert counted(train) == trained_on(cfg) == evaluated(train, kind) == expected
    assert evaluated(val, kind) == Counter(dict(enumerate(COUNTS["val"])))
    assert evaluate(val, kind)["AP"] == pytest.approx(100)


SET_ASIDE = {
    "crowd": first(iscrowd=1),
    "crowd as true": first(iscrowd=True),
    "ignored": first(ignore=1),
    "ignored as true": first(ignore=True),
    "box without width": first(bbox=[5, 5, 0, 9]),
    "box outside": first(bbox=[SIDE, 5, 9, 9]),
    "box left of the image": first(bbox=[-20, 5, 19, 9]),
    "box of a thousandth": first(bbox=[5, 5, 0.001, 9]),
}


@pytest.mark.parametrize("kind", EVALUATORS)
@pytest.mark.parametrize("row", SET_ASIDE)
def test_what_is_left_out_is_left_out_everywhere(row, kind, data_set, cfg_of, log_lines):
    data = edited(SET_ASIDE[row], "train", kind)
    name = data_set(data, kind)
    lines = log_lines("bags_d2.data.build")
    expected = Counter(dict(enumerate(COUNTS["train"])))
    expected[data["annotations"][0]["category_id"] - 1] -= 1
    assert counted(name) == trained_on(cfg_of([name])) == evaluated(name, kind) == expected
    (line,) = lines
    assert "17 objects of 3 classes in 6 images; " in line
    assert re.search(r"left out.*: 1\.$", line)
    assert evaluate(name, kind)["AP"] == pytest.approx(100)


@pytest.mark.parametrize("kind", EVALUATORS)
def test_detections_of_what_is_ignored_do_not_count(kind, data_set):
    """A detection on an ignored region is no false positive; on nothing it is one."""
    results = list(perfect_results(data_set(edited(lambda d: None, "val", kind), kind)))
    ignoring = data_set(edited(first(ignore=1), "val", kind), kind)
    dropping = data_set(edited(lambda d: d["annotations"].pop(0), "val", kind), kind)
    assert evaluate(ignoring, kind, results)["AP"] == pytest.approx(100)
    # In LVIS what is not annotated counts only against classes that are known to be absent.
    if kind == "coco":
        assert evaluate(dropping, kind, results)["AP"] < 99


CODE = {"size": [SIDE, SIDE], "counts": [0, 40, SIDE * SIDE - 40]}

# Faults without a meaning: (kind, MASK_ON, split, edit, what the message says).
REFUSED = {
    "iscrowd text": ("coco", False, "train", each(iscrowd="0"), "annotation 1 has iscrowd '0'"),
    "iscrowd 2": ("coco", False, "train", each(iscrowd=2), "annotation 1 has iscrowd 2"),
    "ignore text": ("coco", False, "train", each(ignore="1"), "annotation 1 has ignore '1'"),
    "area text": ("coco", False, "train", each(area="12"), "annotation 1 has area '12'"),
    "polygon of 2 points, masks": (
        "coco",
        True,
        "train",
        first(segmentation=[[1, 2, 3, 4]]),
        r"annotation 1 has a polygon of 4 numbers.*MODEL\.MASK_ON",
    ),
    "polygon of odd length, masks": (
        "lvis",
        True,
        "train",
        first(segmentation=[[1, 2, 3, 4, 5, 6, 7]]),
        "annotation 1 has a polygon of 7 numbers",
    ),
    "polygon of text, masks": (
        "coco",
        True,
        "train",
        first(segmentation=[["a", 2, 3, 4, 5, 6]]),
        "annotation 1 has a polygon",
    ),
    "polygon far away, masks": (
        "coco",
        True,
        "train",
        first(segmentation=[[1e9, 2, 3, 4, 5, 6]]),
        r"annotation 1 has a polygon with coordinates beyond 100000",
    ),
    "polygon without area, masks": (
        "coco",
        True,
        "train",
        first(segmentation=[[1, 1, 2, 2, 3, 3]]),
        "annotation 1 has a mask without area",
    ),
    "run-length code, masks": (
        "coco",
        True,
        "train",
        first(segmentation=CODE),
        r"annotation 1 .*run-length code.*INPUT\.MASK_FORMAT to 'bitmask'",
    ),
    "run-length code of another size, masks": (
        "coco",
        True,
        "train",
        first(segmentation={**CODE, "size": [9, 9]}),
        "run-length code of size",
    ),
    "no mask, masks": (
        "coco",
        True,
        "train",
        each(segmentation=[]),
        r"annotation 1 has no mask but MODEL\.MASK_ON is True.*leave the object out",
    ),
    "one without a mask, masks": (
        "coco",
        True,
        "train",
        lambda d: d["annotations"][4].update(segmentation=None),
        r"annotation 5 has no mask but MODEL\.MASK_ON",
    ),
    "no mask in val, masks": ("coco", True, "val", each(segmentation=[]), "has no mask"),
    "box of 3": ("coco", False, "train", first(bbox=[1, 2, 3]), r"bbox \[1, 2, 3\]"),
    "box negative": ("lvis", False, "val", first(bbox=[1, 2, -3, 4]), r"bbox \[1, 2, -3, 4\]"),
    "box infinite": ("coco", False, "train", first(bbox=[1, 2, 1e999, 4]), "bbox"),
    "unknown image": ("coco", False, "train", first(image_id="1"), "image_id '1', which is not"),
    "unknown category": ("lvis", False, "val", first(category_id=True), "category_id True"),
    "image id twice": (
        "coco",
        False,
        "train",
        lambda d: d["images"].append(d["images"][0]),
        "image id 1 occurs twice",
    ),
    "image size float": (
        "coco",
        False,
        "train",
        lambda d: d["images"][1].update(width=64.0),
        "image 2 has width 64.0",
    ),
    "image size text": (
        "coco",
        False,
        "train",
        lambda d: d["images"][1].update(height="64"),
        "image 2 has width 64 and height '64'",
    ),
    "file_name null": (
        "coco",
        False,
        "train",
        lambda d: [i.update(file_name=None) for i in d["images"]],
        "image 1 has no file_name",
    ),
    "only coco_url": (
        "coco",
        False,
        "train",
        lambda d: [i.update(file_name=None, coco_url="x/y.png") for i in d["images"]],
        "image 1 has no file_name",
    ),
    "file_name a number": (
        "lvis",
        False,
        "val",
        lambda d: d["images"][0].update(file_name=3),
        "image 1 has file_name 3",
    ),
    "no annotations": (
        "coco",
        False,
        "train",
        lambda d: d["annotations"].clear(),
        "has no objects to train on",
    ),
    "only crowds": ("coco", False, "train", each(iscrowd=1), "has no objects to train on"),
    "no images": (
        "coco",
        False,
        "val",
        lambda d: [d[key].clear() for key in ("images", "annotations")],
        "has no images",
    ),
    "annotations a number": ("coco", False, "val", lambda d: d.update(annotations=5), "no list"),
    "no federated lists": (
        "lvis",
        False,
        "val",
        dropped("images", "neg_category_ids"),
        r"image 1 has no 'neg_category_ids'.*'coco' \(DATASETS\.REGISTER",
    ),
    "no frequency": (
        "lvis",
        False,
        "val",
        dropped("categories", "frequency"),
        r"category 1 has no 'frequency'.*DATASETS\.REGISTER",
    ),
    "federated list of unknown categories": (
        "lvis",
        False,
        "val",
        lambda d: d["images"][0].update(neg_category_ids=[77]),
        r"neg_category_ids \[77\]",
    ),
    "name with a lone surrogate": (
        "coco",
        False,
        "train",
        lambda d: d["categories"][0].update(name="\ud800"),
        r"category 1 has the name '\\ud800'",
    ),
    "image ids that are lists": (
        "coco",
        False,
        "train",
        lambda d: d["images"][0].update(id=[1]),
        "no valid id",
    ),
}


@pytest.mark.parametrize("row", REFUSED)
def test_what_has_no_meaning_is_refused_before_training(row, data_set, cfg_of):
    kind, mask_on, split, edit, message = REFUSED[row]
    name = data_set(edited(edit, split, kind), kind)
    cfg = cfg_of([name], [name], "MODEL.MASK_ON", mask_on)
    with pytest.raises(DataError, match=message) as caught:
        check_dataset(cfg, name, training=split == "train")
    assert "\n" not in str(caught.value)
    assert f"{name}.json" in str(caught.value)


@pytest.mark.parametrize("counts", [CODE["counts"], "compressed"])
def test_run_length_codes_train_as_bitmaps(counts, data_set, cfg_of):
    import pycocotools.mask as mask_utils

    mask = np.zeros((SIDE, SIDE), dtype=np.uint8, order="F")
    mask.reshape(-1, order="F")[:40] = 1
    if counts == "compressed":
        counts = mask_utils.encode(mask)["counts"].decode()
    # Sides as floats, which pycocotools would refuse.
    edit = each(segmentation={"size": [float(SIDE), SIDE], "counts": counts})
    name = data_set(edited(edit))
    cfg = cfg_of([name], (), "MODEL.MASK_ON", True, "INPUT.MASK_FORMAT", "bitmask")
    check_dataset(cfg, name, training=True)
    code = DatasetCatalog.get(name)[0]["annotations"][0]["segmentation"]
    assert (mask_utils.decode(code) == mask).all()
    assert trained_on(cfg) == counted(name)
    annotations = read_annotations(MetadataCatalog.get(name).json_file)
    assert annotations.masks.areas[0] == 40


@pytest.mark.parametrize("counts", ["", "0", "\x00", "oooooo", [1, 2], [-1, SIDE * SIDE + 1], 5])
def test_faulty_run_length_codes_are_refused(counts, data_set, cfg_of):
    name = data_set(edited(each(segmentation={"size": [SIDE, SIDE], "counts": counts})))
    cfg = cfg_of([name], (), "MODEL.MASK_ON", True, "INPUT.MASK_FORMAT", "bitmask")
    with pytest.raises(DataError, match="annotation 1 has a run-length code"):
        check_dataset(cfg, name, training=True)


def test_missing_areas_are_those_of_masks_or_else_of_boxes(data_set):
    data = edited(dropped("annotations", "area"))
    data["annotations"][0].update(bbox=[0, 0, 10, 10], segmentation=[[0, 0, 10, 0, 10, 10]])
    data["annotations"][1].update(bbox=[0, 0, 10, 20], segmentation=None)
    path = MetadataCatalog.get(data_set(data)).json_file
    assert read_annotations(path).areas[:2].tolist() == [50, 200]


def test_polygon_areas_equal_the_shoelace_formula(data_set):
    rng = np.random.default_rng(0)
    data = edited(lambda d: None)
    polygons = [
        [rng.uniform(0, SIDE, 2 * rng.integers(3, 9)).tolist() for _ in range(rng.integers(1, 4))]
        for _ in data["annotations"]
    ]
    for a, p in zip(data["annotations"], polygons, strict=True):
        a["segmentation"] = p

    def shoelace(flat):
        corners = [flat[i : i + 2] for i in range(0, len(flat), 2)]
        pairs = zip(corners, corners[1:] + corners[:1], strict=True)
        return abs(sum(a[0] * b[1] - b[0] * a[1] for a, b in pairs)) / 2

    areas = read_annotations(MetadataCatalog.get(data_set(data)).json_file).masks.areas
    assert areas.tolist() == pytest.approx([sum(map(shoelace, p)) for p in polygons])


@pytest.mark.parametrize("mask_on", [False, True])
def test_whole_numbers_train_to_the_same_bits_as_floats(mask_on, data_set, cfg_of):
    weights = []
    for edit in (lambda data: None, as_floats):
        options = ("MODEL.MASK_ON", mask_on, "SEED", 3, "SOLVER.MAX_ITER", 3)
        options += ("SOLVER.IMS_PER_BATCH", 2, "INPUT.MIN_SIZE_TRAIN", (SIDE, 80, 51))
        options += ("DATALOADER.NUM_WORKERS", 0, "MODEL.DEVICE", "cpu", "TEST.EVAL_PERIOD", 0)
        seed_all_rng(3)
        trainer = BAGSTrainer(cfg_of([data_set(edited(edit))], (), *options))
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_set_without_federated_lists_can_be_evaluated_as_coco(data_set, cfg_of):
    """The remedy that the refusal names works."""
    data = edited(dropped("images", "neg_category_ids"), "val", "lvis")
    train, val = data_set(edited(lambda d: None)), data_set(data, "coco")
    check_datasets(cfg_of([train], [val]), training=True)
    assert evaluate(val, "coco")["AP"] == pytest.approx(100)


# Rows of the page's tables, and the cases of this file that show them.
PAGE = {
    "`iscrowd`, `ignore` missing, null, true or false": ["iscrowd null", "iscrowd false"],
    "`area` missing, null or 0": ["area missing", "area null", "area 0"],
    "whole numbers in boxes and polygons": ["floats"],
    "`segmentation` null, `[]` or `[[]]`": ["segmentation null", "segmentation [[]]"],
    "`segmentation` a flat list of numbers": ["polygon flat"],
    "`coco_url` null or empty": ["coco_url null", "coco_url empty"],
    "ids that are text, negative or beyond 2^53": ["image ids text", "category ids of 2^53"],
    "category ids with gaps, in any order": ["category ids negative"],
    "keys that are not needed (`license`, ...)": ["license of text"],
    "crowds, ignored regions": ["crowd", "ignored"],
    "boxes without area, or outside their images": ["box without width", "box outside"],
    "`iscrowd` or `ignore` other than 0 and 1, as text": ["iscrowd text", "ignore text"],
    "boxes that are not four finite numbers, or of negative size": ["box of 3", "box negative"],
    "unknown images or categories, ids that occur twice": ["unknown image", "image id twice"],
    "image sizes that are not whole numbers above 0": ["image size float", "image size text"],
    "images without a `file_name` (COCO), or without it and `coco_url` (LVIS)": [
        "file_name null",
        "only coco_url",
    ],
    "category names that are missing or cannot be written as UTF-8": ["name with a lone surrogate"],
    "no images, no categories; nothing to train on": ["no images", "no annotations"],
    "with `MODEL.MASK_ON`: an object without a mask; polygons of fewer than 3 points, of odd "
    "length, without area or with coordinates beyond 100,000": [
        "no mask, masks",
        "polygon of odd length, masks",
        "polygon far away, masks",
    ],
    'with `MODEL.MASK_ON`: run-length codes and `INPUT.MASK_FORMAT "polygon"`': [
        "run-length code, masks"
    ],
    "an LVIS test set without `neg_category_ids`, `not_exhaustive_category_ids` or `frequency`": [
        "no federated lists",
        "no frequency",
    ],
}


def test_the_page_lists_what_is_tested_here():
    page = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text()
    tables = page.split("## What an annotation file may hold")[1].split("\n## ")[0]
    rows = [line.split("|")[1].strip() for line in tables.splitlines() if line.startswith("|")]
    heads = ("normalized", "left out everywhere", "refused before training", "---")
    assert [row for row in rows if row not in heads] == list(PAGE)
    cases = {*NORMALIZED, *SET_ASIDE, *REFUSED}
    assert {case for shown in PAGE.values() for case in shown} <= cases


# Ids


@given(
    st.lists(
        st.integers(-(2**60), 2**60) | st.integers(0, 9) | st.text(max_size=3),
        unique=True,
        min_size=1,
    )
)
def test_ids_go_inside_and_come_back(outside):
    ids = Ids(outside)
    assert sorted(map(str, ids.outside)) == sorted(map(str, outside))
    assert len(set(ids.inside)) == len(outside)
    assert ids.inside == sorted(ids.inside)
    assert all(0 <= i < 2**53 for i in ids.inside)
    assert [ids.outside_of(i) for i in ids.inside] == ids.outside
    for position, (inside, own) in enumerate(zip(ids.inside, ids.outside, strict=True)):
        assert ids.position(inside) == ids.position(own) == position
    assert ids.are_plain == all(isinstance(i, int) and 0 <= i < 2**53 for i in outside)
    if ids.are_plain:
        assert ids.inside == ids.outside


@pytest.mark.parametrize("kind", EVALUATORS)
@pytest.mark.parametrize("edit", ["text", "plain"])
def test_results_files_have_the_ids_of_the_annotations(kind, edit, data_set, tmp_path):
    data = edited(lambda d: None, "val", kind)
    if edit == "text":
        renumbered("images", "image {}".format)(data)
        renumbered("categories", "category {}".format)(data)
    name = data_set(data, kind)
    evaluate(name, kind, output_dir=str(tmp_path / "out"))
    file = {"coco": "coco_instances_results.json", "lvis": "lvis_instances_results.json"}[kind]
    found = json.loads((tmp_path / "out" / file).read_text())
    pairs = Counter((d["image_id"], d["category_id"]) for d in found)
    assert pairs == Counter((a["image_id"], a["category_id"]) for a in data["annotations"])


def test_fixed_ap_of_enormous_ids(data_set):
    data = edited(renumbered("images", lambda i: BIG + i), "val", "lvis")
    name = data_set(data, "lvis")
    evaluator = LongTailLVISEvaluator(name, detections_per_class=100)
    evaluator.reset()
    for inputs, outputs in perfect_results(name):
        evaluator.process(inputs, outputs)
    assert evaluator.evaluate()["bbox_fixed"]["AP"] == pytest.approx(100)


# Classes by name


def reordered(data):
    """The same set with category ids dealt out in reverse, and so the classes in another order."""
    renumbered("categories", lambda i: 10 - i)(data)


@pytest.mark.parametrize("kind", EVALUATORS)
def test_classes_in_another_order_are_matched_by_name(kind, data_set):
    results = list(perfect_results(data_set(edited(lambda d: None, "val", kind), kind)))
    name = data_set(edited(reordered, "val", kind), kind)
    by_name = evaluate(name, kind, results, class_names=NAMES, class_counts=[1, 50, 5000])
    assert by_name["AP"] == pytest.approx(100)
    assert evaluate(name, kind, results)["AP"] < 50  # the order of the file, when none is known
    assert [by_name[f"AP{i}"] for i in (1, 2, 4)] == pytest.approx([100] * 3)


@pytest.mark.parametrize("kind", EVALUATORS)
def test_counts_follow_the_classes(kind, data_set, tmp_path):
    name = data_set(edited(reordered, "val", kind), kind)
    options = {"class_names": NAMES, "class_counts": [1, 50, 5000], "output_dir": str(tmp_path)}
    evaluate(name, kind, **options)
    rows = (tmp_path / "per_class_bbox.csv").read_text().splitlines()[1:]
    found = {row.split(",")[1]: int(row.split(",")[3]) for row in rows}
    assert found == {"red": 1, "green": 50, "blue": 5000}


def fewer(data):
    data["categories"] = data["categories"][::2]
    data["annotations"] = [a for a in data["annotations"] if a["category_id"] != 2]
    for image in data["images"]:
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            if key in image:
                image[key] = [c for c in image[key] if c != 2]


def more(data):
    data["categories"].append({"id": 4, "name": "mauve", "frequency": "r"})
    data["annotations"][0]["category_id"] = 4


@pytest.mark.parametrize("kind", EVALUATORS)
@pytest.mark.parametrize(("edit", "common"), [(fewer, 2), (more, 3)])
def test_other_classes_are_refused_with_a_remedy_that_works(kind, edit, common, data_set):
    name = data_set(edited(edit, "val", kind), kind)
    results = list(perfect_results(data_set(edited(lambda d: None, "val", kind), kind)))
    with pytest.raises(ConfigError, match=rf"COMMON_CLASSES_ONLY.*the {common} in common"):
        EVALUATORS[kind](name, class_names=NAMES)
    options = {"class_names": NAMES, "class_counts": [1, 2, 3], "common_classes_only": True}
    metrics = evaluate(name, kind, results, **options)
    if edit is fewer:
        assert metrics["AP"] == pytest.approx(100)


@pytest.mark.parametrize("edit", [fewer, more])
def test_training_refuses_test_sets_of_other_classes_at_the_start(edit, data_set, cfg_of):
    train, val = data_set(edited(lambda d: None)), data_set(edited(edit, "val"))
    with pytest.raises(ConfigError, match="COMMON_CLASSES_ONLY"):
        check_datasets(cfg_of([train], [val]), training=True)
    check_datasets(cfg_of([train], [val], "TEST.COMMON_CLASSES_ONLY", True), training=True)


def test_evaluation_takes_the_names_of_the_checkpoint(data_set, cfg_of, monkeypatch):
    """With no training set to be had, and the test set's classes in another order."""
    train, val = data_set(edited(lambda d: None)), data_set(edited(reordered, "val"))
    options = ("SOLVER.MAX_ITER", 1, "SOLVER.IMS_PER_BATCH", 2, "MODEL.DEVICE", "cpu")
    options += ("DATALOADER.NUM_WORKERS", 0, "SOLVER.STEPS", ())
    trainer = BAGSTrainer(cfg_of([train], (), *options))
    trainer.train()
    cfg = cfg_of((), [val], *options)
    model = BAGSTrainer.build_model(cfg)
    checkpoint = f"{cfg.OUTPUT_DIR}/model_final.pth"
    LongTailCheckpointer(model, evaluating=True).load(checkpoint)
    found = {}
    build = BAGSTrainer.build_evaluator

    def spy(cfg, name, folder, class_counts, class_names):
        found.update(names=class_names, counts=class_counts)
        return build(cfg, name, folder, class_counts, class_names)

    monkeypatch.setattr(BAGSTrainer, "build_evaluator", spy)
    results = BAGSTrainer.test(cfg, model)["bbox"]
    assert tuple(found["names"]) == NAMES
    assert tuple(found["counts"]) == COUNTS["train"]
    assert "bAP" in results


def test_a_checkpoint_of_the_same_classes_in_another_order_is_not_trained_on(data_set, cfg_of):
    options = ("SOLVER.MAX_ITER", 1, "SOLVER.IMS_PER_BATCH", 2, "MODEL.DEVICE", "cpu")
    options += ("DATALOADER.NUM_WORKERS", 0, "SOLVER.STEPS", ())
    cfg = cfg_of([data_set(edited(lambda d: None))], (), *options)
    BAGSTrainer(cfg).train()
    weights = ("MODEL.WEIGHTS", f"{cfg.OUTPUT_DIR}/model_final.pth")
    other = BAGSTrainer(cfg_of([data_set(edited(reordered))], (), *options, *weights))
    with pytest.raises(ConfigError, match="in another order"):
        other.resume_or_load(resume=False)


def test_names_that_name_several_classes_are_refused(data_set):
    edit = lambda d: [c.update(name="red") for c in d["categories"][1:]]  # noqa: E731
    name = data_set(edited(edit, "val"))
    with pytest.raises(DataError, match="'red' names several"):
        LongTailCOCOEvaluator(name, class_names=NAMES)


# Whatever a file holds


NUMBERS = st.integers(-5, SIDE + 5) | st.floats(-5, SIDE + 5) | st.sampled_from([0, 1e-4, 1e12])
POLYGONS = st.lists(NUMBERS, max_size=9)
VALUES = {
    "id": st.integers(-3, 30) | st.text(max_size=2) | st.just(2**60) | st.none(),
    "image_id": st.integers(0, 3) | st.text(max_size=1),
    "category_id": st.integers(0, 4) | st.text(max_size=1),
    "bbox": st.lists(NUMBERS, min_size=3, max_size=5) | st.lists(NUMBERS, min_size=4, max_size=4),
    "area": NUMBERS | st.none() | st.just("9"),
    "iscrowd": st.sampled_from([0, 1, None, True, False, "0", 2, 0.0, []]),
    "ignore": st.sampled_from([0, 1, None, True, "x"]),
    "segmentation": st.lists(POLYGONS, max_size=3) | POLYGONS | st.none() | st.just({}),
}
CHANGES = st.lists(
    st.sampled_from(sorted(VALUES)).flatmap(
        lambda key: st.tuples(st.integers(0, 8), st.just(key), VALUES[key])
    ),
    max_size=5,
)
IMAGE_VALUES = {
    "id": st.integers(-3, 9) | st.text(max_size=2) | st.just(2**60),
    "width": st.just(SIDE) | st.sampled_from([0, -1, 64.0, "64", None]),
    "coco_url": st.none() | st.just(""),
    "license": st.text(max_size=2) | st.integers(),
}
IMAGE_CHANGES = st.lists(
    st.sampled_from(sorted(IMAGE_VALUES)).flatmap(
        lambda key: st.tuples(st.integers(0, 2), st.just(key), IMAGE_VALUES[key])
    ),
    max_size=2,
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    changes=CHANGES,
    image_changes=IMAGE_CHANGES,
    kind=st.sampled_from(["coco", "lvis"]),
    mask_on=st.booleans(),
)
def test_counted_is_trained_on_is_evaluated(
    changes, image_changes, kind, mask_on, data_set, cfg_of
):
    data = small_set.content("val", kind)
    for row, key, value in changes:
        data["annotations"][row][key] = value
    for row, key, value in image_changes:
        before, data["images"][row][key] = data["images"][row].get(key), value
        for a in data["annotations"] if key == "id" else ():
            if a["image_id"] == before:
                a["image_id"] = value
    name = data_set(data, kind)
    cfg = cfg_of([name], [name], "MODEL.MASK_ON", mask_on)
    try:
        check_dataset(cfg, name, training=True)
        check_dataset(cfg, name, training=False)
    except BagsError as error:
        event("refused")
        refusal = str(error)
    else:
        event("accepted")
        refusal = ""
        task = "segm" if mask_on else "bbox"
        assert counted(name) == trained_on(cfg) == evaluated(name, kind, task)
        evaluate(name, kind)
    assert "\n" not in refusal


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([1e999, -(2**80), "\ud800", "a\0"]),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=6,
)
KEYS = (
    *("id", "name", "frequency", "width", "height", "file_name", "coco_url", "neg_category_ids"),
    *("image_id", "category_id", "bbox", "area", "iscrowd", "ignore", "segmentation"),
)


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    section=st.sampled_from(["images", "categories", "annotations"]),
    key=st.sampled_from(KEYS) | st.none(),
    value=JSON,
    kind=st.sampled_from(["coco", "lvis"]),
    mask_format=st.sampled_from(["polygon", "bitmask"]),
)
def test_any_json_is_read_or_refused_in_one_sentence(
    section, key, value, kind, mask_format, tmp_path
):
    data = small_set.content("val", kind)
    if key is None:
        data[section] = value
    else:
        data[section][0][key] = value
    path = write(tmp_path / "any.json", data)
    refusal = ""
    try:
        annotations = read_annotations(path)
        annotations.require_file_names(kind == "lvis")
        annotations.require_objects()
        annotations.require_masks(mask_format)
        annotations.require_federated()
        annotations.records("", lvis=kind == "lvis")
    except BagsError as error:
        refusal = str(error)
    assert "\n" not in refusal
