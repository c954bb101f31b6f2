"""What README, docs and the help of commands say can be done: it is run, or at least could be."""

import dataclasses
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import own_data
import prepare_glyphs
import pytest
import torch
from commands import bags_d2_here, run_command
from documentation import (
    PAGES,
    ROOT,
    CommandError,
    blocks,
    check_command,
    check_inline,
    check_yaml,
    example,
    inline_commands,
)

sys.path.insert(0, str(ROOT / "tools"))
import write_config_reference

from bags_d2 import cli, merge_group_probs
from bags_d2.analysis import demo
from bags_d2.data.formats import find_dataset
from bags_d2.data.formats.convert import convert_dataset

# What a block of commands may need that a test has not: "bash needs=lvis".
NEEDS = {
    *("network", "lvis", "gpu", "slurm"),
    "checkpoints",  # the authors'
    *("minutes", "hours"),  # too long for a test
    "data",  # that takes minutes to draw, or is the reader's own
}
# Examples of --help, by the walk below that runs them, or by what they need. One that is in no list
# runs as it stands.
OWN_EXAMPLES = ("runs", "report", "publish", "analyze", "convert-data", "add-class")
GLYPHS_EXAMPLES = ("demo", "exposure", "calibrate", "thresholds", "evaluate", "propose-groups")
EXAMPLE_NEEDS = {
    **dict.fromkeys(("train", "fit"), "lvis"),
    **dict.fromkeys(("auto", "compare"), "minutes"),
    "convert": "checkpoints",
}
COMMANDS = [name for name in cli.COMMANDS if name in cli._commands()]
EXAMPLES = set(COMMANDS) - {*OWN_EXAMPLES, *GLYPHS_EXAMPLES, *EXAMPLE_NEEDS}
# Files that are there once the data sets are, and those of the reader and of the authors.
GIVEN = {
    "output/demo",  # of make demo
    *("datasets", "muscima-pp", "mine", "mine_yolo", "owls", "photos"),
    *("gs_mask_rcnn_r50_fpn_1x_lvis.pth", "label2binlabel.pt", "pred_slice_with0.pt"),
}
ALL_BLOCKS = {page: blocks(page) for page in PAGES}


def test_readme_lists_every_page():
    assert len(PAGES) == len(set(PAGES))
    assert set(PAGES) >= set((ROOT / "docs").glob("*.md"))


