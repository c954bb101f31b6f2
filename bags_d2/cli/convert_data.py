"""Convert a data set between COCO, YOLO, Pascal VOC and LabelMe.

The kind and the splits of the folder are found; LVIS is read as well. What the format cannot hold
is counted in the log. Prints the rows of DATASETS.REGISTER for the result. See docs/datasets.md.

Example:
    bags-d2 convert-data mine --to yolo --output mine_yolo
"""

import argparse

from .flags import add_data_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_data_flags(parser)
    parser.add_argument(
        "--to", required=True, choices=("coco", "yolo", "voc", "labelme"), help="format to write"
    )
    parser.add_argument("--output", required=True, help="folder to write, which must not exist")
    parser.add_argument("--copy", action="store_true", help="copy the images; default: link them")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from ..data.formats import find_dataset
    from ..data.formats.convert import convert_dataset
    from ..errors import ConfigError

    if bool(args.data) == bool(args.row):
        raise ConfigError("Name either a folder or rows (--row NAME KIND ANNOTATIONS IMAGES).")
    rows = args.row or find_dataset(args.data)
    print("DATASETS:\n  REGISTER:")
    for row in convert_dataset(rows, args.to, args.output, args.copy):
        print(f"    - {list(row)}")
