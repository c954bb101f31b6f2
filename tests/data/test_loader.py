"""Training images: a stream that goes on where it was left, and errors that name the file."""

import contextlib
import itertools
import random

import numpy as np
import pytest
import torch
from detectron2.data.common import AspectRatioGroupedDataset, ToIterableDataset
from PIL import Image

from bags_d2 import DataError, MissingFileError
from bags_d2.data.loader import LongTailDatasetMapper, ResumableBatches, build_resumable_loader
from bags_d2.data.samplers import EpochSampler
from bags_d2.utils.seeding import isolated_generators

NUM_IMAGES = 23
WIDE = [i % 3 == 0 for i in range(NUM_IMAGES)]


def _order(generator):
    return torch.randperm(NUM_IMAGES, generator=generator)


def _batches(batch_size, grouped, start, count):
    stream = EpochSampler(_order, seed=3)
    batches = ResumableBatches(stream, batch_size, start, WIDE if grouped else None)
    return list(itertools.islice(batches, count))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_resumed_stream_is_the_rest_of_the_whole(grouped, batch_size):
    whole = _batches(batch_size, grouped, 0, 30)
    assert len({s for batch in whole for s in batch}) == 30 * batch_size  # no sample twice
    for start in range(30):
        assert _batches(batch_size, grouped, start, 30 - start) == whole[start:], start
    if grouped:
        assert all(len({WIDE[image] for _, image in batch}) == 1 for batch in whole)


def test_every_epoch_has_every_image():
    batches = _batches(1, False, 0, 3 * NUM_IMAGES)
    for epoch in range(3):
        samples = [s for (s,) in batches[epoch * NUM_IMAGES :][:NUM_IMAGES]]
        assert sorted(image for _, image in samples) == list(range(NUM_IMAGES))
        numbers = [number for number, _ in samples]
        assert numbers == list(range(epoch * NUM_IMAGES, (epoch + 1) * NUM_IMAGES))


def test_processes_share_the_stream(monkeypatch):
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
        shares.append(_batches(1, False, 0, 2 * NUM_IMAGES))
    monkeypatch.undo()
    whole = _batches(1, False, 0, 4 * NUM_IMAGES)
    assert [s for pair in zip(*shares, strict=True) for s in pair] == whole


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_batches_are_those_of_detectron2s_loader_in_one_process(batch_size):
    images = [{"image": i, "width": 2 if WIDE[i] else 1, "height": 1.5} for i in range(NUM_IMAGES)]
    stream = ToIterableDataset(images, EpochSampler(_order, seed=3))
    for grouped in (False, True):
        if grouped:
            theirs = iter(AspectRatioGroupedDataset(stream, batch_size))
        else:
            theirs = iter(torch.utils.data.DataLoader(stream, batch_size, collate_fn=list))
        expected = [[d["image"] for d in batch] for batch in itertools.islice(theirs, 30)]
        ours = _batches(batch_size, grouped, 0, 30)
        assert [[image for _, image in batch] for batch in ours] == expected


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_number_of_workers_changes_nothing(tiny_cfg, datasets_root, register, num_workers):
    folder = datasets_root / "glyphs_tiny"
    path = str(folder / "annotations" / "glyphs_tiny_train.json")
    options = ("DATASETS.TRAIN", (register("workers_train", path, str(folder)),), "SEED", 5)
    batches = []
    for workers in (0, num_workers):
        cfg = tiny_cfg(*options, "DATALOADER.NUM_WORKERS", workers, "SOLVER.IMS_PER_BATCH", 2)
        batches.append(list(itertools.islice(build_resumable_loader(cfg, 3), 5)))
    for ours, theirs in zip(*batches, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a["file_name"] == b["file_name"]
            assert torch.equal(a["image"], b["image"])


def test_samples_are_augmented_alike_before_and_after(tiny_cfg, datasets_root, register):
    folder = datasets_root / "glyphs_tiny"
    path = str(folder / "annotations" / "glyphs_tiny_train.json")
    name = register("loader_train", path, str(folder))
    cfg = tiny_cfg(
        *("DATASETS.TRAIN", (name,), "INPUT.RANDOM_FLIP", "horizontal", "SEED", 5),
        *("INPUT.MIN_SIZE_TRAIN", (48, 64, 80, 96), "SOLVER.IMS_PER_BATCH", 2),
        *("DATALOADER.NUM_WORKERS", 0),
    )
    whole = list(itertools.islice(build_resumable_loader(cfg), 8))
    torch.rand(5)  # what else draws does not matter
    resumed = list(itertools.islice(build_resumable_loader(cfg, 5), 3))
    for ours, theirs in zip(resumed, whole[5:], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a["file_name"] == b["file_name"]
            assert torch.equal(a["image"], b["image"])
    sizes = {d["image"].shape[1:] for batch in whole for d in batch}
    assert len(sizes) > 1  # there was something to draw
    state = torch.get_rng_state()
    next(iter(build_resumable_loader(cfg, 1)))
    assert torch.equal(torch.get_rng_state(), state)


def test_isolated_generators_leave_no_trace():
    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002

    with isolated_generators(7):
        first = draw()
    torch_state = torch.get_rng_state()
    with isolated_generators(7):
        assert draw() == first
    assert torch.equal(torch.get_rng_state(), torch_state)
    with contextlib.suppress(KeyError), isolated_generators(7):
        raise KeyError(draw())
    assert torch.equal(torch.get_rng_state(), torch_state)


@pytest.fixture
def load(tiny_cfg, tmp_path):
    """``load(image, name)``: what the mapper makes of a picture that is annotated as 30 x 20."""
    mapper = LongTailDatasetMapper(tiny_cfg("INPUT.RANDOM_FLIP", "none"), is_train=True)

    def run(image, name="x.png", damage=lambda data: data):
        path = tmp_path / name
        if image is not None:
            image.save(path)
            path.write_bytes(damage(path.read_bytes()))
        record = {"file_name": str(path), "height": 20, "width": 30, "annotations": []}
        return mapper(record)

    return run


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "LA", "CMYK"])
def test_8_bit_images_of_any_kind_are_read(load, mode):
    name = "x.tif" if mode == "CMYK" else "x.png"
    image = load(PICTURE.convert(mode), name)["image"]
    assert image.shape[0] == 3
    assert image.float().std() > 10


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deeper_images_are_refused_instead_of_clipped(load, mode):
    deep = Image.fromarray(np.full((20, 30), 4000, dtype=np.uint16))
    with pytest.raises(DataError, match=r"x\.tif' has more than 8 bits a channel"):
        load(deep if mode == "I;16" else deep.convert(mode), "x.tif")


def test_damaged_and_missing_images_are_named(load):
    with pytest.raises(MissingFileError, match=r"x\.png' does not exist"):
        load(None)
    for name in ("x.png", "x.jpg", "x.webp"):
        for damage in (lambda d: d[: len(d) // 2], lambda d: b"", lambda d: b"<html>404</html>"):
            with pytest.raises(DataError, match=rf"Image '.*{name}' cannot be read"):
                load(PICTURE, name, damage)


def test_an_image_of_another_size_is_named(load):
    with pytest.raises(DataError, match=r"got \(10, 10\), expect \(30, 20\).*x\.png'"):
        load(PICTURE.resize((10, 10)))
