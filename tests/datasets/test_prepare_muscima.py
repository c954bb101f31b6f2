"""MUSCIMA++ as tiles: masks, pages, tiles and boxes of a page of our own making."""

import json

import cv2
import numpy as np
import prepare_muscima
import pytest

from bags_d2 import DataError, MissingFileError
from bags_d2.data.annotations import read_annotations

STEM = '<CropObject xml:id="x"><Id>0</Id><{tag}>{name}</{tag}><Top>{top}</Top><Left>{left}</Left>'
STEM += "<Width>{width}</Width><Height>{height}</Height><Mask>{mask}</Mask></CropObject>"


def crop(name, left, top, width, height, mask=None, tag="ClassName"):
    return STEM.format(**{**locals(), "mask": mask or f"1:{width * height}"})


def page_xml(*objects):
    return f"<CropObjectList><CropObjects>{''.join(objects)}</CropObjects></CropObjectList>"


@pytest.fixture
def source(tmp_path):
    """A folder like the repository, with one page of each split."""
    objects = [
        crop("stem", 100, 100, 8, 40),
        crop("notehead", 92, 130, 20, 16, "0:100 1:220"),
        crop("flat", 300, 100, 12, 40, tag="MLClassName"),
        crop("tie", 500, 100, 60, 10),  # of which the first tile has 16 of 30 pixels
        crop("dot", 200, 100, 2, 3),  # one pixel wide at half size
        crop("staff_line", 60, 120, 1000, 2),
        crop("staff_space", 60, 200, 1000, 380),
    ]
    folder = tmp_path / "muscima-pp" / prepare_muscima.ANNOTATIONS
    folder.mkdir(parents=True)
    for page in ("W-01_N-10", "W-05_N-19"):  # the latter is one of validation
        (folder / f"CVC-MUSCIMA_{page}_D-ideal.xml").write_text(page_xml(*objects))
    return tmp_path / "muscima-pp"


def test_tiles_have_the_objects_that_are_mostly_inside(source, tmp_path):
    prepare_muscima.build(source, tmp_path / "out")
    paths = [tmp_path / "out" / "annotations" / f"muscima_{s}.json" for s in ("train", "val")]
    train, val = (json.loads(path.read_text()) for path in paths)
    # Other tiles have fewer than three objects.
    assert [i["file_name"] for i in train["images"]] == ["W-01_N-10_0_0.png"]
    assert [i["file_name"] for i in val["images"]] == ["W-05_N-19_0_0.png"]
    names = {c["id"]: c["name"] for c in train["categories"]}
    # The page begins at (20, 60): 40 pixels before its first objects, of which one is the staff.
    assert [(names[a["category_id"]], a["bbox"]) for a in train["annotations"]] == [
        ("stem", [40.0, 20.0, 4.0, 20.0]),
        ("notehead", [36.0, 35.0, 10.0, 8.0]),
        ("flat", [140.0, 20.0, 6.0, 20.0]),
    ]
    assert [(c["name"], c["instance_count"]) for c in train["categories"]] == [
        *(("flat", 1), ("notehead", 1), ("stem", 1))
    ]
    tile = cv2.imread(str(tmp_path / "out" / "images" / "W-01_N-10_0_0.png"), 0)
    assert tile.shape == (256, 256)
    assert tile[30, 42] == 0
    assert len(read_annotations(paths[0]).images) == 1


def test_a_page_is_drawn_dark_on_white_at_half_size(source):
    path = next((source / prepare_muscima.ANNOTATIONS).glob("*N-10*"))
    symbols = prepare_muscima.read_page(path)
    page, top, left = prepare_muscima.draw_page(symbols)
    assert (top, left) == (60, 20)
    assert page[(110 - 60) // 2, (102 - 20) // 2] == 0  # in the stem
    assert page[(120 - 60) // 2, (900 - 20) // 2] == 0  # on the line of the staff
    assert page[(300 - 60) // 2, (900 - 20) // 2] == 255  # in its space
    assert symbols[1].mask.sum() == 220
    assert symbols[1].mask[0, 0] == 0


def test_tiles_cover_a_side_and_end_with_it():
    assert list(prepare_muscima.tile_starts(256)) == [0]
    assert list(prepare_muscima.tile_starts(752)) == [0, 240, 480, 496]


def test_outlines_are_polygons_or_the_box():
    mask = cv2.circle(np.zeros((40, 40), np.uint8), (20, 20), 15, 1, -1)
    (polygon,) = prepare_muscima.outline(mask, np.array([100.0, 50.0, 120.0, 70.0]))
    area = cv2.contourArea(polygon.astype(np.float32))
    assert area == pytest.approx(mask.sum() / 4, rel=0.15)
    dot = prepare_muscima.outline(np.ones((1, 1), np.uint8), np.array([3.0, 4.0, 3.5, 4.5]))
    assert dot[0].tolist() == [[3.0, 4.0], [3.5, 4.0], [3.5, 4.5], [3.0, 4.5]]


def test_faulty_sources_are_errors(source, tmp_path):
    with pytest.raises(MissingFileError, match="git clone"):
        prepare_muscima.build(tmp_path / "nowhere", tmp_path / "out")
    path = next((source / prepare_muscima.ANNOTATIONS).glob("*N-10*"))
    for content in ("<a", page_xml(crop("stem", 1, 1, 2, 2, "1:3")), page_xml("<CropObject/>")):
        path.write_text(content)
        with pytest.raises(DataError, match="is damaged or of another version"):
            prepare_muscima.read_page(path)
