"""Training counts of each class, from metadata, annotation files, records and counts files."""

import itertools
import json
import re
from collections import Counter

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from hypothesis import given, settings
from hypothesis import strategies as st

from bags_d2 import ClassGroups, ConfigError, DataError, MissingFileError
from bags_d2.data import count_classes, read_class_counts, training_class_counts
from bags_d2.data.datasets import missing_dataset_message

# Ids with gaps and out of order; contiguous classes are cat 0, dog 1, owl 2, yak 3.
CATEGORIES = {7: "dog", 2: "cat", 90: "yak", 31: "owl"}
# (image, category), crowds marked by a third 1: 3 cats in 2 images, 1 dog, no owl, 2 yaks in 1.
ANNOTATIONS = [(1, 2), (1, 2), (5, 2), (5, 7), (1, 31, 1), (5, 90, 0), (5, 90), (5, 2, 1)]


@pytest.fixture
def write_coco(tmp_path):
    """A COCO-format file of the annotations above: every annotation says whether it is a crowd."""

    def write(categories=CATEGORIES, annotations=ANNOTATIONS):
        content = {
            "images": [
                {"id": i, "file_name": f"{i}.jpg", "height": 20, "width": 30} for i in (1, 5)
            ],
            "categories": [{"id": i, "name": n} for i, n in categories.items()],
            "annotations": [
                {
                    "id": i,
                    "image_id": im,
                    "category_id": c,
                    "bbox": [1, 2, 3, 4],
                    "iscrowd": crowd[0] if crowd else 0,
                }
                for i, (im, c, *crowd) in enumerate(annotations)
            ],
        }
        path = tmp_path / "coco.json"
        path.write_text(json.dumps(content))
        return str(path)

    return write


@pytest.fixture
def cfg_of(tiny_cfg):
    """``cfg_of(names, num_classes, *opts)``: a config that counts these training sets."""

    def make(names, num_classes, *opts):
        return tiny_cfg(
            *("DATASETS.TRAIN", tuple(names)),
            *("MODEL.ROI_HEADS.NUM_CLASSES", num_classes),
            *("MODEL.LONG_TAIL.CLASS_COUNTS_FILE", ""),
            *opts,
        )

    return make


# Counting a data set


@pytest.mark.parametrize(
    ("by", "expected"), [("instances", [3, 1, 0, 2]), ("images", [2, 1, 0, 1])]
)
def test_annotation_files_are_counted_in_contiguous_order_without_crowds(
    write_lvis, write_coco, register, by, expected
):
    lvis = register("counts_lvis", write_lvis(CATEGORIES, ANNOTATIONS))
    assert count_classes(lvis, by).tolist() == expected
    counts = count_classes(register("counts_coco", write_coco()), by)
    assert counts.tolist() == expected
    assert counts.dtype == torch.long


def test_a_loader_of_ones_own_is_counted_by_what_it_returns(write_coco, register):
    """Training takes what it returns, whatever the file for the evaluator holds."""
    name = register("counts_own", _records, thing_classes=["a", "b", "c"])
    MetadataCatalog.get(name).set(json_file=write_coco())
    assert count_classes(name).tolist() == [3, 0, 2]


def test_registrations_of_detectron2_are_read_here(write_coco, register):
    name = "counts_detectron2"
    register_coco_instances(name, {}, write_coco(), "")
    try:
        assert count_classes(name).tolist() == [3, 1, 0, 2]
        counted = Counter(
            a["category_id"]
            for record in DatasetCatalog.get(name)
            for a in record["annotations"]
            if not a["iscrowd"]
        )
        assert counted == {0: 3, 1: 1, 3: 2}
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_a_changed_file_is_counted_anew_and_results_are_independent(write_lvis, register):
    name = register("counts_changing", write_lvis(CATEGORIES, ANNOTATIONS))
    count_classes(name).zero_()
    assert count_classes(name).tolist() == [3, 1, 0, 2]
    write_lvis(CATEGORIES, [*ANNOTATIONS, (5, 31)])
    assert count_classes(name).tolist() == [3, 1, 1, 2]


