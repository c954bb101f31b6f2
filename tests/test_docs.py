"""What README and docs say can be done."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import own_data
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import write_config_reference

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
# What a block of commands needs that a test has not, by the word after "bash needs=".
KNOWN_NEEDS = {
    *("network", "lvis", "gpu", "slurm", "checkpoints"),
    *("minutes", "hours"),  # too long for a test; the tools have tests of their own
    "demo",  # the output of make demo
}


def blocks(page):
    """The info string and the content of each block of shell commands."""
    return re.findall(r"```bash([^\n]*)\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_python_of_the_readme_runs(number, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(SNIPPETS[number], f"README.md snippet {number}", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    text = page.read_text()
    named = re.findall(
        r"\b((?:configs|tools|docs|benchmarks|demo)/[\w./-]+\.(?:yaml|py|md|png))", text
    )
    # Configs of the reader's own data set, and of a method of the reader's own.
    absent = [p for p in named if not (ROOT / p).exists() and "mine_" not in p and "yours" not in p]
    assert not absent
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    assert not [link for link in links if not (page.parent / link).exists()]


def test_the_config_reference_is_that_of_the_code():
    source = (ROOT / "bags_d2" / "config" / "defaults.py").read_text()
    expected = write_config_reference.render(source)
    assert (ROOT / "docs" / "config.md").read_text() == expected, (
        "run tools/write_config_reference.py"
    )
    keys = re.findall(r"cfg\.([A-Z_.0-9]+) = (?!CfgNode)", source)
    assert len(keys) > 20
    assert all(f"`{key}`" in expected for key in keys)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_run_or_says_what_it_needs(page):
    for info, _ in blocks(page):
        word = info.strip()
        known = word in ("", "run=own") or word.removeprefix("needs=") in KNOWN_NEEDS
        assert known, f"{page.name}: ```bash {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_in_commands_are_those_of_the_tools(page):
    for _, block in blocks(page):
        for line in commands(block):
            script = next((w for w in line.split() if w.endswith(".py")), None)
            if script is None or not (ROOT / script).is_file():
                continue
            text = (ROOT / script).read_text()
            flags = set(re.findall(r"(?<= )--[a-z][a-z0-9-]+", line.split(script)[1]))
            of_detectron2 = {
                *("--config-file", "--num-gpus", "--num-machines", "--machine-rank"),
                *("--dist-url", "--resume", "--eval-only", "--method"),
            }
            own = set(re.findall(r'"(--[a-z0-9-]+)"', text))
            uses_detectron2s = "argument_parser(" in text
            unknown = flags - own - (of_detectron2 if uses_detectron2s else set())
            assert not unknown, f"{page.name}: {script} has no {unknown}"


def commands(block):
    """Commands of a block, with continued lines joined and comments left out."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in map(str.strip, lines) if line and not line.startswith("#")]


def run(command, folder):
    """Run a documented command in a folder that looks like the project's."""
    words = command.replace("python ", f"{sys.executable} ", 1)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, shell=True, capture_output=True, text=True, cwd=folder, env=environment
    )
    assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture
def project(tmp_path):
    """A folder with the parts of the project that commands name."""
    for name in ("configs", "checkpoints", "tools", "demo", "docs", "train_net.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


RUNNABLE = [(page, block) for page in PAGES for info, block in blocks(page) if not info.strip()]


@pytest.mark.parametrize(("page", "block"), RUNNABLE, ids=lambda x: getattr(x, "name", "block"))
def test_commands_of_the_docs_run(page, block, project):
    for command in commands(block):
        run(command, project)
        outputs = re.findall(r"--output (\S+)", command)
        assert all((project / output).exists() for output in outputs)


def test_there_are_commands_to_run():
    assert len(RUNNABLE) >= 4


@pytest.fixture
def own_project(project):
    """The reader's project: the configs of docs/own_data.md, made small, and a data set."""
    own_data.build(project / "mine")
    (project / "configs").unlink()
    shutil.copytree(ROOT / "configs", project / "configs")
    page = (ROOT / "docs" / "own_data.md").read_text()
    for name, text in re.findall(r"```yaml\n# (configs/\S+)\n(.*?)```", page, re.DOTALL):
        # The detector of the tests in place of a ResNet-50 with weights from the network.
        text = re.sub(r'"coco/coco_baseline_R50.yaml"', f'"{ROOT}/tests/tiny.yaml"', text)
        text = re.sub(r'WEIGHTS: "detectron2://.*"', 'WEIGHTS: ""', text)
        text = re.sub(r"MAX_ITER: \d+", "MAX_ITER: 8", text)
        text = re.sub(r"STEPS: \(.*\)", "STEPS: (6,)", text)
        (project / name).write_text(text)
    return project


@pytest.mark.slow
def test_own_data_from_the_json_to_the_pictures(own_project):
    page = ROOT / "docs" / "own_data.md"
    printed = {
        command: run(command, own_project)
        for info, block in blocks(page)
        if info.strip() == "run=own"
        for command in commands(block)
    }
    assert len(printed) == 6
    groups = next(out for command, out in printed.items() if "show_groups" in command)
    assert "1 class has none and cannot be learned: washer" in groups
    assert "GROUP_THRESHOLDS" in groups  # no class has 1000 instances: others are proposed
    out = own_project / "output"
    results = json.loads((out / "mine_bags" / "inference" / "results.json").read_text())
    assert {"AP", "AP1", "AP2", "AP3", "bAP"} <= set(results["bbox"])
    assert (out / "mine_groups.png").stat().st_size > 10_000
    assert (out / "mine_comparison" / "winning_groups.png").is_file()
    report = (out / "mine_report.html").read_text()
    for name in own_data.NAMES.values():
        assert f'data-value="{name}"' in report
    pictures = list((out / "mine_pictures").iterdir())
    assert len(pictures) == len(list((own_project / "mine" / "images").iterdir()))
