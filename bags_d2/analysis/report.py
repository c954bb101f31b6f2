"""One self-contained HTML page about one or several evaluated runs."""

import datetime
import math
import tempfile
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
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
from .detections import group_by, winning_classes, winning_groups
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
    objects_of,
    read_ground_truth,
)

__all__ = ["all_weight_norms", "write_html_report"]

_MEASURES = ("AP", "AP50", "AP75")
_FREQUENCIES = ("APr", "APc", "APf")
_CROPS_PER_KIND = 4
_CONFUSIONS_PER_CLASS = 3
_CONFUSIONS = 15
_DOUBTFUL = 24
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
    try:
        seen = _see(runs)
    except (BagsError, OSError) as error:
        seen = _Seen(absent=str(error))
    names = [
        printable(name) or f"class {category}"
        for name, category in zip(first.names, first.category_ids, strict=True)
    ]
    labels = _doubtful_labels(runs, seen)
    shown, crops_note = _limited(runs, seen, max_crops - len(labels["cards"]))
    crops = {c for of_runs in shown.values() for of in of_runs.values() for c in of}
    pictures = cut_crops([*crops, *(card["crop"] for card in labels["cards"])], seen.images)
    if crops and not pictures:
        crops_note = f"No crops: the images of '{first.dataset}' cannot be read here."
    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html").render(
        title=f"{', '.join(run.label for run in runs)} on {first.dataset}",
        is_comparison=is_comparison,
        dataset=first.dataset,
        task=first.task,
        date=datetime.date.today().isoformat(),
        bins=bin_names(thresholds),
        **_measures(runs, bins),
        config=_config(runs),
        charts=_charts(runs, bins, thresholds, seen),
        run_labels=[run.label for run in runs],
        confusions=_worst_confusions(first, names, seen),
        labels=labels,
        class_columns=[
            *("class", "training instances", "validation instances"),
            *(f"AP {run.label}" for run in runs),
            *([f"{last.label} - {first.label}"] if is_comparison else []),
        ],
        classes=_classes(runs, names, seen, shown),
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


