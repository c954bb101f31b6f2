"""Config files: their bases, the methods laid over them, and the names they are found by.

A *method* is a YAML of ``configs/methods`` or ``configs/ablations`` that holds what the method is
and nothing of the detector or the data, so that it can be laid over any baseline.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, downgrade_config, upgrade_config
from detectron2.config.compat import guess_version

from ..errors import ConfigError, MissingFileError
from ..utils.files import load_yaml
from .lazy_reader import RECORD, attach_lazy_config, read_lazy_config
from .renamed import rename_keys

CONFIGS = Path(__file__).parents[1] / "model_zoo" / "configs"

_BASE = "_BASE_"
BASELINE = "baseline"
_METHODS, _ABLATIONS = "methods", "ablations"
# What a name may end in, and the method that is then laid over the one it begins with.
_SUFFIXES = {"classifier": "softmax_retrained", "RFS": "rfs", "AP_fixed": "ap_fixed"}
# Where files of version 0.4, which stood side by side, are now.
_DATASET_FOLDERS = ("", "lvis_v0.5", "coco", "glyphs")
_FORMER_FOLDERS = (_ABLATIONS, "glyphs_lvis")
_FORMER_METHODS = (
    (re.compile(r"(.+)_beta_all"), r"\1+MODEL.BAGS.OTHERS_SAMPLE_RATIO=.inf"),
    (re.compile(r"(.+)_beta([0-9]+)"), r"\1+MODEL.BAGS.OTHERS_SAMPLE_RATIO=\2.0"),
    (re.compile(r"(.+)_beta([0-9.]+)"), r"\1+MODEL.BAGS.OTHERS_SAMPLE_RATIO=\2"),
    (re.compile(r"(.+)_normalized"), r"\1+cosine"),
)
_FORMER_FILES = {
    "Base-BAGS.yaml": f"{_METHODS}/bags.yaml",
    "Base-AP-fixed.yaml": f"{_METHODS}/ap_fixed.yaml",
}


def list_methods(ablations: bool = False) -> list[str]:
    """Names of the files in ``configs/methods``, or else in ``configs/ablations``."""
    folder = CONFIGS / (_ABLATIONS if ablations else _METHODS)
    return sorted(path.stem for path in folder.glob("*.yaml"))


def find_config(path: str) -> tuple[str, tuple[str, ...]]:
    """The file that a path stands for, and the methods that its name lays over that file.

    Where there is no such file, ``lvis_seesaw_R50.yaml`` is ``lvis_baseline_R50.yaml`` with the
    method ``seesaw``, and a file that used to be in this place is found where it is now. What the
    present folder lacks is looked for among the configs of this package.

    Returns:
        A path and methods. They are ``path`` itself and none if nothing fits.
    """
    found = _find_config(path)
    if os.path.isfile(found[0]) or os.path.isabs(path) or "://" in path:
        return found
    packaged = _find_config(str(CONFIGS / path.removeprefix("configs/")))
    return packaged if os.path.isfile(packaged[0]) else found


def _find_config(path: str) -> tuple[str, tuple[str, ...]]:
    folder, name = os.path.split(path)
    stem, extension = os.path.splitext(name)
    if "://" in path or os.path.isfile(path) or extension not in (".yaml", ".py"):
        return path, ()
    if name in _FORMER_FILES:
        return os.path.join(folder, _FORMER_FILES[name]), ()
    for place in (os.path.join(folder, subfolder) for subfolder in _DATASET_FOLDERS):
        if os.path.isfile(os.path.join(place, name)):
            return os.path.join(place, name), ()
        for baseline in sorted(Path(place).glob(f"*{BASELINE}*{extension}")):
            before, after = baseline.stem.split(BASELINE, 1)
            method = stem.removeprefix(before).removesuffix(after)
            if stem == f"{before}{method}{after}" and _parts_of_method(method):
                return os.path.join(place, baseline.name), (method,)
    if stem.endswith("_AP_fixed"):
        file, methods = _find_config(
            os.path.join(folder, f"{stem.removesuffix('_AP_fixed')}{extension}")
        )
        if os.path.isfile(file):
            return file, (*methods, "AP_fixed")
    if os.path.basename(folder) in _FORMER_FOLDERS:
        found = _find_config(os.path.join(os.path.dirname(folder), name))
        if os.path.isfile(found[0]):
            return found
    return path, ()


def read_config_file(
    path: str | os.PathLike, method: str | None = None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Read a YAML with its ``_BASE_`` as data; a tag that names a Python object is an error.

    Later bases take precedence over earlier ones, and the file itself over all. What makes
    ``STAGE2.ENABLED`` true is preceded by what the baseline's ``STAGE2`` says of weights and
    schedule. If no file sets ``OUTPUT_DIR``, it follows from the names of config and method. A path
    that ends in .py is that of a LazyConfig, which is no data: it is run, and read as keys.

    Args:
        path: see :func:`find_config`, or a URL that Detectron2's PathManager knows. Its ``_BASE_``
            is one path or a list; each is absolute, from the home folder (``~``), relative to the
            file, or the name of a config of this package.
        method: what to lay over the file, joined by "+": names of :func:`list_methods`, followed
            by "_classifier" if only the classifier is to train, paths of YAMLs, and ``KEY=value``.
        overrides: ``path.key=value`` of a LazyConfig; they take precedence over the method.

    Raises:
        MissingFileError, ConfigError: if the file, a ``_BASE_`` or the method does not exist, holds
            no mapping, or is its own ``_BASE_``.
    """
    path = os.fspath(path)
    file, methods = find_config(path)
    is_lazy = file.endswith(".py")
    content = read_lazy_config(file, overrides) if is_lazy else _read_with_bases(file, ())
    content["OUTPUT_DIR"] = baseline_dir = _output_dir(content, file)
    parent, run = os.path.split(baseline_dir.rstrip("/"))
    if methods and os.path.basename(os.path.dirname(path)) == _ABLATIONS:
        parent = os.path.join(parent, _ABLATIONS)
    for name in (*methods, *([method] if method else [])):
        _lay_method(name, content, baseline_dir)
        run = run_name(run, name)
    if content["OUTPUT_DIR"] == baseline_dir:
        content["OUTPUT_DIR"] = os.path.join(parent, run)
    if overrides:
        _merge(read_lazy_config(file, overrides, overridden=True), content, path)
    return content


