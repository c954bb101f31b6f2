#!/usr/bin/env python
"""Write docs/config.md from the comments of bags_d2/config.py."""

import argparse
import ast
import inspect
import re
from pathlib import Path

import bags_d2.config
from bags_d2.utils.files import write_atomically

DEFAULT = Path(__file__).resolve().parents[1] / "docs" / "config.md"

HEADER = """\
# Config keys

What `bags_d2.add_bags_config` adds to Detectron2's keys
([Detectron2's own](https://detectron2.readthedocs.io/en/latest/modules/config.html#yaml-config-references)).
Written by `python tools/write_config_reference.py` from `bags_d2/config.py`; edit that instead.

A YAML holds what differs from its `_BASE_`; `KEY VALUE` at the end of a command goes before it. An
integer is refused where the default is a float: write `8.0`. Infinity is `.inf`.

"""


def read_keys(source: str) -> list[tuple[str, str, list[str]]]:
    """Comments, and the keys with their defaults that follow them.

    Returns:
        For each comment: its text, and the lines "KEY = default" below it.
    """
    blocks, comment, keys = [], [], []
    for line in map(str.strip, source.splitlines()):
        assignment = re.fullmatch(r"cfg\.([A-Z_.0-9]+) = (.+)", line)
        if line.startswith("#"):
            if keys:
                blocks.append((" ".join(comment), keys))
                comment, keys = [], []
            comment.append(line.removeprefix("#").strip())
        elif assignment and assignment[2] != "CfgNode()":
            ast.literal_eval(assignment[2])  # anything else could not be told in a table
            keys.append((assignment[1], assignment[2]))
    return [*blocks, (" ".join(comment), keys)]


def render(source: str) -> str:
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for comment, keys in read_keys(source):
        names, defaults = (
            "<br>".join(f"`{x}`" for x in column) for column in zip(*keys, strict=True)
        )
        rows.append(f"| {names} | {defaults} | {comment} |")
    return HEADER + "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=DEFAULT)
    args = parser.parse_args()
    with write_atomically(args.output) as file:
        file.write(render(inspect.getsource(bags_d2.config)))
    print(args.output)


if __name__ == "__main__":
    main()
