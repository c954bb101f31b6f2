"""Charts. Each is written whole or not at all; texts are drawn as they are.

Shapes: K classes, G groups. ``path`` is the picture to write (its suffix gives the format), and
``thresholds`` are the edges of the bins of training instances.
"""

import contextlib
import io
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..errors import ConfigError
from ..evaluation.bins import DEFAULT_COUNT_THRESHOLDS, bin_index
from ..utils.files import write_atomically
from ..utils.text import printable
from .grouping import bin_names
from .palette import RIGHT, WRONG, bin_color, run_color

__all__ = [
    "plot_ap_bins",
    "plot_class_ap_change",
    "plot_class_counts",
    "plot_losses",
    "plot_methods",
    "plot_weight_norms",
    "plot_winning_groups",
]

_FORMATS = (".pdf", ".png", ".svg")
_NONE = 0.5  # where a count of 0 is on a logarithmic axis
_SHOWN_POINTS = 1000  # of a loss curve
_SHOWN_LOSSES = 48


def plot_ap_bins(
    metrics: Mapping[str, Mapping[str, float | None]],
    path: str | Path,
    thresholds: Sequence[int] = DEFAULT_COUNT_THRESHOLDS,
    title: str = "",
    task: str = "bbox",
) -> None:
    """Bars of AP in each bin of training instances, one colour for each method.

    Args:
        metrics: AP1, AP2, ..., bAP of each method in percent; None is drawn as "-".
    """
    labels = bin_names(thresholds)
    keys = [*(f"AP{i + 1}" for i in range(len(labels))), "bAP"]
    # A gap before bAP: it is the mean of the bars to its left, not a further bin.
    centers = np.array([*range(len(labels)), len(labels) + 0.4])
    width = 0.8 / len(metrics)
    with _chart(path, title, "training instances of a class", _ap_label(task)) as axes:
        for i, (name, measured) in enumerate(metrics.items()):
            values = [measured.get(key) for key in keys]
            x, heights = centers + (i - (len(metrics) - 1) / 2) * width, [v or 0.0 for v in values]
            bars = axes.bar(x, heights, width * 0.94, color=run_color(i), label=_label(name))
            texts = ["-" if v is None else f"{v:.1f}" for v in values]
            axes.bar_label(bars, texts, fontsize=min(8, 40 * width), padding=1)
        axes.set_xticks(centers, [*labels, "mean of the\nbins (bAP)"])


def plot_weight_norms(
    norms: Mapping[str, Sequence[float]],
    counts: Sequence[int],
    path: str | Path,
    thresholds: Sequence[int] = DEFAULT_COUNT_THRESHOLDS,
    title: str = "",
) -> None:
    """Classifier weight norm of each class (K for each method) against its training count (K)."""
    with _chart(path, title, ylabel="L2 norm of the class's weights") as axes:
        for i, (name, values) in enumerate(norms.items()):
            values = np.asarray(values)
            ratio = values.max() / max(values.min(), 1e-9)
            label = f"{_label(name)} (largest / smallest = {ratio:.1f})"
            style = {"marker": "os^Dvp"[i % 6], "markersize": 5 if len(values) < 200 else 3}
            x = np.maximum(counts, _NONE)
            axes.plot(x, values, color=run_color(i), linestyle="", alpha=0.8, label=label, **style)
        _class_axis(axes, counts, thresholds)
        # Room for the legend above the points.
        axes.set_ylim(0, axes.get_ylim()[1] * (1 + 0.08 * len(norms)))


