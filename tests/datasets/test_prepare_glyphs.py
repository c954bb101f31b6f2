"""The built-in data sets of drawn characters."""

import hashlib
import json
import logging
from importlib import metadata

import cv2
import numpy as np
import prepare_glyphs as glyphs
import pytest
from lvis import LVIS
from prepare_glyphs import PRESETS, build_glyphs, glyph_distances, train_counts

TINY = "glyphs_tiny"


def _build(root, **options):
    return build_glyphs(TINY, root, **{"num_workers": 1, "progress": False, **options})


def _load(folder, split):
    path = folder / "annotations" / f"{TINY}_{split}.json"
    return json.loads(path.read_text("utf-8"))


def _digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return _build(tmp_path_factory.mktemp("glyphs"))


# What results in docs/ were measured on. Other versions of these render and compress otherwise.
_PINNED_WITH = {
    "matplotlib": "3.11.2", "numpy": "2.4.6", "opencv-python": "5.0.0.93", "pillow": "13.0.0",
}  # fmt: skip
pinned = pytest.mark.skipif(
    any(metadata.version(name) != version for name, version in _PINNED_WITH.items()),
    reason=f"bytes are pinned for {_PINNED_WITH}",
)


def _sha256(*parts):
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else json.dumps(part).encode())
    return digest.hexdigest()[:16]


@pinned
def test_bytes_of_the_tiny_set_never_change(tiny):
    written = [path.read_bytes() for path in sorted(tiny.rglob("*.json"))]
    pictures = [path.read_bytes() for path in sorted(tiny.rglob("*.jpg"))]
    assert [_sha256(content) for content in written] == [
        "83b4785a682ec25e",
        "9f82d35b7d040b24",
        "770bffd6bb6a7fed",
    ]
    assert (len(pictures), _sha256(*pictures)) == (45, "ffb119571ba5afce")


@pinned
@pytest.mark.parametrize(
    ("preset", "characters", "drawn"),
    [
        ("glyphs", "fb4be92f7edad384", "ab4ce98b077827c7"),
        ("glyphs_lvis", "78e6eace3c7c659b", "477936e45d47a208"),
    ],
)
def test_bytes_of_the_large_sets_never_change(preset, characters, drawn, tmp_path):
    spec, names = PRESETS[preset], glyphs.glyph_characters(preset)
    assert _sha256("".join(names)) == characters
    plan = glyphs._deal(train_counts(preset), spec.objects_per_image, np.random.default_rng([0, 1]))
    parts = [plan]
    for i, categories in enumerate(plan[:4]):
        path = tmp_path / f"{i}.jpg"
        objects = tuple((c, names[c - 1]) for c in categories)
        job = glyphs._Job((0, 1, i), str(path), spec.image_size, spec.glyph_size, objects, None)
        parts += [*glyphs._draw_to_file(job), path.read_bytes()]
    assert _sha256(*parts) == drawn


@pytest.mark.parametrize(
    ("preset", "bins"),
    [
        ("glyphs", [12, 12, 12, 4]),
        ("glyphs_lvis", [200, 412, 334, 257]),
        (TINY, [2, 2, 2, 0]),
    ],
)
@pytest.mark.parametrize("seed", [0, 7])
def test_plan_fills_the_instance_bins(preset, bins, seed):
    counts = train_counts(preset, seed)
    edges = [*glyphs.INSTANCE_BINS, np.inf]
    assert np.histogram(counts, edges)[0].tolist() == bins
    assert len(counts) == PRESETS[preset].num_classes
    assert counts.min() >= 1


def test_another_seed_makes_other_classes_rare():
    first, second = train_counts("glyphs", 0), train_counts("glyphs", 1)
    assert sorted(first) == sorted(second)
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("preset", list(PRESETS))
def test_classes_can_be_told_apart(preset):
    characters = glyphs.glyph_characters(preset)
    assert len(set(characters)) == len(characters) == PRESETS[preset].num_classes
    # All pairs of 1203 classes would take seconds; code-point neighbours are the likeliest twins.
    characters = characters[-200:]
    distances = glyph_distances(characters)
    assert distances.shape == (len(characters),) * 2
    np.testing.assert_allclose(distances, distances.T, atol=1e-6)
    off_diagonal = distances[~np.eye(len(characters), dtype=bool)]
    assert off_diagonal.min() >= glyphs.MIN_DISTANCE


def test_look_alikes_of_other_alphabets_and_sizes_are_found_out():
    # Latin, Greek and Cyrillic A; small and capital O, which differ in size only.
    distances = glyph_distances(["A", "\u0391", "\u0410", "o", "O", "\u2605"])
    assert distances[0, 1] < glyphs.MIN_DISTANCE
    assert distances[0, 2] < glyphs.MIN_DISTANCE
    assert distances[3, 4] < glyphs.MIN_DISTANCE
    assert distances[0, 5] > 5 * glyphs.MIN_DISTANCE


