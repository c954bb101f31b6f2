"""Whether class groups suit a data set: what they hold, what is odd, and which edges would suit.

Shapes: K classes, G groups; ``thresholds`` are the G - 1 edges of half-open bins of counts.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tabulate import tabulate

from ..evaluation.bins import DEFAULT_COUNT_THRESHOLDS, bin_index

__all__ = [
    "GroupSummary",
    "bin_names",
    "choose_thresholds",
    "describe_groups",
    "grouping_faults",
    "propose_thresholds",
    "summarize_groups",
]

# Of all classes in one group: above this share grouping hardly changes anything.
_TOO_LARGE_A_SHARE = 0.9
_SHOWN = 8  # classes listed of a kind


@dataclass(frozen=True)
class GroupSummary:
    """One group."""

    name: str  # its range of counts, such as "10-99"
    classes: tuple[int, ...]  # positions of its classes, in ascending order of count
    instances: int  # training instances of all its classes
    share: float  # of all training instances, 0..1


def bin_names(thresholds: Sequence[int]) -> list[str]:
    """The ranges of counts in words: (10, 100) gives "0-9", "10-99" and "100+"."""
    edges = [0, *thresholds]
    ranges = [f"{a}-{b - 1}" if b - 1 > a else f"{a}" for a, b in itertools.pairwise(edges)]
    return [*ranges, f"{edges[-1]}+"]


def summarize_groups(counts: Sequence[int], thresholds: Sequence[int]) -> list[GroupSummary]:
    """What each of the G groups of K classes holds.

    Raises:
        ConfigError: if the thresholds do not ascend.
        DataError: if a count is negative.
    """
    counts = np.asarray(counts)
    groups = bin_index(counts, thresholds)
    order = np.argsort(counts, kind="stable")
    summaries = []
    for g, name in enumerate(bin_names(thresholds)):
        classes = order[groups[order] == g]
        total = int(counts[classes].sum())
        share = total / max(int(counts.sum()), 1)
        summaries.append(GroupSummary(name, tuple(classes.tolist()), total, share))
    return summaries


def grouping_faults(counts: Sequence[int], thresholds: Sequence[int]) -> list[str]:
    """What makes little sense about a grouping, one sentence each; [] if nothing."""
    faults = []
    for group in summarize_groups(counts, thresholds):
        size, has = len(group.classes), f"{group.name} instances"
        if size == 0:
            faults.append(f"No class has {has}: the group is empty and does nothing.")
        elif size == 1 and len(counts) > 1:
            faults.append(f"One class alone has {has}: it competes with no class of its frequency.")
        if thresholds and size > _TOO_LARGE_A_SHARE * len(counts):
            faults.append(
                f"{size} of {len(counts)} classes have {has}: within their group they compete as "
                "in a plain softmax."
            )
    return faults


def propose_thresholds(counts: Sequence[int], max_groups: int = 4) -> tuple[int, ...]:
    """Edges at round numbers that put classes of similar frequency together.

    Powers of ten, or, where these leave all classes in one group though their counts differ more
    than threefold, the series 1, 2, 5, 10, ...; then the smallest group is merged with its smaller
    neighbour until every group has two classes and there are at most ``max_groups``.

    Returns:
        Edges in ascending order; () if one group is best.
    """
    counts = np.asarray(counts)
    known = counts[counts > 0]
    if len(known) == 0:
        return ()
    rarest, most = int(known.min()), int(known.max())
    for steps in ((1,), (1, 2, 5)):
        series = [step * 10**exponent for exponent in range(len(str(most))) for step in steps]
        edges = [edge for edge in series if rarest < edge <= most]
        edges = _merge_small_groups(counts, edges, max_groups)
        if edges or most <= 3 * rarest:
            break
    return tuple(edges)


def choose_thresholds(counts: Sequence[int]) -> tuple[int, ...]:
    """The paper's edges 10, 100 and 1000 where nothing is odd about them, else those proposed."""
    faults = grouping_faults(counts, DEFAULT_COUNT_THRESHOLDS)
    return propose_thresholds(counts) if faults else DEFAULT_COUNT_THRESHOLDS


def describe_groups(
    counts: Sequence[int], names: Sequence[str], thresholds: Sequence[int], by: str = "instances"
) -> str:
    """All of the above as text; ``by`` says what was counted, "instances" or "images"."""
    groups = summarize_groups(counts, thresholds)
    rows = [
        (i, g.name, len(g.classes), g.instances, f"{g.share:.1%}")
        for i, g in enumerate(groups, start=1)
    ]
    headers = ("group", f"training {by}", "classes", by, "share")
    parts = [tabulate(rows, headers, intfmt=",")]

    filled = [g for g in groups if g.classes]
    boundaries = [
        f"  {names[a.classes[-1]]} ({counts[a.classes[-1]]:,}) | "
        f"{names[b.classes[0]]} ({counts[b.classes[0]]:,})"
        for a, b in itertools.pairwise(filled)
    ]
    if boundaries:
        parts.append("At the edges (largest of a group | smallest of the next):")
        parts += boundaries
    empty = [n for n, c in zip(names, counts, strict=True) if c == 0]
    if empty:
        more = f", and {len(empty) - _SHOWN} more" if len(empty) > _SHOWN else ""
        have = "class has" if len(empty) == 1 else "classes have"
        parts.append(
            f"{len(empty)} {have} none and cannot be learned: {', '.join(empty[:_SHOWN])}{more}"
        )
    faults = grouping_faults(counts, thresholds)
    parts += [f"Warning: {fault}" for fault in faults]
    proposed = propose_thresholds(counts)
    if faults and proposed != tuple(thresholds):
        sizes = [len(g.classes) for g in summarize_groups(counts, proposed)]
        parts.append(
            f"Proposed: MODEL.BAGS.GROUP_THRESHOLDS {str(proposed)!r}  "
            f"(groups of {', '.join(map(str, sizes))} classes)"
        )
    return "\n".join(parts)


def _merge_small_groups(counts: np.ndarray, edges: list[int], max_groups: int) -> list[int]:
    while edges:
        sizes = np.bincount(np.searchsorted(edges, counts, side="right"), minlength=len(edges) + 1)
        smallest = int(sizes.argmin())
        if sizes[smallest] >= 2 and len(sizes) <= max_groups:
            break
        # Edge i separates the groups i and i + 1.
        neighbours = [i for i in (smallest - 1, smallest) if 0 <= i < len(edges)]
        drop = min(neighbours, key=lambda i: sizes[i] + sizes[i + 1])
        edges = edges[:drop] + edges[drop + 1 :]
    return edges