def _records():
    def annotations(*ids, **extra):
        return [{"category_id": c, "bbox": [0, 0, 1, 1], **extra} for c in ids]

    return [
        {"image_id": 0, "annotations": annotations(0, 0, 2)},
        {"image_id": 1, "annotations": annotations(0, 2) + annotations(1, 1, iscrowd=1)},
        {"image_id": 2, "annotations": []},
    ]


@pytest.mark.parametrize(("by", "expected"), [("instances", [3, 0, 2]), ("images", [2, 0, 2])])
def test_a_data_set_without_a_file_is_walked(register, by, expected):
    name = register("counts_records", _records, thing_classes=["a", "b", "c"])
    assert count_classes(name, by).tolist() == expected


def test_class_names_may_be_set_by_the_loader(register):
    def load():
        MetadataCatalog.get("counts_late").set(thing_classes=["a", "b", "c"])
        return _records()

    assert count_classes(register("counts_late", load)).tolist() == [3, 0, 2]


def test_counts_in_the_metadata_go_before_everything(register):
    name = register(
        "counts_known",
        lambda: pytest.fail("the data set was loaded"),
        class_instance_count=[4, 5, 6],
        class_image_count=[{"id": i, "image_count": n} for i, n in enumerate([1, 2, 3])],
    )
    assert count_classes(name).tolist() == [4, 5, 6]
    assert count_classes(name, "images").tolist() == [1, 2, 3]


def test_lvis_v1_needs_no_file_on_disk(cfg_of, monkeypatch):
    cfg = cfg_of(["lvis_v1_train"], 1203)
    cfg_by_images = cfg_of(["lvis_v1_train"], 1203, "MODEL.LONG_TAIL.COUNT_BY", "images")
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("a file was read"))
    instances = training_class_counts(cfg)
    assert len(instances) == 1203
    assert instances.sum() == 1_270_141
    assert ClassGroups.from_counts(instances).sizes == (200, 412, 334, 257)
    images = training_class_counts(cfg_by_images)
    rows = MetadataCatalog.get("lvis_v1_train").class_image_count
    assert images.tolist() == [row["image_count"] for row in rows]
    assert (images <= instances).all()
    assert ClassGroups.from_counts(images).sizes != (200, 412, 334, 257)


def test_counting_a_file_is_counting_by_hand(write_lvis, register):
    numbers = itertools.count()
    annotation = st.tuples(st.integers(1, 4), st.sampled_from([3, 5, 8]), st.integers(0, 1))

    @settings(deadline=None, max_examples=30)
    @given(st.lists(annotation, min_size=1, max_size=30))
    def check(annotations):
        name = f"counts_by_hand_{next(numbers)}"
        path = write_lvis({8: "c", 3: "a", 5: "b"}, annotations, f"{name}.json")
        register(name, path)
        kept = [(image, c) for image, c, crowd in annotations if not crowd]
        of_instances = Counter(c for _, c in kept)
        of_images = Counter(c for _, c in set(kept))
        assert count_classes(name).tolist() == [of_instances[c] for c in (3, 5, 8)]
        assert count_classes(name, "images").tolist() == [of_images[c] for c in (3, 5, 8)]

    check()


# Faulty or missing data

