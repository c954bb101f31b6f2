#!/usr/bin/env python
"""The loss of BAGS and the merging of its probabilities against one softmax over all classes.

All sides run in turn in one process on one thread, and the tables hold medians. Groups are those
of LVIS v1's training counts (for other numbers of classes, of as many quantiles of them). A quarter
of the RoIs is foreground, of classes drawn as often as they occur in training. Peak memory is what
a side adds to the process, measured in a fork of it (Linux).

The first table is of losses, forward and backward:
  softmax  Cross-entropy of one softmax over K + 1 classes.
  naive    BAGS group by group as one would write it down: look for the group's RoIs, draw "others"
           with numpy, and take the cross-entropy of the selected rows.
  here     group_softmax_loss.

The second is of probabilities: one softmax over K + 1 classes, merge_group_probs, and what of it
is inevitable, the permutation of the columns into the order of classes. Losses, gradients and
probabilities are compared with those of plain loops in float64.
"""

import argparse
import ctypes
import functools
import random
import statistics
import sys
import time

import numpy as np
import torch
from memory import added_memory
from tabulate import tabulate
from torch.autograd import grad
from torch.nn import functional as F

from bags_d2 import ClassGroups, group_softmax_loss, merge_group_probs
from bags_d2.data.lvis_v1 import lvis_v1_counts

BETA = 8.0
TOLERANCE = 1e-5  # of the greatest value

CLAIM = (1024, 1203)  # RoIs, classes
GRID = [(r, k) for k in (80, 1203, 5000, 10000) for r in (512, 1024, 2048)]

# What is promised for CLAIM, with room for other work on the machine
MOST_SOFTMAX_LOSSES = 1.3
LEAST_GAIN_ON_NAIVE = 1.4
MOST_SOFTMAXES = 4.5


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


def naive_loss(logits, labels, groups, rng=None, used=None):
    """Loss of each group (G + 1,); draws "others" unless the used RoIs (G + 1, R) are given."""
    is_foreground = labels < groups.num_classes
    losses = [F.cross_entropy(logits[:, :2], is_foreground.long())]
    group_of = torch.zeros_like(labels)
    group_of[is_foreground] = groups.class_to_group[labels[is_foreground]]
    for g, columns in enumerate(groups.group_slices[1:], 1):
        inside = (group_of == g).nonzero().flatten()
        if len(inside) == 0:
            losses.append(0 * logits[:, columns].sum())
            continue
        outside = (group_of != g).nonzero().flatten().numpy()
        if used is None:
            num_others = min(int(BETA * len(inside)), len(outside))
            others = rng.choice(outside, num_others, replace=False)
        else:
            others = outside[used[g, outside].numpy()]
        rows = torch.cat([inside, torch.from_numpy(others)])
        targets = torch.zeros_like(rows)
        targets[: len(inside)] = groups.class_to_slot[labels[inside]]
        losses.append(F.cross_entropy(logits[:, columns][rows], targets))
    return torch.stack(losses)


def naive_merge(logits, groups):
    """Class probabilities (R, K + 1), background last."""
    background, foreground = logits[:, :2].softmax(dim=1).split(1, dim=1)
    probs = logits.new_empty(len(logits), groups.num_classes + 1)
    for g, columns in enumerate(groups.group_slices[1:], 1):
        members = (groups.class_to_group == g).nonzero().flatten()
        probs[:, members] = logits[:, columns].softmax(dim=1)[:, 1:] * foreground
    probs[:, -1:] = background
    return probs


def agree(found, expected):
    return float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def losses_agree(groups, labels, logits):
    """Whether losses and gradients are those of the naive loop for the same RoIs."""
    losses, used = group_softmax_loss(logits, labels, groups, BETA, return_used=True)
    (gradient,) = grad(losses.sum(), logits)
    exact = logits.detach().double().requires_grad_()
    expected = naive_loss(exact, labels, groups, used=used)
    (expected_gradient,) = grad(expected.sum(), exact)
    return agree(losses, expected) and agree(gradient, expected_gradient)


