"""The main job on the built-in data set: softmax against Balanced Group Softmax, in one table.

Every number comes from the commands that a user would run: ``bags-d2 train`` and, for stage 2,
which trains classifiers alone, ``bags-d2 fit``.
"""

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import MetadataCatalog
from tabulate import tabulate

from .. import model_zoo
from ..data.images import read_image
from ..errors import BagsError
from ..utils.files import load_json, lock_folder, write_atomically, write_json
from ..utils.processes import bags_d2_command, run_logged
from .comparison import MEASURES
from .detections import corners, group_by, label_detections
from .drawing import draw_boxes, grid
from .palette import RIGHT, TRUTH, WRONG
from .plots import plot_ap_bins, plot_weight_norms
from .report import all_weight_norms
from .runs import EvaluatedRun, read_ground_truth, read_run

__all__ = ["draw_comparison", "report_demo", "run_demo"]

_CONFIG = "glyphs_baseline.yaml"

_LABELS = {
    "softmax": "softmax",
    "softmax_retrained": "softmax, classifier retrained",
    "bags": "Balanced Group Softmax",
    "bags_joint": "BAGS, joint merge, images by class",
    "crt+cosine": "cRT, cosine classifier (recommended)",
}
_RARE = 10  # training instances: classes with fewer are drawn thick
_MIN_SCORE = 0.3


def run_demo(output: Path, seed: int = 1, from_scratch: bool = False, online: bool = False) -> str:
    """Build the data set, run every model of the demo, and report.

    Args:
        output: folder of the runs.
        seed: of stage 2, and of the baseline if that is trained.
        from_scratch: train the softmax baseline as well, instead of the carried one.
        online: train stage 2 from images, not from cached features.

    Returns:
        The table as text.
    """
    with lock_folder(output):
        # Stale as soon as a run of this demo writes.
        (output / "results.json").unlink(missing_ok=True)
        start = time.perf_counter()
        root = os.environ.get("DETECTRON2_DATASETS", "datasets")
        prepare = bags_d2_command("prepare", "glyphs", "glyphs", "--root", root)
        if subprocess.run(prepare).returncode:
            raise BagsError("The data set could not be built (see above).")
        seconds = {"dataset": time.perf_counter() - start}

        weights = model_zoo.get_checkpoint(_CONFIG)
        with_seed = ("SEED", str(seed))
        if from_scratch:
            # --resume: an interrupted training is continued.
            folder = output / "glyphs_baseline"
            seconds["softmax_training"] = _run("train", folder, "--resume", *with_seed)
            weights = folder / "model_final.pth"
        detector = ("MODEL.WEIGHTS", str(weights))
        seconds["softmax"] = _run("train", output / "softmax", "--eval-only", *detector)
        for name in list(_LABELS)[1:]:
            folder, method = output / name, ("--method", name)
            if online:
                seconds[name] = _run("train", folder, *method, *with_seed, *detector)
                continue
            cache = ("--cache", str(output / "features"), "--cache-dtype", "float16")
            fitted = ("MODEL.WEIGHTS", str(folder / "model_final.pth"))
            seconds[name] = _run("fit", folder, *method, *cache, *with_seed, *detector)
            seconds[name] += _run("train", folder, *method, "--eval-only", *fitted)
        return report_demo(output, seconds)


def _run(command: str, output_dir: Path, *options: str) -> float:
    """Run a command, and return the seconds that it took."""
    words = [command, "--config-file", _CONFIG, *options, "OUTPUT_DIR", str(output_dir)]
    return run_logged(bags_d2_command(*words), output_dir / "console.txt")


def report_demo(output: Path, seconds: Mapping[str, float]) -> str:
    """Write ``results.json``, the charts and the pictures of a finished demo.

    Args:
        output: folder with a run of each method, in a folder of its name.
        seconds: duration of each step, for the record.

    Returns:
        The table as text.
    """
    runs = [read_run(output / name, label) for name, label in _LABELS.items()]
    measures = {run.label: run.measures for run in runs}
    record = {name: {"bbox": dict(run.measures)} for name, run in zip(_LABELS, runs, strict=True)}
    record["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    write_json(output / "results.json", record)
    title = "Box AP by training frequency (glyphs)"
    plot_ap_bins(measures, output / "ap_per_bin.png", title=title)
    title = "What the long tail does to the classifier (glyphs)"
    counts, path = runs[0].training_instances, output / "weight_norms.png"
    plot_weight_norms(all_weight_norms(runs), counts, path, title=title)
    categories = load_json(MetadataCatalog.get(runs[0].dataset).json_file)["categories"]
    # The third word of "the character Б (U+0411)".
    characters = {category["id"]: category["def"].split()[2] for category in categories}
    draw_comparison(runs, characters, output / "pictures.png")
    table = tabulate(
        [[name, *map(values.get, MEASURES)] for name, values in measures.items()],
        headers=["", *MEASURES],
        floatfmt=".1f",
        missingval="-",
    )
    return (
        f"{table}\n\nBox AP in % on {runs[0].dataset}, measured by this run in "
        f"{sum(seconds.values()):.0f} s.\nAP1..AP4: classes with 0-9, 10-99, 100-999, 1000+ "
        "training instances; bAP: their mean.\n"
        f"Charts, pictures and results.json are in {output}."
    )


def draw_comparison(
    runs: Sequence[EvaluatedRun], class_labels: Mapping[int, str], path: Path, rows: int = 4
) -> None:
    """Draw the images with the most objects of rare classes: the truth, then each run's detections.

    ``class_labels``, by category id, are what to write on boxes; each of ``rows`` is one image.
    """
    rare = {category for category, count in runs[0].count_of.items() if count < _RARE}
    truth = read_ground_truth(runs[0])
    found = [
        group_by((d for d in run.detections() if d["score"] >= _MIN_SCORE), "image_id")
        for run in runs
    ]

    def draw(pixels: np.ndarray, boxes: list[dict], colors: list[str], title, legend):
        ids = [box["category_id"] for box in boxes]
        labels, is_rare = [class_labels[i] for i in ids], [i in rare for i in ids]
        return draw_boxes(pixels, corners(boxes), labels, colors, is_rare, title, legend, 330)

    def rarity(image_id) -> int:
        return sum(a["category_id"] in rare for a in truth[image_id]["annotations"])

    chosen = sorted(truth, key=rarity, reverse=True)[:rows]
    pictures = []
    for image_id in chosen:
        is_first, is_last = image_id == chosen[0], image_id == chosen[-1]
        pixels = read_image(truth[image_id]["file_name"], format="RGB")
        objects = truth[image_id]["annotations"]
        legend = [("object (thick: rare class)", TRUTH)] if is_last else ()
        title = "ground truth" if is_first else ""
        row = [draw(pixels, objects, [TRUTH] * len(objects), title, legend)]
        legend = [(f"right (score {_MIN_SCORE} or more)", RIGHT), ("wrong", WRONG)]
        for run, detections in zip(runs, found, strict=True):
            boxes = sorted(detections.get(image_id, ()), key=lambda d: -d["score"])
            colors = [RIGHT if right else WRONG for right in label_detections(boxes, objects)]
            title = run.label if is_first else ""
            row.append(draw(pixels, boxes, colors, title, legend if is_last else ()))
            legend = ()
        pictures.append(row)
    _, encoded = cv2.imencode(path.suffix, grid(pictures)[:, :, ::-1])
    with write_atomically(path, "wb") as file:
        file.write(encoded.tobytes())
