"""The folder of an evaluated run, as training and evaluation leave it."""

import csv
import json

COLUMNS = [
    *("category_id", "name", "frequency"),
    *("training_instances", "validation_instances", "AP", "AP50"),
]


def write_run(folder, dataset, names, counts, aps, detections, measures, task="bbox"):
    """Write a run's folder.

    Args:
        folder: its OUTPUT_DIR.
        dataset: name of the evaluated data set.
        names: class name by category id.
        counts: training instances by category id.
        aps: AP of each class in percent; None where it is not evaluated.
        detections: in COCO's results format.
        measures: content of results.json for the task.
        task: "bbox" or "segm".
    """
    where = folder / "inference" / dataset
    where.mkdir(parents=True)
    with open(where / f"per_class_{task}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for (i, name), ap in zip(names.items(), aps, strict=True):
            cell = "" if ap is None else ap
            writer.writerow((i, name, "", counts[i], 1, cell, cell))
    (folder / "inference" / "results.json").write_text(json.dumps({task: measures}))
    (where / "lvis_instances_results.json").write_text(json.dumps(detections))
    return folder
