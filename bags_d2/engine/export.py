"""Detectors as files that run without Detectron2: TorchScript traces and ONNX.

An exported detector takes one image, a float tensor (3, height, width) that has been resized, its
channels in the order of ``INPUT.FORMAT``. It gives N detections, best first, in this order:

- "boxes": (N, 4), XYXY in pixels of that image;
- "classes": long (N,);
- "masks": (N, M, M), probabilities over the area of the box; only with MODEL.MASK_ON;
- "scores": (N,).
"""

import contextlib
import copy
import io
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN
from tabulate import tabulate
from torch import nn

from ..errors import ConfigError, DataError
from ..utils.files import require_file, write_atomically, write_json
from .predictor import LongTailPredictor

__all__ = ["OPSET", "Deviation", "deviation", "export_model", "export_predictor", "load_exported"]

SUFFIXES = {"onnx": ".onnx", "torchscript": ".ts"}

# The first in which RoIAlign shifts by half a pixel as Detectron2's does (ROIAlignV2).
OPSET = 16


@dataclass
class Deviation:
    """How far detections are from those expected.

    Attributes:
        boxes: largest difference of a coordinate in pixels.
        scores: largest difference of a score.
        masks: largest difference of a mask's probability; 0 without masks.
        unmatched: detections without a counterpart.
    """

    boxes: float = 0.0
    scores: float = 0.0
    masks: float = 0.0
    unmatched: int = 0

    def __or__(self, other: "Deviation") -> "Deviation":
        """The larger of both; unmatched ones add up."""
        largest = [
            max(a, b) for a, b in zip(vars(self).values(), vars(other).values(), strict=True)
        ]
        return Deviation(*largest[:3], self.unmatched + other.unmatched)

    def within(self, boxes: float = 1e-2, scores: float = 1e-4) -> bool:
        """Whether all detections agree; masks, which are probabilities too, as scores."""
        return self.boxes <= boxes and max(self.scores, self.masks) <= scores and not self.unmatched


def export_model(model: nn.Module, image: torch.Tensor, path: str | os.PathLike) -> None:
    """Write a detector in evaluation mode to a file, atomically.

    Args:
        model: a ``GeneralizedRCNN`` on the CPU, with any of our RoI heads or Detectron2's.
        image: (3, height, width), an example in which something is detected.
        path: the suffix decides: .onnx (operator set 16) or .ts (a TorchScript trace).

    Raises:
        ConfigError: for another suffix or meta-architecture.
        DataError: if nothing is detected in the image, or the file cannot be written.
    """
    if Path(path).suffix not in SUFFIXES.values():
        raise ConfigError(f"'{path}' must end in one of {', '.join(SUFFIXES.values())}.")
    if not isinstance(model, GeneralizedRCNN):
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE is {type(model).__name__}, but only GeneralizedRCNN can be "
            "exported."
        )
    model = copy.deepcopy(model).eval().requires_grad_(False)
    adapter = TracingAdapter(model, [{"image": image.float()}], _detect)
    with _quiet():
        outputs = adapter(*adapter.flattened_inputs)
    if not len(outputs[0]):
        raise DataError(
            "Nothing is detected in the image that the export is to be recorded with; give one of "
            "objects that the model knows, or lower MODEL.ROI_HEADS.SCORE_THRESH_TEST."
        )
    with write_atomically(path, "wb") as file, _quiet():
        if Path(path).suffix == SUFFIXES["torchscript"]:
            trace = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
            torch.jit.save(trace, file)
            return
        names = _output_names(len(outputs))
        content = io.BytesIO()
        torch.onnx.export(
            adapter,
            adapter.flattened_inputs,
            content,
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=names,
            dynamic_axes={
                "image": {1: "height", 2: "width"},
                **{name: {0: "detections"} for name in names},
            },
        )
        file.write(content.getbuffer())