def test_loads_as_lvis_and_detectron2_finds_the_pictures(tiny):
    for split in ("train", "val"):
        data = LVIS(str(tiny / "annotations" / f"{TINY}_{split}.json"))
        assert data.get_cat_ids() == [1, 2, 3, 4, 5, 6]
        for image in data.dataset["images"]:
            *_, folder, name = image["coco_url"].split("/")
            assert (folder, name) == (split, image["file_name"])
            picture = cv2.imread(str(tiny / folder / name))
            assert picture.shape == (image["height"], image["width"], 3)


def test_counts_equal_the_plan(tiny):
    train, val = _load(tiny, "train"), _load(tiny, "val")
    plan = train_counts(TINY)
    for data, expected in ((train, plan), (val, np.full(6, PRESETS[TINY].val_per_class))):
        ids = [item["category_id"] for item in data["annotations"]]
        assert np.bincount(ids, minlength=7)[1:].tolist() == expected.tolist()
    assert 30 <= len(train["images"]) <= 45
    assert 8 <= len(val["images"]) <= 14

    assert train["categories"] == val["categories"]
    for category in train["categories"]:
        images = {
            item["image_id"]
            for item in train["annotations"]
            if item["category_id"] == category["id"]
        }
        assert category["instance_count"] == plan[category["id"] - 1]
        assert category["image_count"] == len(images)
        expected = "r" if len(images) <= 10 else "c" if len(images) <= 100 else "f"
        assert category["frequency"] == expected


def test_ids_are_unique_across_splits(tiny):
    both = [_load(tiny, split) for split in ("train", "val")]
    for key in ("images", "annotations"):
        ids = [item["id"] for data in both for item in data[key]]
        assert len(ids) == len(set(ids))


def test_category_fields(tiny):
    categories = _load(tiny, "train")["categories"]
    names = [category["name"] for category in categories]
    assert names[1] == "greek capital letter omega"
    assert len(set(names)) == 6
    assert all(category["synonyms"] == [category["name"]] for category in categories)
    for category, character in zip(categories, glyphs.glyph_characters(TINY), strict=True):
        assert character in category["def"]


def test_boxes_and_polygons_agree(tiny):
    for split in ("train", "val"):
        data = _load(tiny, split)
        side = {image["id"]: image["width"] for image in data["images"]}
        for item in data["annotations"]:
            x, y, width, height = item["bbox"]
            limit = side[item["image_id"]]
            assert 0 <= x < x + width <= limit
            assert 0 <= y < y + height <= limit
            assert 0 < item["area"] <= width * height
            assert item["segmentation"]
            assert all(len(p) >= 6 and len(p) % 2 == 0 for p in item["segmentation"])
            points = np.concatenate([np.reshape(p, (-1, 2)) for p in item["segmentation"]])
            # Outlines run through sample centres, an eighth of a pixel inside the box.
            np.testing.assert_allclose(points.min(0), (x, y), atol=0.3)
            np.testing.assert_allclose(points.max(0), (x + width, y + height), atol=0.3)
            assert (points >= (x, y)).all()
            assert (points <= (x + width, y + height)).all()


def test_objects_hardly_overlap(tiny):
    data = _load(tiny, "train")
    boxes: dict[int, list] = {}
    for item in data["annotations"]:
        x, y, width, height = item["bbox"]
        boxes.setdefault(item["image_id"], []).append((x, y, x + width, y + height))
    overlaps = [
        glyphs._box_overlap(a, b)
        for group in boxes.values()
        for i, a in enumerate(group)
        for b in group[:i]
    ]
    assert max(overlaps) <= glyphs._MAX_BOX_OVERLAP + 0.01


def test_every_absent_class_is_listed_as_absent(tiny):
    data = _load(tiny, "val")
    present: dict[int, set] = {image["id"]: set() for image in data["images"]}
    for item in data["annotations"]:
        present[item["image_id"]].add(item["category_id"])
    for image in data["images"]:
        negatives = image["neg_category_ids"]
        assert negatives == sorted(set(range(1, 7)) - present[image["id"]])
        assert set(image["not_exhaustive_category_ids"]) <= present[image["id"]]


def test_glyphs_stand_out_from_what_is_around_them(tiny):
    data = _load(tiny, "val")
    names = {image["id"]: image["file_name"] for image in data["images"]}
    contrasts = []
    for item in data["annotations"]:
        picture = cv2.imread(str(tiny / "val" / names[item["image_id"]]), cv2.IMREAD_GRAYSCALE)
        x, y, width, height = (int(v) for v in item["bbox"])
        patch = picture[y : y + height, x : x + width].astype(float)
        contrasts.append(np.subtract(*np.percentile(patch, [95, 5])))
    assert np.percentile(contrasts, 5) > 25


