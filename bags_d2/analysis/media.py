"""Drawing what a model detects in images, videos and a webcam's pictures."""

import argparse
import contextlib
import glob
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from ..config import run_name
from ..data.images import read_image
from ..engine.predictor import LongTailPredictor, predictor_cfg
from ..errors import ConfigError, DataError, MissingFileError
from ..evaluation.thresholds import ScoreThresholds
from ..utils.files import require_file, write_atomically
from .drawing import best_instances, draw_instances, grid

__all__ = ["Artist", "draw", "draw_images", "draw_video", "image_paths", "output_paths"]

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
VIDEO_SUFFIXES = {".avi", ".mkv", ".mov", ".mp4"}
WINDOW = "bags_d2"


class Artist:
    """One or two models, and how their detections are drawn."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.top = args.top
        self.predictors: dict[str, LongTailPredictor] = {}
        self._add(args, args.config_file, None, args.opts, args.method)
        if args.compare:
            self._add(args, args.compare, args.compare_weights)
            if len(self.predictors) == 1:
                raise ConfigError("--compare: both configs have the same name; rename one.")

    def _add(self, args, config_file, weights, opts=(), method=None) -> None:
        cfg = predictor_cfg(config_file, weights, opts, method=method)
        choice = args.thresholds or ("none" if args.confidence_threshold is not None else None)
        thresholds = ScoreThresholds.of_checkpoint(cfg.MODEL.WEIGHTS, choice)
        if "MODEL.ROI_HEADS.SCORE_THRESH_TEST" not in opts and thresholds is None:
            least = 0.3 if args.confidence_threshold is None else args.confidence_threshold
            cfg.defrost()
            cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = least
            cfg.freeze()
        predictor = LongTailPredictor(cfg)
        predictor.thresholds = thresholds
        self.predictors[run_name(Path(config_file).stem, method)] = predictor

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """The picture of a BGR image, RGB."""
        pictures = []
        for name, predictor in self.predictors.items():
            instances = predictor(image)["instances"].to("cpu")
            best = best_instances(instances, self.top)
            title = f"{name}: {len(best)} of {len(instances)} detections"
            names, counts = predictor.class_names, predictor.class_counts
            edges = predictor.cfg.MODEL.BAGS.GROUP_THRESHOLDS
            pixels = image[:, :, ::-1]
            pictures.append(draw_instances(pixels, best, names, counts, title, thresholds=edges))
        return grid([pictures])


def image_paths(patterns: list[str]) -> list[Path]:
    """The files that paths, folders, glob patterns and text files (.txt) of paths stand for.

    In a text file each line is a path, as if given on the command line; whether it exists is not
    looked at.
    """
    paths = []
    for pattern in patterns:
        try:
            path = Path(pattern).expanduser()
            if path.is_dir():
                found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            elif path.suffix.lower() == ".txt" and path.is_file():
                found = [Path(line.strip()) for line in path.open() if line.strip()]
            else:
                found = [path] if path.exists() else sorted(map(Path, glob.glob(str(path))))
        # A closed folder; the home of an unknown user; a list that is not UTF-8.
        except (OSError, RuntimeError, UnicodeError) as error:
            raise MissingFileError(f"--input '{pattern}' cannot be read: {error}.") from None
        if not found:
            raise MissingFileError(f"--input '{pattern}' matches no image; correct the path.")
        paths += found
    return list({path.absolute(): path for path in paths}.values())


def output_paths(inputs: list[Path], output: Path) -> list[Path]:
    """Where the picture of each input goes: into a folder, or one to a file."""
    if len(inputs) == 1 and output.suffix.lower() in IMAGE_SUFFIXES and not output.is_dir():
        outputs = [output]
    elif output.is_file():
        raise ConfigError(f"--output '{output}' is a file, but there are {len(inputs)} images.")
    else:
        outputs = [output / path.name for path in inputs]
    names = [path.name for path in outputs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(
            f"--input has several files named '{repeated[0]}', which would overwrite each other in "
            f"'{output}'; draw them in separate runs."
        )
    refuse_overwriting(inputs, outputs)
    return outputs


def refuse_overwriting(inputs: list[Path], outputs: list[Path]) -> None:
    """Raise a ConfigError if an output is one of the inputs, under whatever name."""
    sources = {(s.st_dev, s.st_ino) for s in (p.stat() for p in inputs if p.exists())}
    for path in outputs:
        if path.exists() and (path.stat().st_dev, path.stat().st_ino) in sources:
            raise ConfigError(f"--output would overwrite the input '{path}'; name another folder.")


def draw_images(artist: Artist, inputs: list[Path], outputs: list[Path | None]) -> None:
    for source, target in zip(tqdm(inputs, disable=len(inputs) == 1), outputs, strict=True):
        image = read_image(source)
        try:
            picture = artist(image)
        except DataError as error:
            raise DataError(f"'{source}': {error}") from None
        if target is None:
            if not show(picture, wait_ms=0):
                return
        else:
            write_image(target, picture)


def write_image(path: Path, picture: np.ndarray) -> None:
    try:
        # Not imwrite, which crashes on names that are not UTF-8.
        _, data = cv2.imencode(path.suffix.encode("ascii").decode(), picture[:, :, ::-1])
    except (UnicodeError, cv2.error):
        raise DataError(
            f"--output '{path}' is of a format that cannot be written; choose a .png or .jpg file."
        ) from None
    with write_atomically(path, "wb") as file:
        file.write(data)


def video_output(source: Path | int, output: Path) -> Path:
    """The file that a video goes to."""
    if output.is_dir() or not output.suffix:
        output = output / (f"{source.stem}.mp4" if isinstance(source, Path) else "webcam.mp4")
    if output.suffix.lower() not in VIDEO_SUFFIXES:
        raise ConfigError(f"--output '{output}' is no video; name an .mp4 file.")
    if isinstance(source, Path):
        refuse_overwriting([source], [output])
    return output


@contextlib.contextmanager
def opened_video(source: Path | int) -> Iterator[cv2.VideoCapture]:
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(source, Path):
            # By a name of ASCII: OpenCV crashes on names that are not UTF-8.
            link = Path(folder) / "video"
            link.symlink_to(source.absolute())
        video = cv2.VideoCapture(str(link) if isinstance(source, Path) else source)
        try:
            if not video.isOpened():
                raise DataError(f"'{source}' cannot be opened as a video.")
            yield video
        finally:
            video.release()


def draw_video(artist: Artist, source: Path | int, output: Path | None) -> None:
    with opened_video(source) as video, contextlib.ExitStack() as stack:
        rate = video.get(cv2.CAP_PROP_FPS) or 30.0
        total = int(video.get(cv2.CAP_PROP_FRAME_COUNT)) if isinstance(source, Path) else None
        write = stack.enter_context(video_writer(output, rate)) if output else None
        # Ctrl-C is the way to end a webcam's video.
        stack.enter_context(contextlib.suppress(KeyboardInterrupt))
        for frame in tqdm(frames(video), total=total, unit="frame"):
            picture = artist(frame)
            if write:
                write(picture)
            elif not show(picture, wait_ms=1):
                break


@contextlib.contextmanager
def video_writer(path: Path, rate: float) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that appends a picture to a video, which has its name once it is whole."""
    writer = cv2.VideoWriter()
    with tempfile.TemporaryDirectory() as folder:
        partial = Path(folder) / f"video{path.suffix}"

        def write(picture: np.ndarray) -> None:
            # Codecs want even sides.
            picture = picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2, ::-1]
            if not writer.isOpened():
                codec = cv2.VideoWriter.fourcc(*"mp4v")
                if not writer.open(str(partial), codec, rate, picture.shape[1::-1]):
                    raise DataError(f"--output '{path}' cannot be written; name an .mp4 file.")
            writer.write(np.ascontiguousarray(picture))

        try:
            yield write
        finally:
            writer.release()
        if not partial.exists():
            raise DataError(f"--output '{path}' is not written, as the video has no frame.")
        # OpenCV says nothing of a full disk, and leaves what cannot be opened.
        if not cv2.VideoCapture(str(partial)).isOpened():
            raise DataError(f"'{path}' could not be written; free some space in '{folder}'.")
        with open(partial, "rb") as source, write_atomically(path, "wb") as file:
            shutil.copyfileobj(source, file)


