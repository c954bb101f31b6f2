#!/usr/bin/env python
"""Write docs/config.md from the comments of bags_d2/config/defaults.py."""

import argparse
import ast
import inspect
import re
from pathlib import Path

import bags_d2.config.defaults
from bags_d2.utils.files import write_atomically

DEFAULT = Path(__file__).resolve().parents[1] / "docs" / "config.md"

HEADER = """\
# Config keys

What `bags_d2.add_bags_config` adds to Detectron2's keys
([Detectron2's own](https://detectron2.readthedocs.io/en/latest/modules/config.html#yaml-config-references)).
Written by `python tools/write_config_reference.py` from `bags_d2/config/defaults.py`; edit that.

A YAML holds what differs from its `_BASE_`: a path, or a list of them, relative to the file or to
the configs of this package. `--method NAME` lays a file of `configs/methods/` or
`configs/ablations/` over a config, as a file with both as its `_BASE_` would; names, paths of YAMLs
and `KEY=value` may be joined by `+`. `KEY VALUE` at the end of a command takes precedence over all
files. An integer is refused where the default is a
float: write `8.0`. Infinity is `.inf`.

`OUTPUT_DIR` follows from the file's name where no file sets it, instead of Detectron2's `./output`:
`lvis_baseline_R50.yaml` writes to `output/lvis_baseline_R50`, with `--method seesaw` to
`output/lvis_seesaw_R50`, and `detector.yaml` with it to `output/detector_seesaw`.

A config that has no file of its own is found by its name: `lvis_seesaw_R50.yaml` is
`lvis_baseline_R50.yaml` with `--method seesaw`. All of this is done by `bags_d2.config`
(`merge_config_file(cfg, path, method)`). Detectron2's own `cfg.merge_from_file` knows nothing of
it: use it for `lvis_bags_R50.yaml`, `lvis_bags_mask_R50.yaml` and `glyphs_bags.yaml`, which spell
out what it would miss.

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
            ast.literal_eval(assignment[2])  # a table could not show anything else
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
        file.write(render(inspect.getsource(bags_d2.config.defaults)))
    print(args.output)


if __name__ == "__main__":
    main()
