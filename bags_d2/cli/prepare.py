"""Build a data set that this package has a script for.

What follows the name are the flags of its script; "bags-d2 prepare glyphs --help" shows them.

Example:
    bags-d2 prepare glyphs glyphs_tiny --root datasets
"""

import argparse
from pathlib import Path

_SCRIPTS = Path(__file__).parents[1] / "data" / "scripts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = sorted(p.stem.removeprefix("prepare_") for p in _SCRIPTS.glob("prepare_*.py"))
    parser.add_argument("data_set", choices=names, help=f"one of {', '.join(names)}")
    parser.add_argument("flags", nargs="...", help="those of its script")


def run(args: argparse.Namespace) -> None:
    import importlib
    import sys

    script = importlib.import_module(f"bags_d2.data.scripts.prepare_{args.data_set}")
    sys.argv = [f"bags-d2 prepare {args.data_set}", *args.flags]
    script.main()
