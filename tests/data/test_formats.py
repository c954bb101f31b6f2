# ruff: noqa: F401, F811 (fixtures of test_annotations)
"""Data sets in folders: read as COCO's are, refused in one sentence, found, and converted."""

import argparse
import json
import os
import re
import shutil
import uuid
from collections import Counter
from pathlib import Path

import format_sets
import numpy as np
import own_data
import pycocotools.mask as mask_utils
import pytest
import small_set
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.env import seed_all_rng
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from small_set import COUNTS, NAMES, SIDE
from test_annotations import (
    cfg_of,
    counted,
    evaluate,
    evaluated,
    images,
    perfect_results,
    trained_on,
)

from bags_d2 import BagsError, ConfigError, DataError, MissingFileError
from bags_d2.analysis.method_runs import _data_record
from bags_d2.cli import convert_data
from bags_d2.data.build import check_dataset, check_datasets, training_records
from bags_d2.data.datasets import class_names, register_from_config
from bags_d2.data.formats import find_dataset, read_row
from bags_d2.data.formats.convert import convert_dataset
from bags_d2.data.images import read_image
from bags_d2.data.loader import LongTailDatasetMapper
from bags_d2.fitting.cache import cache_settings

KINDS = ("yolo", "voc", "labelme")


@pytest.fixture
def sets(tmp_path, images):
    """The same training set in every format: (kind, annotations, images) by kind."""
    rows = format_sets.write_all(tmp_path / "sets", images)
    return {kind: (kind, *row) for kind, row in rows.items()}


@pytest.fixture
def register():
    """``register(kind, annotations, images)``: name of a data set, until the test ends."""
    names = []

    def of(kind, source, image_root):
        names.append(f"set_{uuid.uuid4().hex}")
        register_from_config([[names[-1], kind, str(source), str(image_root)]])
        return names[-1]

    yield of
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def file_of(kind, row):
    """The annotation file of the first image, and a file of the second."""
    source, root = Path(row[1]), Path(row[2])
    folder, suffix = {
        "yolo": (root.parents[1] / "labels" / "train", "txt"),
        "voc": (source.parents[2] / "Annotations", "xml"),
        "labelme": (source, "json"),
    }[kind]
    return folder / f"train1.{suffix}"


def edit(path, before, after, count=1):
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, count))


