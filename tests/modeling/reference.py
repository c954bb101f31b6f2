"""Balanced Group Softmax one RoI and one group at a time, in plain Python.

Written from the description of the method alone, to be compared with and not to be fast. Classes
are 0..K-1 and background is K; numbers are Python floats.
"""

import itertools
import math


def make_groups(counts, thresholds):
    """Foreground groups as lists of class ids, by half-open bins of the training count."""
    bounds = [0, *thresholds, math.inf]
    groups = []
    for low, high in itertools.pairwise(bounds):
        groups.append([c for c, count in enumerate(counts) if low <= count < high])
    return groups


def make_columns(groups):
    """What every logit stands for: ("background",), ("foreground",), ("others", g), ("class", c)"""
    columns = [("background",), ("foreground",)]
    for g, members in enumerate(groups, 1):
        columns.append(("others", g))
        columns.extend(("class", c) for c in members)
    return columns


def softmax(values):
    top = max(values)
    exponentials = [math.exp(v - top) for v in values]
    total = sum(exponentials)
    return [e / total for e in exponentials]


def cross_entropy(values, target):
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values)) - values[target]


def group_columns(columns, groups, g):
    """Positions of the logits of group g, group 0 included, in the order of its slots."""
    if g == 0:
        return [columns.index(("background",)), columns.index(("foreground",))]
    return [columns.index(("others", g)), *(columns.index(("class", c)) for c in groups[g - 1])]


def target_slot(label, groups, g, num_classes):
    if g == 0:
        return 0 if label == num_classes else 1
    members = groups[g - 1]
    return 1 + members.index(label) if label in members else 0


def in_group(label, groups, g):
    return label in groups[g - 1]


def num_others(labels, groups, g, beta):
    """How many "others" a foreground group is to draw."""
    inside = sum(in_group(label, groups, g) for label in labels)
    available = len(labels) - inside
    if inside == 0:
        return 0
    return available if math.isinf(beta) else min(int(beta * inside), available)


def used_without_sampling(labels, groups, beta):
    """Which RoIs each group uses where nothing is left to chance: beta 0 or infinite."""
    used = [[True] * len(labels)]
    for g in range(1, len(groups) + 1):
        inside = [in_group(label, groups, g) for label in labels]
        keep_others = any(inside) and beta != 0
        used.append([i or keep_others for i in inside])
    return used


def loss_and_gradient(logits, labels, counts, thresholds, used, group_weights):
    """Loss of each group, and the gradient of their weighted sum.

    Args:
        logits: R rows of C floats.
        labels: R labels.
        counts: K training counts.
        thresholds: edges of the groups.
        used: G + 1 rows of R booleans, the RoIs that take part in each group.
        group_weights: G + 1 weights for the gradient.

    Returns:
        G + 1 losses, and R rows of C gradients.
    """
    num_classes = len(counts)
    groups = make_groups(counts, thresholds)
    columns = make_columns(groups)
    losses = []
    gradient = [[0.0] * len(columns) for _ in logits]
    for g in range(len(groups) + 1):
        positions = group_columns(columns, groups, g)
        num_used = max(sum(used[g]), 1)
        loss = 0.0
        for r, (row, label) in enumerate(zip(logits, labels, strict=True)):
            if not used[g][r]:
                continue
            values = [row[p] for p in positions]
            target = target_slot(label, groups, g, num_classes)
            loss += cross_entropy(values, target) / num_used
            for slot, (position, prob) in enumerate(zip(positions, softmax(values), strict=True)):
                step = (prob - (slot == target)) / num_used
                gradient[r][position] += group_weights[g] * step
        losses.append(loss)
    return losses, gradient


def merge(logits, counts, thresholds):
    """R rows of K + 1 probabilities, background last."""
    groups = make_groups(counts, thresholds)
    columns = make_columns(groups)
    merged = []
    for row in logits:
        background, foreground = softmax([row[p] for p in group_columns(columns, groups, 0)])
        probs = [0.0] * len(counts)
        for g, members in enumerate(groups, 1):
            of_group = softmax([row[p] for p in group_columns(columns, groups, g)])
            for slot, c in enumerate(members, 1):
                probs[c] = of_group[slot] * foreground
        merged.append([*probs, background])
    return merged


def merge_joint(logits, counts, thresholds):
    """R rows of K + 1 probabilities: one softmax over all classes, relative to "others"."""
    groups = make_groups(counts, thresholds)
    columns = make_columns(groups)
    merged = []
    for row in logits:
        background, foreground = softmax([row[p] for p in group_columns(columns, groups, 0)])
        margins = [0.0] * len(counts)
        for g, members in enumerate(groups, 1):
            others, *own = [row[p] for p in group_columns(columns, groups, g)]
            for c, value in zip(members, own, strict=True):
                margins[c] = value - others
        _, *probs = softmax([0.0, *margins])  # the first is "none of the classes"
        merged.append([*(p * foreground for p in probs), background])
    return merged