def merge_config_file(
    cfg: CfgNode, path: str | os.PathLike, method: str | None = None, overrides: Sequence[str] = ()
) -> None:
    """``cfg.merge_from_file`` for what :func:`read_config_file` returns.

    Raises:
        MissingFileError, ConfigError: see :func:`read_config_file`.
        KeyError, ValueError and the like: if it does not fit this config, as yacs says it.
    """
    loaded = CfgNode(read_config_file(path, method, overrides))
    if (file := find_config(os.fspath(path))[0]).endswith(".py"):
        attach_lazy_config(cfg, file, overrides)
    version = loaded.get("VERSION", None) or guess_version(loaded, os.fspath(path))
    if version == cfg.VERSION:
        cfg.merge_from_other_cfg(loaded)
    else:
        old = downgrade_config(cfg, to_version=version)
        old.merge_from_other_cfg(loaded)
        new = upgrade_config(old)
        cfg.clear()
        cfg.update(new)
    scale_schedule(cfg)


def run_name(config: str, method: str | None) -> str:
    """What a run is called: "lvis_baseline_R50" with "seesaw" is "lvis_seesaw_R50"."""
    if not method:
        return config
    method = Path(method).stem if method.endswith(".yaml") else method
    return config.replace(BASELINE, method, 1) if BASELINE in config else f"{config}_{method}"


def scale_schedule(cfg: CfgNode) -> None:
    """Multiply the steps of training by ``SOLVER.SCHEDULE_FACTOR``, which then is 1 again."""
    factor = cfg.SOLVER.SCHEDULE_FACTOR
    cfg.SOLVER.MAX_ITER = round(cfg.SOLVER.MAX_ITER * factor)
    cfg.SOLVER.STEPS = tuple(round(step * factor) for step in cfg.SOLVER.STEPS)
    if factor != 1:  # rounding may put the last step on the end, which no schedule takes
        cfg.SOLVER.STEPS = tuple(s for s in cfg.SOLVER.STEPS if s < cfg.SOLVER.MAX_ITER)
    cfg.SOLVER.SCHEDULE_FACTOR = 1.0


def _files_of_method(name: str) -> list[str]:
    """The files to lay over a baseline, in this order; none if there is no such method."""
    if name.endswith(".yaml"):
        return [name]
    name = _SUFFIXES.get(name, name)
    paths = [CONFIGS / folder / f"{name}.yaml" for folder in (_METHODS, _ABLATIONS)]
    if found := [str(path) for path in paths if path.is_file()]:
        return found[:1]
    for suffix, overlay in _SUFFIXES.items():
        if name.endswith(f"_{suffix}"):
            first = _files_of_method(name.removesuffix(f"_{suffix}"))
            return [*first, *_files_of_method(overlay)] if first else []
    return []