def compare(sides, options, clear=lambda: None):
    """Median milliseconds and added MB of each side; ``clear`` drops what a side leaves behind."""
    memory = {side: added_memory(lambda run=run: (run(), clear())) for side, run in sides.items()}
    seconds = {side: [] for side in sides}
    for run in sides.values():
        run()
    for _ in range(options.repeats):
        # In another order each time, since a side's speed depends on what is left in the caches.
        for side in random.sample(list(sides), len(sides)):
            if sum(seconds[side]) < options.max_seconds:
                start = time.perf_counter()
                sides[side]()
                seconds[side].append(time.perf_counter() - start)
    return {side: 1e3 * statistics.median(times) for side, times in seconds.items()}, memory


def measure_loss(case, options):
    """One row of the table of losses."""
    groups, labels, grouped, plain = make_input(*case, options.seed)
    equal = losses_agree(groups, labels, grouped)
    rng = np.random.default_rng(options.seed)

    def clear():
        plain.grad = grouped.grad = None

    def step(loss):
        clear()
        loss().sum().backward()

    losses = {
        "softmax": lambda: F.cross_entropy(plain, labels),
        "naive": lambda: naive_loss(grouped, labels, groups, rng),
        "here": lambda: group_softmax_loss(grouped, labels, groups, BETA),
    }
    sides = {side: functools.partial(step, loss) for side, loss in losses.items()}
    milliseconds, memory = compare(sides, options, clear)
    return {
        "RoIs": case[0],
        "classes": case[1],
        **{f"{side} ms": value for side, value in milliseconds.items()},
        "here / softmax": milliseconds["here"] / milliseconds["softmax"],
        "naive / here": milliseconds["naive"] / milliseconds["here"],
        "equal": equal,
        **{f"{side} MB": value for side, value in memory.items()},
    }


@torch.no_grad()
def measure_merge(case, options):
    """One row of the table of probabilities."""
    groups, _, grouped, plain = make_input(*case, options.seed)
    equal = agree(merge_group_probs(grouped, groups), naive_merge(grouped.double(), groups))
    columns = F.pad(groups.class_to_column, (0, 1)).expand(len(grouped), -1)
    sides = {
        "softmax": lambda: plain.softmax(dim=1),
        "permutation": lambda: grouped.gather(1, columns),
        "here": lambda: merge_group_probs(grouped, groups),
    }
    milliseconds, memory = compare(sides, options)
    return {
        "RoIs": case[0],
        "classes": case[1],
        **{f"{side} ms": value for side, value in milliseconds.items()},
        "here / softmax": milliseconds["here"] / milliseconds["softmax"],
        "equal": equal,
        **{f"{side} MB": value for side, value in memory.items()},
    }


def as_text(row):
    formats = {"ms": ".2f", "MB": ".0f", "softmax": ".2f", "here": ".1f"}
    return [format(value, formats.get(key.split()[-1], "")) for key, value in row.items()]


def print_table(measure, cases, options):
    rows = []
    for case in cases:
        rows.append(measure(case, options))
        print(*as_text(rows[-1]), file=sys.stderr, flush=True)
    text = map(as_text, rows)
    print(tabulate(text, list(rows[0]), disable_numparse=True, tablefmt="github"), end="\n\n")
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=51, help="runs of each side (default 51)")
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=5,
        help="no more runs of a side after this (default 5)",
    )
    parser.add_argument("--claims-only", action="store_true", help="not the grid of sizes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(options.seed)
    # As in any process that has been training for a while, freed memory is kept for the next step
    # (M_TRIM_THRESHOLD is -1, M_MMAP_THRESHOLD -3, at most 32 MB); page faults would be timed else.
    libc = ctypes.CDLL(None)
    libc.mallopt(-1, 1 << 30)
    libc.mallopt(-3, 1 << 25)

    cases = [CLAIM] if options.claims_only else GRID
    losses = print_table(measure_loss, cases, options)
    merges = print_table(measure_merge, cases, options)
    if not all(row["equal"] for row in losses + merges):
        sys.exit("Results differ.")
    loss, merge = losses[cases.index(CLAIM)], merges[cases.index(CLAIM)]
    if (
        loss["here / softmax"] > MOST_SOFTMAX_LOSSES
        or loss["naive / here"] < LEAST_GAIN_ON_NAIVE
        or merge["here / softmax"] > MOST_SOFTMAXES
    ):
        sys.exit("A ratio is worse than what is promised.")


if __name__ == "__main__":
    main()
