"""One self-contained HTML page about one or several evaluated runs."""

import datetime
import math
import reprlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import yaml
from detectron2.config import get_cfg

from ..checkpoint.files import read_model_weights
from ..config import add_bags_config
from ..errors import BagsError, ConfigError
from ..utils.files import write_atomically
from ..utils.text import printable
from .classifier import class_weight_norms
from .crops import Crop, choose_crops, cut_crops
from .detections import group_by, winning_groups
from .grouping import bin_names
from .plots import (
    plot_ap_bins,
    plot_class_ap_change,
    plot_losses,
    plot_weight_norms,
    plot_winning_groups,
)
from .runs import (
    EvaluatedRun,
    check_comparable,
    configured_thresholds,
    flat_items,
    loss_history,
    read_ground_truth,
)

__all__ = ["all_weight_norms", "all_winning_groups", "write_html_report"]

_MEASURES = ("AP", "AP50", "AP75")
_FREQUENCIES = ("APr", "APc", "APf")
_CROPS_PER_KIND = 4
_MOST_KEYS = 1000  # of a config; real ones have some hundred


def write_html_report(
    runs: Sequence[EvaluatedRun],
    path: str | Path,
    thresholds: Sequence[int] | None = None,
    max_crops: int = 1500,
) -> None:
    """Write the report. Sections whose files are absent say so in one sentence.

    Args:
        runs: evaluated on the same classes, with labels of their own.
        path: the HTML file.
        thresholds: edges of the bins of training instances; None takes those of the runs' configs.
        max_crops: most crops of images; the classes that differ most between the first and the
            last run, or those with the lowest AP, get theirs first.

    Raises:
        ConfigError: if the runs are of different classes, or share a label.
        DataError: if the page cannot be written; one that was there before stays.
    """
    from jinja2 import Environment, PackageLoader

    check_comparable(runs)
    if thresholds is None:
        thresholds = configured_thresholds(runs)
    first, last, is_comparison = runs[0], runs[-1], len(runs) > 1
    bins = {run.label: run.bin_measures(thresholds) for run in runs}
    crops, pictures, crops_note = _crops(runs, max_crops)
    template = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html")
    html = template.render(
        title=f"{', '.join(run.label for run in runs)} on {first.dataset}",
        is_comparison=is_comparison,
        dataset=first.dataset,
        task=first.task,
        date=datetime.date.today().isoformat(),
        bins=bin_names(thresholds),
        **_measures(runs, bins),
        config=_config(runs),
        charts=_charts(runs, bins, thresholds),
        class_columns=[
            *("class", "training instances", "validation instances"),
            *(f"AP {run.label}" for run in runs),
            *([f"{last.label} - {first.label}"] if is_comparison else []),
        ],
        classes=_classes(runs, crops),
        pictures=pictures,
        crops_note=crops_note,
    )
    with write_atomically(path) as file:
        # A folder's name need not be valid text.
        file.write(html.encode("utf-8", "replace").decode("utf-8"))


def all_weight_norms(runs: Sequence[EvaluatedRun]) -> dict[str, np.ndarray]:
    """Classifier weight norms (K,) by label of the run.

    Of the model that a run trained or, if it only evaluated, that of its ``MODEL.WEIGHTS``.
    """
    norms = {}
    for run in runs:
        weights, evaluated = run.folder / "model_final.pth", run.config().get("MODEL.WEIGHTS")
        if not weights.is_file() and isinstance(evaluated, str) and evaluated:
            weights = evaluated
        norms[run.label] = class_weight_norms(read_model_weights(weights), len(run.names)).numpy()
    return norms


def all_winning_groups(
    runs: Sequence[EvaluatedRun], thresholds: Sequence[int]
) -> dict[str, np.ndarray]:
    """What :func:`.detections.winning_groups` counts, by label of the run."""
    images = read_ground_truth(runs[0]).values()
    objects = [annotation for image in images for annotation in image["annotations"]]
    return {r.label: winning_groups(objects, r.detections(), r.count_of, thresholds) for r in runs}


def _measures(runs: Sequence[EvaluatedRun], bins: dict[str, dict]) -> dict[str, list]:
    """Names and rows of the table of measures; AP1, AP2, ... are those of the report's bins."""
    names = [*_MEASURES, *bins[runs[0].label], *_FREQUENCIES]
    values = {r.label: [(r.measures | bins[r.label]).get(name) for name in names] for r in runs}
    columns = zip(*values.values(), strict=True)
    best = [max((v for v in column if v is not None), default=None) for column in columns]
    shown = [i for i, value in enumerate(best) if value is not None]
    rows = [
        (label, [(_text(of[i], ".1f"), len(runs) > 1 and of[i] == best[i]) for i in shown])
        for label, of in values.items()
    ]
    return {"measure_names": [names[i] for i in shown], "measures": rows}


def _config(runs: Sequence[EvaluatedRun]) -> dict:
    """Keys whose values differ between the runs; of one run, those that are not defaults."""
    configs = {run.label: run.config() for run in runs}
    for run in runs:
        if not configs[run.label]:
            return {"rows": [], "absent": f"'{run.folder}' has no readable config.yaml."}
    if len(runs) == 1:
        cfg = get_cfg()
        add_bags_config(cfg)
        configs["default"] = dict(flat_items(yaml.safe_load(cfg.dump())))
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxstring = 4, 40, 200
    rows = []
    for key in sorted(set().union(*configs.values()) - {"OUTPUT_DIR"})[:_MOST_KEYS]:
        values = [of.get(key, "-") for of in configs.values()]
        texts = [printable(v)[:500] if isinstance(v, str) else short.repr(v) for v in values]
        if len(set(texts)) > 1:
            rows.append((printable(key), texts))
    return {"rows": rows, "columns": list(configs), "absent": "Nothing but the folder."}


