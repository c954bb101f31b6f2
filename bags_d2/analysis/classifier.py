"""What a checkpoint's classifier looks like from outside. Shapes: K classes."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from ..checkpoint.files import read_checkpoint
from ..data.class_statistics import ClassStatistics
from ..errors import BagsError, ConfigError, DataError
from ..evaluation.bins import bin_index
from ..modeling.class_groups import ClassGroups
from ..utils.files import write_csv
from .grouping import bin_names
from .plots import plot_weight_norms

__all__ = [
    "class_weight_norms",
    "known_classes",
    "rank_correlation",
    "read_labelled_checkpoints",
    "remembered_counts",
    "write_weight_norms",
]

_PREDICTOR = "roi_heads.box_predictor."
_WEIGHT = "cls_score.weight"


def class_weight_norms(state_dict: Mapping[str, torch.Tensor], num_classes: int) -> torch.Tensor:
    """L2 norm (K,) of each foreground class's weight vector (the paper's Figure 1).

    Works on grouped classifiers, and on those whose first K rows are the classes: softmax (K + 1
    rows, background last), sigmoid (K) and Seesaw (K + 2). Learned scales (LWS) count. For a
    cascade, the mean over its stages.

    Args:
        state_dict: the "model" entry of a checkpoint.
        num_classes: K.

    Raises:
        DataError: if there is no box classifier in it, or it has another number of classes.
    """
    prefixes = [str(key).removesuffix(_WEIGHT) for key in state_dict if _is_of(key, _WEIGHT)]
    if not prefixes:
        raise DataError(f"The checkpoint has no '{_PREDICTOR}*{_WEIGHT}': not a box classifier.")
    with _as_data_error():
        stages = [_stage_norms(state_dict, prefix, num_classes) for prefix in prefixes]
        return torch.stack(stages).mean(dim=0)


def remembered_counts(checkpoint: Mapping) -> list[int] | None:
    """The training counts (K) that a checkpoint (its whole content) carries, if any."""
    with _as_data_error():
        counts = (checkpoint.get("classes") or {}).get("training_instances")
        if counts is None:
            buffers = (v for k, v in checkpoint["model"].items() if _is_of(k, ".class_counts"))
            counts = next(buffers, ())
        counts = torch.as_tensor(counts, dtype=torch.long).tolist()
        return counts if counts and min(counts) >= 0 else None


def read_labelled_checkpoints(arguments: Sequence[str]) -> dict[str, dict]:
    """Checkpoints by label, from "LABEL=PATH" or "PATH" (else ConfigError for repeated labels)."""
    checkpoints = {}
    for argument in arguments:
        label, _, path = argument.rpartition("=")
        label = label or "/".join(Path(path).parts[-2:])
        if label in checkpoints:
            raise ConfigError(f"--checkpoint: two are named '{label}'; write LABEL=PATH.")
        checkpoints[label] = read_checkpoint(path)
    return checkpoints


def known_classes(
    checkpoints: Iterable[Mapping], counts: Sequence[int] | None = None
) -> ClassStatistics:
    """Names that a checkpoint carries, if any does; and training counts, unless they are given.

    Raises:
        ConfigError: if no checkpoint has counts.
    """
    checkpoints = list(checkpoints)
    names = (ClassStatistics.from_checkpoint(c).names for c in checkpoints)
    if counts is None:
        counts = next(filter(None, map(remembered_counts, checkpoints)), None)
    if counts is None:
        raise ConfigError(
            "No checkpoint has training counts; add --config-file (its training set is counted) "
            "or --counts."
        )
    return ClassStatistics(next(filter(None, names), None), tuple(counts))


def write_weight_norms(
    checkpoints: Mapping[str, Mapping],
    classes: ClassStatistics,
    thresholds: Sequence[int],
    output: Path,
) -> str:
    """Write ``weight_norms.png`` and ``.csv`` to a folder; a table of the classifiers as text.

    Args:
        checkpoints: contents of checkpoints, by label.
        classes: training counts, and names where known.
        thresholds: edges of bins of counts.
        output: the folder.
    """
    counts, names = classes.training_instances, classes.names
    norms = {
        label: class_weight_norms(checkpoint["model"], len(counts)).tolist()
        for label, checkpoint in checkpoints.items()
    }
    title = "Classifier weight of each class"
    plot_weight_norms(norms, counts, output / "weight_norms.png", thresholds, title)
    groups = [bin_names(thresholds)[g] for g in bin_index(counts, thresholds)]
    names = names or [f"class {i}" for i in range(len(counts))]
    columns = (range(len(counts)), names, counts, groups, *norms.values())
    header = ("class", "name", "training_instances", "group", *norms)
    write_csv(output / "weight_norms.csv", header, zip(*columns, strict=True))
    rows = [
        (label, rank_correlation(counts, values), max(values) / max(min(values), 1e-12))
        for label, values in norms.items()
    ]
    headers = ("", "rank correlation with count", "largest / smallest norm")
    return tabulate(rows, headers, floatfmt=".2f")


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: Pearson's correlation of the ranks, ties sharing their mean rank.

    NaN if all of x or all of y are equal.
    """
    ranks = []
    for values in (x, y):
        _, inverse, sizes = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        ranks.append((sizes.cumsum() - (sizes - 1) / 2)[inverse])
    if np.ptp(ranks, axis=1).min() == 0:
        return float("nan")
    return float(np.corrcoef(ranks)[0, 1])


def _is_of(key: Any, suffix: str) -> bool:
    return isinstance(key, str) and key.startswith(_PREDICTOR) and key.endswith(suffix)


@contextlib.contextmanager
def _as_data_error() -> Iterator[None]:
    """Whatever reading tensors of unknown shapes and types raises means a damaged checkpoint."""
    try:
        yield
    except BagsError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"The checkpoint's box classifier is damaged ({error!r:.200}).") from None


def _stage_norms(
    state_dict: Mapping[str, torch.Tensor], prefix: str, num_classes: int
) -> torch.Tensor:
    def tensor(key: str) -> torch.Tensor:
        return torch.as_tensor(state_dict[prefix + key])

    norms = tensor(_WEIGHT).float().norm(dim=1)
    if prefix + "scale" in state_dict:
        norms = norms * tensor("scale").float().abs()
    if prefix + "groups.class_to_group" in state_dict:
        keys = ("class_to_group", "class_counts", "thresholds")
        *buffers, thresholds = (tensor(f"groups.{key}") for key in keys)
        norms = norms[ClassGroups(*buffers, thresholds.tolist()).class_to_column]
        if len(norms) != num_classes:
            raise DataError(
                f"'{prefix}{_WEIGHT}' is of {len(norms)} classes, but {num_classes} were expected."
            )
    elif not num_classes <= len(norms) <= num_classes + 2:
        raise DataError(
            f"'{prefix}{_WEIGHT}' has {len(norms)} rows, which is no classifier of {num_classes} "
            "classes."
        )
    return norms[:num_classes]
