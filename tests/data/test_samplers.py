"""Orders of training images: their statistics, and that processes share one stream."""

import itertools
from collections import Counter

import pytest
import torch
from detectron2.data import DatasetCatalog

from bags_d2 import BAGSTrainer, ConfigError, DataError
from bags_d2.data import samplers
from bags_d2.data.samplers import EpochSampler, class_balanced_order, epoch_order, repeated_order

# Class 0 in images 0 to 7, class 1 in image 8, class 2 (a crowd there) in images 8 and 9.
RECORDS = [
    *({"annotations": [{"category_id": 0}]} for _ in range(8)),
    {"annotations": [{"category_id": 1}, {"category_id": 2, "iscrowd": 1}]},
    {"annotations": [{"category_id": 2}, {"category_id": 2}]},
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def order_of(tiny_cfg, name, *options, records=RECORDS):
    cfg = tiny_cfg("DATALOADER.SAMPLER_TRAIN", name, *options)
    return epoch_order(cfg, records)


def test_the_random_sampler_takes_each_image_once(tiny_cfg):
    order = order_of(tiny_cfg, "TrainingSampler")
    first, second = order(generator()).tolist(), order(generator(1)).tolist()
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert order(generator()).tolist() == first


def test_repeated_images_come_as_often_as_their_factors_say():
    factors = torch.tensor([1.0, 2.0, 1.25, 3.5])
    source, counts, epochs = generator(), Counter(), 4000
    for _ in range(epochs):
        epoch = Counter(repeated_order(factors, source).tolist())
        assert epoch[0] == 1
        assert epoch[1] == 2
        assert epoch[2] in (1, 2)
        assert epoch[3] in (3, 4)
        counts.update(epoch)
    for i, factor in enumerate(factors.tolist()):
        assert counts[i] / epochs == pytest.approx(factor, abs=0.03)


def test_repeat_factors_are_those_of_detectron2(tiny_cfg):
    order = order_of(tiny_cfg, "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD", 0.4)
    epoch = Counter(order(generator()).tolist())
    # Class 1 is in a tenth of the images and class 2, crowds included, in a fifth: square roots of
    # 0.4 / 0.1 and 0.4 / 0.2. Class 0 is frequent.
    assert all(epoch[i] == 1 for i in range(8))
    assert epoch[8] == 2
    assert epoch[9] in (1, 2)


def test_classes_are_drawn_evenly_and_so_are_their_images():
    images = [torch.arange(8), torch.tensor([8]), torch.tensor([9, 8])]
    draws = class_balanced_order(images, 60_000, generator())
    shares = torch.bincount(draws, minlength=10) / len(draws)
    torch.testing.assert_close(shares[:8], torch.full((8,), 1 / 24), atol=0.004, rtol=0)
    assert shares[8].item() == pytest.approx(1 / 3 + 1 / 6, abs=0.01)
    assert shares[9].item() == pytest.approx(1 / 6, abs=0.01)


def test_the_class_balanced_sampler_leaves_crowds_and_absent_classes_out(tiny_cfg):
    order = order_of(tiny_cfg, "ClassBalancedTrainingSampler")
    draws = torch.cat([order(generator(seed)) for seed in range(3000)])
    assert len(draws) == 30_000
    shares = torch.bincount(draws, minlength=10) / len(draws)
    assert shares[:8].sum().item() == pytest.approx(1 / 3, abs=0.01)
    assert shares[8].item() == pytest.approx(1 / 3, abs=0.01)
    assert shares[9].item() == pytest.approx(1 / 3, abs=0.01)


def test_the_tail_sampler_takes_images_with_rare_classes(tiny_cfg):
    # tiny_cfg counts 3, 12 and 150 instances of classes 0, 1 and 2.
    order = order_of(tiny_cfg, "TailTrainingSampler", "DATALOADER.TAIL_MAX_COUNT", 13)
    assert sorted(order(generator()).tolist()) == list(range(9))
    order = order_of(tiny_cfg, "TailTrainingSampler", "DATALOADER.TAIL_MAX_COUNT", 4)
    assert sorted(order(generator()).tolist()) == list(range(8))


def test_what_cannot_be_drawn_is_refused(tiny_cfg):
    with pytest.raises(ConfigError, match=r"DATALOADER\.SAMPLER_TRAIN is 'Nonsense'.*TailTraining"):
        order_of(tiny_cfg, "Nonsense")
    with pytest.raises(DataError, match=r"raise DATALOADER\.TAIL_MAX_COUNT"):
        order_of(tiny_cfg, "TailTrainingSampler", "DATALOADER.TAIL_MAX_COUNT", 1)
    with pytest.raises(DataError, match="no annotations"):
        order_of(tiny_cfg, "ClassBalancedTrainingSampler", records=[{"annotations": []}])


def test_processes_take_disjoint_shares_of_one_stream(monkeypatch):
    def take(rank, world_size, number):
        monkeypatch.setattr(samplers.comm, "get_rank", lambda: rank)
        monkeypatch.setattr(samplers.comm, "get_world_size", lambda: world_size)
        sampler = EpochSampler(lambda g: torch.randperm(10, generator=g), seed=5)
        return list(itertools.islice(sampler, number))

    whole = take(0, 1, 30)
    assert all(sorted(whole[i : i + 10]) == list(range(10)) for i in (0, 10, 20))
    assert take(0, 3, 10) == whole[0::3]
    assert take(1, 3, 10) == whole[1::3]
    assert take(2, 3, 10) == whole[2::3]


@pytest.mark.parametrize("name", [samplers.CLASS_BALANCED, samplers.TAIL])
def test_the_trainer_loads_images_in_that_order(tiny_cfg, datasets_root, register, name):
    folder = datasets_root / "glyphs_tiny"
    path = str(folder / "annotations" / "glyphs_tiny_train.json")
    data = register("glyphs_tiny_sampled", path, str(folder))
    cfg = tiny_cfg(
        *("DATASETS.TRAIN", (data,), "DATALOADER.SAMPLER_TRAIN", name),
        *("DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 2, "SEED", 1),
        *("MODEL.LONG_TAIL.CLASS_COUNTS_FILE", "", "DATALOADER.TAIL_MAX_COUNT", 10),
    )
    batch = next(iter(BAGSTrainer.build_train_loader(cfg)))
    assert len(batch) == 2
    known = {record["image_id"] for record in DatasetCatalog.get(data)}
    assert {record["image_id"] for record in batch} <= known


@pytest.mark.parametrize("name", samplers.EPOCH_SAMPLERS)
def test_an_epoch_takes_images_as_often_as_expected(tiny_cfg, name, monkeypatch):
    monkeypatch.setattr(samplers, "training_class_counts", lambda *_, **__: torch.tensor([8, 1, 2]))
    options = ["DATALOADER.REPEAT_THRESHOLD", 0.4, "DATALOADER.TAIL_MAX_COUNT", 2]
    cfg = tiny_cfg("DATALOADER.SAMPLER_TRAIN", name, "DATALOADER.REPEAT_ALPHA", 0.5, *options)
    draws = samplers.expected_draws(cfg, RECORDS)
    order, source, epochs = epoch_order(cfg, RECORDS), generator(), 3000
    counts = torch.bincount(torch.cat([order(source) for _ in range(epochs)]), minlength=10)
    torch.testing.assert_close(counts / epochs, draws.float(), atol=0.08, rtol=0)


def test_instance_aware_factors_are_the_papers(tiny_cfg):
    records = [
        {"annotations": [{"category_id": 0}] * 9},
        *({"annotations": [{"category_id": 0}]} for _ in range(7)),
        {"annotations": [{"category_id": 0}] * 3 + [{"category_id": 1}]},
        {"annotations": []},
    ]
    options = ["DATALOADER.REPEAT_THRESHOLD", 0.5, "DATALOADER.REPEAT_ALPHA", 1.5]
    # Class 0: in 9 of 10 images and 19 of 20 instances; class 1: in 1 of 10 and 1 of 20.
    scarcity = [(0.5 / (9 / 10 * 19 / 20) ** 0.5) ** 0.5, (0.5 / (1 / 10 * 1 / 20) ** 0.5) ** 0.5]
    cfg = tiny_cfg("DATALOADER.SAMPLER_TRAIN", samplers.IRFS, *options)
    irfs = [1.0] * 8 + [scarcity[1], 1.0]
    torch.testing.assert_close(samplers.expected_draws(cfg, records), torch.tensor(irfs))
    cfg = tiny_cfg("DATALOADER.SAMPLER_TRAIN", samplers.E_IRFS, *options)
    weights = torch.tensor([1.5 * scarcity[0]] * 8 + [1.5 * scarcity[1], 0.0]).exp()
    expected = 10 * weights / weights.sum()
    torch.testing.assert_close(samplers.expected_draws(cfg, records), expected)
