"""Data sets in LVIS format, and what importing the package registers."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from bags_d2 import BAGSTrainer, ConfigError, DataError, MissingFileError
from bags_d2.data import load_lvis_format
from bags_d2.data.class_statistics import count_classes
from bags_d2.data.datasets import GLYPH_SETS, register_from_config
from bags_d2.data.lvis_v1 import lvis_v1_counts

CONTENT = {
    "categories": [{"id": 30, "name": "owl"}, {"id": 4, "name": "cat"}, {"id": 9, "name": "dog"}],
    "images": [
        {
            "id": 7,
            "coco_url": "http://images.cocodataset.org/val2017/000000000007.jpg",
            "height": 40,
            "width": 60,
            "neg_category_ids": [4],
            "not_exhaustive_category_ids": [9],
        },
        {"id": 3, "file_name": "sub/3.png", "height": 20, "width": 30},
    ],
    "annotations": [
        {
            "id": 1,
            "image_id": 7,
            "category_id": 30,
            "bbox": [1.5, 2, 3, 4],
            "segmentation": [[1, 2, 3, 4, 5, 6]],
        },
        {"id": 2, "image_id": 7, "category_id": 4, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        {"id": 3, "image_id": 7, "category_id": 9, "bbox": [5, 5, 2, 2], "segmentation": []},
    ],
}


@pytest.fixture
def lvis_file(tmp_path):
    def write(**changes):
        path = tmp_path / "lvis.json"
        path.write_text(json.dumps({**CONTENT, **changes}))
        return str(path)

    return write


def test_records_of_a_file(lvis_file, register):
    name = register("lvis_format", lvis_file(), "root")
    first, second = DatasetCatalog.get(name)
    assert first == {
        "file_name": "root/sub/3.png",
        "image_id": 3,
        "height": 20,
        "width": 30,
        "neg_category_ids": [],
        "not_exhaustive_category_ids": [],
        "annotations": [],
    }
    annotations = second.pop("annotations")
    annotations[0]["segmentation"] = [p.tolist() for p in annotations[0]["segmentation"]]
    assert second == {
        "file_name": "root/val2017/000000000007.jpg",
        "image_id": 7,
        "height": 40,
        "width": 60,
        "neg_category_ids": [4],
        "not_exhaustive_category_ids": [9],
    }
    mode = BoxMode.XYWH_ABS
    assert annotations == [
        {
            "bbox": [1.5, 2, 3, 4],
            "bbox_mode": mode,
            "category_id": 2,
            "iscrowd": 0,
            "segmentation": [[1, 2, 3, 4, 5, 6]],
        },
        {"bbox": [0, 0, 9, 9], "bbox_mode": mode, "category_id": 0, "iscrowd": 1},
        {"bbox": [5, 5, 2, 2], "bbox_mode": mode, "category_id": 1, "iscrowd": 0},
    ]


def test_metadata_of_a_file(lvis_file, register):
    path = lvis_file()
    metadata = MetadataCatalog.get(register("lvis_format", path, "root"))
    assert metadata.json_file == path
    assert metadata.image_root == "root"
    assert metadata.evaluator_type == "lvis"
    DatasetCatalog.get("lvis_format")
    assert metadata.thing_classes == ["cat", "dog", "owl"]
    assert metadata.thing_dataset_id_to_contiguous_id == {4: 0, 9: 1, 30: 2}


def test_registration_needs_no_file_and_loading_does(tmp_path, register):
    path = str(tmp_path / "gone.json")
    name = register("lvis_format", path)
    with pytest.raises(MissingFileError, match=r"gone\.json' of data set 'lvis_format'"):
        DatasetCatalog.get(name)


def test_a_file_without_annotations_is_a_test_set(lvis_file, register):
    path = lvis_file()
    content = {k: v for k, v in CONTENT.items() if k != "annotations"}
    with open(path, "w") as file:
        json.dump(content, file)
    records = DatasetCatalog.get(register("lvis_format", path))
    assert [r["annotations"] for r in records] == [[], []]


@pytest.mark.parametrize(
    "annotation",
    [
        {"id": 5, "image_id": 99, "category_id": 4, "bbox": [0, 0, 1, 1]},
        {"id": 5, "image_id": 3, "category_id": 99, "bbox": [0, 0, 1, 1]},
        {"id": 5, "image_id": 3, "category_id": 4},
        {"id": 5, "category_id": 4, "bbox": [0, 0, 1, 1]},
    ],
    ids=["unknown image", "unknown category", "no box", "no image"],
)
def test_a_faulty_annotation_is_named(lvis_file, register, annotation):
    name = register("lvis_format", lvis_file(annotations=[annotation]))
    with pytest.raises(DataError, match=r"lvis\.json': annotation 5 "):
        DatasetCatalog.get(name)


@pytest.mark.parametrize(
    "changes",
    [
        {"categories": [{"name": "cat"}]},
        {"categories": [{"id": 4}]},
        {"categories": None},
        {"images": [{"id": 3, "file_name": "3.png"}]},
        {"images": [{"id": 3, "height": 20, "width": 30}]},
        {"images": [{"file_name": "3.png", "height": 20, "width": 30}]},
        {"images": None},
    ],
    ids=[
        "category without id",
        "category without name",
        "no categories",
        "image without size",
        "image without name",
        "image without id",
        "no images",
    ],
)
def test_a_file_of_another_structure_is_refused_by_name(lvis_file, register, changes):
    name = register("lvis_format", lvis_file(annotations=[], **changes))
    with pytest.raises(DataError, match=r"lvis\.json"):
        DatasetCatalog.get(name)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "\x80"])
def test_a_file_that_is_no_lvis_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "faulty.json"
    path.write_text(text, encoding="latin1")
    with pytest.raises(DataError, match=r"faulty\.json"):
        load_lvis_format(str(path), "", "lvis_format_faulty")


@pytest.mark.parametrize("preset", GLYPH_SETS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_the_glyph_sets_are_registered(preset, split):
    name = f"{preset}_{split}"
    assert name in DatasetCatalog
    metadata = MetadataCatalog.get(name)
    assert metadata.evaluator_type == "lvis"
    assert metadata.json_file.endswith(f"{preset}/annotations/{name}.json")
    assert metadata.image_root.endswith(preset)


def test_counts_of_lvis_v1_are_those_of_its_categories():
    counts = lvis_v1_counts()
    images = MetadataCatalog.get("lvis_v1_train").class_image_count
    assert counts["image_count"] == [
        row["image_count"] for row in sorted(images, key=lambda row: row["id"])
    ]
    assert sum(counts["instance_count"]) == 1_270_141
    assert all(
        n >= m >= 1 for n, m in zip(counts["instance_count"], counts["image_count"], strict=True)
    )
    assert MetadataCatalog.get("lvis_v1_train").class_instance_count == counts["instance_count"]


@pytest.fixture
def unregister():
    """Names that a test has registered, to be forgotten after it."""
    names = []
    yield names
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize("kind", ["coco", "lvis"])
def test_configs_register_data_sets(kind, write_lvis, tmp_path, unregister):
    path = write_lvis({3: "ant", 7: "bee", 20: "cat"}, [(1, 7), (2, 20), (2, 20)])
    row = (f"of_config_{kind}", kind, path, str(tmp_path))
    register_from_config([row])
    unregister.append(row[0])
    register_from_config([list(row)])  # as every process does anew
    assert count_classes(row[0]).tolist() == [0, 1, 2]
    assert len(DatasetCatalog.get(row[0])) == 2
    metadata = MetadataCatalog.get(row[0])
    assert metadata.evaluator_type == kind
    assert list(metadata.thing_classes) == ["ant", "bee", "cat"]
    with pytest.raises(ConfigError, match="of other files is registered already"):
        register_from_config([(row[0], kind, "other.json", str(tmp_path))])


def test_a_plain_merge_registers_when_a_model_is_built(tiny_cfg, write_lvis, tmp_path, unregister):
    path = write_lvis({3: "ant", 7: "bee"}, [(1, 7), (2, 7)])
    config = tmp_path / "plain.yaml"
    config.write_text(
        "MODEL: {ROI_HEADS: {NUM_CLASSES: 2}, LONG_TAIL: {CLASS_COUNTS_FILE: ''}}\n"
        f"DATASETS: {{REGISTER: [[plain_set, lvis, '{path}', '{tmp_path}']], TRAIN: [plain_set]}}"
    )
    unregister.append("plain_set")
    cfg = tiny_cfg("MODEL.ROI_BOX_PREDICTOR.NAME", "BAGSOutputLayers")
    cfg.merge_from_file(str(config))
    model = BAGSTrainer.build_model(cfg)
    assert model.roi_heads.box_predictor.groups.class_counts.tolist() == [0, 2]


@pytest.mark.parametrize(
    "row", ["text", ("a", "coco", "b"), ("a", "csv", "b", "c"), ("a", "coco", "b", 3)]
)
def test_faulty_rows_are_refused(row):
    with pytest.raises(ConfigError, match=r"DATASETS\.REGISTER must hold rows"):
        register_from_config([row])
