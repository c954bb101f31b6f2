"""Loading of training images: errors that name the file, and a stream that can be resumed.

The stream of samples is a function of a seed. Sample number p of a process is drawn, augmented and
put into a batch in the same way whether training has run up to it or was resumed before it.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import DatasetFromList, DatasetMapper
from detectron2.data.build import trivial_batch_collator, worker_init_reset_seed
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from ..config.lazy_reader import lazy_config
from ..errors import ConfigError, DataError, MissingFileError
from ..utils.seeding import isolated_generators, step_seed
from .build import training_records
from .images import check_image, unreadable
from .samplers import EpochSampler, epoch_order


class LongTailDatasetMapper(DatasetMapper):
    """``DatasetMapper`` whose errors name the image."""

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
        """As the parent's; errors (Missing, Data, Config) say what is missing or wrong."""
        path = dataset_dict["file_name"]
        try:
            check_image(path)
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
            raise unreadable(path, error) from None


def build_resumable_loader(cfg: CfgNode, start_iter: int = 0) -> DataLoader:
    """A loader of training batches, lists of dicts, going on after so many of each process.

    Args:
        cfg: the config; a negative ``SEED`` draws a common one for all processes.
        start_iter: batches that training has had. The stream is that of the run that had them if
            seed, data, batch size, number of processes and sampler are the same.

    Raises:
        ConfigError, DataError: if the sampler is unknown, or has nothing to draw.
    """
    records = training_records(cfg)
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed() % 2**31
    batches = ResumableBatches(
        EpochSampler(epoch_order(cfg, records), seed),
        cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
        start_iter,
        is_wide=[record["width"] > record["height"] for record in records]
        if cfg.DATALOADER.ASPECT_RATIO_GROUPING
        else None,
    )
    return DataLoader(
        _SeededImages(records, LongTailDatasetMapper(cfg, is_train=True), seed),
        batch_sampler=batches,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
        worker_init_fn=worker_init_reset_seed,
        # Of the workers, which would else draw their seeds from a step's random numbers.
        generator=torch.Generator().manual_seed(seed),
    )


class ResumableBatches(Sampler[list[tuple[int, int]]]):
    """Endless batches of a process, from a chosen one on, of images that are wide or high alike.

    A sample is its number in the stream of all processes, and the position of its image. Which
    samples are in a batch follows from the stream alone, as with Detectron2's own loader in a
    single process.
    """

    def __init__(
        self,
        stream: EpochSampler,
        batch_size: int,
        start_iter: int = 0,
        is_wide: Sequence[bool] | None = None,
    ) -> None:
        """
        Args:
            stream: positions of images, for this process.
            batch_size: images of a batch of this process.
            start_iter: batches that it has had.
            is_wide: of each image, to batch wide and high ones apart; None batches all together.
        """
        self.stream, self.batch_size = stream, batch_size
        self.start_iter, self.is_wide = start_iter, is_wide

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.islice(self._batches(), self.start_iter, None)

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        waiting = defaultdict(list)
        numbers = itertools.count(self.stream.rank, self.stream.world_size)
        for number, image in zip(numbers, self.stream, strict=False):
            kind = self.is_wide and self.is_wide[image]
            waiting[kind].append((number, image))
            if len(waiting[kind]) == self.batch_size:
                yield waiting.pop(kind)


class _SeededImages(Dataset):
    """Images of records, each drawn with the seed of its sample."""

    def __init__(self, records: Sequence[dict], mapper: LongTailDatasetMapper, seed: int) -> None:
        # Kept as bytes, which worker processes share.
        self.records = DatasetFromList(records, copy=False)
        self.mapper, self.seed = mapper, seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, sample: tuple[int, int]) -> dict:
        number, image = sample
        with isolated_generators(step_seed(self.seed, number)):
            return self.mapper(self.records[image])
