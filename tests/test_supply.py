"""What is installed: pinned by hash, and under licences that let the project be used anywhere."""

import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()
LOCKED = dict(re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==([\w.]+)", LOCK, re.MULTILINE))
EXTRAS = PROJECT["optional-dependencies"]
DIRECT, OPTIONAL = (
    [re.match(r"[\w.-]+", line)[0] for line in lines if not line.startswith("bags-d2[")]
    for lines in (PROJECT["dependencies"], [x for extra in EXTRAS.values() for x in extra])
)
PERMISSIVE = re.compile(r"\b(MIT|BSD|FreeBSD|Apache|PSF|Python Software Foundation|HPND|MPL)\b")
# Its metadata says nothing; the licence file in its repository is BSD's.
SILENT = {"lvis"}


def test_every_locked_file_has_a_hash():
    entries = re.split(r"^(?=[\w.-]+(?:\[[\w,-]+\])?==)", LOCK, flags=re.MULTILINE)[1:]
    assert len(entries) == len(LOCKED) > 50
    for entry in entries:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry.splitlines()[0]


def test_the_lock_holds_what_the_project_asks_for():
    pinned = dict(re.findall(r"^(torch\w*)==(\S+)", (ROOT / "requirements.txt").read_text(), re.M))
    assert len(pinned) == 2
    for name, version in pinned.items():
        assert LOCKED[name] == version
    assert {*DIRECT, *OPTIONAL} <= set(LOCKED)
    text = (ROOT / "third_party" / "detectron2" / "repack.py").read_text()
    assert re.search(r"\b[0-9a-f]{64}\b", text), "Detectron2's wheel is pinned by its hash"


@pytest.mark.parametrize("name", DIRECT)
def test_licences_are_permissive(name):
    info = metadata.metadata(name)
    kinds = [c for c in info.get_all("Classifier") or [] if c.startswith("License")]
    text = " ".join([info.get("License-Expression") or "", info.get("License") or "", *kinds])
    assert name in SILENT or PERMISSIVE.search(text), text[:200]


def test_no_copyleft_by_the_back_door():
    for name in LOCKED:
        try:
            info = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            continue
        text = f"{info.get('License-Expression') or ''} {(info.get('License') or '')[:60]}"
        assert not re.search(r"\b(A?GPL|LGPL)", text), f"{name}: {text}"
