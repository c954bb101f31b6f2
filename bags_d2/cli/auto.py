"""Go from a data set to a trained model and a report.

Finds the training and the validation set, or splits one by image; chooses groups and a config;
trains the softmax baseline; fits the recommended method and BAGS; and compares and reports them.
Each step is shown as the command that does it alone. See docs/auto.md.

Example:
    bags-d2 auto mine
    bags-d2 auto mine --config-file configs/Base-Glyphs.yaml --num-gpus 0 --opts SOLVER.MAX_ITER 500
"""

import argparse
from pathlib import Path

from .flags import add_data_flags, add_options_flag

INTERRUPTED = "Run the same command again to go on where it stopped."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_flags(parser, "; one whose name ends in _val is to validate")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: output/DATA_auto")
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help="the base, a path or a name in this package's configs; default: a ResNet-50-FPN with "
        "COCO weights",
    )
    parser.add_argument("--weights", metavar="FILE", help="to start from; default: the base's")
    parser.add_argument("--masks", action="store_true", help="masks as well as boxes")
    parser.add_argument("--num-gpus", type=int, help="0: the CPU; default: all GPUs")
    parser.add_argument("--seed", type=int, default=1, help="of a split by image")
    parser.add_argument("--dry-run", action="store_true", help="show the config and the commands")
    add_options_flag(parser)


def run(args: argparse.Namespace) -> None:
    import shlex

    from ..analysis.auto import make_plan
    from ..utils.files import lock_folder
    from . import parse_args

    plan = make_plan(args)
    print(*plan.files, sep="\n")
    config, text = next(iter(plan.files.items()))
    if config.is_file():  # which may have been edited
        text = config.read_text(encoding="utf-8")
    print(f"\n{text}")
    if not args.dry_run:
        with lock_folder(plan.folder):
            plan.write()
    for words in plan.commands:
        print(f"\n$ bags-d2 {shlex.join(words)}", flush=True)
        if not args.dry_run:
            module, parsed = parse_args(words)
            module.run(parsed)