FAULTY = (
    '{"images": [{"id": 1, "file_name": "a", "height": 9, "width": 9}], "categories": [%s], '
    '"annotations": %s}'
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"annotations": [', "is not valid JSON"),
        ("[]", "has no list 'images'"),
        ('{"annotations": []}', "has no list 'categories'"),
        (FAULTY % ('{"id": 1, "name": "cat"}', "{}"), "has no list 'annotations'"),
        (
            FAULTY % ('{"id": 1, "name": "cat"}', '[{"id": 9, "image_id": 1, "category_id": 4}]'),
            r"annotation 9 .*\b4\b",
        ),
        (FAULTY % ('{"id": 1, "name": "cat"}', '[{"id": 9, "image_id": 1}]'), "annotation 9"),
        (FAULTY % ('{"name": "cat"}', "[]"), "categor"),
    ],
)
def test_a_faulty_annotation_file_is_named(tmp_path, register, content, message):
    path = tmp_path / "faulty.json"
    path.write_text(content)
    name = register("counts_faulty", str(path))
    with pytest.raises(DataError, match=message) as caught:
        count_classes(name)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("lvis_v0.5_train", "lvisdataset.org"),
        ("coco_2017_train", "cocodataset.org"),
        ("glyphs_tiny_train", "bags-d2 prepare glyphs.*glyphs_tiny"),
        ("birds_train", "correct the path"),
    ],
)
def test_a_missing_file_is_named_with_where_to_get_it(name, remedy):
    message = missing_dataset_message(name, "some/file.json")
    assert message.startswith(f"'some/file.json' of data set '{name}' does not exist; ")
    assert message.endswith(".")
    assert re.search(remedy, message)


def test_counting_a_missing_file_says_so(register, cfg_of, tmp_path):
    path = str(tmp_path / "gone.json")
    name = register("counts_gone", path)
    with pytest.raises(MissingFileError, match=r"gone\.json' of data set 'counts_gone'"):
        count_classes(name)
    with pytest.raises(FileNotFoundError, match=r"gone\.json"):
        training_class_counts(cfg_of([name], 4))


# What a config asks for


def test_counts_of_several_training_sets_are_summed(write_lvis, register, cfg_of):
    first = register("counts_first", write_lvis(CATEGORIES, ANNOTATIONS, "first.json"))
    second = register(
        "counts_second", write_lvis(CATEGORIES, [(1, 31), (2, 31), (2, 2)], "second.json")
    )
    assert training_class_counts(cfg_of([first, second], 4)).tolist() == [4, 1, 2, 2]
    by_images = cfg_of([first, second], 4, "MODEL.LONG_TAIL.COUNT_BY", "images")
    assert training_class_counts(by_images).tolist() == [3, 1, 2, 1]
    assert training_class_counts(by_images, by="instances").tolist() == [4, 1, 2, 2]


@pytest.mark.parametrize(
    "others",
    [{1: "ant"}, {2: "cat", 7: "dog", 31: "owl", 91: "ant"}],
    ids=["fewer classes", "as many classes with other names"],
)
def test_training_sets_of_different_classes_are_refused(write_lvis, register, cfg_of, others):
    first = register("counts_first", write_lvis(CATEGORIES, ANNOTATIONS, "first.json"))
    second = register("counts_second", write_lvis(others, [(1, min(others))], "second.json"))
    with pytest.raises(
        DataError, match="'counts_first' and 'counts_second' have different classes"
    ):
        training_class_counts(cfg_of([first, second], 4))


def test_records_of_different_classes_are_refused(register, cfg_of):
    first = register("counts_first", _records, thing_classes=["a", "b", "c"])
    second = register("counts_second", _records, thing_classes=["a", "c", "b"])
    with pytest.raises(DataError, match="different classes"):
        training_class_counts(cfg_of([first, second], 3))


def test_number_of_classes_has_to_agree(write_lvis, register, cfg_of, tiny_cfg):
    name = register("counts_four", write_lvis(CATEGORIES, ANNOTATIONS))
    with pytest.raises(ConfigError, match=r"counts_four.*has 4 classes.*NUM_CLASSES is 5.*to 4"):
        training_class_counts(cfg_of([name], 5))
    cfg = tiny_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 5)
    with pytest.raises(ConfigError, match=r"CLASS_COUNTS_FILE.*6 classes.*NUM_CLASSES is 5"):
        training_class_counts(cfg)