def page_id(page):
    return str(page.relative_to(ROOT))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with the parts of the project that commands name, to work in."""
    for path in ROOT.iterdir():
        if path.name not in ("configs", "output") and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    page = (ROOT / "docs" / "own_data.md").read_text()
    for name, text in re.findall(r"```yaml\n# (configs/\S+)\n(.*?)```", page, re.DOTALL):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command):
    """Run a documented command in the present folder, within this process."""
    program, *words = shlex.split(command)
    if program == "python":
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sys, "argv", words)
            runpy.run_path(words[0], run_name="__main__")
    elif words[-1] == "--help":
        with pytest.raises(SystemExit):
            cli.main(words)
    else:
        assert program == "bags-d2"
        # As the shell does it.
        words = [p for w in words for p in (sorted(map(str, Path().glob(w))) if "*" in w else [w])]
        run_command(*words)
    outputs = re.findall(r"(?:--output|OUTPUT_DIR) (\S+)", command)
    assert all(Path(output).exists() for output in outputs), command


def run_blocks(page, tag=""):
    """Run the blocks of a page that carry a tag, in one go; the names that Python then knows."""
    names = {}
    for block in ALL_BLOCKS[page]:
        if block.tag == tag:
            for command in block.commands:
                run(command)
            if block.language == "python":
                exec(compile(block.text, page.name, "exec"), names)
    return names


def is_run(page):
    return any(b.language in ("bash", "python") and not b.tag for b in ALL_BLOCKS[page])


LOSS, DEPLOYMENT = (ROOT / "docs" / name for name in ("loss_alone.md", "deployment.md"))


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if is_run(page) and page not in (LOSS, DEPLOYMENT)],
    ids=page_id,
)
def test_blocks_without_a_tag_run(page, project):
    run_blocks(page)


def test_the_page_about_the_loss():
    torch.manual_seed(0)
    page = run_blocks(LOSS)
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


@pytest.mark.slow
def test_the_page_about_deployment(project, capsys):
    page = run_blocks(DEPLOYMENT)
    found = page["predictor"]("docs/images/demo_input.png")["instances"]
    assert capsys.readouterr().out.count("[") >= int((found.scores > 0.5).sum()) > 0
    boxes = page["found"]["boxes"][:5] / page["scale"]
    np.testing.assert_allclose(boxes, found.pred_boxes.tensor[:5], atol=0.5)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_blocks_say_what_they_are_and_need(page):
    for block in ALL_BLOCKS[page]:
        assert block.language in ("bash", "python", "yaml", "text", "mermaid", "bibtex"), block
        tags = {"", "run=own", "run=glyphs", *(f"needs={need}" for need in NEEDS)}
        assert block.tag in (tags if block.language == "bash" else {""}), block


def test_every_command_could_run(project):
    """Pages may use what commands of those before them write."""
    there = set(GIVEN)
    for page in PAGES:
        for block in ALL_BLOCKS[page]:
            for command in block.commands:
                check_command(command, there)
            if block.language == "yaml":
                check_yaml(block.text, project)
        for command in inline_commands(page):
            check_inline(command)
    for name in COMMANDS:
        assert example(name)
        for command in example(name):
            check_command(command, there)


@pytest.mark.parametrize(
    "command",
    [
        "bags-d2 trian --config-file configs/glyphs_bags.yaml",
        "bags-d2 train --config-file configs/glyphs_bags.yaml --epochs 3",
        "bags-d2 train --config-file configs/glyphs_bags.yaml --num-gpus two",
        "bags-d2 predict --config-file glyphs_bags.yaml --input docs/images",
        "bags-d2 predict --config-file glyphs_bags.yaml --input docs/nowhere.png --output x",
        "bags-d2 report output/never_run",
        "bags-d2 prepare glyphs glyphs_huge",
        "python tools/nothing.py",
        "python benchmarks/loss.py --everything",
        "make everything",
        "python -m pytest tests/nowhere",
        "torchrun -m bags_d2 train --config-file configs/glyphs_bags.yaml --epochs 3",
        'srun bash -c "bags-d2 train --config-file configs/glyphs_bags.yaml --epochs $N"',
        "conda install bags_d2",
    ],
)
def test_a_command_that_could_not_run_is_noticed(command, project):
    with pytest.raises(CommandError):
        check_command(command, set())


@pytest.mark.parametrize(
    "command",
    [
        "bags-d2 train --config-file configs/glyphs_bags.yaml --method none",
        "bags-d2 train --config-file configs/nowhere.yaml",
        "bags-d2 train --config-file configs/glyphs_bags.yaml MODEL.NOTHING 3",
        "bags-d2 compare --config-file configs/glyphs_baseline.yaml --methods none",
    ],
)
def test_a_config_that_is_not_there_is_noticed(command, project):
    with pytest.raises(Exception, match=r"none|nowhere|NOTHING"):
        check_command(command, set())


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_that_are_named_exist(page):
    text = page.read_text()
    named = re.findall(
        r"\b((?:configs|tools|docs|benchmarks|demo)/[\w./-]+\.(?:yaml|py|md|png))", text
    )
    # Configs of the reader's own data set, and of a method of the reader's own. Checkpoints were
    # made by scripts of their time.
    absent = [p for p in named if not (ROOT / p).exists() and "mine_" not in p and "yours" not in p]
    assert set(absent) <= ({"tools/fit_classifier.py"} if "checkpoints" in str(page) else set())
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


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_examples_of_help_run(name, project):
    photos = project / "photos"
    photos.mkdir()
    shutil.copy(ROOT / "docs" / "images" / "demo_input.png", photos / "photo.jpg")
    own_data.build(project / "as_coco")
    convert_dataset(find_dataset("as_coco"), "coco", "mine")
    (project / "datasets").unlink()
    for command in example(name):
        if "--num-gpus 8" not in command:
            run(command)


def shorten(project, name, steps):
    """Make the schedules of a config short."""
    path = project / "configs" / name
    text = re.sub(r"MAX_ITER: \d+", f"MAX_ITER: {steps}", path.read_text())
    path.write_text(re.sub(r"STEPS: \(.*\)", f"STEPS: ({steps - 2},)", text))


@pytest.mark.slow
def test_own_data_from_the_files_to_the_pictures(project):
    """The reader's data, with the detector of the tests for a ResNet-50 of the network."""
    own_data.build(project / "as_coco")
    convert_dataset(find_dataset("as_coco"), "yolo", "mine_yolo")
    own_data.build_one_class(project / "owls", "owl")
    config = project / "configs" / "mine_baseline.yaml"
    text = re.sub(r'"coco/coco_baseline_R50.yaml"', f'"{ROOT}/tests/tiny.yaml"', config.read_text())
    config.write_text(re.sub(r'WEIGHTS: "detectron2://.*"', 'WEIGHTS: ""', text))
    shorten(project, "mine_baseline.yaml", 8)
    for page in ("own_data.md", "after_training.md", "datasets.md"):
        run_blocks(ROOT / "docs" / page, "run=own")
    for name in OWN_EXAMPLES:
        shutil.rmtree("mine_yolo", ignore_errors=True)
        for command in example(name):
            run(command)
    out = project / "output"
    results = json.loads((out / "mine_bags" / "inference" / "results.json").read_text())
    assert {"AP", "AP1", "AP2", "AP3", "bAP"} <= set(results["bbox"])
    assert (out / "mine_groups.png").stat().st_size > 10_000
    assert (out / "mine_comparison" / "winning_groups.png").is_file()
    report = (out / "mine_report.html").read_text()
    for name in own_data.NAMES.values():
        assert f'data-value="{name}"' in report
    images = list((project / "mine" / "images" / "val").iterdir())
    assert len(list((out / "mine_pictures").iterdir())) == len(images)


