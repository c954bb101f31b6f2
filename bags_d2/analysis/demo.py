"""The demo's table, charts and pictures, from the files that its runs wrote."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate

from ..checkpoint.files import read_model_weights
from ..data.class_counts import count_classes
from ..utils.files import load_json, write_json
from .classifier import class_weight_norms
from .detections import draw_comparison
from .plots import plot_ap_bins, plot_weight_norms

__all__ = ["report_demo"]

_TRAIN, _VAL = "glyphs_train", "glyphs_val"
_LABELS = {
    "softmax": "softmax",
    "softmax_retrained": "softmax, classifier retrained",
    "bags": "Balanced Group Softmax",
}
_MEASURES = ("AP", "AP50", "AP1", "AP2", "AP3", "AP4", "bAP", "APr", "APc", "APf")


def report_demo(output: Path, softmax_weights: Path, seconds: Mapping[str, float]) -> str:
    """Write ``results.json``, the charts and the pictures of a finished demo.

    Args:
        output: folder with one run in each of ``softmax``, ``softmax_retrained``, ``bags``.
        softmax_weights: checkpoint of the softmax baseline.
        seconds: duration of each step, for the record.

    Returns:
        The table as text.
    """
    metrics = {name: load_json(output / name / "inference" / "results.json") for name in _LABELS}
    record = {**metrics, "seconds": {name: round(value, 1) for name, value in seconds.items()}}
    write_json(output / "results.json", record)

    box = {_LABELS[name]: result["bbox"] for name, result in metrics.items()}
    plot_ap_bins(box, output / "ap_per_bin.png", title="Box AP by training frequency (glyphs)")
    checkpoints = {
        "softmax": softmax_weights,
        "softmax_retrained": output / "softmax_retrained" / "model_final.pth",
        "bags": output / "bags" / "model_final.pth",
    }
    plot_weight_norms(
        {
            _LABELS[name]: class_weight_norms(read_model_weights(path))
            for name, path in checkpoints.items()
        },
        count_classes(_TRAIN),
        output / "weight_norms.png",
        title="What the long tail does to the classifier (glyphs)",
    )
    _draw_pictures(output)

    table = tabulate(
        [[name, *(values[m] for m in _MEASURES)] for name, values in box.items()],
        headers=["", *_MEASURES],
        floatfmt=".1f",
        missingval="-",
    )
    return (
        f"{table}\n\nBox AP in % on {_VAL}, measured by this run in {sum(seconds.values()):.0f} s."
        "\nAP1..AP4: classes with 0-9, 10-99, 100-999, 1000+ training instances; bAP: their mean."
        f"\nCharts, pictures and results.json are in {output}."
    )


def _draw_pictures(output: Path, count: int = 4) -> None:
    """Draw the validation pictures with the most objects of rare classes."""
    records = DatasetCatalog.get(_VAL)
    metadata = MetadataCatalog.get(_VAL)
    ground_truth = load_json(metadata.json_file)
    rare = frozenset(c["id"] for c in ground_truth["categories"] if c["frequency"] == "r")
    # The second word of "the character Б (U+0411)".
    characters = {c["id"]: c["def"].split()[2] for c in ground_truth["categories"]}
    annotations = _by_image(ground_truth["annotations"])
    rare_objects = {
        image: sum(a["category_id"] in rare for a in anns) for image, anns in annotations.items()
    }
    records.sort(key=lambda r: -rare_objects.get(r["image_id"], 0))
    draw_comparison(
        [{"id": r["image_id"], "file_name": r["file_name"]} for r in records[:count]],
        annotations,
        {
            label: _by_image(
                load_json(output / name / "inference" / _VAL / "lvis_instances_results.json")
            )
            for name, label in _LABELS.items()
        },
        characters,
        rare,
        output / "pictures.png",
    )


def _by_image(rows: list[dict]) -> dict[int, list[dict]]:
    grouped = defaultdict(list)
    for row in rows:
        grouped[row["image_id"]].append(row)
    return grouped
