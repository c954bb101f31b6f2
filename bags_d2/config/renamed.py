"""Keys that had other names, which files, commands and programs may still use.

A key that is set under both names to different values is a ConfigError.
"""

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode

from ..errors import ConfigError

_FORMER, _CURRENT = "BAGS", "LONG_TAIL"
# With their defaults, under the current names.
_MOVED = {"COUNT_BY": "instances", "CLASS_COUNTS_FILE": "", "CASCADE_AVERAGE": "logits"}


def former_names() -> list[str]:
    """Dotted keys that are still read, and are empty in a config that ``setup_cfg`` returns."""
    return [f"MODEL.{_FORMER}.{name}" for name in _MOVED]


def current_name(key: str) -> str:
    """The name of a dotted key today."""
    node, _, name = key.rpartition(".")
    return f"MODEL.{_CURRENT}.{name}" if node == f"MODEL.{_FORMER}" and name in _MOVED else key


def rename_options(opts: Sequence) -> list:
    """Keys and values of a command, the keys under their current names."""
    renamed, given = list(opts), dict(zip(opts[::2], opts[1::2], strict=False))
    for i, key in enumerate(opts[::2]):
        renamed[2 * i] = current = current_name(str(key))
        if current != key and current in given:
            _require_same(key, given[key], given[current])
    return renamed


def rename_keys(content: dict[str, Any]) -> None:
    """Move keys of a file to their current names, in place. An empty value is none."""
    model = content.get("MODEL") if isinstance(content, dict) else None
    former = model.get(_FORMER) if isinstance(model, dict) else None
    for name in _MOVED.keys() & former.keys() if isinstance(former, dict) else ():
        value = former.pop(name)
        if value != "" and isinstance(current := model.setdefault(_CURRENT, {}), dict):
            _require_same(f"MODEL.{_FORMER}.{name}", value, current.setdefault(name, value))


def long_tail(cfg: CfgNode) -> CfgNode:
    """``MODEL.LONG_TAIL``, where a program may have set keys under their former names."""
    node = cfg.MODEL[_CURRENT].clone()
    node.defrost()
    for name, default in _MOVED.items():
        value = cfg.MODEL[_FORMER].get(name, "")
        if value != "":
            if node[name] != default:
                _require_same(f"MODEL.{_FORMER}.{name}", value, node[name])
            node[name] = value
    return node


def _require_same(former: str, value: object, current: object) -> None:
    if value != current:
        raise ConfigError(
            f"{former} is '{value}' but {current_name(former)}, its name now, is '{current}'; set "
            "the latter alone."
        )