def frames(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    found, frame = video.read()
    while found:
        yield frame
        found, frame = video.read()


def show(picture: np.ndarray, wait_ms: int) -> bool:
    """Show a picture; False once the user presses Esc."""
    cv2.namedWindow(WINDOW, cv2.WINDOW_NORMAL)
    cv2.imshow(WINDOW, picture[:, :, ::-1])
    return cv2.waitKey(wait_ms) != 27


def require_display() -> None:
    """Raise a ConfigError if no window can be opened."""
    # Tried in another process, since Qt aborts the one that has no display.
    code = f"import cv2; cv2.namedWindow('{WINDOW}')"
    if subprocess.run([sys.executable, "-c", code], capture_output=True).returncode:
        raise ConfigError("There is no display to show pictures on; add --output to save them.")


def draw(args: argparse.Namespace) -> None:
    """``bags-d2 draw``: draw what is detected in all inputs, to files or in a window."""
    for name in ("fvcore", "bags_d2"):
        setup_logger(name=name)
    # Cheap checks come before the models are loaded.
    if args.input:
        inputs = image_paths(args.input)
        outputs = output_paths(inputs, args.output) if args.output else [None] * len(inputs)
    else:
        source = 0 if args.webcam else Path(require_file(args.video_input))
        output = video_output(source, args.output) if args.output else None
    if not args.output:
        require_display()
    artist = Artist(args)
    if args.input:
        draw_images(artist, inputs, outputs)
    else:
        draw_video(artist, source, output)