def test_result_does_not_depend_on_the_number_of_workers(tiny, tmp_path):
    assert _digests(_build(tmp_path, num_workers=2)) == _digests(tiny)


def test_another_seed_draws_other_pictures(tiny, tmp_path):
    first, second = _digests(tiny), _digests(_build(tmp_path, seed=1))
    shared = {name for name in first.keys() & second.keys() if name.endswith(".jpg")}
    assert shared
    assert all(first[name] != second[name] for name in shared)


def test_crowded_pictures_carry_objects_over(tmp_path, monkeypatch):
    crowded = glyphs.GlyphPreset(
        name=TINY,
        num_classes=2,
        counts=(20, 40),
        count_cap=100,
        characters="AΩ",
        val_per_class=5,
        image_size=64,
        objects_per_image=(12, 12),
        glyph_size=(24, 40),
        negatives=None,
    )
    monkeypatch.setitem(PRESETS, TINY, crowded)
    data = _load(_build(tmp_path), "train")
    ids = [item["category_id"] for item in data["annotations"]]
    assert sorted(np.bincount(ids)[1:]) == [20, 40]
    assert len(data["images"]) > 60 / 12


def test_second_call_returns_at_once(tmp_path, monkeypatch):
    folder = _build(tmp_path)
    before = _digests(folder)

    def never(job):
        raise AssertionError("drawn again")

    monkeypatch.setattr(glyphs, "_draw", never)
    assert _build(tmp_path) == folder
    assert _digests(folder) == before


@pytest.mark.parametrize("num_workers", [1, 2])
def test_interrupted_build_leaves_nothing_and_the_next_succeeds(tmp_path, monkeypatch, num_workers):
    draw = glyphs._draw

    def fails_in_the_middle(job):
        if job.stream[2] == 20:
            raise RuntimeError("power cut")
        return draw(job)

    with monkeypatch.context() as patch:
        patch.setattr(glyphs, "_draw", fails_in_the_middle)
        with pytest.raises(RuntimeError, match="power cut"):
            _build(tmp_path, num_workers=num_workers)
    assert list(tmp_path.iterdir()) == []
    assert (_build(tmp_path, num_workers=num_workers) / "glyphs.json").is_file()


def test_what_a_killed_build_left_is_reported_and_ignored(tmp_path, caplog):
    left = tmp_path / f".{TINY}.partial-0"
    left.mkdir()
    with caplog.at_level(logging.WARNING):
        folder = _build(tmp_path)
    assert str(left) in caplog.text
    assert len(list((folder / "train").iterdir())) == len(_load(folder, "train")["images"])


def test_other_settings_are_refused(tmp_path):
    folder = _build(tmp_path)
    with pytest.raises(ValueError, match=r"seed.*remove it or choose another root") as caught:
        _build(tmp_path, seed=3)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("stamp", [None, "", "[]", "{broken"])
def test_folder_without_a_valid_stamp_is_refused(tmp_path, stamp):
    (tmp_path / TINY).mkdir()
    if stamp is not None:
        (tmp_path / TINY / "glyphs.json").write_text(stamp)
    with pytest.raises(ValueError, match="remove it or choose another root"):
        _build(tmp_path)


def test_unknown_preset(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown glyph preset 'nope'; choose one of glyphs, "):
        build_glyphs("nope", tmp_path)
    with pytest.raises(ValueError, match="Unknown glyph preset"):
        train_counts("nope")


def test_negative_seed(tmp_path):
    with pytest.raises(ValueError, match="seed must be 0 or more, not -1"):
        _build(tmp_path, seed=-1)


def test_photographs_are_used_as_backgrounds(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    # Pure blue never occurs in the drawn backgrounds.
    cv2.imwrite(str(photos / "blue.png"), np.full((150, 200, 3), (255, 0, 0), np.uint8))
    (photos / "notes.txt").write_text("not a picture")
    folder = _build(tmp_path / "out", image_folder=photos)
    for path in (folder / "train").iterdir():
        median = np.median(cv2.imread(str(path)).reshape(-1, 3), axis=0)
        assert median[0] > 200
        assert median[1:].max() < 60
    with pytest.raises(ValueError, match="image_folder"):
        _build(tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ({}, "holds no pictures"),
        ({"a.txt": b"x"}, "holds no pictures"),
        ({"a.jpg": b"x"}, "cannot be read as an image"),
    ],
)
def test_useless_image_folder(tmp_path, content, message):
    photos = tmp_path / "photos"
    if content is not None:
        photos.mkdir()
        for name, data in content.items():
            (photos / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        _build(tmp_path / "out", image_folder=photos)
    assert not (tmp_path / "out" / TINY).exists()
