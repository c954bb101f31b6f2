"""In which order a training run takes its images: samplers for long-tailed data.

An epoch's order is a function of a random generator alone, so that training from images and from
cached features (``fitting/train.py``) can take the same one.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch.utils.data import Sampler

from ..errors import ConfigError, DataError
from .class_statistics import training_class_counts

EpochOrder = Callable[[torch.Generator], torch.Tensor]

# Values of DATALOADER.SAMPLER_TRAIN:
RANDOM = "TrainingSampler"
# Images repeated for their rarest class (Gupta et al., CVPR 2019).
RFS = "RepeatFactorTrainingSampler"
# The same with the rarity of a class in images and in instances (IRFS; Yaman et al., 2023).
IRFS = "InstanceAwareRepeatFactorTrainingSampler"
# Draws with replacement by the exponential of these factors (E-IRFS; Ahmed et al., 2025).
E_IRFS = "ExponentialRepeatFactorTrainingSampler"
# Each sample is an image of a class that is drawn evenly (cRT; Kang et al., ICLR 2020, section 4).
CLASS_BALANCED = "ClassBalancedTrainingSampler"
# Images that show a class of the tail, evenly. BAGS reports "tail fine-tune" without saying how it
# is done; here such images keep the annotations of all their classes.
TAIL = "TailTrainingSampler"
# All whose epochs are known here; Detectron2 has others, whose order its own loader decides.
EPOCH_SAMPLERS = (RANDOM, RFS, IRFS, E_IRFS, CLASS_BALANCED, TAIL)


class EpochSampler(Sampler):
    """Endless sampler that goes from epoch to epoch, shared by all processes.

    As Detectron2's ``TrainingSampler``, every process draws the same stream and takes its share.
    """

    def __init__(self, order: EpochOrder, seed: int | None = None) -> None:
        """The seed must be the same in all processes; None draws a common one."""
        self.order = order
        self.seed = comm.shared_random_seed() if seed is None else seed
        # Asked now: iteration takes place in the loader's worker processes.
        self.rank, self.world_size = comm.get_rank(), comm.get_world_size()

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        epochs = (self.order(generator).tolist() for _ in itertools.count())
        stream = itertools.chain.from_iterable(epochs)
        return itertools.islice(stream, self.rank, None, self.world_size)


def epoch_order(cfg: CfgNode, records: Sequence[dict]) -> EpochOrder:
    """The order that ``DATALOADER.SAMPLER_TRAIN`` means; it can be pickled, for worker processes.

    Args:
        cfg: the config.
        records: Detectron2's; of ``TrainingSampler`` only their number counts.

    Raises:
        ConfigError: if there is no such sampler here.
        DataError: if no image has what the sampler is to draw.
    """
    name, draws = cfg.DATALOADER.SAMPLER_TRAIN, expected_draws(cfg, records)
    if name in (RFS, IRFS):
        return functools.partial(repeated_order, draws)
    if name == E_IRFS:
        return functools.partial(weighted_order, draws)
    if name == CLASS_BALANCED:
        return functools.partial(class_balanced_order, _images_of_classes(records), len(records))
    return functools.partial(shuffled, draws.nonzero().flatten())


def expected_draws(cfg: CfgNode, records: Sequence[dict]) -> torch.Tensor:
    """How often an epoch of ``DATALOADER.SAMPLER_TRAIN`` takes each image, on average.

    Returns:
        Float tensor (N,); its sum is the length of an epoch.

    Raises:
        ConfigError, DataError: as :func:`epoch_order`.
    """
    name, num_images = cfg.DATALOADER.SAMPLER_TRAIN, len(records)
    if name == RANDOM:
        return torch.ones(num_images)
    if name == RFS:
        return RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
    if name == IRFS:
        scarcity = _scarcity(records, cfg.DATALOADER.REPEAT_THRESHOLD)
        return _greatest_of_image(records, {c: max(1.0, x) for c, x in scarcity.items()}, 1.0)
    if name == E_IRFS:
        # Of the logarithms the greatest is subtracted: factors beyond e^700 would be infinite.
        scarcity = _scarcity(records, cfg.DATALOADER.REPEAT_THRESHOLD)
        logs = {c: cfg.DATALOADER.REPEAT_ALPHA * x for c, x in scarcity.items()}
        return num_images * _greatest_of_image(records, logs, 0.0).softmax(dim=0)
    if name == CLASS_BALANCED:
        images_of_class = _images_of_classes(records)
        draws = torch.zeros(num_images)
        for images in images_of_class:
            draws[images] += num_images / len(images_of_class) / len(images)
        return draws
    if name == TAIL:
        is_tail = training_class_counts(cfg, by="instances") < cfg.DATALOADER.TAIL_MAX_COUNT
        draws = torch.tensor([float(any(is_tail[c] for c in _classes_of(r))) for r in records])
        if not draws.any():
            raise DataError(
                f"No training image shows a class of fewer than {cfg.DATALOADER.TAIL_MAX_COUNT} "
                "instances; raise DATALOADER.TAIL_MAX_COUNT."
            )
        return draws
    raise ConfigError(
        f"DATALOADER.SAMPLER_TRAIN is '{name}', which is none of {', '.join(EPOCH_SAMPLERS)}; set "
        "it to one of these."
    )


def shuffled(positions: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Positions in random order."""
    return positions[torch.randperm(len(positions), generator=generator)]