def _parts_of_method(name: str) -> list[str]:
    """The files and the ``KEY=value`` that a method consists of; [] if there is no such method."""
    parts = []
    for part in [name] if name.endswith(".yaml") else name.split("+"):
        files = [part] if "=" in part else _files_of_method(part)
        if not files:
            for former, current in _FORMER_METHODS:
                if former.fullmatch(part):
                    files = _parts_of_method(former.sub(current, part))
                    break
        if not files:
            return []
        parts += files
    return parts


def _inline(part: str) -> dict[str, Any]:
    """The content of a config for ``KEY=value``."""
    key, _, text = part.partition("=")
    try:
        content: Any = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(
            f"--method: the value of '{part}' cannot be read; write it as in YAML."
        ) from None
    for name in reversed(key.split(".")):
        content = {name: content}
    rename_keys(content)
    return content


def _read_with_bases(path: str, above: tuple[str, ...]) -> dict[str, Any]:
    if os.path.realpath(path) in above:
        raise ConfigError(f"'{path}' is its own {_BASE}; remove that line.")
    content = load_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"'{path}' is no config: it must hold 'KEY: value' lines.")
    if RECORD in content:
        name = _node(content, RECORD).get("file")
        raise ConfigError(
            f"'{path}' records a run by the LazyConfig '{name}'; name that file, with its options."
        )
    rename_keys(content)
    bases = content.pop(_BASE, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{_BASE} of '{path}' must be a path, or a list of paths.")
    merged: dict[str, Any] = {}
    baseline_dir = None
    for base in bases:
        named = base
        if "://" not in base:
            base = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        file, methods = find_config(base)
        if not os.path.isfile(file) and os.path.isfile(find_config(named)[0]):
            file, methods = find_config(named)
        within = (*above, os.path.realpath(path))
        update = _read_with_bases(file, within)
        for method in methods:
            _lay_method(method, update, _output_dir(update, file), within)
        _lay(update, merged, path, baseline_dir)
        if os.path.basename(os.path.dirname(file)) not in (_METHODS, _ABLATIONS):
            baseline_dir = _output_dir(merged, file)
    _lay(content, merged, path, baseline_dir)
    return merged


def _lay_method(name: str, content: dict, baseline_dir: str, above: tuple[str, ...] = ()) -> None:
    parts = _parts_of_method(name)
    if not parts:
        known = ", ".join([*list_methods(), *list_methods(ablations=True)])
        raise MissingFileError(
            f"There is no method '{name}'; name the path of a YAML, KEY=value, or one of {known}; "
            "several are joined by '+'."
        )
    for part in parts:
        is_file = part.endswith(".yaml") and "=" not in part
        update = _read_with_bases(part, above) if is_file else _inline(part)
        _lay(update, content, part, baseline_dir)


def _lay(update: dict, into: dict, path: str, baseline_dir: str | None) -> None:
    """Merge, after what stage 2 takes from the baseline, if there is one, where it is turned on."""
    stage2 = _node(into, "STAGE2")
    turned_on = _node(update, "STAGE2").get("ENABLED") and not stage2.get("ENABLED")
    if turned_on and baseline_dir is not None:
        weights = stage2.get("WEIGHTS") or os.path.join(baseline_dir, "model_final.pth")
        _merge({"MODEL": {"WEIGHTS": weights}}, into, path)
        if stage2.get("MAX_ITER"):
            schedule = {"MAX_ITER": stage2["MAX_ITER"], "STEPS": stage2.get("STEPS", ())}
            _merge({"SOLVER": schedule}, into, path)
    _merge(update, into, path)


def _merge(update: dict, into: dict, path: str) -> None:
    for key, value in update.items():
        if not isinstance(value, dict):
            into[key] = value
        elif isinstance(into.setdefault(key, {}), dict):
            _merge(value, into[key], path)
        else:
            raise ConfigError(f"'{path}' has keys below '{key}', which is a value in its {_BASE}.")


def _node(content: dict, key: str) -> dict:
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def _output_dir(content: dict, path: str) -> str:
    return content.get("OUTPUT_DIR") or os.path.join("output", Path(path).stem)