# The same data in every format


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_records_of_coco(kind, sets, register, cfg_of):
    name, coco = register(*sets[kind]), register(*sets["coco"])
    cfg = cfg_of([name], [name])
    check_datasets(cfg, training=True)
    expected = Counter(dict(enumerate(COUNTS["train"])))
    if kind != "yolo":  # whose classes are in the order of names
        names = sorted(NAMES)
        expected = Counter({names.index(n): COUNTS["train"][c] for c, n in enumerate(NAMES)})
    assert counted(name) == trained_on(cfg) == evaluated(name, "coco") == expected
    assert evaluate(name, "coco")["AP"] == pytest.approx(100)

    class_of = dict(enumerate(class_names(name)))
    for ours, theirs in zip(DatasetCatalog.get(name), DatasetCatalog.get(coco), strict=True):
        assert (ours["width"], ours["height"]) == (theirs["width"], theirs["height"])
        assert os.path.basename(ours["file_name"]) == os.path.basename(theirs["file_name"])
        for a, b in zip(ours["annotations"], theirs["annotations"], strict=True):
            assert a["bbox"] == pytest.approx(b["bbox"], abs=1e-9)
            assert class_of[a["category_id"]] == NAMES[b["category_id"]]
            assert a["iscrowd"] == b["iscrowd"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_edits_are_noticed(kind, sets, register):
    name = register(*sets[kind])
    before, record = DatasetCatalog.get(name), _data_record([name])
    assert read_row(*sets[kind]) is read_row(*sets[kind])  # read once
    path = file_of(kind, sets[kind])
    time = os.stat(path).st_mtime_ns
    number = {"yolo": r"(?<=\.)\d", "voc": r"(?<=<ymax>)\d", "labelme": r"(?<=\[\[)\d"}[kind]
    text = re.sub(number, lambda m: str((int(m[0]) + 1) % 10), path.read_text(), count=1)
    path.write_text(text)
    os.utime(path, ns=(time, time))  # nor does the size tell
    assert DatasetCatalog.get(name) != before
    assert _data_record([name]) != record


def test_a_folder_that_cannot_be_written_to_is_read(sets):
    for kind in KINDS:
        folder = Path(sets[kind][2])
        listing = sorted(folder.rglob("*"))
        read_row(*sets[kind])
        assert sorted(folder.rglob("*")) == listing


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_of_features_notices_edits(kind, sets, register, cfg_of, tmp_path):
    name = register(*sets[kind])
    (tmp_path / "model.pth").write_bytes(b"weights")
    cfg = cfg_of([name], (), "MODEL.WEIGHTS", str(tmp_path / "model.pth"))
    before = cache_settings(cfg, training_records(cfg))
    assert cache_settings(cfg, training_records(cfg)) == before
    pattern = {"yolo": r"(?<=\.)\d", "voc": r"(?<=<ymax>)\d", "labelme": r"(?<=\[\[)\d"}[kind]
    path = file_of(kind, sets[kind])
    path.write_text(re.sub(pattern, "9", path.read_text(), count=1))
    after = cache_settings(cfg, training_records(cfg))
    assert {key for key in before if before[key] != after[key]} == {"annotations"}


@pytest.mark.parametrize(
    ("kind", "mask_on"),
    [
        (kind, mask)
        for kind in (*KINDS, "coco")
        for mask in (False, True)
        if (kind, mask) != ("voc", 1)
    ],
)
def test_what_is_converted_trains_to_the_same_bits(kind, mask_on, tmp_path, register, cfg_of):
    own_data.build(tmp_path / "mine")
    rows = find_dataset(tmp_path / "mine")
    passes = []
    for row in (rows[0], convert_dataset(rows, kind, tmp_path / "out")[0]):
        name = register(*row[1:])
        cfg = cfg_of([name], (), "MODEL.ROI_HEADS.NUM_CLASSES", 7, "MODEL.MASK_ON", mask_on)
        mapper, found = LongTailDatasetMapper(cfg, is_train=True), []
        for record in training_records(cfg):
            seed_all_rng(0)
            found.append(mapper(record)["instances"])
        passes.append(found)
    for a, b in zip(*passes, strict=True):
        assert torch.equal(a.gt_boxes.tensor, b.gt_boxes.tensor)
        assert torch.equal(a.gt_classes, b.gt_classes)
        if mask_on:
            for p, q in zip(a.gt_masks.polygons, b.gt_masks.polygons, strict=True):
                np.testing.assert_allclose(p, q, atol=1e-9)


# Row by row, what docs/datasets.md says


def without_file(kind, row):
    file_of(kind, row).unlink()


def orphan(kind, row):
    Path(row[2], "train1.png").unlink()


def uppercase_suffix(kind, row):
    Path(row[2], "train1.png").rename(Path(row[2], "train1.PNG"))


def in_subfolders(kind, row):
    path, image = file_of(kind, row), Path(row[2], "train1.png")
    for file in (path, image):
        (file.parent / "more").mkdir(exist_ok=True)
        file.rename(file.parent / "more" / file.name)


def hidden(kind, row):
    for file in (file_of(kind, row), Path(row[2], "train1.png")):
        (file.parent / f"._{file.name}").write_bytes(b"\0")
    (file.parent / ".cache").mkdir()
    (file.parent / ".cache" / "a.png").write_bytes(b"\0")


def sized_by_image(kind, row):
    path = file_of(kind, row)
    if kind == "voc":
        path.write_text(
            re.sub("<size>.*</size>", "<size><width>0</width></size>", path.read_text())
        )
    else:
        edit(path, '"imageHeight": 64', '"imageHeight": null')


def polygons(kind, row):
    path = file_of(kind, row)
    if kind == "yolo":
        c, x, y, w, h = map(float, path.read_text().split()[:5])
        (x0, x1), (y0, y1) = (x - w / 2, x + w / 2), (y - h / 2, y + h / 2)
        first = f"{int(c)} {x0} {y0} {x1} {y0} {x1} {y1} {x0} {y1}"
        path.write_text("\n".join([first, *path.read_text().splitlines()[1:]]))
    else:
        shape = (data := json.loads(path.read_text()))["shapes"][0]
        (x0, y0), (x1, y1) = shape["points"]
        shape.update(shape_type="polygon", points=[[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
        path.write_text(json.dumps(data))


def grouped(kind, row):
    """An object of two polygons, and a group of two labels."""
    path = file_of(kind, row)
    data = json.loads(path.read_text())
    shape = data["shapes"][0]
    (x0, y0), (x1, y1) = shape["points"]
    middle = (x0 + x1) / 2
    parts = []
    for a, b in ((x0, middle), (middle, x1)):
        points = [[a, y0], [b, y0], [b, y1], [a, y1]]
        parts.append({**shape, "shape_type": "polygon", "points": points, "group_id": 5})
    data["shapes"][1]["group_id"] = 5
    data["shapes"][1]["label"] = next(n for n in NAMES if n != shape["label"])
    data["shapes"][1]["label"] = json.loads(path.read_text())["shapes"][1]["label"]
    data["shapes"] = [*parts, *data["shapes"][1:]]
    path.write_text(json.dumps(data))


def corners_swapped(kind, row):
    path = file_of(kind, row)
    data = json.loads(path.read_text())
    data["shapes"][0]["points"].reverse()
    path.write_text(json.dumps(data))


def declared(kind, row):
    Path(row[1]).parent.joinpath("classes.txt").write_text("red\ngreen\nblue\n\n")


def in_yaml(text):
    def change(kind, row):
        Path(row[1]).write_text(text)

    return change


def beside_images(kind, row):
    labels = Path(row[2]).parents[1] / "labels" / "train"
    for path in labels.iterdir():
        shutil.move(path, row[2])
    shutil.rmtree(labels.parent)


def replaced(before, after, count=1):
    return lambda kind, row: edit(file_of(kind, row), before, after, count)


def with_bom(kind, row):
    path = file_of(kind, row)
    path.write_text("\ufeff" + path.read_text().replace("\n", "\r\n") + "\r\n\r\n")


def difficult(kind, row):
    if kind == "voc":
        edit(file_of(kind, row), "<pose>", "<difficult>1</difficult><pose>")
    else:
        edit(
            file_of(kind, row),
            '"flags": {}, "group_id"',
            '"flags": {"difficult": true}, "group_id"',
        )


def all_unlisted(kind, row):
    path = file_of(kind, row)
    data = json.loads(path.read_text())
    data["shapes"] += [
        {"label": "red", "shape_type": "point", "points": [[3, 4]]},
        {"label": "red", "shape_type": "line", "points": [[3, 4], [5, 6]]},
    ]
    path.write_text(json.dumps(data))


# Kinds and edit; all objects are there.
ACCEPTED = {
    "suffix in capitals": (KINDS, uppercase_suffix),
    "subfolders": (("yolo", "labelme"), in_subfolders),
    "hidden files": (KINDS, hidden),
    "size missing": (("voc", "labelme"), sized_by_image),
    "polygon": (("yolo", "labelme"), polygons),
    "polygons of a group": (("labelme",), grouped),
    "corners in any order": (("labelme",), corners_swapped),
    "classes.txt": (("labelme",), declared),
    "names as a list": (("yolo",), in_yaml("nc: 3\nnames: [red, green, blue]")),
    "names as numbers": (("yolo",), in_yaml("names: [1, 2, 3]")),
    "labels beside images": (("yolo",), beside_images),
    "blank lines and a byte order mark": (("yolo",), with_bom),
    "class as 1.0": (
        ("yolo",),
        lambda k, r: file_of(k, r).write_text(
            re.sub(r"(?m)^(\d)", r"\1.0", file_of(k, r).read_text())
        ),
    ),
}
# Kinds, edit, objects less, what the line in the log says.
LEFT_OUT = {
    "image without JSON": (("labelme",), without_file, 3, "images without .* left out: 1"),
    "image without label file": (("yolo",), without_file, 3, "images without annotation file: 1"),
    "file without image": (("yolo", "labelme"), orphan, 3, r"without image left out .*: 1"),
    "difficult": (("voc", "labelme"), difficult, 1, "ignored regions left out: 1"),
    "points and lines": (("labelme",), all_unlisted, 0, "points left out: 1; lines left out: 1"),
    "box of no size": (("yolo",), lambda k, r: file_of(k, r).write_text(
        "0 .5 .5 0 0\n" + file_of(k, r).read_text()), 0, "enclose nothing.*: 1"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "kind"), [(case, kind) for case, (kinds, *_) in ACCEPTED.items() for kind in kinds]
)
def test_what_has_one_meaning_is_accepted(case, kind, sets, register, cfg_of):
    before = read_row(*sets[kind])
    ACCEPTED[case][1](kind, sets[kind])
    after = read_row(*sets[kind])
    assert after is not before or case in ("hidden files", "classes.txt")
    if case == "classes.txt":
        assert after.names == NAMES
    else:
        np.testing.assert_array_equal(after.instance_counts(), before.instance_counts())
    key = lambda read: sorted(map(tuple, np.round(read.boxes, 6)))  # noqa: E731
    assert key(after) == key(before)
    if "polygon" in case:
        assert after.masks.areas.sum() == pytest.approx(after.areas[0], rel=1e-5)
    name = register(*sets[kind])
    assert counted(name) == trained_on(cfg_of([name])) == evaluated(name, "coco")


@pytest.mark.parametrize(
    ("case", "kind"), [(case, kind) for case, (kinds, *_) in LEFT_OUT.items() for kind in kinds]
)
def test_what_is_left_out_is_left_out_everywhere(case, kind, sets, register, cfg_of, log_lines):
    _, change, number, line = LEFT_OUT[case]
    change(kind, sets[kind])
    name, lines = register(*sets[kind]), log_lines("bags_d2.data.build")
    assert counted(name) == trained_on(cfg_of([name])) == evaluated(name, "coco")
    assert sum(counted(name).values()) == sum(COUNTS["train"]) - number
    assert re.search(line, lines[0])
    assert evaluate(name, "coco")["AP"] == pytest.approx(100)


def added(text):
    def change(kind, row):
        path = file_of(kind, row)
        path.write_text(f"{path.read_text()}\n{text}")

    return change


BOMB = """<?xml version="1.0"?>
<!DOCTYPE lolz [<!ENTITY a "ha"> <!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>
<annotation><object><name>&b;</name></object></annotation>"""


def whole(text):
    return lambda kind, row: file_of(kind, row).write_text(text)


def list_more(kind, row):
    Path(row[1]).write_text("train1\nabsent\n")


def two_of_a_name(kind, row):
    shutil.copy(Path(row[2], "train1.png"), Path(row[2], "train1.jpg"))


# Kinds, edit, what the sentence says.
REFUSED = {
    "words": (("yolo",), added("red .1 .1 .1 .1"), r"train1\.txt' line 4 is 'red .*not all num"),
    "confidence": (("yolo",), added("0 .1 .1 .1 .1 .9"), "line 4 has 6 numbers, where 5"),
    "point too few": (("yolo",), added("0 .1 .1 .1"), "line 4 has 4 numbers"),
    "class too high": (("yolo",), added("3 .1 .1 .1 .1"), "line 4 is of class 3, but there are 3"),
    "class negative": (("yolo",), added("-1 .1 .1 .1 .1"), "line 4 is of class -1"),
    "class of a fraction": (("yolo",), added("0.5 .1 .1 .1 .1"), "line 4 is of class 0.5"),
    "class NaN": (("yolo",), added("nan .1 .1 .1 .1"), "line 4 is of class nan"),
    "pixels": (("yolo",), added("0 32 32 9 9"), "line 4 has 32.0, where fractions"),
    "NaN": (("yolo",), added("0 .5 nan .1 .1"), "line 4 has nan, where fractions"),
    "infinity": (("yolo",), added("0 .5 inf .1 .1"), "line 4 has inf"),
    "negative": (("yolo",), added("0 .5 .5 -.1 .1"), "line 4 has -0.1"),
    "polygon outside": (("yolo",), added("0 .1 .1 .2 .1 .2 1.2"), "line 4 has 1.2"),
    "no names": (("yolo",), in_yaml("nc: 3"), r"data\.yaml' must list 'names'"),
    "names with gaps": (("yolo",), in_yaml("names: {0: red, 2: blue}"), "must list 'names'"),
    "name that is no text": (("yolo",), in_yaml("names: [red, null, yes]"), "no name"),
    "keypoints": (("yolo",), in_yaml("names: [a]\nkpt_shape: [17, 3]"), "of keypoints"),
    "broken YAML": (("yolo",), in_yaml("names: ["), "not valid YAML"),
    "no bndbox": (("voc",), replaced("<bndbox>", "<robndbox>"), "not valid XML"),
    "no xmin": (("voc",), replaced("xmin>", "left>", 2), r"train1\.xml' object 1 has no bndbox"),
    "text in xmin": (("voc",), replaced("<xmin>", "<xmin>a"), "object 1 has no bndbox"),
    "NaN in xmin": (("voc",), replaced("<xmin>", "<xmin>nan</xmin><xmin>"), "1' has bbox .nan"),
    "xmax under xmin": (("voc",), replaced("<xmax>", "<xmax>-"), "train1.xml object 1' has bbox"),
    "difficult maybe": (
        ("voc",), replaced("<pose>", "<difficult>maybe</difficult><pose>"), "ignore 'maybe'",
    ),
    "no name": (("voc",), replaced("<name>", "<label>").__call__, "not valid XML"),
    "empty name": (("voc",), lambda k, r: file_of(k, r).write_text(
        re.sub("<name>.*?</name>", "<name/>", file_of(k, r).read_text())), "has the name ''"),
    "other XML": (("voc",), whole("<svg/>"), "is no Pascal VOC annotation but a <svg>"),
    "cut off": (("voc", "labelme"), lambda k, r: file_of(k, r).write_bytes(
        file_of(k, r).read_bytes()[:90]), r"train1\.(xml|json)' is not valid (XML|JSON)"),
    "entities": (("voc",), whole(BOMB), r"train1\.xml' has a DOCTYPE"),
    "too large": (("voc",), lambda k, r: os.truncate(file_of(k, r), 64_000_001), "is too large"),
    "another encoding": (("yolo", "voc"), lambda k, r: file_of(k, r).write_bytes(
        BOMB.encode("utf-16")), "is not text in UTF-8"),
    "listed but absent": (("voc",), list_more, r"train\.txt' lists 'absent', of which there is no"),
    "listed without annotation": (("voc",), without_file, r"train1\.xml' does not exist"),
    "no shapes": (("labelme",), whole('{"images": 3}'), "has no list 'shapes'"),
    "text as a point": (("labelme",), replaced("[[", '["a", ['), "shape 1 lacks a label or points"),
    "label of a number": (("labelme",), replaced('"label": "', '"label": 3, "x": "'), "1 lacks"),
    "point of NaN": (("labelme",), lambda k, r: file_of(k, r).write_text(re.sub(
        r"\[\[\d+", "[[NaN", file_of(k, r).read_text(), count=1)), "shape 1' has bbox .nan"),
    "class that is not listed": (("labelme",), lambda k, r: Path(r[1], "classes.txt").write_text(
        "red\nblue"), r"is of class 'green', which '.*classes\.txt' does not list"),
    "two images of a name": (KINDS, two_of_a_name, "differ in their suffix alone"),
    "image that is none": (("yolo",), lambda k, r: Path(r[2], "train1.png").write_bytes(b"x"),
        r"train1\.png' cannot be read"),
    "no folder of images": (KINDS, lambda k, r: shutil.move(r[2], r[2] + "_"),
        "[Nn]o such|not exist"),
    "no annotations": (("yolo",), lambda k, r: shutil.rmtree(file_of(k, r).parent),
        "No image of .* has YOLO labels in"),
    "folder of other images": (("labelme",), lambda k, r: [p.rename(p.with_stem(f"x{p.stem}"))
        for p in Path(r[2]).glob("*.png")], "No image of .* has LabelMe annotations in"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "kind"), [(case, kind) for case, (kinds, *_) in REFUSED.items() for kind in kinds]
)
def test_what_has_no_meaning_is_refused_before_training(case, kind, sets, register, cfg_of):
    _, change, sentence = REFUSED[case]
    change(kind, sets[kind])
    name = register(*sets[kind])
    with pytest.raises(BagsError, match=sentence) as refusal:
        check_dataset(cfg_of([name]), name, training=True)
    assert "\n" not in str(refusal.value)


def test_what_a_voc_folder_lacks_is_left_out(sets):
    source, root = Path(sets["voc"][1]).parents[2] / "Annotations", sets["voc"][2]
    assert read_row("voc", str(source), root).instance_counts().sum() == 18
    (source / "train1.xml").unlink()
    Path(root, "train2.png").unlink()
    read = read_row("voc", str(source), root)
    assert read.instance_counts().sum() == 12
    assert "images without annotation file left out: 1" in read.summary
    assert "annotation files without image left out (as ['train2']): 1" in read.summary


# Each row of the tables in docs/datasets.md, with cases or tests of it.
PAGE = {
    "subfolders; suffixes of images in capitals; hidden files": [
        *("subfolders", "suffix in capitals", "hidden files"),
    ],
    "polygons": ["polygon"],
    "shapes of one label and `group_id`": ["polygons of a group", "corners in any order"],
    "`names` as a list, an object or numbers": ["names as a list", "names as numbers"],
    "blank lines, a byte order mark, class numbers like `1.0`": [
        *("blank lines and a byte order mark", "class as 1.0"),
    ],
    "an image without a label file": ["image without label file"],
    "sizes that are missing or 0, and all sizes of YOLO": [
        *("size missing", "test_sizes_are_those_of_images_as_they_are_shown"),
    ],
    "coordinates of boxes": ["test_every_format_gives_the_records_of_coco"],
    "`difficult` (labelme: a flag)": ["difficult"],
    "images without an annotation file, which nobody may have looked at": [
        *("image without JSON", "test_what_a_voc_folder_lacks_is_left_out"),
    ],
    "annotation files without an image": ["file without image"],
    "points, lines and other shapes": ["points and lines"],
    "lines that are neither 5 numbers nor a polygon of 3 points or more": [
        *("words", "confidence", "point too few"),
    ],
    "classes that `data.yaml` has no name for": ["class too high", "class negative"],
    "NaN, and values more than 0.01 below 0 or above 1": ["NaN", "pixels", "negative"],
    "`data.yaml` without names, or of keypoints": ["no names", "keypoints"],
    "objects without a name or a box of four numbers; NaN": [
        *("empty name", "no xmin", "NaN in xmin", "label of a number", "point of NaN"),
    ],
    "classes that `classes.txt` does not list": ["class that is not listed"],
    "a `DOCTYPE`, without which no entity can be defined or expand; files above 64 MB": [
        *("entities", "too large"),
    ],
    "files that are cut off, of another format or not in UTF-8": [
        *("cut off", "other XML", "no shapes", "another encoding"),
    ],
    "a list that names an image without file or annotations": [
        *("listed but absent", "listed without annotation"),
    ],
    "two images whose paths differ in the suffix alone": ["two images of a name"],
    "annotations of another kind than registered": [
        "test_another_kind_is_refused_with_the_right_one"
    ],
}


def test_the_page_lists_what_is_tested_here():
    page = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text()
    section = page.split("## YOLO, Pascal VOC and LabelMe")[1].split("### Converting")[0]
    tables = section.split("has a case for each row.")[1]
    rows = [line.split("|")[1].strip() for line in tables.splitlines() if line.startswith("|")]
    heads = ("accepted", "left out everywhere", "refused in one sentence", "---")
    assert [row for row in rows if row not in heads] == list(PAGE)
    known = {*ACCEPTED, *LEFT_OUT, *REFUSED, *globals()}
    assert {case for shown in PAGE.values() for case in shown} <= known


# Kinds that are not those of the data


@pytest.mark.parametrize("kind", [*KINDS, "coco", "lvis"])
@pytest.mark.parametrize("registered", [*KINDS, "coco", "lvis"])
def test_another_kind_is_refused_with_the_right_one(kind, registered, sets, register, cfg_of):
    if kind == "lvis":
        path = Path(sets["coco"][1])
        path.write_text(json.dumps(small_set.content(kind="lvis")))
    right = "coco" if kind == "lvis" else kind
    if registered in (kind, right) or (kind, registered) == ("coco", "lvis"):
        return
    sources = {sets[right][1]}
    if right != "coco":
        sources |= {str(file_of(kind, sets[kind]).parent)}
    for source in sources:
        name = register(registered, source, sets[right][2])
        remedy = f"no data set of kind '{registered}'; register it as '{right}'"
        with pytest.raises(DataError, match=remedy):
            check_dataset(cfg_of([name]), name, training=True)


def test_a_folder_in_place_of_names_is_refused_with_what_is_wanted(sets):
    with pytest.raises(DataError, match=r"is a folder; name the file of class names"):
        read_row("yolo", sets["yolo"][2], sets["yolo"][2])


# Classes by name


@pytest.mark.parametrize("kind", ["voc", "labelme"])
def test_test_sets_without_objects_of_a_class_are_evaluated(
    kind, tmp_path, images, register, cfg_of
):
    train = format_sets.write_all(tmp_path, images)[kind]
    data = small_set.content("val")
    data["annotations"] = [a for a in data["annotations"] if a["category_id"] != 2]
    val = format_sets.write_all(tmp_path, images, "val", data)[kind]
    train, val = register(kind, *train), register(kind, *val)
    check_datasets(cfg_of([train], [val]), training=True)
    assert class_names(val) == ["blue", "red"]
    names = class_names(train)
    results = [
        (inputs, [output(outputs[0]["instances"], [names.index("blue"), names.index("red")])])
        for inputs, outputs in perfect_results(val)
    ]
    assert evaluate(val, "coco", results, class_names=names)["AP"] == pytest.approx(100)


def output(instances, class_of):
    instances.pred_classes = torch.tensor(class_of)[instances.pred_classes]
    return {"instances": instances}


def test_test_sets_with_further_classes_are_refused(tmp_path, images, register, cfg_of):
    rows = [format_sets.write_all(tmp_path, images, split)["voc"] for split in COUNTS]
    edit(tmp_path / "voc" / "Annotations" / "val1.xml", "red", "tan")
    train, val = (register("voc", *row) for row in rows)
    with pytest.raises(
        ConfigError, match=r"unknown to the model \(as 'tan'\); set TEST.COMMON_CLASSES"
    ):
        check_datasets(cfg_of([train], [val]), training=True)
    cfg = cfg_of([train], [val], "TEST.COMMON_CLASSES_ONLY", True)
    check_datasets(cfg, training=True)


# Images


def test_sizes_are_those_of_images_as_they_are_shown(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    exif = Image.Exif()
    exif[274] = 6  # turned by a right angle
    Image.new("RGB", (40, 20)).save(tmp_path / "images" / "a.jpg", exif=exif)
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.25 0.5 0.5\n")
    (tmp_path / "classes.txt").write_text("red\n")
    read = read_row("yolo", str(tmp_path / "classes.txt"), str(tmp_path / "images"))
    assert (read.image_rows[0]["width"], read.image_rows[0]["height"]) == (20, 40)
    assert read.boxes.tolist() == [[5, 0, 10, 20]]
    assert read_image(str(tmp_path / "images" / "a.jpg")).shape == (40, 20, 3)


# Finding


def names_of(rows):
    return [(name.rpartition("_")[2], kind) for name, kind, *_ in rows]


@pytest.fixture
def both(tmp_path, images):
    for split in COUNTS:
        format_sets.write_all(tmp_path / "both", images, split)
    return tmp_path / "both"


@pytest.mark.parametrize("kind", [*KINDS, "coco"])
def test_folders_are_found_with_their_splits(kind, both):
    rows = find_dataset(both / kind)
    assert names_of(rows) == [("train", kind), ("val", kind)]
    for row, split in zip(rows, COUNTS, strict=True):
        read = read_row(*row[1:])
        assert read.instance_counts().sum() == sum(COUNTS[split])
        assert all(os.path.isfile(record["file_name"]) for record in read.records(row[3]))


def move(root, *pairs):
    for before, after in pairs:
        (root / after).parent.mkdir(parents=True, exist_ok=True)
        (root / before).rename(root / after)


LAYOUTS = {
    "yolo, splits above": ("yolo", lambda root: (
        move(root, *((f"{part}/{split}", f"{new}/{part}") for part in ("images", "labels")
                     for split, new in (("train", "train"), ("val", "valid")))),
        (root / "data.yaml").write_text(
            "train: ../train/images\nval: ../valid/images\nnames: [red, green, blue]"))),
    "yolo, path in the YAML": ("yolo", lambda root: (root / "data.yaml").write_text(
        f"path: {root}\ntrain: [images/train]\nval: images/val\nnames: [red, green, blue]")),
    "yolo, test in place of val": ("yolo", lambda root: (root / "data.yaml").write_text(
        "train: images/train\ntest: images/val\nnames: [red, green, blue]")),
    "yolo, classes.txt": ("yolo", lambda root: (
        (root / "data.yaml").unlink(),
        (root / "labels" / "classes.txt").write_text("red\ngreen\nblue"))),
    "voc, trainval and test": ("voc", lambda root: move(root / "ImageSets" / "Main",
        ("train.txt", "trainval.txt"), ("val.txt", "test.txt"))),
    "voc, folders": ("voc", lambda root: (
        shutil.rmtree(root / "ImageSets"), (root / "Annotations").rename(root / "all"),
        *(move(root, (f"{old}/{p.stem}{p.suffix}", f"{new}/{split}/{p.name}"))
          for old, new in (("JPEGImages", "images"), ("all", "annotations"))
          for p in sorted((root / old).iterdir())
          for split in COUNTS if p.name.startswith(split)),
        (root / "all").rmdir(), (root / "JPEGImages").rmdir())),
    "labelme, images apart": ("labelme", lambda root: [
        move(root, (f"{split}/{p.name}", f"{part}/{split}/{p.name}"))
        for part, suffix in (("images", ".png"), ("annotations", ".json"))
        for split in COUNTS for p in sorted((root / split).glob(f"*{suffix}"))]),
    "coco, as Roboflow": ("coco", lambda root: (
        move(root, *((f"annotations/instances_{split}.json", f"{split}/_annotations.coco.json")
                     for split in COUNTS)), (root / "val").rename(root / "valid"))),
    "coco, as COCO": ("coco", lambda root: (
        move(root / "annotations", *((f"instances_{split}.json", f"instances_{split}2017.json")
                     for split in COUNTS)),
        move(root, *((split, f"{split}2017") for split in COUNTS)),
        (root / "annotations" / "captions_train2017.json").write_text(
            '{"images": [], "annotations": []}'))),
    "lvis": ("coco", lambda root: [
        (root / "annotations" / f"instances_{split}.json").write_text(
            json.dumps(small_set.content(split, "lvis"))) for split in COUNTS]),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_other_programs_are_found(layout, both):
    kind, change = LAYOUTS[layout]
    change(both / kind)
    rows = find_dataset(both / kind)
    kind = "lvis" if layout == "lvis" else kind
    assert names_of(rows) == [("train", kind), ("val", kind)]
    for row, split in zip(rows, COUNTS, strict=True):
        read = read_row(*row[1:])
        assert read.instance_counts().sum() == sum(COUNTS[split])
        records = read.records(row[3], lvis=kind == "lvis")
        assert all(os.path.isfile(record["file_name"]) for record in records)


@pytest.mark.parametrize("kind", [*KINDS, "coco"])
def test_one_split_is_one_row(kind, sets):
    root = Path(sets["yolo"][1]).parents[1] / kind
    if kind == "yolo":
        (root / "data.yaml").write_text("train: images/train\nnames: [red, green, blue]")
        assert names_of(find_dataset(root / "data.yaml")) == [("train", "yolo")]
    rows = find_dataset(root)
    assert len(rows) == 1
    assert read_row(*rows[0][1:]).instance_counts().sum() == 18


def test_one_folder_of_everything_is_one_row(sets, tmp_path):
    flat = shutil.copytree(sets["labelme"][2], tmp_path / "flat set")
    ((name, kind, source, root),) = find_dataset(flat)
    assert (name, kind, source, root) == ("flat_set", "labelme", str(flat), str(flat))


def test_several_folders_of_a_split_are_several_rows(both):
    names = "names: [red, green, blue]"
    (both / "yolo" / "data.yaml").write_text(f"train: [images/train, images/val]\n{names}")
    assert names_of(find_dataset(both / "yolo")) == [("train", "yolo"), ("train2", "yolo")]


def test_what_is_no_data_set_is_refused(tmp_path, both):
    with pytest.raises(MissingFileError, match="does not exist; name the folder"):
        find_dataset(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("Nothing here.")
    with pytest.raises(DataError, match="has no annotations in COCO, LVIS, YOLO"):
        find_dataset(tmp_path / "empty")
    (both / "yolo" / "data.yaml").write_text("train: absent\nnames: [a]")
    with pytest.raises(DataError, match=r"train is 'absent', which is no folder"):
        find_dataset(both / "yolo")
    (both / "yolo" / "data.yaml").unlink()
    with pytest.raises(DataError, match=r"no file of class names; add 'data\.yaml'"):
        find_dataset(both / "yolo")
    shutil.rmtree(both / "coco" / "train")
    with pytest.raises(MissingFileError, match=r"Image 'train1\.png' of .* put the images there"):
        find_dataset(both / "coco")


# Conversion

# Names as XML, YAML, JSON and text must keep them.
WORDS = st.text(
    st.characters(codec="utf-8", exclude_categories=("C", "Z")) | st.sampled_from(" :#'\"<>&-"),
    min_size=1,
    max_size=8,
).filter(lambda name: name == name.strip() and name.isprintable())


@st.composite
def data_sets(draw):
    """COCO files of two splits: boxes, polygons of one part or more, crowds, empty images."""
    names = draw(st.lists(WORDS, min_size=1, max_size=4, unique=True))
    side = draw(st.integers(20, 300)), draw(st.integers(20, 300))
    contents = {}
    for split in COUNTS:
        images = [
            {"id": i, "file_name": f"{i % 2}/{split} {i}.png", "width": side[0], "height": side[1]}
            for i in range(1, draw(st.integers(1, 3)) + 1)
        ]
        annotations = []
        for image in images:
            for _ in range(draw(st.integers(0, 3))):
                annotation = {"id": len(annotations) + 1, "image_id": image["id"]}
                annotation["category_id"] = draw(st.integers(1, len(names)))
                x, y = (draw(st.floats(0, s - 8)) for s in side)
                w, h = (draw(st.floats(4, s - a)) for s, a in zip(side, (x, y), strict=True))
                annotation["bbox"] = [x, y, w, h]
                annotation["iscrowd"] = draw(st.sampled_from([0, 0, 0, 1]))
                parts = draw(st.integers(0, 2))
                if parts == 1:
                    annotation["segmentation"] = [[x, y, x + w, y, x + w / 2, y + h]]
                elif parts == 2:  # apart, and in opposite directions
                    left = [x, y, x + w / 3, y, x + w / 3, y + h, x, y + h]
                    right = [x + w, y, x + w / 2, y, x + w / 2, y + h, x + w, y + h]
                    annotation["segmentation"] = [left, right]
                annotations.append(annotation)
        categories = [{"id": n, "name": name} for n, name in enumerate(names, 1)]
        contents[split] = {"images": images, "annotations": annotations, "categories": categories}
    return contents


def shown(read, position, row):
    """The mask of an annotation as eighths of pixels."""
    image = read.image_rows[position]
    mask = read.masks.get(row, image, as_json=True)
    if mask is None:
        return None
    fine = [[8 * value for value in polygon] for polygon in mask]
    codes = mask_utils.frPyObjects(fine, 8 * image["height"], 8 * image["width"])
    return mask_utils.decode(mask_utils.merge(codes))


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(contents=data_sets(), kinds=st.permutations((*KINDS, "coco")))
def test_there_and_back_without_loss(contents, kinds, tmp_path_factory):
    root = tmp_path_factory.mktemp("convert")
    rows = []
    for split, content in contents.items():
        for image in content["images"]:
            path = root / "mine" / split / image["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (image["width"], image["height"])).save(path)
        (root / f"{split}.json").write_text(json.dumps(content))
        rows.append((f"a_{split}", "coco", str(root / f"{split}.json"), str(root / "mine" / split)))
    rows = [row for row in rows if contents[row[0][2:]]["images"]]
    before = [read_row(*row[1:]) for row in rows]
    if not any(len(read.boxes) for read in before):
        return
    has_crowds, has_masks = True, True
    for kind in kinds:
        rows = convert_dataset(rows, kind, root / kind)
        has_crowds, has_masks = has_crowds and kind != "yolo", has_masks and kind != "voc"
        assert [(name.rpartition("_")[2], own) for name, own, *_ in rows] == [
            (split, kind) for split in COUNTS
        ]
        for old, row in zip(before, rows, strict=True):
            new = read_row(*row[1:])
            assert new.names == old.names
            files = [sorted(i["file_name"] for i in read.image_rows) for read in (old, new)]
            assert files[0] == files[1]
            kept = np.ones(len(old.boxes), bool) if has_crowds else old.is_object
            order = {i["file_name"]: n for n, i in enumerate(new.image_rows)}
            places = np.array([order[i["file_name"]] for i in old.image_rows])
            wanted = [r for r in np.argsort(places[old.image_index], kind="stable") if kept[r]]
            assert new.classes.tolist() == old.classes[wanted].tolist()
            assert new.is_object.tolist() == old.is_object[wanted].tolist()
            np.testing.assert_allclose(new.boxes, old.boxes[wanted], rtol=0, atol=0.5)
            for number, r in enumerate(wanted):
                expected = shown(old, old.image_index[r], r) if has_masks else None
                found = shown(new, new.image_index[number], number)
                assert (found is None) == (expected is None)
                if expected is not None:
                    assert abs(found.astype(int) - expected).sum() <= 0.05 * expected.sum()
    shutil.rmtree(root)


def coco_set(tmp_path, images, change=lambda data: None):
    """A row of the small set in COCO format, with the content changed."""
    data = small_set.content()
    change(data)
    path = small_set.write(tmp_path / "train.json", data)
    return ("a_train", "coco", path, str(images))


def test_conversion_of_run_length_codes_and_what_is_lost(tmp_path, images, log_lines):
    disc = np.hypot(*(np.mgrid[:SIDE, :SIDE] - 30)) < 12
    code = mask_utils.encode(np.asfortranarray(disc.astype(np.uint8)))
    box = mask_utils.toBbox(code).tolist()
    code["counts"] = code["counts"].decode()

    def change(data):
        data["annotations"][0].update(segmentation=code, bbox=box, area=0)
        data["annotations"][1].update(bbox=[1, 1, 60, 60])  # not that around its mask
        data["annotations"][2]["iscrowd"] = 1

    row = coco_set(tmp_path, images, change)
    lines = log_lines("bags_d2.data.formats.convert")
    for kind in ("labelme", "yolo", "coco"):
        ((*_, source, root),) = convert_dataset([row], kind, tmp_path / kind)
        read = read_row(kind, source, root)
        disc_back = mask_utils.decode(
            mask_utils.merge(mask_utils.frPyObjects(mask, SIDE, SIDE))
            if isinstance(mask := read.masks.get(0, as_json=True), list)
            else mask
        )
        both = np.minimum(disc_back, disc).sum() / np.maximum(disc_back, disc).sum()
        assert both == 1 if kind == "coco" else both > 0.85
        assert read.boxes[1].tolist() == pytest.approx([1, 1, 60, 60], abs=1e-4)
        assert read.instance_counts().sum() == 17
        assert read.crowd.sum() == (kind == "coco")
        assert bool(read.masks.areas[1]) == (kind != "yolo")
    assert [line.partition("format: ")[2] for line in lines] == [
        "run-length codes written as outlines, if at all: 1.",
        "run-length codes written as outlines, if at all: 1.",
        "masks left out whose box is not that around them: 1.",
        "crowds and ignored regions left out: 1.",
    ]


def test_conversion_stays_in_its_folder(tmp_path, images):
    outside = {"up": "../train1.png", "absolute": str(images / "train1.png")}
    for name, file_name in outside.items():
        (tmp_path / name).mkdir()
        row = coco_set(
            tmp_path / name, images, lambda d, n=file_name: d["images"][0].update(file_name=n)
        )
        shutil.copytree(images, tmp_path / name / "images")
        shutil.copy(images / "train1.png", tmp_path / name)
        row = (*row[:3], str(tmp_path / name / "images"))
        before = sorted(tmp_path.rglob("*"))
        rows = convert_dataset([row], "yolo", tmp_path / name / "out")
        after = {p for p in tmp_path.rglob("*") if (tmp_path / name / "out") not in p.parents}
        assert after == {*before, tmp_path / name / "out"}
        assert read_row(*rows[0][1:]).instance_counts().tolist() == list(COUNTS["train"])


def test_equal_names_in_two_splits_are_kept_apart(tmp_path, images):
    sets = format_sets.write_all(tmp_path, images)
    rows = [("a_train", "yolo", *sets["yolo"]), ("a_val", "yolo", *sets["yolo"])]
    rows = convert_dataset(rows, "voc", tmp_path / "out")
    assert [read_row(*row[1:]).instance_counts().sum() for row in rows] == [18, 18]


@pytest.mark.parametrize("copy_images", [True, False])
def test_images_are_linked_or_copied(copy_images, tmp_path, images):
    convert_dataset([coco_set(tmp_path, images)], "voc", tmp_path / "out", copy_images)
    image = tmp_path / "out" / "JPEGImages" / "train1.png"
    assert image.is_symlink() != copy_images
    assert image.read_bytes() == (images / "train1.png").read_bytes()


NOT_CONVERTED = {
    "class of two lines": (lambda d: d["categories"][0].update(name="a\nb"), "cannot be a line"),
    "two classes of a name": (
        lambda d: d["categories"][0].update(name="blue"),
        "two classes of one name",
    ),
    "image that is missing": (
        lambda d: d["images"][0].update(file_name="absent.png"),
        "absent.png' does not exist",
    ),
    "no suffix": (lambda d: d["images"][0].update(file_name="absent"), "no suffix of an image"),
    "an image twice": (
        lambda d: d["images"][0].update(file_name=d["images"][1]["file_name"]),
        "Several images are named",
    ),
}


@pytest.mark.parametrize("case", NOT_CONVERTED)
def test_what_cannot_be_converted_is_refused(case, tmp_path, images):
    change, sentence = NOT_CONVERTED[case]
    with pytest.raises(BagsError, match=sentence):
        convert_dataset([coco_set(tmp_path, images, change)], "yolo", tmp_path / "out")
    assert not (tmp_path / "out").exists()  # nor may what is half done look like a data set
    row = coco_set(tmp_path, images)
    convert_dataset([row], "yolo", tmp_path / "out")
    with pytest.raises(DataError, match="exists already; name a new folder"):
        convert_dataset([row], "yolo", tmp_path / "out")


def convert_command(*words):
    parser = argparse.ArgumentParser()
    convert_data.add_arguments(parser)
    convert_data.run(parser.parse_args([*map(str, words)]))


def test_the_command_prints_rows_that_register(both, tmp_path, capsys):
    convert_command(both / "voc", "--to", "yolo", "--output", tmp_path / "out")
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["DATASETS"]["REGISTER"] == [list(row) for row in find_dataset(tmp_path / "out")]
    row = printed["DATASETS"]["REGISTER"][1]
    convert_command("--row", *row, "--to", "coco", "--output", tmp_path / "coco", "--copy")
    data = json.loads((tmp_path / "coco" / "annotations" / "val.json").read_text())
    assert len(data["annotations"]) == sum(COUNTS["val"])
    for words in ([both, "--row", *row], []):
        with pytest.raises(ConfigError, match="Name either a folder or rows"):
            convert_command(*words, "--to", "coco", "--output", tmp_path / "none")


# Whatever a file holds

TAGS = ["</object>", "<object>", "<bndbox>", "<name>red</name>", "<xmin>3</xmin>"]
KEYS = ['"shapes":', '"points":', '"label":"red"', "null"]
TOKENS = st.sampled_from([*"01x<{}[],\n \0é", "-1", "0.5", "nan", "inf", "1e999", *TAGS, *KEYS])


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(KINDS),
    start=st.integers(0, 300),
    tokens=st.lists(TOKENS, max_size=8),
    end=st.integers(0, 300),
)
def test_any_file_is_read_or_refused_in_one_sentence(kind, start, tokens, end, sets):
    path = file_of(kind, sets[kind])
    before = path.read_bytes()
    cut = before[:start] + "".join(tokens).encode() + before[end:]
    path.write_bytes(cut)
    refusal = ""
    try:
        read_row(*sets[kind]).require_masks("polygon")
    except BagsError as error:
        refusal = str(error)
    finally:
        path.write_bytes(before)
    assert "\n" not in refusal
