"""What README and docs say can be done."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_python_of_the_readme_runs(number, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(SNIPPETS[number], f"README.md snippet {number}", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    text = page.read_text()
    named = re.findall(r"\b((?:configs|tools|docs|benchmarks)/[\w./-]+\.(?:yaml|py|md|png))", text)
    # Configs of the reader's own data set.
    absent = [p for p in named if not (ROOT / p).exists() and "mine_" not in p]
    assert not absent
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    assert not [link for link in links if not (page.parent / link).exists()]


def test_configs_named_in_the_table_exist():
    names = re.findall(r"`((?:lvis|coco)_[\w.]+)`", (ROOT / "README.md").read_text())
    names = [name for name in names if not name.endswith("...")]
    assert len(names) > 8
    complete = [name for name in names if not name.endswith("_")]
    assert not [n for n in complete if not (ROOT / "configs" / f"{n}.yaml").exists()]
