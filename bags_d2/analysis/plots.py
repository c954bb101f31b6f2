"""Charts, in the colour-blind-safe palette of Okabe and Ito."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

__all__ = ["COLORS", "plot_ap_bins", "plot_methods", "plot_weight_norms"]

COLORS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#0072B2", "#D55E00")


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
    edges = [0, *thresholds]
    labels = [f"{a}-{b - 1}" for a, b in zip(edges, thresholds, strict=False)]
    labels = [*labels, f"{edges[-1]}+"]
    keys = [*(f"AP{i + 1}" for i in range(len(edges))), "bAP"]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(metrics)
    # A gap before bAP: it is the mean of the bars to its left, not a further bin.
    centers = np.array([*range(len(edges)), len(edges) + 0.4])
    for i, (name, measured) in enumerate(metrics.items()):
        offset = (i - (len(metrics) - 1) / 2) * width
        heights = [measured.get(key) or 0.0 for key in keys]
        bars = axes.bar(centers + offset, heights, width * 0.94, label=name, color=COLORS[i])
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
            markers[i],
            color=COLORS[i],
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


def _finish(axes, title: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=11)
    axes.legend(frameon=False, fontsize=9)
