"""Loading of training images: errors that name the file, and a stream that can be resumed.

The stream of samples is a function of a seed. Sample number p of a process is drawn, augmented and
put into a batch in the same way whether training has run up to it or was resumed before it.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

from detectron2.config import CfgNode, instantiate
from detectron2.data import DatasetFromList, DatasetMapper, build_detection_train_loader
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import Dataset, Sampler

from ..config.lazy_reader import lazy_config
from ..errors import ConfigError, DataError, MissingFileError
from ..utils.seeding import isolated_generators, step_seed
from .build import training_records
from .images import check_image
from .samplers import EpochOrder, EpochSampler, epoch_order

__all__ = ["LongTailDatasetMapper", "ResumableSampler", "build_resumable_loader"]

_SEED_KEY = "sample_seed"


class LongTailDatasetMapper(DatasetMapper):
    """``DatasetMapper`` whose errors name the image, and whose choices follow a sample's seed."""

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        lazy = lazy_config(cfg)
        if lazy is None:
            return super().from_config(cfg, is_train)
        call = dict((lazy.dataloader.train if is_train else lazy.dataloader.test).mapper)
        if (mapper := call.pop("_target_")) not in (DatasetMapper, cls):
            raise ConfigError(
                f"The LazyConfig's mapper {mapper} is unknown here; make it Detectron2's "
                "DatasetMapper, or use Detectron2's lazyconfig_train_net.py."
            )
        return {name: instantiate(value) for name, value in call.items()}

    def __call__(self, dataset_dict: dict) -> dict:
        """As the parent's.

        Raises:
            MissingFileError: if the image does not exist.
            ConfigError: if an augmentation needs a package that is missing.
            DataError: if it is damaged, of another size than annotated, or deeper than 8 bits.
        """
        dataset_dict = dict(dataset_dict)
        seed = dataset_dict.pop(_SEED_KEY, None)
        path = dataset_dict["file_name"]
        try:
            check_image(path)
            if seed is None:
                return super().__call__(dataset_dict)
            with isolated_generators(seed):
                return super().__call__(dataset_dict)
        except FileNotFoundError:
            raise MissingFileError(
                f"Image '{path}' does not exist; restore it, or correct the data set's folder of "
                "images."
            ) from None
        except ModuleNotFoundError as error:  # as where masks are cropped without shapely
            raise ConfigError(
                f"An augmentation needs '{error.name}': pip install {error.name}."
            ) from None
        except SizeMismatchError as error:
            raise DataError(f"{str(error).rstrip('.')} ('{path}').") from None
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(
                f"Image '{path}' cannot be read ({error}); restore it, or leave it out of the "
                "annotations."
            ) from None


def build_resumable_loader(cfg: CfgNode, start_iter: int = 0):
    """Detectron2's training loader, going on after so many batches of each process.

    Args:
        cfg: the config; a negative ``SEED`` draws a common one for all processes.
        start_iter: batches that training has had. The stream is that of the run that had them if
            seed, data, batch size, number of processes and ``DATALOADER`` are the same.

    Raises:
        ConfigError, DataError: if the sampler is unknown, or has nothing to draw.
    """
    records = training_records(cfg)
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed() % 2**31
    is_wide = [record["width"] > record["height"] for record in records]
    sampler = ResumableSampler(
        epoch_order(cfg, records),
        len(records),
        seed,
        batch_size=cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        bucket_of=is_wide.__getitem__ if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None,
        start_iter=start_iter,
    )
    return build_detection_train_loader(
        cfg,
        dataset=_SeededRecords(records, seed),
        sampler=sampler,
        mapper=LongTailDatasetMapper(cfg, is_train=True),
        seed=seed,  # of the workers, which would else draw it from a step's random numbers
    )


class ResumableSampler(Sampler):
    """Endless sampler that can start where a data loader has had a number of batches.

    A sample is one whole number, since Detectron2's loader takes no other: its number in the
    stream of all processes, times the number of images, plus the position of its image.

    Detectron2's loader deals a sampler's stream out to its worker processes in chunks of a batch,
    collects from them in turn, and (with ``bucket_of``) batches wide and high images apart. So
    which samples are in the batches that were had, and which wait for their batch to fill, follows
    from the stream; those that wait go first.
    """

    def __init__(
        self,
        order: EpochOrder,
        num_images: int,
        seed: int,
        *,
        batch_size: int,
        num_workers: int = 0,
        bucket_of: Callable[[int], object] | None = None,
        start_iter: int = 0,
    ) -> None:
        """
        Args:
            order: positions of an epoch's images.
            num_images: of the data set.
            seed: of the stream; the same in all processes.
            batch_size: images of a batch of one process.
            num_workers: worker processes of the loader.
            bucket_of: images of which the loader batches together, by position; None for all.
            start_iter: batches that this process has had.
        """
        self.stream = EpochSampler(order, seed)
        self.num_images = num_images
        # Asked now: iteration takes place in the loader's worker processes.
        self.rank, self.world_size = comm.get_rank(), comm.get_world_size()
        self.batch_size = batch_size
        # Without buckets a worker's chunk is a batch, and batches come in the stream's order.
        self.num_columns = max(num_workers, 1) if bucket_of else 1
        self.bucket_of = bucket_of or _one_bucket
        self.start_iter = start_iter

    def __iter__(self) -> Iterator[int]:
        numbers = itertools.count(self.rank, self.world_size)
        samples = (
            number * self.num_images + image
            for number, image in zip(numbers, self.stream, strict=False)
        )
        if self.start_iter == 0:
            yield from samples
            return
        collected = _transposed(samples, self.num_columns, self.batch_size)
        waiting = self._skip(collected)
        going_on = itertools.chain(waiting, collected)
        yield from _transposed(going_on, self.batch_size, self.num_columns)

    def _skip(self, collected: Iterator[int]) -> list[int]:
        """Take the samples of the batches that were had; return those that wait for others."""
        buckets: dict[object, list[int]] = {}
        left = self.start_iter
        while left:
            sample = next(collected)
            bucket = buckets.setdefault(self.bucket_of(sample % self.num_images), [])
            bucket.append(sample)
            if len(bucket) == self.batch_size:
                bucket.clear()
                left -= 1
        return list(itertools.chain.from_iterable(buckets.values()))


def _one_bucket(_: int) -> None:
    return None


class _SeededRecords(Dataset):
    """Records with the seed of the sample that they are drawn for."""

    def __init__(self, records: Sequence[dict], seed: int) -> None:
        self.records = DatasetFromList(records, copy=False)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, sample: int) -> dict:
        number, image = divmod(sample, len(self.records))
        return {**self.records[image], _SEED_KEY: step_seed(self.seed, number)}


def _transposed(stream: Iterator, rows: int, columns: int) -> Iterator:
    """Read blocks of rows x columns row by row, and give them column by column."""
    if min(rows, columns) == 1:
        yield from stream
        return
    while block := list(itertools.islice(stream, rows * columns)):
        for column in range(columns):
            yield from block[column::columns]
