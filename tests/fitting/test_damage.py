"""Damaged caches: nothing but the package's own errors, which name the file and a remedy."""

import json
import os
import pickle
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from bags_d2.errors import BagsError, DataError
from bags_d2.fitting.cache import (
    FORMAT,
    FeatureCache,
    encode_features,
    plan_shards,
    write_shard,
)

NUM_CLASSES, NUM_IMAGES, WIDTH, STAGES = 6, 5, 4, 2
SETTINGS = {
    **{
        "format": FORMAT,
        "dtype": "float16",
        "num_images": NUM_IMAGES,
        "num_classes": NUM_CLASSES,
        "views": 2,
    },
    **{"images_per_shard": 3, "images_per_batch": 2, "rois_per_image": 0, "checkpoint": "1f"},
}
SHARD = Path("view0") / "shard00000"


def make_cache(folder, dtype="float16"):
    """A cache of a cascade, two views and two shards each; image i has i + 1 RoIs."""
    settings = {**SETTINGS, "dtype": dtype}
    generator = torch.Generator().manual_seed(0)
    for shard in plan_shards(folder, settings):
        images, rois = shard.places, []
        for i in images:
            features = torch.randn(i + 1, STAGES, WIDTH, generator=generator)
            labels = torch.randint(NUM_CLASSES + 1, (i + 1, STAGES), generator=generator)
            labels[:1, 1] = -1  # its box became empty
            rois.append((encode_features(features, dtype), labels))
        write_shard(shard, images, rois)
    (folder / "cache.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("damage") / "cache")


@pytest.fixture
def cache(whole, tmp_path):
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def use(folder):
    """Open a cache and read all of it; returns what training would be given."""
    cache = FeatureCache(folder)
    views, num_images = cache.settings["views"], cache.settings["num_images"]
    rois = [cache.read([(view, i)]) for view in range(views) for i in range(num_images)]
    return [*rois, *cache.parts()]


def rewrite(path, change):
    np.save(path, change(np.load(path)))


def put(array, index, value):
    array[index] = value
    return array


def test_a_whole_cache_is_read(whole):
    rois = use(whole)
    assert [len(labels) for _, labels in rois[:NUM_IMAGES]] == [1, 2, 3, 4, 5]
    assert all(features.shape[1:] == (STAGES, WIDTH) for features, _ in rois)
    assert all(features.dtype == torch.float32 for features, _ in rois)


ARRAYS = {
    "float32": ("features", lambda x: x.astype(np.float32)),
    "big endian": ("features", lambda x: x.astype(">f2")),
    "column by column": ("features", np.asfortranarray),
    "one dimension": ("features", np.ravel),
    "another width": ("features", lambda x: x[..., :3].copy()),
    "no width": ("features", lambda x: x[..., :0].copy()),
    "another number of stages": ("features", lambda x: x[:, :1].copy()),
    "no stages": ("labels", lambda x: x[:, :0].copy()),
    "integers": ("features", lambda x: x.view(np.uint8)),
    "RoIs missing": ("features", lambda x: x[:-1]),
    "NaN": ("features", lambda x: put(x, (2, 1, 3), np.nan)),
    "infinity": ("features", lambda x: put(x, (2, 1, 3), -np.inf)),
    "fractional labels": ("labels", lambda x: x + np.float32(0.5)),
    "int64 labels": ("labels", lambda x: x.astype(np.int64)),
    "RoI that no stage sees": ("labels", lambda x: put(x, 1, -1)),
    "negative label": ("labels", lambda x: put(x, (1, 1), -2)),
    "label beyond background": ("labels", lambda x: put(x, 1, NUM_CLASSES + 1)),
    "labels missing": ("labels", lambda x: x[:-1]),
    "image beyond the last": ("images", lambda x: put(x, 0, NUM_IMAGES)),
    "negative image": ("images", lambda x: put(x, 0, -1)),
    "image twice": ("images", lambda x: put(x, 0, x[1])),
    "image of another shard": ("images", lambda x: put(x, 0, 4)),
    "images missing": ("images", lambda x: x[:-1]),
    "no images": ("images", lambda x: x[:0]),
    "offsets from 1": ("offsets", lambda x: put(x, 0, 1)),
    "falling offsets": ("offsets", lambda x: put(x, 1, 4)),
    "offsets beyond the RoIs": ("offsets", lambda x: put(x, -1, 7)),
    "no offsets": ("offsets", lambda x: x[:0]),
    "objects": ("labels", lambda x: x.astype(object)),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_of_another_kind_are_refused(cache, case):
    name, change = ARRAYS[case]
    rewrite(cache / SHARD / f"{name}.npy", change)
    # The second view counts shards too: the message names one of the first.
    with pytest.raises(DataError, match=r"is damaged \(.*\); delete '.*shard0000[01]' and run"):
        use(cache)


INTEGERS = {
    "NaN": lambda x: put(x, (2, 1, slice(-8, None)), 255),
    "overflow": lambda x: put(x, (2, 1, slice(-4, None)), (255, 255, 127, 127)),
    "no features": lambda x: x[..., -8:].copy(),
    "float16": lambda x: x.astype(np.float16),
}


@pytest.mark.parametrize("dtype", ["uint2", "uint8"])
@pytest.mark.parametrize("case", INTEGERS)
def test_damaged_integers_are_refused(tmp_path, dtype, case):
    cache = make_cache(tmp_path / "cache", dtype)
    use(cache)
    rewrite(cache / SHARD / "features.npy", INTEGERS[case])
    with pytest.raises(DataError, match=r"features\.npy' is damaged \(.*\); delete '.*shard0000"):
        use(cache)


def make_fifo(path):
    path.unlink()
    os.mkfifo(path)


FILES = {
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-2]),
    "cut in the header": lambda p: p.write_bytes(p.read_bytes()[:50]),
    "empty": lambda p: p.write_bytes(b""),
    "longer": lambda p: p.write_bytes(p.read_bytes() + b"\0\0"),
    "missing": Path.unlink,
    "named pipe": make_fifo,
    "huge": lambda p: p.write_bytes(
        re.sub(rb"\((\d+),(.*?) {9}\n", rb"(\g<1>000000000,\2\n", p.read_bytes(), count=1)
    ),
    "pickle": lambda p: p.write_bytes(pickle.dumps([1, 2])),
}


