"""The table and the chart of a comparison of methods, from the files that its runs wrote."""

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from tabulate import tabulate

from ..errors import ConfigError, DataError
from ..evaluation.bootstrap import interval
from ..utils.files import write_atomically, write_csv, write_json
from .intervals import Draws
from .method_runs import BASELINE, MethodRun
from .plots import plot_methods

__all__ = ["MEASURES", "add_intervals", "interval_table", "summarize", "write_comparison"]

MEASURES = ("AP", "AP50", "AP1", "AP2", "AP3", "AP4", "bAP", "APr", "APc", "APf")
_FIXED = ("AP-fixed", "bAP-fixed")  # where TEST.LVIS_AP_FIXED is set
_ALL = (*MEASURES, *_FIXED)


def summarize(runs: Iterable[MethodRun], task: str = "bbox") -> list[dict]:
    """Mean and standard deviation of each measure over the seeds of each method.

    Returns:
        For each method, best bAP first: its name, what was trained, its seeds, seconds (mean) and
        for each measure {"mean", "std"} in percent; std is None for one seed. ``gain`` likewise is
        that of bAP over the baseline, seed by seed, where the baseline is among the runs: runs of a
        seed start from the same detector, so it varies less than they do.

    Raises:
        ConfigError: if a run was not evaluated for the task ("bbox" or "segm").
    """
    by_method: dict[str, list[tuple[MethodRun, dict]]] = {}
    for run in runs:
        by_method.setdefault(run.method, []).append((run, _measures(run, task)))
    baseline = {run.seed: measures["bAP"] for run, measures in by_method.get(BASELINE, ())}
    rows = []
    for method, results in by_method.items():
        of_method, measures = zip(*results, strict=True)
        pairs = [(found["bAP"], baseline.get(run.detector)) for run, found in results]
        rows.append(
            {
                "method": method,
                "trained": of_method[0].trained,
                "seeds": sorted(run.seed for run in of_method),
                "seconds": _mean_and_std(run.seconds for run in of_method)["mean"],
                **{name: _mean_and_std(found[name] for found in measures) for name in _ALL},
                "gain": _mean_and_std(
                    own - other for own, other in pairs if None not in (own, other)
                ),
            }
        )
    return sorted(rows, key=lambda row: -(row["bAP"]["mean"] or row["AP"]["mean"] or -math.inf))


def add_intervals(rows: Sequence[dict], draws: Draws, against: str) -> None:
    """Add 95% intervals to rows of :func:`summarize`: of AP, of bAP, and of their differences.

    Args:
        rows: get ``intervals``, {"AP", "bAP", "AP_difference", "bAP_difference"}: (low, high).
        draws: measures of each method on the same drawn images.
        against: the method that the differences are from.

    Raises:
        ConfigError: if there is no such method among them.
    """
    if against not in draws:
        raise ConfigError(f"--against '{against}' is none of the methods {', '.join(draws)}.")
    reference = next(row for row in rows if row["method"] == against)
    for row in rows:
        row["intervals"] = {}
        for name in ("AP", "bAP"):
            found, measured = draws[row["method"]][name], row[name]["mean"]
            row["intervals"][name] = interval(found, measured)
            row["intervals"][f"{name}_difference"] = interval(
                found - draws[against][name], measured - reference[name]["mean"]
            )


def interval_table(rows: Sequence[dict], against: str) -> str:
    """The intervals of :func:`add_intervals` as Markdown."""
    reference = next(row for row in rows if row["method"] == against)
    lines = []
    for row in rows:
        line = [row["method"], len(row["seeds"])]
        for name in ("AP", "bAP"):
            mean = row[name]["mean"]
            difference = mean - reference[name]["mean"]
            low, high = row["intervals"][f"{name}_difference"]
            line += [
                "{:.1f} [{:.1f}, {:.1f}]".format(mean, *row["intervals"][name]),
                "-" if row is reference else f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]",
            ]
        lines.append(line)
    headers = ["method", "seeds"]
    for name in ("AP", "bAP"):
        headers += [f"{name} [95%]", f"{name} - {against}"]
    return tabulate(lines, headers, "github", disable_numparse=True)


def write_comparison(
    runs: Sequence[MethodRun],
    output: Path,
    title: str,
    task: str = "bbox",
    draws: Draws | None = None,
    against: str = BASELINE,
) -> str:
    """Write ``comparison.md``, ``.csv`` (a line for each run), ``.json`` and ``.png``.

    With ``draws``, intervals are added (:func:`add_intervals`).

    Returns:
        The table as Markdown, under its title.
    """
    rows = summarize(runs, task)
    shown = [name for name in (*_ALL, "gain") if any(row[name]["mean"] is not None for row in rows)]
    table = tabulate(
        [
            [
                *(row["method"], row["trained"], len(row["seeds"])),
                *(_cell(row[name]) for name in shown),
                "-" if row["seconds"] is None else f"{row['seconds'] / 60:.1f}",
            ]
            for row in rows
        ],
        headers=["method", "trained", "seeds", *shown, "minutes"],
        tablefmt="github",
        disable_numparse=True,
    )
    note = (
        f"Measured {'mask' if task == 'segm' else 'box'} AP in %, mean ± standard deviation over "
        "seeds. AP1..AP4: classes by training instances (0-9, 10-99, 100-999, 1000+); bAP: their "
        "mean; gain: of bAP over the baseline of the same seed. Minutes: training or fitting, "
        "without evaluation and, where it starts from the baseline, without that."
    )
    text = f"# {title}\n\n{table}\n\n{note}\n"
    if draws is not None:
        add_intervals(rows, draws, against)
        num_draws = len(draws[against]["AP"])
        text += (
            f"\n{interval_table(rows, against)}\n\n95% intervals of the mean over seeds, by "
            f"{num_draws} paired draws of the test images with replacement.\n"
        )
    with write_atomically(output / "comparison.md") as file:
        file.write(text)
    write_json(output / "comparison.json", rows)
    header = ("method", "trained", "seed", *_ALL, "seconds")
    lines = (
        (run.method, run.trained, run.seed, *_measures(run, task).values(), run.seconds)
        for run in sorted(runs, key=lambda run: (run.method, run.seed))
    )
    write_csv(output / "comparison.csv", header, lines)
    plot_methods(rows, output / "comparison.png", title, task)
    return text


def _measures(run: MethodRun, task: str) -> dict[str, float | None]:
    results = run.results()
    measures = results.get(task)
    if not isinstance(measures, dict):
        raise ConfigError(
            f"'{run.results_file}' has no measures of --task {task}, only {', '.join(results)}; "
            "set MODEL.MASK_ON for masks, and one data set in DATASETS.TEST."
        )
    fixed = results.get(f"{task}_fixed") or {}
    measures = {name: measures.get(name) for name in MEASURES}
    measures |= {name: fixed.get(name.removesuffix("-fixed")) for name in _FIXED}
    if not all(isinstance(value, int | float | None) for value in measures.values()):
        raise DataError(f"'{run.results_file}' must hold numbers; delete it, and compare again.")
    return measures


def _mean_and_std(values: Iterable[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.mean(known) if known else None,
        "std": statistics.stdev(known) if len(known) > 1 else None,
    }


def _cell(value: dict[str, float | None]) -> str:
    if value["mean"] is None:
        return "-"
    spread = "" if value["std"] is None else f" ± {value['std']:.1f}"
    return f"{value['mean']:.1f}{spread}"
