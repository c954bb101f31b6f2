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
from prepare_glyphs import PRESETS, build_glyphs, train_counts

from bags_d2 import ConfigError, DataError

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
    spec = PRESETS[preset]
    assert _sha256(spec.characters) == characters
    plan = glyphs.deal(train_counts(spec), spec.objects_per_image, np.random.default_rng([0, 1]))
    parts = [plan]
    for i, categories in enumerate(plan[:4]):
        path = tmp_path / f"{i}.jpg"
        job = glyphs.Job(spec, (0, 1, i), categories, str(path))
        parts += [*glyphs.draw(job), path.read_bytes()]
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
    counts = train_counts(PRESETS[preset], seed)
    edges = [0, 10, 100, 1000, np.inf]
    assert np.histogram(counts, edges)[0].tolist() == bins
    assert len(counts) == len(PRESETS[preset].characters)
    assert counts.min() >= 1


def test_another_seed_makes_other_classes_rare():
    first, second = (train_counts(PRESETS["glyphs"], seed) for seed in (0, 1))
    assert sorted(first) == sorted(second)
    assert first.tolist() != second.tolist()


def _feature(character, face):
    """A glyph's ink, scaled to a square and blurred, as a vector of mean 0 and length 1.

    The blur lets strokes that are a pixel apart still count as the same stroke.
    """
    shape = glyphs.shape_of(character, face)
    height, width = (max(1, round(side * 32 / max(shape.shape))) for side in shape.shape)
    small = cv2.resize(shape, (width, height), interpolation=cv2.INTER_AREA)
    square = np.zeros((40, 40), np.float32)
    top, left = (40 - height) // 2, (40 - width) // 2
    square[top : top + height, left : left + width] = small
    vector = cv2.GaussianBlur(square, (0, 0), 1.0).ravel()
    vector -= vector.mean()
    return vector / np.linalg.norm(vector)


def _least_distances(characters):
    """1 - correlation of every pair of characters, (n, n): the least over all faces."""
    best = np.full((len(characters),) * 2, np.inf)
    for face in glyphs.FACES:
        rows = [i for i, c in enumerate(characters) if face in glyphs.faces_of(c)]
        features = np.stack([_feature(characters[i], face) for i in rows])
        block = np.ix_(rows, rows)
        best[block] = np.minimum(best[block], 1 - features @ features.T)
    np.fill_diagonal(best, np.inf)
    return best


@pytest.mark.parametrize("preset", list(PRESETS))
def test_classes_can_be_told_apart(preset):
    characters = PRESETS[preset].characters
    assert len(set(characters)) == len(characters)
    assert _least_distances(characters).min() >= 0.035


def test_look_alikes_would_be_found():
    # Latin, Greek and Cyrillic A; small and capital O, which differ in size only.
    distances = _least_distances(["A", "\u0391", "\u0410", "o", "O", "\u2605"])
    assert max(distances[0, 1], distances[0, 2], distances[3, 4]) < 0.035
    assert distances[0, 5] > 5 * 0.035


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
    plan = train_counts(PRESETS[TINY])
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
    for category, character in zip(categories, PRESETS[TINY].characters, strict=True):
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
        glyphs.box_overlap(a, b)
        for group in boxes.values()
        for i, a in enumerate(group)
        for b in group[:i]
    ]
    assert max(overlaps) <= glyphs.MAX_BOX_OVERLAP + 0.01


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
    crowded = glyphs.Preset(
        name=TINY,
        characters="AΩ",
        counts=(20, 40),
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

    monkeypatch.setattr(glyphs, "draw", never)
    assert _build(tmp_path) == folder
    assert _digests(folder) == before


@pytest.mark.parametrize("num_workers", [1, 2])
def test_interrupted_build_leaves_nothing_and_the_next_succeeds(tmp_path, monkeypatch, num_workers):
    init = glyphs.Job.__init__

    def fails_in_the_middle(job, spec, stream, categories, path):
        init(job, spec, stream, categories, path.replace("21.jpg", "absent/21.jpg"))

    with monkeypatch.context() as patch:
        patch.setattr(glyphs.Job, "__init__", fails_in_the_middle)
        with pytest.raises(DataError, match=r"21\.jpg' could not be written"):
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


def test_a_link_to_nothing_is_refused_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("prepare_glyphs._build_into", pytest.fail)
    (tmp_path / "glyphs_tiny").symlink_to(tmp_path / "missing")
    with pytest.raises(DataError, match="glyphs_tiny is a link to nothing; remove it"):
        build_glyphs("glyphs_tiny", tmp_path, num_workers=1, progress=False)


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


def test_a_set_with_photographs_of_an_earlier_version_is_another_set(tmp_path):
    (tmp_path / TINY).mkdir()
    stamp = {"preset": TINY, "seed": 0, "version": 1, "image_folder": "/photos"}
    (tmp_path / TINY / "glyphs.json").write_text(json.dumps(stamp))
    with pytest.raises(DataError, match="image_folder differ"):
        _build(tmp_path)


def test_the_script_builds_or_says_why_not(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    glyphs.main([TINY, "--num-workers", "1", "--quiet"])
    assert (tmp_path / "datasets" / TINY / "glyphs.json").is_file()
    with pytest.raises(ConfigError, match="--seed must be 0 or more, not -1"):
        glyphs.main([TINY, "--seed", "-1"])
    with pytest.raises(SystemExit):
        glyphs.main(["nope"])
    assert "invalid choice: 'nope'" in capsys.readouterr().err
