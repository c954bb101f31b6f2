"""An installed package has its configs, its checkpoints and the three-line API, away from here."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
USE = """
import sys
from pathlib import Path
import numpy as np
import bags_d2
assert Path(bags_d2.__file__).is_relative_to(sys.argv[1]), bags_d2.__file__
from bags_d2 import LongTailPredictor, model_zoo
predictor = LongTailPredictor.from_config_file("glyphs_bags.yaml")
instances = predictor(np.full((60, 80, 3), 90, np.uint8))["instances"]
assert len(predictor.class_names) == 40
cfg = model_zoo.get_config("ablations/lvis_bags_beta0_R50.yaml")
assert cfg.MODEL.BAGS.OTHERS_SAMPLE_RATIO == 0
assert model_zoo.get_config("lazy/lvis_baseline_mask_R50.py").train.max_iter == 75_100
from bags_d2.config import files
assert len([p for s in ("yaml", "py") for p in files.CONFIGS.rglob(f"*.{s}")]) == int(sys.argv[2])
laid = LongTailPredictor.from_config_file("glyphs_baseline.yaml", method="bags")
assert laid.cfg == predictor.cfg
from jinja2 import PackageLoader, Environment
Environment(loader=PackageLoader("bags_d2.analysis", ".")).get_template("report.html")
from bags_d2.data.lvis_v1 import lvis_v1_counts
assert len(lvis_v1_counts()["instance_count"]) == 1203
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Folder with the package as pip installs it, without what it depends on."""
    if int(metadata.version("setuptools").partition(".")[0]) < 77:
        pytest.skip("needs the setuptools of pyproject.toml, since the build is not isolated")
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy of what is under version control, so that nothing else slips in, nor is left here.
    source = folder / "source"
    source.mkdir()
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if names.returncode != 0:
        pytest.skip("needs the project's git repository")
    kept = [n for n in names.stdout.split("\0") if n and not n.startswith(("tests/", "docs/"))]
    archive = subprocess.run(["tar", "-c", *kept], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x"], cwd=source, input=archive, check=True)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("bags_d2-*.whl")
    target = folder / "site"
    install = [*pip, "install", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return target


def test_commands_run_from_another_directory(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}

    def bags_d2(*arguments):
        command = [sys.executable, str(installed / "bin" / "bags-d2"), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
        return done.stdout

    listed = re.findall(r"^  ([a-z-]+) ", bags_d2("--help"), re.MULTILINE)
    assert {"train", "fit", "demo", "prepare"} <= set(listed)
    for name in listed:
        assert f"usage: bags-d2 {name}" in bags_d2(name, "--help")
    bags_d2("prepare", "glyphs", "glyphs_tiny", "--quiet", "--num-workers", "1")
    tiny = ["DATASETS.TRAIN", "('glyphs_tiny_train',)", "MODEL.ROI_HEADS.NUM_CLASSES", "6"]
    assert "100-999" in bags_d2("groups", "--config-file", "glyphs_bags.yaml", "--opts", *tiny)


def test_it_works_from_another_directory(installed, tmp_path):
    configs = [p for s in ("yaml", "py") for p in (ROOT / "configs").rglob(f"*.{s}")]
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", USE, str(installed), str(len(configs))],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
