"""One self-contained HTML page about one or several evaluated runs."""

import datetime
import json
import logging
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import yaml
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from jinja2 import Environment, PackageLoader

from ..config import add_bags_config
from ..engine.checkpoint_file import read_model_weights
from ..errors import BagsError, ConfigError
from .classifier import class_weight_norms
from .crops import choose_crops, cut_crops
from .groups import bin_names
from .plots import (
    plot_ap_bins,
    plot_class_ap_change,
    plot_losses,
    plot_weight_norms,
    plot_winning_groups,
)
from .runs import Run, winning_groups

__all__ = ["write_report"]

logger = logging.getLogger(__name__)

_FIRST_MEASURES = ("AP", "AP50", "AP75", "bAP", "APr", "APc", "APf")
_CROPS_PER_KIND = 4


def write_report(
    runs: Sequence[Run],
    path: str | Path,
    thresholds: Sequence[int] = (10, 100, 1000),
    max_crops: int = 1500,
) -> None:
    """Write the report.

    Sections whose files are absent say so in one sentence.

    Args:
        runs: evaluated on the same classes, with labels of their own.
        path: the HTML file.
        thresholds: edges of the bins of training instances.
        max_crops: most crops of images; the classes that differ most between the first and the
            last run, or those with the lowest AP, get theirs first.

    Raises:
        ConfigError: if the runs are of different classes, or share a label.
    """
    _check(runs)
    first = runs[0]
    crops, crops_note = _crops(runs, max_crops)
    names = _measure_names(runs)
    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html").render(
        title=f"{', '.join(run.label for run in runs)} on {first.dataset}",
        runs=runs,
        dataset=first.dataset,
        task=first.task,
        date=datetime.date.today().isoformat(),
        measure_names=names,
        measures=_measures(runs, names),
        bins=bin_names(thresholds),
        config=_config(runs),
        charts=_charts(runs, thresholds),
        class_columns=_class_columns(runs),
        classes=_classes(runs, crops),
        crops_note=crops_note,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")


def _check(runs: Sequence[Run]) -> None:
    labels = [run.label for run in runs]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"Runs share a name among {', '.join(labels)}; add --labels.")
    for run in runs[1:]:
        if (run.dataset, run.category_ids) != (runs[0].dataset, runs[0].category_ids):
            raise ConfigError(
                f"'{runs[0].folder}' ({runs[0].dataset}) and '{run.folder}' ({run.dataset}) were "
                "not evaluated on the same classes."
            )


# --- measures and config -------------------------------------------------------------------------


def _measure_names(runs: Sequence[Run]) -> list[str]:
    known = {name for run in runs for name, value in run.measures.items() if value is not None}
    bins = sorted(n for n in known if n.startswith("AP") and n[2:].isdigit() and len(n) == 3)
    return [n for n in (*_FIRST_MEASURES[:3], *bins, *_FIRST_MEASURES[3:]) if n in known]


def _measures(runs: Sequence[Run], names: Sequence[str]) -> list[dict]:
    best = {
        name: max(
            (v for run in runs if (v := run.measures.get(name)) is not None), default=math.inf
        )
        for name in names
    }
    return [
        {
            "label": run.label,
            "cells": [
                {
                    "text": "-" if (value := run.measures.get(name)) is None else f"{value:.1f}",
                    "best": len(runs) > 1 and value == best[name],
                }
                for name in names
            ],
        }
        for run in runs
    ]


def _config(runs: Sequence[Run]) -> dict:
    """Keys whose values differ between the runs; of one run, those that are not defaults."""
    configs = []
    for run in runs:
        try:
            content = yaml.safe_load((run.folder / "config.yaml").read_text())
        except (OSError, yaml.YAMLError):
            return {"rows": [], "absent": f"'{run.folder}' has no readable config.yaml."}
        configs.append(_flatten(content))
    columns = [run.label for run in runs]
    if len(runs) == 1:
        cfg = get_cfg()
        add_bags_config(cfg)
        configs.append(_flatten(yaml.safe_load(cfg.dump())))
        columns.append("default")
    keys = sorted(set().union(*configs) - {"OUTPUT_DIR"})
    rows = [(key, [str(c.get(key, "-")) for c in configs]) for key in keys]
    rows = [row for row in rows if len(set(row[1])) > 1]
    return {"rows": rows, "columns": columns, "absent": "Nothing but the folder."}


