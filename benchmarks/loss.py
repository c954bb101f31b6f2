#!/usr/bin/env python
"""The loss of BAGS and the merging of its probabilities against one softmax over all classes.

All sides run in turn in one process on one thread, and the tables hold medians. Groups are those
of LVIS v1's training counts (for other numbers of classes, of as many quantiles of them). A quarter
of the RoIs is foreground, of classes drawn as often as they occur in training.

The first table is of losses, forward and backward: cross-entropy of one softmax over K + 1 classes
against group_softmax_loss. The second is of probabilities: one softmax over K + 1 classes against
merge_group_probs, by either merge, and what of it is inevitable, the permutation of the columns
into the order of classes.
"""

import argparse
import ctypes
import random
import statistics
import sys
import time

import torch
from tabulate import tabulate
from torch.nn import functional as F

from bags_d2 import ClassGroups, group_softmax_loss, merge_group_probs
from bags_d2.data.lvis_v1 import lvis_v1_counts

CLAIM = (1024, 1203)  # RoIs, classes
GRID = [(r, k) for k in (80, 1203, 5000, 10000) for r in (512, 1024, 2048)]
MAX_LOSS_RATIO = 3.0  # to cross-entropy, promised for CLAIM


def make_input(num_rois, num_classes, seed):
    """Groups, labels (R,), grouped logits (R, C) and logits of one softmax (R, K + 1)."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(sorted(lvis_v1_counts()["instance_count"]))
    counts = counts[torch.arange(num_classes) * len(counts) // num_classes]
    counts = counts[torch.randperm(num_classes, generator=generator)]
    groups = ClassGroups.from_counts(counts)
    labels = torch.full((num_rois,), num_classes)
    foreground = torch.randperm(num_rois, generator=generator)[: num_rois // 4]
    labels[foreground] = torch.multinomial(
        counts.double(), len(foreground), replacement=True, generator=generator
    )
    grouped = 3 * torch.randn(num_rois, groups.num_logits, generator=generator)
    plain = 3 * torch.randn(num_rois, num_classes + 1, generator=generator)
    return groups, labels, grouped.requires_grad_(), plain.requires_grad_()


def measure(case, sides, options):
    """One row of a table: median milliseconds of each side, and ratios to the first."""
    seconds = {side: [] for side in sides}
    for run in sides.values():
        run()
    for _ in range(options.repeats):
        # In another order each time, since a side's speed depends on what is left in the caches.
        for side in random.sample(list(sides), len(sides)):
            start = time.perf_counter()
            sides[side]()
            seconds[side].append(time.perf_counter() - start)
    median = {side: 1e3 * statistics.median(times) for side, times in seconds.items()}
    first, *others = median
    return {
        "RoIs": case[0],
        "classes": case[1],
        **{f"{side} ms": value for side, value in median.items()},
        **{f"{side} / {first}": median[side] / median[first] for side in others},
    }


def measure_loss(case, options):
    groups, labels, grouped, plain = make_input(*case, options.seed)

    def softmax():
        plain.grad = None
        F.cross_entropy(plain, labels).backward()

    def bags():
        grouped.grad = None
        group_softmax_loss(grouped, labels, groups).sum().backward()

    return measure(case, {"softmax": softmax, "BAGS": bags}, options)


@torch.no_grad()
def measure_merge(case, options):
    groups, _, grouped, plain = make_input(*case, options.seed)
    sides = {
        "softmax": lambda: plain.softmax(dim=1),
        "permutation": lambda: grouped.index_select(1, groups.output_columns),
        "paper": lambda: merge_group_probs(grouped, groups, "paper"),
        "joint": lambda: merge_group_probs(grouped, groups, "joint"),
    }
    return measure(case, sides, options)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=51, help="runs of each side (default 51)")
    parser.add_argument("--claims-only", action="store_true", help="not the grid of sizes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(options.seed)
    # As in any process that has been training for a while, freed memory is kept for the next step
    # (M_TRIM_THRESHOLD is -1, M_MMAP_THRESHOLD -3, at most 32 MB); otherwise page faults would be
    # timed.
    libc = ctypes.CDLL(None)
    libc.mallopt(-1, 1 << 30)
    libc.mallopt(-3, 1 << 25)

    cases = [CLAIM] if options.claims_only else GRID
    for measure_case in (measure_loss, measure_merge):
        rows = [measure_case(case, options) for case in cases]
        print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f"), end="\n\n")
        if rows[cases.index(CLAIM)].get("BAGS / softmax", 0) > MAX_LOSS_RATIO:
            sys.exit("The loss costs more than is promised.")


if __name__ == "__main__":
    main()
