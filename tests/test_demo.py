"""demo/demo.py on the checkpoints that the package carries."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from bags_d2 import BagsError

ROOT = Path(__file__).resolve().parents[1]
BAGS, BASELINE = "configs/glyphs_bags.yaml", "configs/glyphs_baseline.yaml"

spec = importlib.util.spec_from_file_location("demo", ROOT / "demo" / "demo.py")
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)


@pytest.fixture
def images(datasets_root):
    return sorted((datasets_root / "glyphs_tiny" / "val").iterdir())[:3]


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_one_image_to_one_file(images, tmp_path):
    out = tmp_path / "new" / "picture.png"
    demo.main(["--config-file", BAGS, "--input", str(images[0]), "--output", str(out)])
    picture = cv2.imread(str(out))
    assert min(picture.shape[:2]) >= 640
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


def test_two_models_side_by_side_for_a_folder_and_a_pattern(images, tmp_path):
    folder = images[0].parent
    pattern = str(images[0].parent / f"*{images[0].name[-6:]}")
    args = ["--config-file", BAGS, "--compare", BASELINE, "--output", str(tmp_path)]
    demo.main([*args, "--top", "3", "--input", pattern])
    demo.main(["--config-file", BAGS, "--output", str(tmp_path / "one"), "--input", pattern])
    both = cv2.imread(str(tmp_path / images[0].name))
    one = cv2.imread(str(tmp_path / "one" / images[0].name))
    assert both.shape[1] == 2 * one.shape[1] + 8
    assert len(demo.image_paths([str(folder)])) == len(list(folder.iterdir()))
    assert demo.image_paths([pattern, str(images[1])])[-1] == images[1]


def test_a_video(images, tmp_path):
    source = tmp_path / "in.avi"
    writer = cv2.VideoWriter(str(source), cv2.VideoWriter.fourcc(*"MJPG"), 5, (160, 120))
    frame = cv2.resize(cv2.imread(str(images[0])), (160, 120))
    for _ in range(4):
        writer.write(frame)
    writer.release()
    demo.main(
        ["--config-file", BAGS, "--video-input", str(source), "--output", str(tmp_path / "o")]
    )
    video = cv2.VideoCapture(str(tmp_path / "o" / "in.mp4"))
    assert sum(1 for _ in demo.frames(video)) == 4


def test_options_reach_the_model(images, tmp_path):
    args = ["--config-file", BAGS, "--input", str(images[0]), "--output", str(tmp_path)]
    with pytest.raises(BagsError, match="nowhere"):
        demo.main([*args, "--opts", "MODEL.WEIGHTS", "nowhere.pth"])
    with pytest.raises(BagsError, match="nowhere"):
        demo.main([*args, "--compare", BASELINE, "--compare-weights", "nowhere.pth"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "none_*.jpg"], r"--input 'none_\*\.jpg' matches no image"),
        (["--input", "README.md"], r"'README\.md' is not a readable image"),
        (["--video-input", "none.mp4"], r"--video-input 'none\.mp4' does not exist"),
        (["--video-input", "README.md"], r"'README\.md' cannot be opened as a video"),
    ],
)
def test_faulty_input_is_one_sentence(arguments, message, tmp_path):
    with pytest.raises(BagsError, match=message):
        demo.main(["--config-file", BAGS, "--output", str(tmp_path), *arguments])


def test_pictures_that_would_overwrite_each_other_are_refused(tmp_path):
    inputs = [Path("a/x.jpg"), Path("b/x.jpg")]
    with pytest.raises(BagsError, match=r"several files named 'x\.jpg'"):
        demo.output_paths(inputs, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BagsError, match="is a file, but there are 2 images"):
        demo.output_paths(inputs, tmp_path / "file")
    assert demo.output_paths(inputs[:1], tmp_path / "y.png") == [tmp_path / "y.png"]


def test_as_a_program_it_ends_with_one_sentence(tmp_path):
    command = [sys.executable, "demo/demo.py", "--config-file", "none.yaml", "--input", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: 'none.yaml' is no config")
    assert "Traceback" not in done.stderr
