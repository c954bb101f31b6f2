"""Charts, in the colour-blind-safe palette of Okabe and Ito."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ..evaluation.bins import bin_index
from .groups import bin_names

__all__ = [
    "BIN_COLORS",
    "COLORS",
    "plot_ap_bins",
    "plot_class_ap_change",
    "plot_class_counts",
    "plot_losses",
    "plot_methods",
    "plot_weight_norms",
    "plot_winning_groups",
]

COLORS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#0072B2", "#D55E00")
# Of groups by training count: the rarer, the warmer.
BIN_COLORS = (
    "#D55E00",
    "#E69F00",
    "#009E73",
    "#0072B2",
    "#CC79A7",
    "#56B4E9",
    "#999999",
    "#000000",
)


def plot_ap_bins(
    metrics: Mapping[str, Mapping[str, float]],
    path: str | Path,
    thresholds: Sequence[int] = (10, 100, 1000),
    title: str = "",
) -> None:
    """Bars of AP in each bin of training instances, one colour for each method.

    Args:
        metrics: for each method its measures in percent, with AP1, AP2, ..., bAP.
        path: the picture to write; its suffix gives the format.
        thresholds: edges of the bins.
        title: heading of the chart.
    """
    labels = bin_names(thresholds)
    keys = [*(f"AP{i + 1}" for i in range(len(labels))), "bAP"]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(metrics)
    # A gap before bAP: it is the mean of the bars to its left, not a further bin.
    centers = np.array([*range(len(labels)), len(labels) + 0.4])
    for i, (name, measured) in enumerate(metrics.items()):
        offset = (i - (len(metrics) - 1) / 2) * width
        heights = [measured.get(key) or 0.0 for key in keys]
        bars = axes.bar(centers + offset, heights, width * 0.94, label=name, color=_color(i))
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=1)
    axes.set_xticks(centers, [*labels, "mean of the\nbins (bAP)"])
    axes.set_xlabel("training instances of a class")
    axes.set_ylabel("box AP (%)")
    _finish(axes, title)
    figure.savefig(path, dpi=150)


def plot_weight_norms(
    norms: Mapping[str, Sequence[float]],
    counts: Sequence[int],
    path: str | Path,
    thresholds: Sequence[int] = (10, 100, 1000),
    title: str = "",
) -> None:
    """Classifier weight norm of each class against its training count.

    Args:
        norms: for each method K norms.
        counts: K training instances.
        path: the picture to write.
        thresholds: edges of the bins, drawn as lines.
        title: heading of the chart.
    """
    counts = np.asarray(counts)
    order = np.argsort(counts, kind="stable")
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    markers = "os^Dvp"
    for i, (name, values) in enumerate(norms.items()):
        values = np.asarray(values)
        axes.plot(
            np.maximum(counts[order], 1),
            values[order],
            markers[i % len(markers)],
            color=_color(i),
            markersize=5,
            label=f"{name} (largest / smallest = {values.max() / max(values.min(), 1e-9):.1f})",
        )
    for edge in thresholds:
        axes.axvline(edge, color="0.8", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("training instances of a class (grey lines: edges of the groups)")
    axes.set_ylabel("L2 norm of the class's weights")
    _finish(axes, title)
    figure.savefig(path, dpi=150)


def plot_class_counts(
    counts: Sequence[int], thresholds: Sequence[int], path: str | Path, by: str = "instances"
) -> None:
    """Training count of every class, from the most frequent on, coloured by group.

    Args:
        counts: K counts.
        thresholds: edges of the groups.
        path: the picture to write.
        by: what is counted, for the axis.
    """
    counts = np.sort(np.asarray(counts))[::-1]
    groups = bin_index(counts, thresholds)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    # Classes without any have no place on a logarithmic axis: they are drawn below 1, named "0".
    floor = 0.5
    axes.bar(
        range(len(counts)),
        np.maximum(counts, floor * 1.3) - floor,
        width=1.0,
        bottom=floor,
        color=[BIN_COLORS[g % len(BIN_COLORS)] for g in groups],
    )
    handles = [
        Patch(
            color=BIN_COLORS[g % len(BIN_COLORS)],
            label=f"{name}: {n} {'class' if n == 1 else 'classes'}",
        )
        for g, name in enumerate(bin_names(thresholds))
        for n in [(groups == g).sum()]
    ]
    for edge in thresholds:
        axes.axhline(edge, color="0.6", linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.set_ylim(floor, max(counts.max(), 1) * 2)
    axes.set_xlim(-0.5, len(counts) - 0.5)
    decades = [10**i for i in range(len(str(counts.max())))]
    zero = [floor * 1.15] if counts.min() == 0 else []
    axes.set_yticks([*zero, *decades], [*("0" for _ in zero), *(f"{d:,}" for d in decades)])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("classes, from the most frequent to the rarest")
    axes.set_ylabel(f"training {by} (log scale)")
    _finish(axes, f"{len(counts):,} classes in groups by training {by}", handles=handles[::-1])
    figure.savefig(path, dpi=150)


def plot_class_ap_change(
    counts: Sequence[int],
    before: Sequence[float],
    after: Sequence[float],
    labels: tuple[str, str],
    path: str | Path,
    thresholds: Sequence[int] = (10, 100, 1000),
) -> None:
    """How AP of each class changes between two runs, against its training count.

    Args:
        counts: K training instances.
        before: K APs in percent, NaN where a class is not evaluated.
        after: likewise, of the other run.
        labels: names of the two runs.
        path: the picture to write.
        thresholds: edges of the bins whose mean change is drawn.
    """
    counts, change = np.asarray(counts), np.asarray(after) - np.asarray(before)
    known = ~np.isnan(change)
    counts, change = counts[known], change[known]
    position = np.maximum(counts, 0.5)
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for sign, color, what in ((1, "#0072B2", "better"), (-1, "#D55E00", "worse")):
        chosen = np.sign(change) == sign
        axes.vlines(position[chosen], 0, change[chosen], color=color, linewidth=1, alpha=0.5)
        axes.plot(
            position[chosen], change[chosen], "o" if sign > 0 else "v", color=color, markersize=4,
            label=f"{what} with {labels[1]} ({chosen.sum()} classes)",
        )  # fmt: skip
    axes.axhline(0, color="0.4", linewidth=0.8)
    bounds = [
        0.4,
        *thresholds,
        max(position.max(initial=1.0), thresholds[-1] if thresholds else 1) * 2,
    ]
    bins = bin_index(counts, thresholds)
    for i in range(len(bounds) - 1):
        if not (bins == i).any():
            continue
        mean = change[bins == i].mean()
        axes.hlines(mean, bounds[i] * 1.05, bounds[i + 1] / 1.05, color="black", linewidth=2.5,
                    label="mean of the bin" if i == bins.min() else None)  # fmt: skip
        axes.annotate(
            f"{mean:+.1f}",
            (np.sqrt(bounds[i] * bounds[i + 1]), mean),
            xytext=(0, 5 if mean >= 0 else -14),
            textcoords="offset points",
            ha="center",
            fontsize=10,
            fontweight="bold",
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.8},
        )
    for edge in thresholds:
        axes.axvline(edge, color="0.85", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set_xlabel("training instances of a class (grey lines: edges of the bins)")
    axes.set_ylabel(f"AP({labels[1]}) - AP({labels[0]}), points")
    _finish(axes, f"AP of each class: {labels[0]} to {labels[1]}")
    figure.savefig(path, dpi=150)


def plot_winning_groups(
    matrices: Mapping[str, np.ndarray], thresholds: Sequence[int], path: str | Path
) -> None:
    """Which group won where an object is, as a heat map for each run.

    Args:
        matrices: for each run counts (G, G + 2) of objects: rows are the object's group; columns
            the right class, a wrong class of each group, nothing.
        thresholds: edges of the groups.
        path: the picture to write.
    """
    names = bin_names(thresholds)
    columns = ["right\nclass", *(f"wrong,\n{name}" for name in names), "missed"]
    figure = Figure(
        figsize=(1.2 + 4.4 * len(matrices), 1.9 + 0.55 * len(names)), layout="constrained"
    )
    grid = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axes, (label, matrix) in zip(grid, matrices.items(), strict=True):
        totals = matrix.sum(axis=1)
        share = matrix / np.maximum(totals, 1)[:, None]
        picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(share):
            if totals[i]:
                color = "white" if value > 0.55 else "black"
                axes.text(j, i, f"{value:.0%}", ha="center", va="center", color=color, fontsize=9)
        axes.set_xticks(range(len(columns)), columns, fontsize=8)
        axes.set_yticks(
            range(len(names)),
            [f"{n}\n({t:,} objects)" for n, t in zip(names, totals, strict=True)],
            fontsize=8,
        )
        axes.tick_params(length=0)
        axes.set_title(label, fontsize=11)
        axes.spines[:].set_visible(False)
    grid[0].set_ylabel("object's class, by training instances", fontsize=9)
    figure.supxlabel("what scores highest where the object is (IoU of at least 0.5)", fontsize=9)
    figure.colorbar(picture, ax=grid, label="share of the objects", shrink=0.9)
    figure.savefig(path, dpi=150)


def plot_losses(
    histories: Mapping[str, Mapping[str, Mapping[int, float]]], path: str | Path
) -> None:
    """Losses over the iterations, a panel for each loss and a line for each run.

    Args:
        histories: for each run, for each loss its value by iteration; nothing for a run that
            logged none.
        path: the picture to write.
    """
    names = sorted({name for history in histories.values() for name in history})
    names.sort(key=lambda name: (name.startswith("bags/"), name != "total_loss"))
    rows = -(-len(names) // 3)
    figure = Figure(figsize=(12, 0.6 + 2.4 * rows), layout="constrained")
    panels = figure.subplots(rows, 3, squeeze=False).flat
    for axes, name in zip(panels, names, strict=False):
        for i, (label, history) in enumerate(histories.items()):
            if name in history:
                iterations, values = zip(*sorted(history[name].items()), strict=True)
                axes.plot(iterations, _running_median(values), color=_color(i), label=label)
        axes.set_title(name, fontsize=10)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("iteration", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(panels):
        axes.set_visible(False)
    handles = [
        Line2D([], [], color=_color(i), label=label)
        for i, (label, history) in enumerate(histories.items())
        if history
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def plot_methods(rows: Sequence[Mapping], path: str | Path, title: str, label: str) -> None:
    """AP of each bin of training instances, and their mean, with one line for each method.

    Args:
        rows: for each method, from top to bottom, "method", "trained" and {"mean", "std"} of AP1,
            AP2, ... and bAP.
        path: the picture to write.
        title: heading of the chart.
        label: of the AP axis.
    """
    bins = sorted(key for key in rows[0] if key.startswith("AP") and key[2:] in set("123456789"))
    series = [*zip(bins, COLORS, "os^D", strict=False), ("bAP", "black", "|")]
    figure = Figure(figsize=(8, 1.6 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    lines = np.arange(len(rows))
    for key, color, marker in series:
        means = [row[key]["mean"] if row[key]["mean"] is not None else np.nan for row in rows]
        spreads = [row[key]["std"] or 0.0 for row in rows]
        size = 14 if key == "bAP" else 6
        axes.errorbar(
            means, lines, xerr=spreads, fmt=marker, color=color, markersize=size, label=key
        )
    axes.set_yticks(lines, [f"{row['method']}  ({row['trained']})" for row in rows], fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"{label}; bars: standard deviation over seeds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=11)
    figure.legend(loc="outside lower center", ncols=len(series), frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def _running_median(values: Sequence[float], share: float = 0.05) -> np.ndarray:
    """Median of each value's neighbourhood, a share of the whole wide."""
    half = max(int(len(values) * share / 2), 1)
    return np.array(
        [np.median(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))]
    )


def _color(i: int) -> str:
    return COLORS[i % len(COLORS)]


def _finish(axes, title: str, **legend) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=11)
    axes.legend(frameon=False, fontsize=9, **legend)