def repeated_order(factors: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """An epoch in which image i comes ``factors[i]`` (N,), 1 or more, times on average.

    The fraction is rounded up or down at random, as in Detectron2's sampler (Gupta et al., CVPR
    2019). Returns positions in random order.
    """
    up = torch.rand(len(factors), generator=generator) < factors.frac()
    positions = torch.arange(len(factors)).repeat_interleave(factors.long() + up)
    return shuffled(positions, generator)


def weighted_order(draws: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draws with replacement, as many as there are images, by the numbers expected of each (N,)."""
    return torch.multinomial(draws, len(draws), replacement=True, generator=generator)


def class_balanced_order(
    images_of_class: Sequence[torch.Tensor], num_draws: int, generator: torch.Generator
) -> torch.Tensor:
    """Draws (num_draws,) of a class, each as likely as any other, and then of one of its images.

    ``images_of_class`` has the positions of the images of each class that has any.
    """
    sizes = torch.tensor([len(images) for images in images_of_class])
    starts = sizes.cumsum(0) - sizes
    classes = torch.randint(len(sizes), (num_draws,), generator=generator)
    within = torch.rand(num_draws, generator=generator, dtype=torch.float64) * sizes[classes]
    return torch.cat(list(images_of_class))[starts[classes] + within.long()]


def _scarcity(records: Sequence[dict], threshold: float) -> dict[int, float]:
    """sqrt(t / sqrt(f_image f_instance)) of each class, f its share of images and of instances."""
    images = Counter(c for record in records for c in _classes_of(record))
    instances = Counter(c for record in records for c in instance_classes(record))
    product = {c: images[c] / len(records) * instances[c] / instances.total() for c in images}
    return {c: (threshold / share**0.5) ** 0.5 for c, share in product.items()}


def _greatest_of_image(
    records: Sequence[dict], of_class: dict[int, float], empty: float
) -> torch.Tensor:
    greatest = (max(map(of_class.get, _classes_of(r)), default=empty) for r in records)
    return torch.tensor(list(greatest))


def _images_of_classes(records: Sequence[dict]) -> list[torch.Tensor]:
    images: dict[int, list[int]] = {}
    for i, record in enumerate(records):
        for c in _classes_of(record):
            images.setdefault(c, []).append(i)
    if not images:
        raise DataError("The training set has no annotations to balance the classes by.")
    return [torch.tensor(images[c]) for c in sorted(images)]


def _classes_of(record: dict) -> set[int]:
    return set(instance_classes(record))


def instance_classes(record: dict) -> list[int]:
    """Classes of a record's objects; crowds do not count, since training leaves them out."""
    return [a["category_id"] for a in record["annotations"] if not a.get("iscrowd", 0)]