def plot_class_counts(
    counts: Sequence[int], thresholds: Sequence[int], path: str | Path, by: str = "instances"
) -> None:
    """Training count (of K classes, ``by`` what) of every class, the most frequent first."""
    from matplotlib.ticker import MaxNLocator

    counts = np.sort(np.asarray(counts))[::-1]
    groups = bin_index(counts, thresholds)
    heading = f"{len(counts):,} classes in groups by training {by}"
    xlabel, ylabel = "classes, from the most frequent to the rarest", f"training {by} (log scale)"
    with _chart(path, heading, xlabel, ylabel) as axes:
        # Classes that have none get a short bar below 1.
        heights = np.maximum(counts, 1.3 * _NONE) - _NONE
        colors = [bin_color(g) for g in groups]
        axes.bar(range(len(counts)), heights, width=1.0, bottom=_NONE, color=colors)
        sizes = np.bincount(groups, minlength=len(thresholds) + 1)
        for g, name in reversed(list(enumerate(bin_names(thresholds)))):
            label = f"{name}: {sizes[g]:,} {'class' if sizes[g] == 1 else 'classes'}"
            axes.bar(0, 0, bottom=_NONE, color=bin_color(g), label=label)  # for the legend
        for edge in thresholds:
            axes.axhline(edge, color="0.6", linewidth=0.8, linestyle=":")
        axes.set_yscale("log")
        axes.set_ylim(_NONE, max(counts.max(), 1) * 2)
        axes.set_xlim(-0.5, len(counts) - 0.5)
        _count_ticks(axes.yaxis, counts, ())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_class_ap_change(
    counts: Sequence[int],
    before: Sequence[float],
    after: Sequence[float],
    labels: tuple[str, str],
    path: str | Path,
    thresholds: Sequence[int] = DEFAULT_COUNT_THRESHOLDS,
) -> None:
    """How the AP of each class changes between two runs, against its training count, and by bin.

    Args:
        counts: K training instances.
        before, after: K APs in percent, NaN where a class is not evaluated.
        labels: names of the two runs.
    """
    counts, change = np.asarray(counts), np.asarray(after) - np.asarray(before)
    known = ~np.isnan(change)
    counts, change = counts[known], change[known]
    position = np.maximum(counts, _NONE)
    bins = bin_index(counts, thresholds)
    bounds = [0.4, *thresholds, 2 * max(position.max(initial=1.0), *thresholds, 1)]
    first, second = map(_label, labels)
    title = f"AP of each class: {first} to {second}"
    with _chart(path, title, ylabel=f"change of AP, {first} to {second} (points)") as axes:
        for sign, color, what in ((1, RIGHT, "better"), (-1, WRONG, "worse")):
            x, y = (values[np.sign(change) == sign] for values in (position, change))
            axes.vlines(x, 0, y, color=color, linewidth=1, alpha=0.5)
            label = f"{what} with {second} ({len(x)} classes)"
            axes.plot(x, y, "o" if sign > 0 else "v", color=color, markersize=4, label=label)
        axes.axhline(0, color="0.4", linewidth=0.8)
        box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.8}
        for i in np.unique(bins):
            mean, (low, high) = change[bins == i].mean(), bounds[i : i + 2]
            label = "mean of the bin" if i == bins.min() else None
            axes.hlines(mean, low * 1.05, high / 1.05, color="black", linewidth=2.5, label=label)
            offset = {"xytext": (0, 5 if mean >= 0 else -14), "textcoords": "offset points"}
            style = {"ha": "center", "fontsize": 10, "fontweight": "bold", "bbox": box}
            axes.annotate(f"{mean:+.1f}", (np.sqrt(low * high), mean), **offset, **style)
        _class_axis(axes, counts, thresholds)


def plot_winning_groups(
    matrices: Mapping[str, np.ndarray], thresholds: Sequence[int], path: str | Path
) -> None:
    """For each run what :func:`.detections.winning_groups` counted (G, G + 2), as a heat map."""
    names = bin_names(thresholds)
    columns = ["right\nclass", *(f"wrong,\n{name}" for name in names), "missed"]
    width = max(4.4, 0.75 * len(columns)) * len(matrices)
    with _figure(path, 1.2 + width, 1.9 + 0.55 * len(names)) as figure:
        panels = figure.subplots(1, len(matrices), squeeze=False)[0]
        for axes, (label, matrix) in zip(panels, matrices.items(), strict=True):
            totals = matrix.sum(axis=1)
            share = matrix / np.maximum(totals, 1)[:, None]
            picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            for (i, j), value in np.ndenumerate(share):
                text = f"{value:.0%}" if totals[i] else "-"
                color = "white" if value > 0.55 else "black"
                axes.text(j, i, text, ha="center", va="center", color=color, fontsize=9)
            rows = [f"{n}\n({t:,} objects)" for n, t in zip(names, totals, strict=True)]
            axes.set_xticks(range(len(columns)), columns, fontsize=8)
            axes.set_yticks(range(len(names)), rows, fontsize=8)
            axes.tick_params(length=0)
            axes.set_title(_label(label), fontsize=11)
            axes.spines[:].set_visible(False)
        panels[0].set_ylabel("object's class, by training instances", fontsize=9)
        figure.supxlabel("what scores highest where the object is (IoU of 0.5 or more)", fontsize=9)
        figure.colorbar(picture, ax=panels, label="share of the objects", shrink=0.9)


def plot_losses(
    histories: Mapping[str, Mapping[str, Mapping[int, float]]], path: str | Path
) -> None:
    """A panel for each loss and a smoothed line for each run.

    Args:
        histories: for each run, for each loss its value by iteration; {} if it logged none.

    Raises:
        ConfigError: if there are no losses.
    """
    names = sorted(
        {name for history in histories.values() for name in history},
        key=lambda name: (name.startswith("bags/"), name != "total_loss", name),
    )[:_SHOWN_LOSSES]
    if not names:
        raise ConfigError("no run has a metrics.json with losses; evaluation writes none.")
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    with _figure(path, 4 * columns, 0.6 + 2.4 * rows) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, name in itertools.zip_longest(panels, names):
            if name is None:
                axes.set_visible(False)
                continue
            for i, history in enumerate(histories.values()):
                if name in history:
                    x, y = _thinned(np.array(sorted(history[name].items()))).T
                    axes.plot(x, y, color=run_color(i), alpha=0.25, linewidth=0.8)
                    axes.plot(x, _running_median(y), color=run_color(i))
            axes.set_title(_label(name), fontsize=10)
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
            axes.set_xlabel("iteration", fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
        for i, (label, history) in enumerate(histories.items()):
            if history:
                panels[0].plot([], [], color=run_color(i), label=_label(label))
        figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=9)


