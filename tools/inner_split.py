#!/usr/bin/env python
"""Split the images of an annotation file in two, to choose settings without the validation set.

Writes NAME_inner_train.json and NAME_inner_val.json, every fifth image of a seeded order in the
latter, and prints the options that make a config use them.
"""

import argparse
import random
from pathlib import Path

from bags_d2.errors import exit_on_user_error
from bags_d2.utils.files import load_json, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("annotations", type=Path, help="in COCO or LVIS format")
    parser.add_argument("images", help="folder of the images")
    parser.add_argument("output", type=Path, help="folder for the two files")
    parser.add_argument("--kind", choices=("coco", "lvis"), default="coco")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    content = load_json(args.annotations)
    ids = [image["id"] for image in content["images"]]
    random.Random(args.seed).shuffle(ids)
    held_out = set(ids[::5])
    rows = []
    for part in ("inner_train", "inner_val"):
        chosen = {i for i in ids if (i in held_out) == (part == "inner_val")}
        path = args.output / f"{args.annotations.stem}_{part}.json"
        split = {
            **content,
            "images": [image for image in content["images"] if image["id"] in chosen],
            "annotations": [a for a in content["annotations"] if a["image_id"] in chosen],
        }
        write_json(path, split)
        rows.append((part, args.kind, str(path), args.images))
    print(
        f'DATASETS.REGISTER "{tuple(rows)}" '
        """DATASETS.TRAIN "('inner_train',)" DATASETS.TEST "('inner_val',)\""""
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main()
