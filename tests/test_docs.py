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
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import write_config_reference

from bags_d2 import cli, merge_group_probs

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
# What a block of commands needs that a test has not, by the word after "bash needs=".
KNOWN_NEEDS = {
    *("network", "lvis", "gpu", "slurm", "checkpoints"),
    *("minutes", "hours"),  # too long for a test; the commands have tests of their own
    "demo",  # the output of make demo
    "data",  # of the reader's own; the commands have tests of their own
}


def blocks(page):
    """The info string and the content of each block of shell commands."""
    return re.findall(r"```bash([^\n]*)\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_python_of_the_readme_runs(number, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(SNIPPETS[number], f"README.md snippet {number}", "exec"), {})


def test_the_page_about_the_loss():
    text = (ROOT / "docs" / "loss_alone.md").read_text()
    page = {}
    torch.manual_seed(0)
    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(snippet, "docs/loss_alone.md", "exec"), page)
    page["roi_heads"].fastrcnn_loss = page["torchvision_loss"]
    predictor, groups = page["model"].roi_heads.box_predictor, page["groups"]
    assert predictor.cls_score.weight.grad.abs().sum() > 0
    assert {"loss_classifier", "loss_box_reg"} <= page["losses"].keys()
    # torchvision's scores, of what the predictor returns, are those of the merge.
    x = torch.randn(40, predictor.cls_score.in_features) * 5
    logits, _ = predictor(x)
    merged = merge_group_probs(predictor.cls_score(x), groups, how="joint")
    torch.testing.assert_close(logits.softmax(dim=1)[:, 1:], merged[:, :-1])
    detections = page["detections"][0]
    assert set(detections["labels"].tolist()) <= {1, 2, 3, 4}


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
def test_flags_in_commands_exist(page):
    """Those of commands that no test runs included."""
    for line in (line for _, block in blocks(page) for line in commands(block)):
        found = re.search(r"(?:bags-d2|-m bags_d2|train_net\.py) ?([a-z-]*)(.*)", line)
        if found is None or found[1].startswith("-"):
            continue
        own = cli.build_parser(found[1] or "train").format_help()
        unknown = set(re.findall(r"(?<= )--[a-z][a-z0-9-]+", found[2])) - set(
            re.findall(r"--[a-z0-9-]+", own)
        )
        assert not unknown, f"{page.name}: {line}: there is no {unknown}"


def commands(block):
    """Commands of a block, with continued lines joined and comments left out."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in map(str.strip, lines) if line and not line.startswith("#")]


def run(command, folder):
    """Run a documented command in a folder that looks like the project's."""
    words = re.sub(r"^bags-d2", f"{sys.executable} -m bags_d2", command)
    words = re.sub(r"^python", sys.executable, words)
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
    groups = next(out for command, out in printed.items() if " groups " in command)
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