def export_predictor(
    predictor: LongTailPredictor,
    images: Sequence[str | os.PathLike],
    folder: str | os.PathLike,
    formats: Sequence[str],
) -> str:
    """Write a predictor as ``model.onnx``, ``model.ts`` or both, and compare them with it.

    ``model.json`` says how images are to be prepared, and what the classes are called.

    Args:
        predictor: on the CPU.
        images: paths; the one with most detections is the example.
        folder: where the files go.
        formats: "onnx", "torchscript".

    Returns:
        A table of the deviations.

    Raises:
        DataError: if a file deviates by more than :meth:`Deviation.within` allows.
    """
    inputs = [predictor.prepare(path)["image"] for path in images]
    expected = [eager(predictor.model)(image) for image in inputs]
    counts = [len(found["scores"]) for found in expected]
    shortest, longest = predictor.cfg.INPUT.MIN_SIZE_TEST, predictor.cfg.INPUT.MAX_SIZE_TEST
    rows = []
    for name in formats:
        path = Path(folder) / f"model{SUFFIXES[name]}"
        export_model(predictor.model, inputs[int(np.argmax(counts))], path)
        run = load_exported(path)
        worst = Deviation()
        for image, found in zip(inputs, expected, strict=True):
            worst = worst | deviation(found, run(image))
        rows.append((str(path), len(images), sum(counts), *vars(worst).values()))
        if not worst.within():
            raise DataError(
                f"'{path}' deviates from the model by up to {worst.boxes:.2g} pixels, "
                f"{worst.scores:.2g} in score and {worst.masks:.2g} in masks, with "
                f"{worst.unmatched} of {sum(counts)} detections missing or added; do not use it."
            )
    about = {
        "classes": predictor.class_names,
        "channels": predictor.input_format,
        "shortest_side": shortest,
        "longest_side": longest,
        "outputs": list(expected[0]),
    }
    write_json(Path(folder) / "model.json", about)
    headers = ("file", "images", "detections", "boxes (px)", "scores", "masks", "unmatched")
    return tabulate(rows, headers, "pipe", floatfmt=".1e")


def load_exported(path: str | os.PathLike) -> Callable[[torch.Tensor], dict[str, np.ndarray]]:
    """A function from an image (3, height, width) to the detections, run on the CPU.

    Raises:
        MissingFileError: if there is no such file.
        ConfigError: if it is ONNX and onnxruntime is not installed.
    """
    path = require_file(path)
    if Path(path).suffix == SUFFIXES["torchscript"]:
        with _quiet():
            trace = torch.jit.load(path, map_location="cpu")

        def run_trace(image: torch.Tensor) -> dict[str, np.ndarray]:
            with torch.no_grad():
                outputs = trace(image.float())
            return _by_name(outputs)

        return run_trace
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError("Running ONNX needs onnxruntime: pip install onnx onnxruntime.") from None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: _by_name(session.run(None, {"image": image.float().numpy()}))


def eager(model: nn.Module) -> Callable[[torch.Tensor], dict[str, np.ndarray]]:
    """The model itself as a function like those of :func:`load_exported`."""

    @torch.no_grad()
    def run(image: torch.Tensor) -> dict[str, np.ndarray]:
        found = _detect(model, [{"image": image.float()}])
        return {name: tensor.cpu().numpy() for name, tensor in sorted(found.items())}

    return run


def deviation(expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> Deviation:
    """Compare detections of one image.

    Each is compared with the one of its class whose box is nearest; beyond a pixel it has no
    counterpart. Where the numbers of detections are cut (SCORE_THRESH_TEST, DETECTIONS_PER_IMAGE),
    the last may differ: those within 1e-4 of the lowest score are not counted as unmatched.
    """
    distances = np.abs(expected["boxes"][:, None] - found["boxes"][None]).max(axis=2, initial=0)
    distances[expected["classes"][:, None] != found["classes"][None]] = np.inf
    lowest = max((d["scores"].min() for d in (expected, found) if len(d["scores"])), default=0)
    unmatched = 0
    for side, table in ((expected, distances), (found, distances.T)):
        is_alone = table.min(axis=1, initial=np.inf) > 1
        unmatched += int((is_alone & (side["scores"] > lowest + 1e-4)).sum())
    pairs = np.argwhere(
        (distances <= 1) & (distances == distances.min(axis=1, keepdims=True, initial=np.inf))
    )
    differences = {
        name: float(np.abs(expected[name][pairs[:, 0]] - found[name][pairs[:, 1]]).max(initial=0))
        for name in ("boxes", "scores", *(["masks"] if "masks" in expected else []))
    }
    return Deviation(**differences, unmatched=unmatched)


def _detect(model: nn.Module, inputs: list[dict]) -> dict[str, torch.Tensor]:
    found = model.inference(inputs, do_postprocess=False)[0]
    outputs = {"boxes": found.pred_boxes.tensor, "classes": found.pred_classes}
    if found.has("pred_masks"):
        outputs["masks"] = found.pred_masks[:, 0]
    return {**outputs, "scores": found.scores}


def _output_names(number: int) -> list[str]:
    return ["boxes", "classes", *(["masks"] if number == 4 else []), "scores"]


def _by_name(outputs) -> dict[str, np.ndarray]:
    return dict(zip(_output_names(len(outputs)), map(np.asarray, outputs), strict=True))


@contextlib.contextmanager
def _quiet():
    """Without the warnings about branches of Detectron2 that are recorded as they are."""
    logger = logging.getLogger("torch.fx._symbolic_trace")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