def _flatten(node: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in node.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


# --- charts --------------------------------------------------------------------------------------


def _charts(runs: Sequence[Run], thresholds: Sequence[int]) -> list[dict]:
    first, last = runs[0], runs[-1]
    charts = []
    if any(run.measures.get("bAP") is not None for run in runs):
        measures = {run.label: run.measures for run in runs}
        charts.append(
            _chart("AP by training instances", lambda p: plot_ap_bins(measures, p, thresholds))
        )
    counted = not (first.training_instances < 0).any()
    if counted:
        charts.append(_chart("Classifier weights", lambda p: _plot_norms(runs, thresholds, p)))
    if counted and len(runs) > 1:
        charts.append(
            _chart(
                f"AP of each class, {first.label} to {last.label}",
                lambda p: plot_class_ap_change(
                    first.training_instances,
                    first.ap,
                    last.ap,
                    (first.label, last.label),
                    p,
                    thresholds,
                ),
                wide=True,
            )
        )
    if counted:
        charts.append(
            _chart(
                "What scores highest where an object is, by groups of training instances",
                lambda p: _plot_winners([first, last] if len(runs) > 1 else [first], thresholds, p),
                wide=True,
            )
        )
    charts.append(_chart("Losses in training", lambda p: _plot_losses(runs, p), wide=True))
    return charts


def _chart(caption: str, draw: Callable[[Path], None], wide: bool = False) -> dict:
    """A chart as SVG; what it lacks, if a file that it needs is not there."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chart.svg"
        try:
            draw(path)
        except (BagsError, OSError) as error:
            return {"caption": caption, "absent": str(error)}
        svg = path.read_text(encoding="utf-8")
    return {"caption": caption, "svg": svg[svg.index("<svg") :], "wide": wide}


def _plot_norms(runs: Sequence[Run], thresholds: Sequence[int], path: Path) -> None:
    norms = {
        run.label: class_weight_norms(read_model_weights(_weights(run)), len(run.names))
        for run in runs
    }
    plot_weight_norms(norms, runs[0].training_instances, path, thresholds, "Classifier weights")


def _weights(run: Run) -> Path:
    """What a run trained or, if it only evaluated, the checkpoint that it evaluated."""
    trained = run.folder / "model_final.pth"
    config = run.folder / "config.yaml"
    if trained.is_file() or not config.is_file():
        return trained
    evaluated = _flatten(yaml.safe_load(config.read_text())).get("MODEL.WEIGHTS")
    return Path(evaluated or trained)


def _plot_winners(runs: Sequence[Run], thresholds: Sequence[int], path: Path) -> None:
    count_of = dict(zip(runs[0].category_ids, runs[0].training_instances.tolist(), strict=True))
    truth = runs[0].ground_truth()["annotations"]
    matrices = {
        run.label: winning_groups(truth, run.detections(), count_of, thresholds) for run in runs
    }
    plot_winning_groups(matrices, thresholds, path)


def _plot_losses(runs: Sequence[Run], path: Path) -> None:
    histories = {run.label: _loss_history(run.folder) for run in runs}
    if not any(histories.values()):
        raise ConfigError("no run has a metrics.json with losses; evaluation alone writes none.")
    plot_losses(histories, path)


def _loss_history(folder: Path) -> dict[str, dict[int, float]]:
    """For each loss its value by iteration; of an iteration that was repeated, the last."""
    history: dict[str, dict[int, float]] = defaultdict(dict)
    path = folder / "metrics.json"
    if not path.is_file():
        return {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line at which a run was killed
        for name, value in row.items():
            if name.removeprefix("bags/").startswith("loss_") or name == "total_loss":
                history[name][row["iteration"]] = value
    return dict(history)


# --- classes -------------------------------------------------------------------------------------


def _class_columns(runs: Sequence[Run]) -> list[str]:
    change = [f"{runs[-1].label} - {runs[0].label}"] if len(runs) > 1 else []
    aps = [f"AP {run.label}" for run in runs]
    return ["class", "training instances", "validation instances", *aps, *change]


def _classes(runs: Sequence[Run], crops: dict[int, list[dict]]) -> list[dict]:
    """Rows of the table, the rarest class first."""
    first = runs[0]
    rows = []
    for i in np.argsort(first.training_instances, kind="stable"):
        aps = [run.ap[i] for run in runs]
        change = [aps[-1] - aps[0]] if len(runs) > 1 else []
        trained = first.training_instances[i]
        cells = [
            _cell(trained if trained >= 0 else math.nan, ",.0f"),
            _cell(first.validation_instances[i], ",.0f"),
            *(_cell(ap, ".1f") for ap in aps),
            *(_cell(c, "+.1f") for c in change),
        ]
        rows.append({"name": first.names[i], "cells": cells, "crops": crops.get(int(i))})
    return rows


def _cell(value: float, style: str) -> dict:
    if math.isnan(value):
        return {"value": "", "text": "-"}
    return {"value": float(value), "text": format(value, style)}


def _crops(runs: Sequence[Run], max_crops: int) -> tuple[dict[int, list[dict]], str]:
    """Crops of each class by its position, and a sentence about them."""
    first = runs[0]
    try:
        truth = first.ground_truth()
        detections = [_by_class(run.detections()) for run in runs]
        files = {r["image_id"]: r["file_name"] for r in DatasetCatalog.get(first.dataset)}
    except (BagsError, OSError, KeyError) as error:
        return {}, f"No crops: {error}"
    annotations = _by_class(a for a in truth["annotations"] if not a.get("iscrowd", 0))
    images = {image["id"]: image for image in truth["images"]}
    chosen: dict[int, list[list]] = {}
    total = 0
    for i in _by_interest(runs):
        category = first.category_ids[i]
        objects: dict[int, list] = defaultdict(list)
        for annotation in annotations.get(category, ()):
            objects[annotation["image_id"]].append(annotation)
        of_class = [
            choose_crops(category, objects, d.get(category, ()), images, _CROPS_PER_KIND)
            for d in detections
        ]
        size = sum(map(len, of_class))
        if total + size > max_crops:
            break
        total += size
        chosen[i] = of_class
    cut = cut_crops({c for rows in chosen.values() for row in rows for c in row}, files)
    if not cut and total:
        return {}, f"No crops: the images of '{first.dataset}' cannot be read here."
    crops = {
        i: [
            {
                "label": run.label,
                "crops": [
                    {"kind": c.kind, "text": c.text, "source": cut[c]} for c in row if c in cut
                ],
            }
            for run, row in zip(runs, rows, strict=True)
        ]
        for i, rows in chosen.items()
    }
    left_out = len(first.names) - len(chosen)
    note = (
        f"A click on a class shows up to {_CROPS_PER_KIND} of its best right (solid) and wrong "
        "(dashed) detections at an IoU of 0.5, and of its objects that were missed (dotted: no "
        "right detection scores 0.3)."
    )
    if left_out:
        note += f" {left_out} classes have none, to keep this page small (--max-crops)."
    return crops, note


def _by_interest(runs: Sequence[Run]) -> list[int]:
    """Positions of the classes: those that changed most first, of one run those of lowest AP."""
    interest = np.abs(runs[-1].ap - runs[0].ap) if len(runs) > 1 else -runs[0].ap
    return np.argsort(-np.nan_to_num(interest, nan=-math.inf), kind="stable").tolist()


def _by_class(rows) -> dict[int, list[dict]]:
    grouped = defaultdict(list)
    for row in rows:
        grouped[row["category_id"]].append(row)
    return grouped