@pytest.mark.parametrize("name", ["features", "labels", "images", "offsets"])
@pytest.mark.parametrize("case", FILES)
def test_damaged_files_are_named(cache, name, case):
    path = cache / SHARD / f"{name}.npy"
    before = path.read_bytes() if case != "named pipe" else None
    FILES[case](path)
    assert case in ("missing", "named pipe") or path.read_bytes() != before
    with pytest.raises(DataError, match=rf"{re.escape(str(SHARD))}.*'.* is damaged .*; delete"):
        use(cache)


def test_a_pickled_array_is_not_run(cache, tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    for name in ("features", "labels", "images", "offsets"):
        np.save(cache / SHARD / f"{name}.npy", np.array([Harm()]), allow_pickle=True)
        with pytest.raises(DataError, match="is damaged"):
            use(cache)
    assert not (tmp_path / "harm").exists()


VALUES = ("0", "-1", "1000000000000", "2.0", "1e300", "true", "null", '"7"', "[]", "{}")


@pytest.mark.parametrize("name", ["num_images", "views", "images_per_shard"])
@pytest.mark.parametrize("value", [*VALUES, pytest.param("1" + 5000 * "0", id="5001 digits")])
def test_settings_out_of_range_are_refused(cache, name, value):
    text = json.dumps({**SETTINGS, name: "VALUE"}).replace('"VALUE"', value)
    (cache / "cache.json").write_text(text)
    with pytest.raises(DataError, match=r"; (delete|run) ") as caught:
        use(cache)
    assert str(cache) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", "[" * 100_000, '{"format": NaN}', "\ud800"]
)
def test_text_that_is_no_settings_is_refused(cache, text):
    (cache / "cache.json").write_text(text, errors="surrogatepass")
    with pytest.raises(DataError, match=r"; delete '.*cache' and run .* or name another"):
        use(cache)


def test_a_cache_of_an_earlier_version_is_refused_by_name(cache):
    earlier = {
        "settings": {
            **{"config": {"MODEL.MASK_ON": "False"}, "checkpoint": 64 * "1", "annotations": {}},
            **{"views": 2, "rois_per_image": None, "sampling": 2, "images_per_shard": 3},
            **{"images_per_batch": 2},
        },
        "num_images": NUM_IMAGES,
    }
    for content in (earlier, {**SETTINGS, "format": FORMAT - 1}, {**SETTINGS, "dtype": "int3"}):
        (cache / "cache.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=r"another version of bags_d2; delete '.*cache' and"):
            FeatureCache(cache)


def test_shards_that_are_too_few_or_too_many_are_told(cache):
    shutil.copytree(cache / "view1", cache / "view2")
    with pytest.raises(DataError, match="holds 6 shards and should hold 4; delete"):
        use(cache)
    shutil.rmtree(cache / "view2")
    shutil.rmtree(cache / SHARD)
    with pytest.raises(DataError, match="is not complete; run the command that makes it again"):
        use(cache)


def mutate(folder, rng):
    """Damage one file of a cache at random."""
    path = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    content = bytearray(path.read_bytes()) or bytearray(1)
    kind = rng.randrange(7)
    if path.name == "cache.json" and kind < 5:
        values = (0, -1, 1, 3, 10**12, 1e308, -0.5, "", "x", None, True, [], {"a": [1]}, "\ud800")
        settings = dict(SETTINGS)
        settings[rng.choice([*settings, "other"])] = rng.choice(values)
        content = json.dumps(settings).encode()
    elif kind < 3:
        for _ in range(rng.choice((1, 1, 2, 20))):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif kind == 3:  # the header, in which most of what a reader acts on stands
        content[rng.randrange(min(128, len(content)))] = rng.randrange(256)
    elif kind == 4:
        del content[rng.randrange(len(content)) :]
    elif kind == 5:
        content += rng.randbytes(rng.randrange(1, 200))
    else:
        other = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
        content = other.read_bytes()
    path.write_bytes(content)


@pytest.mark.filterwarnings("ignore")  # numpy's, of headers from Python 2 and odd types
def test_random_damage_is_refused_or_harmless(whole, tmp_path):
    rng = random.Random(1)
    outcomes = {"refused": 0, "read": 0}
    for number in range(200):
        folder = Path(shutil.copytree(whole, tmp_path / str(number)))
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            mutate(folder, rng)
        try:
            rois = use(folder)
            outcome = "read"
        except BagsError as error:
            outcome, message = "refused", str(error)
        outcomes[outcome] += 1
        if outcome == "read":
            assert all(features.isfinite().all() for features, _ in rois)
            assert all(len(features) == len(labels) for features, labels in rois)
            assert all((labels[:, 0] >= 0).all() for _, labels in rois)
        else:
            assert str(folder) in message
            assert "\n" not in message
        shutil.rmtree(folder)
    # A flipped bit of a feature is another feature; what is not data is refused.
    assert outcomes["refused"] > 100, outcomes
