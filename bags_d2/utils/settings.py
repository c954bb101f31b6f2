"""Config values as text, to see whether two things were made with the same settings."""

import fnmatch
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode


def select_config(
    cfg: Mapping, include: Sequence[str], exclude: Sequence[str] = ()
) -> dict[str, str]:
    """Values of a config (or its YAML) as text by dotted key, chosen by globs on the keys."""
    selected = {}

    def visit(node: Mapping, prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, Mapping):
                visit(value, f"{name}.")
            elif _matches(name, include) and not _matches(name, exclude):
                # A list and a tuple of the same values mean the same in a config.
                selected[name] = str(list(value) if isinstance(value, tuple) else value)

    visit(cfg, "")
    return dict(sorted(selected.items()))


def config_value(cfg: CfgNode, key: str) -> Any:
    """The value of a dotted key."""
    return functools.reduce(getattr, key.split("."), cfg)


def set_key(content: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested dicts, which are made as needed."""
    *nodes, name = key.split(".")
    for node in nodes:
        content = content.setdefault(node, {})
    content[name] = value


def first_difference(found: Mapping, wanted: Mapping) -> str:
    """The first entry in which two mappings differ, in words; "" if there is none."""
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            there, now = (m.get(name, "not set") for m in (found, wanted))
            return f"{name} is {there} there and {now} now"
    return ""


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)