def test_count_by_is_checked(tiny_cfg):
    with pytest.raises(ConfigError, match=r"COUNT_BY must be one of .*'pixels'"):
        training_class_counts(tiny_cfg("MODEL.LONG_TAIL.COUNT_BY", "pixels"))


def test_without_any_source_the_keys_are_named(cfg_of):
    with pytest.raises(MissingFileError, match=r"DATASETS\.TRAIN and .*CLASS_COUNTS_FILE are both"):
        training_class_counts(cfg_of([], 4))


# Counts files


def test_a_counts_file_is_a_list_or_keyed_by_name(tmp_path):
    path = tmp_path / "counts.json"
    path.write_text("[3, 0, 12]")
    assert read_class_counts(str(path)).tolist() == [3, 0, 12]
    assert read_class_counts(str(path), ["a", "b", "c"]).tolist() == [3, 0, 12]
    path.write_text('{"b": 0, "c": 12, "a": 3}')
    counts = read_class_counts(str(path), ["a", "b", "c"])
    assert counts.tolist() == [3, 0, 12]
    assert counts.dtype == torch.long


@pytest.mark.parametrize(
    ("content", "names", "message"),
    [
        ("[]", None, "must hold a JSON list of whole numbers"),
        ("[1, -1]", None, "must hold a JSON list of whole numbers"),
        ("[1, 2.5]", None, "must hold a JSON list of whole numbers"),
        ("[1, true]", None, "must hold a JSON list of whole numbers"),
        ('[1, "2"]', None, "must hold a JSON list of whole numbers"),
        (f"[1, {10**30}]", None, "must hold a JSON list of whole numbers"),
        ("7", None, "must hold a JSON list of whole numbers"),
        ("null", None, "must hold a JSON list of whole numbers"),
        ('{"a": 1, "b": -2}', ["a", "b"], "must hold a JSON list of whole numbers"),
        ('{"a": 1}', None, "class names are unknown"),
        ('{"a": 1}', ["a", "b"], r"disagree on the classes \['b'\]"),
        ('{"a": 1, "c": 2}', ["a"], r"disagree on the classes \['c'\]"),
        ("[1, 2", None, "is not valid JSON"),
    ],
)
def test_a_faulty_counts_file_is_refused(tmp_path, content, names, message):
    path = tmp_path / "counts.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read_class_counts(str(path), names)
    assert str(path) in str(caught.value)


def test_a_missing_counts_file_names_its_key():
    with pytest.raises(MissingFileError, match=r"CLASS_COUNTS_FILE 'gone\.json' does not exist"):
        read_class_counts("gone.json")


def test_a_counts_file_goes_before_the_training_set(tmp_path, register, cfg_of):
    path = tmp_path / "counts.json"
    path.write_text('{"b": 20, "a": 10}')
    name = register("counts_by_name", lambda: pytest.fail("loaded"), thing_classes=["a", "b"])
    cfg = cfg_of([name], 2, "MODEL.LONG_TAIL.CLASS_COUNTS_FILE", str(path))
    assert training_class_counts(cfg).tolist() == [10, 20]


def test_a_counts_file_by_name_serves_a_data_set_that_is_not_loaded_yet(
    tmp_path, write_lvis, register, cfg_of
):
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"yak": 4, "owl": 3, "dog": 2, "cat": 1}))
    name = register("counts_by_name", write_lvis(CATEGORIES, ANNOTATIONS))
    cfg = cfg_of([name], 4, "MODEL.LONG_TAIL.CLASS_COUNTS_FILE", str(path))
    assert training_class_counts(cfg).tolist() == [1, 2, 3, 4]


def test_a_counts_file_serves_without_a_training_set(tiny_cfg):
    assert training_class_counts(tiny_cfg("DATASETS.TRAIN", ())).tolist() == [
        3,
        12,
        150,
        2000,
        7,
        40,
    ]