def plot_methods(rows: Sequence[Mapping], path: str | Path, title: str, task: str) -> None:
    """AP of each bin of training instances, and their mean, with one line for each method.

    Args:
        rows: for each method, from top to bottom, "method", "trained" and {"mean", "std"} of AP1,
            AP2, ... and bAP.
    """
    bins = sorted(key for key in rows[0] if key.startswith("AP") and key[2:] in set("123456789"))
    series = [(key, run_color(i), "os^D"[i % 4], 6) for i, key in enumerate(bins)]
    xlabel = f"{_ap_label(task)}; bars: standard deviation over seeds"
    with _chart(path, title, xlabel, height=1.6 + 0.3 * len(rows), legend=False) as axes:
        for key, color, marker, size in [*series, ("bAP", "black", "|", 14)]:
            means = [np.nan if row[key]["mean"] is None else row[key]["mean"] for row in rows]
            spreads = [row[key]["std"] or 0.0 for row in rows]
            style = {"fmt": marker, "color": color, "markersize": size}
            axes.errorbar(means, range(len(rows)), xerr=spreads, label=key, **style)
        names = [f"{_label(row['method'])}  ({row['trained']})" for row in rows]
        axes.set_yticks(range(len(rows)), names, fontsize=9)
        axes.invert_yaxis()
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        place = {"loc": "outside lower center", "ncols": len(series) + 1}
        axes.figure.legend(**place, frameon=False, fontsize=9)


@contextlib.contextmanager
def _figure(path: str | Path, width: float, height: float) -> Iterator:
    """A figure of this size in inches, saved once the block ends."""
    import matplotlib
    from matplotlib.figure import Figure

    if Path(path).suffix not in _FORMATS:
        raise ConfigError(f"'{path}' must end in {', '.join(_FORMATS)}.")
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # letters that the font lacks
        warnings.filterwarnings("ignore", "constrained_layout", UserWarning)  # very long names
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        content = io.BytesIO()
        figure.savefig(content, dpi=150, format=Path(path).suffix[1:])
    with write_atomically(path, "wb") as file:
        file.write(content.getvalue())


@contextlib.contextmanager
def _chart(
    path: str | Path,
    title: str,
    xlabel: str = "",
    ylabel: str = "",
    height: float = 4,
    legend: bool = True,
) -> Iterator:
    """The axes of a figure of one panel."""
    with _figure(path, 8, height) as figure:
        axes = figure.subplots()
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.set_title(printable(title), fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        yield axes
        if legend:
            axes.legend(frameon=False, fontsize=9)


def _class_axis(axes, counts: Sequence[int], thresholds: Sequence[int]) -> None:
    """A logarithmic x axis of training counts, with the edges of the groups."""
    for edge in thresholds:
        axes.axvline(edge, color="0.85", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set_xlabel("training instances of a class (grey lines: edges of the groups)")
    _count_ticks(axes.xaxis, counts, thresholds)


def _count_ticks(axis, counts: Sequence[int], thresholds: Sequence[int]) -> None:
    largest = int(max([*counts, *thresholds, 1]))
    zero = {_NONE: "0"} if len(counts) and min(counts) == 0 else {}
    ticks = zero | {10**i: f"{10**i:,}" for i in range(len(str(largest)))}
    axis.set_ticks(list(ticks), labels=list(ticks.values()))
    axis.set_ticks([], minor=True)


def _thinned(points: np.ndarray) -> np.ndarray:
    """At most as many points as a picture shows, each the median of its neighbours."""
    parts = np.array_split(points, min(len(points), _SHOWN_POINTS))
    return np.array([np.median(part, axis=0) for part in parts])


def _running_median(values: np.ndarray) -> np.ndarray:
    """Median over the twentieth of the values around each."""
    half = max(len(values) // 40, 1)
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(values, half, constant_values=np.nan), 2 * half + 1
    )
    return np.nanmedian(windows, axis=1)


def _ap_label(task: str) -> str:
    return f"{'mask' if task == 'segm' else 'box'} AP (%)"


def _label(text: str, longest: int = 60) -> str:
    """A name as a chart shows it: one short line, without a leading "_", which would hide it."""
    text = printable(text).lstrip("_")
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