def _measures(runs: Sequence[EvaluatedRun], bins: dict[str, dict]) -> dict[str, list]:
    """Names and rows of the table of measures; AP1, AP2, ... are those of the report's bins."""
    names = [*_MEASURES, *bins[runs[0].label], *_FREQUENCIES]
    values = {r.label: [(r.measures | bins[r.label]).get(name) for name in names] for r in runs}
    columns = zip(*values.values(), strict=True)
    best = [max((v for v in column if v is not None), default=None) for column in columns]
    # An empty bin is worth knowing of; a measure that no run has is not.
    shown = [i for i, v in enumerate(best) if v is not None or names[i] in bins[runs[0].label]]
    rows = [
        (
            label,
            [(_text(of[i], ".1f"), len(runs) > 1 and None is not of[i] == best[i]) for i in shown],
        )
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
    rows = []
    for key in sorted(set().union(*configs.values()) - {"OUTPUT_DIR"})[:_MOST_KEYS]:
        texts = [printable(str(of.get(key, "-")))[:500] for of in configs.values()]
        if len(set(texts)) > 1:
            rows.append((printable(key), texts))
    return {"rows": rows, "columns": list(configs), "absent": "Nothing but the folder."}


def _charts(
    runs: Sequence[EvaluatedRun], bins: dict[str, dict], edges: Sequence[int], seen: "_Seen"
) -> list[dict]:
    """Charts as SVG, or what is missing for them."""
    first, last, counts = runs[0], runs[-1], runs[0].training_instances
    labels = first.label, last.label

    def losses() -> dict[str, dict]:
        return {run.label: loss_history(run.folder) for run in runs}

    def winners() -> dict[str, np.ndarray]:
        if seen.absent:
            raise ConfigError(seen.absent)
        ends = runs[:1] if first is last else (first, last)
        of = {run.label: seen.winners[run.label] for run in ends}
        return {
            label: winning_groups(seen.objects, of[label], first.count_of, edges) for label in of
        }

    change = f"AP of each class, {first.label} to {last.label}"
    plots = {
        "AP by training instances": lambda p: plot_ap_bins(bins, p, edges, task=first.task),
        "Classifier weights": lambda p: plot_weight_norms(all_weight_norms(runs), counts, p, edges),
        change: lambda p: plot_class_ap_change(counts, first.ap, last.ap, labels, p, edges),
        "What scores highest where an object is, by groups of training instances": (
            lambda p: plot_winning_groups(winners(), edges, p)
        ),
        "Losses in training": lambda p: plot_losses(losses(), p),
    }
    if first is last:
        del plots[change]
    charts = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chart.svg"
        for caption, plot in list(plots.items())[0 if first.is_counted else -1 :]:
            try:
                plot(path)
                svg = path.read_text(encoding="utf-8")
                charts.append({"caption": caption, "svg": svg[svg.index("<svg") :]})
            except (BagsError, OSError) as error:
                charts.append({"caption": caption, "absent": str(error)})
    return charts


def _classes(
    runs: Sequence[EvaluatedRun], names: Sequence[str], seen: "_Seen", crops: dict[int, dict]
) -> list[dict]:
    """Rows of the table, the rarest class first."""
    first, last = runs[0], runs[-1]
    details = _details(names, seen, crops)
    rows = []
    for i in np.argsort(first.training_instances, kind="stable").tolist():
        trained, objects = int(first.training_instances[i]), int(first.validation_instances[i])
        cells = [
            _cell(trained if trained >= 0 else None, ",.0f"),
            _cell(objects, ",.0f"),
            *(_cell(run.ap[i], ".1f") for run in runs),
            *([_cell(last.ap[i] - first.ap[i], "+.1f")] if len(runs) > 1 else []),
        ]
        marks = ["never trained"] * (trained == 0) + ["no objects here"] * (objects == 0)
        rows.append({"cells": cells, "marks": marks, "name": names[i], "details": details[i]})
    return rows


def _details(names: Sequence[str], seen: "_Seen", crops: dict[int, dict]) -> list[list[tuple]]:
    """For each class each run's label, what it confuses it with, and its crops; [] if nothing."""
    details = [[] for _ in names]
    for label, counts in seen.confusions.items():
        taken_for, taken_for_it = ([[] for _ in names] for _ in range(2))
        for (own, other), number in counts.most_common():
            taken_for[own].append(f"{names[other]} ({number})")
            taken_for_it[other].append(f"{names[own]} ({number})")
        for i, of_class in enumerate(details):
            worst = (", ".join(x[i][:_CONFUSIONS_PER_CLASS]) for x in (taken_for, taken_for_it))
            row = dict(zip(("taken_for", "taken_for_it"), worst, strict=True))
            of_class.append({**row, "crops": crops.get(i, {}).get(label)})
    labelled = [list(zip(seen.confusions, of_class, strict=True)) for of_class in details]
    return [rows if any(any(row.values()) for _, row in rows) else [] for rows in labelled]


def _worst_confusions(run: EvaluatedRun, names: Sequence[str], seen: "_Seen") -> list[tuple]:
    """Class, what it is taken for, its objects, and how many each run takes so; by the last run."""
    runs, rows = list(seen.confusions.values()), []
    sizes = Counter(annotation["category_id"] for annotation in seen.objects)
    for (own, other), _ in runs[-1].most_common(_CONFUSIONS) if runs else ():
        size = sizes[run.category_ids[own]]
        cells = [f"{of[own, other]} ({of[own, other] / size:.0%})" for of in runs]
        rows.append((names[own], names[other], size, cells))
    return rows


def _cell(value: float | None, style: str) -> tuple[float | str, str]:
    """What a cell is sorted by, and what it shows."""
    text = _text(value, style)
    return "" if text == "-" else float(value), text


def _text(value: float | None, style: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, style)


@dataclass
class _Seen:
    """What images and detections show; nothing if they are absent. Classes are positions."""

    absent: str = ""
    images: dict[Hashable, dict] = field(default_factory=dict)
    objects: list[dict] = field(default_factory=list)
    # By label of the run: the category that wins over each object, and numbers of objects of one
    # class that are taken for another.
    winners: dict[str, list] = field(default_factory=dict)
    confusions: dict[str, Counter] = field(default_factory=dict)
    crops: dict[int, dict[str, list[Crop]]] = field(default_factory=dict)  # by class, by run


def _see(runs: Sequence[EvaluatedRun]) -> _Seen:
    images, categories = read_ground_truth(runs[0]), runs[0].category_ids
    seen = _Seen(images=images, objects=objects_of(images))
    of_class = group_by(seen.objects, "category_id")
    position = {category: i for i, category in enumerate(categories)}
    seen.crops = {i: {} for i in position.values()}
    for run in runs:  # one after the other, as there may be millions of detections
        detections = run.detections()
        seen.winners[run.label] = winners = winning_classes(seen.objects, detections)
        pairs = ((o["category_id"], w) for o, w in zip(seen.objects, winners, strict=True))
        seen.confusions[run.label] = Counter(
            (position[own], position[winner]) for own, winner in pairs if winner not in (None, own)
        )
        found = group_by(detections, "category_id")
        for category, i in position.items():
            rows = of_class.get(category, ()), found.get(category, ())
            seen.crops[i][run.label] = choose_crops(category, *rows, images, _CROPS_PER_KIND)
    return seen


def _limited(
    runs: Sequence[EvaluatedRun], seen: _Seen, max_crops: int
) -> tuple[dict[int, dict[str, list[Crop]]], str]:
    """The crops of as many classes as there is room for, and a sentence about them."""
    if seen.absent:
        return {}, f"No crops: {seen.absent}"
    shown = {}
    for i in _by_interest(runs):
        max_crops -= sum(map(len, seen.crops[i].values()))
        if max_crops < 0:
            break
        shown[i] = seen.crops[i]
    note = (
        "Click a class to see what its objects are taken for where they are, and up to "
        f"{_CROPS_PER_KIND} of its best right (solid) and wrong (dashed) detections at an IoU of "
        "0.5, and of its objects that were missed (dotted: no right detection scores 0.3)."
    )
    if left_out := len(runs[0].names) - len(shown):
        note += f" {left_out} classes have no crops, to keep this page small (--max-crops)."
    return shown, note


def _by_interest(runs: Sequence[EvaluatedRun]) -> list[int]:
    """Positions of the classes: those that changed most first, of one run those of lowest AP."""
    interest = np.abs(runs[-1].ap - runs[0].ap) if len(runs) > 1 else -runs[0].ap
    return np.argsort(-np.nan_to_num(interest, nan=-math.inf), kind="stable").tolist()


def _doubtful_labels(runs: Sequence[EvaluatedRun], seen: _Seen) -> dict:
    """The objects whose label the last run that was asked contradicts most."""
    run = next((run for run in reversed(runs) if run.label_check_file.is_file()), None)
    if run is None:
        absent = f"No run has a {runs[0].label_check_file.name}: evaluate again with --eval-only."
        return {"cards": [], "absent": absent}
    annotations = {str(annotation["id"]): annotation for annotation in seen.objects}
    cards = []
    try:
        for row in run.label_check(_DOUBTFUL):
            if (found := annotations.get(row["annotation_id"])) and row["contradiction"] > 0:
                crop = Crop("doubtful", found["image_id"], tuple(found["bbox"]))
                names = {key: printable(row[key]) for key in ("name", "model_name")}
                cards.append({**row, **names, "crop": crop})
    except (BagsError, OSError) as error:
        return {"cards": [], "absent": str(error)}
    return {"cards": cards, "run": run.label, "file": printable(str(run.label_check_file))}