def _charts(
    runs: Sequence[EvaluatedRun], bins: dict[str, dict], thresholds: Sequence[int]
) -> list[dict]:
    first, last = runs[0], runs[-1]
    counts = first.training_instances

    def bars(path: Path) -> None:
        plot_ap_bins(bins, path, thresholds, task=first.task)

    def norms(path: Path) -> None:
        plot_weight_norms(all_weight_norms(runs), counts, path, thresholds)

    def change(path: Path) -> None:
        labels = first.label, last.label
        plot_class_ap_change(counts, first.ap, last.ap, labels, path, thresholds)

    def winners(path: Path) -> None:
        ends = [first] if first is last else [first, last]
        plot_winning_groups(all_winning_groups(ends, thresholds), thresholds, path)

    def losses(path: Path) -> None:
        histories = {run.label: loss_history(run.folder) for run in runs}
        if not any(histories.values()):
            raise ConfigError("no run has a metrics.json with losses; evaluation writes none.")
        plot_losses(histories, path)

    charts = []
    if first.is_counted:
        charts += [_chart("AP by training instances", bars), _chart("Classifier weights", norms)]
        if len(runs) > 1:
            caption = f"AP of each class, {first.label} to {last.label}"
            charts.append(_chart(caption, change, wide=True))
        caption = "What scores highest where an object is, by groups of training instances"
        charts.append(_chart(caption, winners, wide=True))
    return [*charts, _chart("Losses in training", losses, wide=True)]


def _chart(caption: str, draw: Callable[[Path], None], wide: bool = False) -> dict:
    """A chart as SVG, or what is missing for it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chart.svg"
        try:
            draw(path)
        except (BagsError, OSError) as error:
            return {"caption": caption, "absent": str(error)}
        svg = path.read_text(encoding="utf-8")
    return {"caption": caption, "svg": svg[svg.index("<svg") :], "wide": wide}


def _classes(runs: Sequence[EvaluatedRun], crops: dict[int, list]) -> list[dict]:
    """Rows of the table, the rarest class first."""
    first, last = runs[0], runs[-1]
    rows = []
    for i in np.argsort(first.training_instances, kind="stable").tolist():
        trained = first.training_instances[i]
        cells = [
            _cell(trained if trained >= 0 else None, ",.0f"),
            _cell(first.validation_instances[i], ",.0f"),
            *(_cell(run.ap[i], ".1f") for run in runs),
            *([_cell(last.ap[i] - first.ap[i], "+.1f")] if len(runs) > 1 else []),
        ]
        row = {"cells": cells, "crops": crops.get(i), "untrained": trained == 0}
        row["name"] = printable(first.names[i]) or f"class {first.category_ids[i]}"
        rows.append(row)
    return rows


def _cell(value: float | None, style: str) -> tuple[float | str, str]:
    """What a cell is sorted by, and what it shows."""
    text = _text(value, style)
    return "" if text == "-" else float(value), text


def _text(value: float | None, style: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, style)


def _crops(
    runs: Sequence[EvaluatedRun], max_crops: int
) -> tuple[dict[int, list[tuple[str, list[Crop]]]], dict[Crop, str], str]:
    """For classes by position, each run's label and crops; the pictures; a sentence about them."""
    first = runs[0]
    try:
        images = read_ground_truth(first)
        detections = [group_by(run.detections(), "category_id") for run in runs]
    except (BagsError, OSError) as error:
        return {}, {}, f"No crops: {error}"
    objects = group_by((a for im in images.values() for a in im["annotations"]), "category_id")
    chosen: dict[int, list[list[Crop]]] = {}
    left = max_crops
    for i in _by_interest(runs):
        category = first.category_ids[i]
        own = objects.get(category, ())
        of_runs = [
            choose_crops(category, own, d.get(category, ()), images, _CROPS_PER_KIND)
            for d in detections
        ]
        left -= sum(map(len, of_runs))
        if left < 0:
            break
        chosen[i] = of_runs
    pictures = cut_crops({c for of_runs in chosen.values() for of in of_runs for c in of}, images)
    if not pictures and any(map(any, chosen.values())):
        return {}, {}, f"No crops: the images of '{first.dataset}' cannot be read here."
    crops = {
        i: [
            (run.label, [crop for crop in of_run if crop in pictures])
            for run, of_run in zip(runs, of_runs, strict=True)
        ]
        for i, of_runs in chosen.items()
    }
    note = (
        f"Click a class to see up to {_CROPS_PER_KIND} of its best right (solid) and wrong "
        "(dashed) detections at an IoU of 0.5, and of its objects that were missed (dotted: no "
        "right detection scores 0.3)."
    )
    if left_out := len(first.names) - len(chosen):
        note += f" {left_out} classes have none, to keep this page small (--max-crops)."
    return crops, pictures, note


def _by_interest(runs: Sequence[EvaluatedRun]) -> list[int]:
    """Positions of the classes: those that changed most first, of one run those of lowest AP."""
    interest = np.abs(runs[-1].ap - runs[0].ap) if len(runs) > 1 else -runs[0].ap
    return np.argsort(-np.nan_to_num(interest, nan=-math.inf), kind="stable").tolist()