@pytest.mark.slow
def test_the_demo_and_what_is_done_with_it(project, monkeypatch):
    """On a twentieth of glyphs, with short schedules, in one process."""
    glyphs = prepare_glyphs.PRESETS["glyphs"]
    counts = tuple(max(1, n // 20) for n in glyphs.counts)
    small = dataclasses.replace(glyphs, counts=counts, val_per_class=8)
    monkeypatch.setitem(prepare_glyphs.PRESETS, "glyphs", small)
    (project / "datasets").unlink()
    prepare_glyphs.build_glyphs("glyphs", project / "datasets", num_workers=1, progress=False)
    for name in ("glyphs_baseline.yaml", "glyphs_bags.yaml"):
        shorten(project, name, 8)
        (project / name).symlink_to(Path("configs", name))  # before those of the package
    monkeypatch.setattr(demo, "run_logged", lambda words, log: run_command(*words[3:]) or 1.0)
    in_process = SimpleNamespace(run=lambda words: bags_d2_here(*words[3:]))
    monkeypatch.setattr(demo, "subprocess", in_process)
    for command in example("demo"):
        run(command)
    for page in ("analysis.md", "after_training.md", "deployment.md", "methods.md"):
        run_blocks(ROOT / "docs" / page, "run=glyphs")
    shutil.rmtree("output/glyphs_fracal")
    for name in GLYPHS_EXAMPLES[1:]:
        for command in example(name):
            run(command)
    results = json.loads(Path("output/demo/results.json").read_text())
    assert set(results) == {*demo._LABELS, "seconds"}
