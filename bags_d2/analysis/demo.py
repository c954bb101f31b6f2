"""The main job on the built-in data set: softmax against Balanced Group Softmax, in one table.

Every number comes from the commands that a user would run: ``bags-d2 train`` and, for stage 2,
which trains classifiers alone, ``bags-d2 fit``.
"""

import os
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from tabulate import tabulate
from torchvision.ops import nms

from .. import model_zoo
from ..data.images import read_image
from ..errors import BagsError
from ..utils.files import load_json, lock_folder, write_json
from ..utils.processes import bags_d2_command, run_logged
from .comparison import MEASURES
from .detections import corners, group_by, label_detections, winning_classes
from .drawing import draw_boxes, grid
from .media import write_image
from .palette import RIGHT, TRUTH, WRONG
from .plots import plot_ap_bins, plot_weight_norms
from .report import all_weight_norms
from .runs import EvaluatedRun, objects_of, read_ground_truth, read_run

__all__ = ["draw_comparison", "report_demo", "run_demo"]

_CONFIG = "glyphs_baseline.yaml"

_LABELS = {
    "softmax": "softmax",
    "softmax_retrained": "softmax, classifier retrained",
    "bags": "Balanced Group Softmax",
    "bags_joint": "BAGS, joint merge, images by class",
    "crt+cosine": "cRT, cosine classifier (recommended)",
}
_DRAWN = ("bags", "crt+cosine")  # beside softmax, in the pictures
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
    record = {name: {"bbox": run.measures} for name, run in zip(_LABELS, runs, strict=True)}
    record["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    write_json(output / "results.json", record)
    plot_ap_bins(measures, output / "ap_per_bin.png", title="Box AP by training frequency (glyphs)")
    title = "What the long tail does to the classifier (glyphs)"
    norms, counts = all_weight_norms(runs), runs[0].training_instances
    plot_weight_norms(norms, counts, output / "weight_norms.png", title=title)
    categories = load_json(MetadataCatalog.get(runs[0].dataset).json_file)["categories"]
    # The third word of "the character Б (U+0411)".
    characters = {category["id"]: category["def"].split()[2] for category in categories}
    shown = [runs[0], *(run for run in runs if run.label in map(_LABELS.get, _DRAWN))]
    draw_comparison(shown, characters, output / "pictures.png")
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
    """Draw the truth, and what each run makes of it, on the images where rare classes gain most.

    These are the images with the most objects of rare classes that the runs after the first name
    right, on average, beyond those that the first does; among equals, with the most objects. Of
    detections that overlap, the one that scores highest is drawn.

    Args:
        class_labels: what to write on boxes, by category id.
        rows: images.
    """
    first, *others = runs
    rare = {category for category, count in first.count_of.items() if count < _RARE}
    images = read_ground_truth(first)
    objects = objects_of(images)
    found = [[d for d in run.detections() if d["score"] >= _MIN_SCORE] for run in runs]
    gains = Counter()
    for detections, weight in zip(found, [-len(others), *[1] * len(others)], strict=True):
        for row, winner in zip(objects, winning_classes(objects, detections), strict=True):
            if winner == (own := row["category_id"]):
                gains[row["image_id"]] += weight * (1000 if own in rare else 1)
    of_image = [group_by(detections, "image_id") for detections in found]

    def draw(pixels: np.ndarray, boxes: list[dict], colors: list[str], title, legend):
        ids = [box["category_id"] for box in boxes]
        labels, is_rare = [class_labels[i] for i in ids], [i in rare for i in ids]
        return draw_boxes(pixels, corners(boxes), labels, colors, is_rare, title, legend, 330)

    pictures = []
    for row, image_id in enumerate(sorted(images, key=lambda i: -gains[i])[:rows]):
        pixels = read_image(images[image_id]["file_name"], format="RGB")
        truth, is_last = images[image_id]["annotations"], row == min(rows, len(images)) - 1
        legend = [("object (thick: rare class)", TRUTH)] if is_last else ()
        drawn = [draw(pixels, truth, [TRUTH] * len(truth), "" if row else "ground truth", legend)]
        legend = [(f"right (score {_MIN_SCORE} or more)", RIGHT), ("wrong", WRONG)]
        for run, detections in zip(runs, of_image, strict=True):
            boxes = _highest(detections.get(image_id, []))
            colors = [RIGHT if right else WRONG for right in label_detections(boxes, truth)]
            drawn.append(draw(pixels, boxes, colors, "" if row else run.label, legend * is_last))
            legend = []
        pictures.append(drawn)
    write_image(path, grid(pictures))


def _highest(detections: list[dict]) -> list[dict]:
    """Detections in descending order of scores, without those that overlap a higher one."""
    scores = torch.tensor([d["score"] for d in detections])
    kept = nms(torch.from_numpy(corners(detections)).float(), scores, 0.5)
    return [detections[i] for i in kept.tolist()]
