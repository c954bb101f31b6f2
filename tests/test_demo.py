"""demo/demo.py on the checkpoints that the package carries."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from commands import run_command
from PIL import Image

from bags_d2 import BagsError
from bags_d2.analysis import media
from bags_d2.data.images import read_image

ROOT = Path(__file__).resolve().parents[1]
BAGS, BASELINE = "configs/glyphs_bags.yaml", "configs/glyphs_baseline.yaml"


def draw(arguments):
    run_command("draw", *arguments)


@pytest.fixture
def images(datasets_root):
    return sorted((datasets_root / "glyphs_tiny" / "val").iterdir())[:3]


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_one_image_to_one_file(images, tmp_path):
    out = tmp_path / "new" / "picture.png"
    draw(["--config-file", BAGS, "--input", str(images[0]), "--output", str(out)])
    picture = cv2.imread(str(out))
    assert min(picture.shape[:2]) >= 640
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


def test_two_models_side_by_side_for_a_folder_and_a_pattern(images, tmp_path):
    folder = images[0].parent
    pattern = str(images[0].parent / f"*{images[0].name[-6:]}")
    args = ["--config-file", BAGS, "--compare", BASELINE, "--output", str(tmp_path)]
    draw([*args, "--top", "3", "--input", pattern])
    draw(["--config-file", BAGS, "--output", str(tmp_path / "one"), "--input", pattern])
    both = cv2.imread(str(tmp_path / images[0].name))
    one = cv2.imread(str(tmp_path / "one" / images[0].name))
    assert both.shape[1] == 2 * one.shape[1] + 8
    assert len(media.image_paths([str(folder)])) == len(list(folder.iterdir()))
    assert media.image_paths([pattern, str(images[1])])[-1] == images[1]


def test_a_video(images, tmp_path):
    source = tmp_path / "in.avi"
    writer = cv2.VideoWriter(str(source), cv2.VideoWriter.fourcc(*"MJPG"), 5, (160, 120))
    frame = cv2.resize(cv2.imread(str(images[0])), (160, 120))
    for _ in range(4):
        writer.write(frame)
    writer.release()
    draw(["--config-file", BAGS, "--video-input", str(source), "--output", str(tmp_path / "o")])
    video = cv2.VideoCapture(str(tmp_path / "o" / "in.mp4"))
    assert sum(1 for _ in media.frames(video)) == 4


def test_options_reach_the_model(images, tmp_path):
    args = ["--config-file", BAGS, "--input", str(images[0]), "--output", str(tmp_path)]
    with pytest.raises(BagsError, match="nowhere"):
        draw([*args, "--opts", "MODEL.WEIGHTS", "nowhere.pth"])
    with pytest.raises(BagsError, match="nowhere"):
        draw([*args, "--compare", BASELINE, "--compare-weights", "nowhere.pth"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "none_*.jpg"], r"--input 'none_\*\.jpg' matches no image"),
        (["--input", "README.md"], r"Image 'README\.md' cannot be read"),
        (["--input", "doc*"], r"'docs' is not a regular file"),
        (["--input", "~no-such-user/x.png"], r"--input '~no-such-user/x\.png' cannot be read"),
        (["--input", "x" * 300], r"--input 'x+' cannot be read"),
        (["--video-input", "none.mp4"], r"'none\.mp4' does not exist"),
        (["--video-input", "README.md"], r"'README\.md' cannot be opened as a video"),
    ],
)
def test_faulty_input_is_one_sentence(arguments, message, tmp_path):
    with pytest.raises(BagsError, match=message):
        draw(["--config-file", BAGS, "--output", str(tmp_path), *arguments])


def test_pictures_that_would_overwrite_each_other_are_refused(tmp_path):
    inputs = [Path("a/x.jpg"), Path("b/x.jpg")]
    with pytest.raises(BagsError, match=r"several files named 'x\.jpg'"):
        media.output_paths(inputs, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BagsError, match="is a file, but there are 2 images"):
        media.output_paths(inputs, tmp_path / "file")
    assert media.output_paths(inputs[:1], tmp_path / "y.png") == [tmp_path / "y.png"]


def run(*arguments, **kwargs):
    """demo.py as a program, which a crash of the interpreter ends alone."""
    command = [sys.executable, "demo/demo.py", "--config-file", BAGS, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **kwargs)


def sentence(done):
    assert done.returncode == 1, done.stderr[-500:]
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def write_video(path, frame, count=4):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 5, (160, 120))
    for _ in range(count):
        writer.write(cv2.resize(frame, (160, 120)))
    writer.release()


def test_an_input_is_never_overwritten(images, tmp_path):
    picture, clip = tmp_path / "a.jpg", tmp_path / "v.mp4"
    picture.write_bytes(images[0].read_bytes())
    write_video(clip, cv2.imread(str(images[0])))
    (tmp_path / "link.jpg").symlink_to(picture)
    (tmp_path / "hard.jpg").hardlink_to(picture)
    before = {path: path.read_bytes() for path in (picture, clip)}
    for arguments in (
        ["--input", str(picture), "--output", str(tmp_path)],
        ["--input", str(tmp_path / "a.*"), "--output", str(tmp_path / "." / "a.jpg")],
        ["--input", str(picture), "--output", str(tmp_path / "link.jpg")],
        ["--input", str(picture), "--output", str(tmp_path / "hard.jpg")],
        ["--video-input", str(clip), "--output", str(tmp_path)],
        ["--video-input", str(clip), "--output", str(clip)],
    ):
        with pytest.raises(BagsError, match=r"would overwrite the input '.*(jpg|mp4)'"):
            draw(["--config-file", BAGS, *arguments])
    assert {path: path.read_bytes() for path in (picture, clip)} == before


def test_images_that_training_refuses_are_refused(tmp_path):
    deep = np.full((20, 30), 4000, dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    (tmp_path / "deep.png").rename(tmp_path / "deep.jpg")  # the mode counts, not the suffix
    size = (64000).to_bytes(4, "big")
    chunks = [(b"IHDR", size + size + bytes([8, 0, 0, 0, 0])), (b"IDAT", b"")]
    content = b"".join(
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        for kind, data in chunks
    )
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in (
        ("deep.jpg", "has more than 8 bits a channel"),
        ("bomb.png", "cannot be read .*decompression bomb"),
        ("pipe.png", "is not a regular file"),
        ("none.png", "does not exist"),
    ):
        with pytest.raises(BagsError, match=rf"{name}' {message}"):
            read_image(tmp_path / name)


@pytest.mark.slow
def test_names_that_are_not_utf8(images, tmp_path):
    name = os.fsdecode(b"\xff\xe9")
    folder = tmp_path / name
    folder.mkdir()
    (folder / f"{name}.jpg").write_bytes(images[0].read_bytes())
    write_video(tmp_path / "v.mp4", cv2.imread(str(images[0])))
    (tmp_path / "v.mp4").rename(folder / f"{name}.mp4")
    out = folder / "out"
    done = run("--input", folder, "--output", out)
    assert done.returncode == 0, done.stderr[-500:]
    assert min(Image.open(out / f"{name}.jpg").size) >= 640
    done = run("--video-input", folder / f"{name}.mp4", "--output", out)
    assert done.returncode == 0, done.stderr[-500:]
    assert (out / f"{name}.mp4").stat().st_size > 1000
    (folder / f"x.{name}").write_bytes(images[0].read_bytes())
    assert "format that cannot" in sentence(run("--input", folder / f"x.{name}", "--output", out))


@pytest.mark.slow
def test_without_a_display_it_says_what_to_add(images):
    environment = {k: v for k, v in os.environ.items() if "DISPLAY" not in k}
    for display in ({}, {"DISPLAY": ":77"}):
        done = run("--input", images[0], env=environment | display)
        assert "add --output" in sentence(done)


@pytest.mark.slow
def test_a_full_disk_leaves_the_picture_and_the_video_before(images, tmp_path, monkeypatch):
    picture, clip, source = tmp_path / "a.png", tmp_path / "v.mp4", tmp_path / "s.mp4"
    write_video(source, cv2.imread(str(images[0])))
    for path in (picture, clip):
        path.write_text("the one before")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    (tmp_path / "sitecustomize.py").write_text(limit)
    for arguments in (
        ["--input", images[0], "--output", picture],
        ["--video-input", source, "--output", clip],
    ):
        message = sentence(run(*arguments, env=environment))
        assert "could not be written" in message
    assert picture.read_text() == clip.read_text() == "the one before"
    assert not list(tmp_path.glob(".*"))


def test_as_a_program_it_ends_with_one_sentence(tmp_path):
    command = [sys.executable, "demo/demo.py", "--config-file", "none.yaml"]
    command += ["--input", "README.md", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: 'none.yaml' is no config")
    assert "Traceback" not in done.stderr
