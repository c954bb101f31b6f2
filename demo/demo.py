#!/usr/bin/env python
"""Draw what a model detects in images, a video or a webcam; flags are those of Detectron2's demo.

Without MODEL.WEIGHTS among the --opts, the weights are what training with the config left in its
OUTPUT_DIR, or else what bags_d2's model zoo carries for it.
"""

import argparse
import glob
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from bags_d2 import ConfigError, DataError, LongTailPredictor, MissingFileError
from bags_d2.analysis.drawing import best_instances, draw_instances, side_by_side
from bags_d2.errors import exit_with_one_sentence

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
WINDOW = "bags_d2"


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, help="a path or a name of the model zoo")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--webcam", action="store_true", help="take input from the webcam")
    source.add_argument("--video-input", type=Path, help="a video file")
    source.add_argument("--input", nargs="+", help="images, folders of images, or glob patterns")
    parser.add_argument(
        "--output", type=Path, help="file or folder to save to; without it a window is shown"
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.3,
        help="least score; long-tailed detectors score lower than those of COCO (default: 0.3)",
    )
    parser.add_argument(
        "--top", type=int, default=20, help="detections drawn at most (default: 20)"
    )
    parser.add_argument(
        "--compare", metavar="CONFIG", help="a second model, drawn beside the first"
    )
    parser.add_argument("--compare-weights", help="checkpoint of the second model")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs for the first model"
    )
    return parser.parse_args(argv)


class Artist:
    """One or two models, and how their detections are drawn."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.top = args.top
        self.min_score = args.confidence_threshold
        threshold = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", self.min_score)
        self.predictors = {
            Path(args.config_file).stem: LongTailPredictor.from_config_file(
                args.config_file, opts=(*threshold, *args.opts)
            )
        }
        if args.compare:
            self.predictors[Path(args.compare).stem] = LongTailPredictor.from_config_file(
                args.compare, args.compare_weights, opts=threshold
            )
            if len(self.predictors) == 1:
                raise ConfigError("--compare: both configs have the same name; rename one.")

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """The picture of a BGR image, RGB."""
        pictures = []
        for name, predictor in self.predictors.items():
            instances = predictor(image)["instances"].to("cpu")
            best = best_instances(instances, self.top, self.min_score)
            title = f"{name}: {len(best)} of {len(instances)} detections"
            pictures.append(
                draw_instances(
                    image[:, :, ::-1], best, predictor.class_names, predictor.class_counts, title
                )
            )
        return side_by_side(pictures)


def image_paths(patterns: list[str]) -> list[Path]:
    """The files that paths, folders and glob patterns stand for."""
    paths = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        else:
            found = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path))))
        if not found:
            raise MissingFileError(f"--input '{pattern}' matches no image; correct the path.")
        paths += found
    return paths


def output_paths(inputs: list[Path], output: Path) -> list[Path]:
    """Where the picture of each input goes: into a folder, or one to a file."""
    if len(inputs) == 1 and output.suffix.lower() in IMAGE_SUFFIXES and not output.is_dir():
        return [output]
    if output.is_file():
        raise ConfigError(f"--output '{output}' is a file, but there are {len(inputs)} images.")
    names = [path.name for path in inputs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(
            f"--input has several files named '{repeated[0]}', which would overwrite each other in "
            f"'{output}'; draw them in separate runs."
        )
    return [output / name for name in names]


def draw_images(artist: Artist, patterns: list[str], output: Path | None) -> None:
    inputs = image_paths(patterns)
    outputs = output_paths(inputs, output) if output else [None] * len(inputs)
    for source, target in zip(tqdm(inputs, disable=len(inputs) == 1), outputs, strict=True):
        try:
            image = read_image(source, format="BGR")
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"'{source}' is not a readable image: {error}") from None
        picture = artist(image)
        if target is None:
            if not show(picture, wait_ms=0):
                return
        else:
            write_image(target, picture)


def write_image(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), picture[:, :, ::-1]):
        raise DataError(f"--output '{path}' could not be written; choose a .png or .jpg file.")


def draw_video(artist: Artist, source: Path | int, output: Path | None) -> None:
    if isinstance(source, Path) and not source.is_file():
        raise MissingFileError(f"--video-input '{source}' does not exist.")
    video = cv2.VideoCapture(source if isinstance(source, int) else str(source))
    if not video.isOpened():
        raise DataError(f"'{source}' cannot be opened as a video.")
    if output and (output.is_dir() or not output.suffix):
        output = output / (f"{source.stem}.mp4" if isinstance(source, Path) else "webcam.mp4")
    rate = video.get(cv2.CAP_PROP_FPS) or 30.0
    total = int(video.get(cv2.CAP_PROP_FRAME_COUNT)) if isinstance(source, Path) else None
    writer = None
    try:
        for frame in tqdm(frames(video), total=total, unit="frame"):
            picture = artist(frame)
            if output is None:
                if not show(picture, wait_ms=1):
                    break
                continue
            # Codecs want even sides.
            picture = picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2]
            if writer is None:
                output.parent.mkdir(parents=True, exist_ok=True)
                codec = cv2.VideoWriter.fourcc(*"mp4v")
                writer = cv2.VideoWriter(str(output), codec, rate, picture.shape[1::-1])
                if not writer.isOpened():
                    raise DataError(f"--output '{output}' cannot be written; name an .mp4 file.")
            writer.write(np.ascontiguousarray(picture[:, :, ::-1]))
    finally:
        video.release()
        if writer is not None:
            writer.release()


def frames(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while True:
        found, frame = video.read()
        if not found:
            return
        yield frame


def show(picture: np.ndarray, wait_ms: int) -> bool:
    """Show a picture; False once the user presses Esc."""
    cv2.namedWindow(WINDOW, cv2.WINDOW_NORMAL)
    cv2.imshow(WINDOW, picture[:, :, ::-1])
    return cv2.waitKey(wait_ms) != 27


def main(argv=None) -> None:
    args = parse_args(argv)
    for name in ("fvcore", "bags_d2"):
        setup_logger(name=name)
    artist = Artist(args)
    if args.input:
        draw_images(artist, args.input, args.output)
    else:
        draw_video(artist, 0 if args.webcam else args.video_input, args.output)


if __name__ == "__main__":
    with exit_with_one_sentence():
        main()
