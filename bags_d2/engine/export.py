"""Detectors as files that run without Detectron2: TorchScript traces and ONNX.

An exported detector takes one image, a float tensor (3, height, width) that has been resized, its
channels in the order of ``INPUT.FORMAT``. It gives N detections, best first: "boxes" (N, 4), XYXY
in pixels of that image, "classes" (N,), "masks" (N, M, M), probabilities over the area of the box
(with ``MODEL.MASK_ON`` alone), and "scores" (N,), in this order.
"""

import contextlib
import copy
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
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

__all__ = ["OPSET", "Deviation", "compare", "export_model", "export_predictor", "load_exported"]

SUFFIXES = {"onnx": ".onnx", "torchscript": ".ts"}

# The first in which RoIAlign shifts by half a pixel as Detectron2's does (ROIAlignV2).
OPSET = 16

Detections = Mapping[str, np.ndarray]


@dataclass
class Deviation:
    """The largest differences of detections from those expected: boxes in pixels, scores, masks.

    Attributes:
        unmatched: detections without a counterpart.
    """

    boxes: float = 0.0
    scores: float = 0.0
    masks: float = 0.0
    unmatched: int = 0

    @property
    def is_small(self) -> bool:
        """Within 1e-2 pixels and 1e-4 of scores and of masks, with nothing unmatched."""
        return self.boxes <= 1e-2 and max(self.scores, self.masks) <= 1e-4 and not self.unmatched


def export_model(model: nn.Module, image: torch.Tensor, path: str | os.PathLike) -> None:
    """Write a detector to a file, atomically.

    Args:
        model: a ``GeneralizedRCNN`` on the CPU, with our RoI heads or Detectron2's.
        image: (3, height, width), an example in which something is detected (else DataError).
        path: ends in .onnx (operator set 16) or .ts, a TorchScript trace (else ConfigError).
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
    names, content = _output_names(len(outputs)), io.BytesIO()
    with _quiet():
        if Path(path).suffix == SUFFIXES["torchscript"]:
            trace = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
            torch.jit.save(trace, content)
        else:
            torch.onnx.export(
                adapter,
                adapter.flattened_inputs,
                content,
                dynamo=False,
                opset_version=OPSET,
                input_names=["image"],
                output_names=names,
                dynamic_axes={name: {0: "detections"} for name in names}
                | {"image": {1: "height", 2: "width"}},
            )
    with write_atomically(path, "wb") as file:
        file.write(content.getbuffer())


def load_exported(path: str | os.PathLike) -> Callable[[torch.Tensor], Detections]:
    """A function from an image to its detections, run on the CPU.

    ConfigError if it is ONNX and onnxruntime is not installed.
    """
    path = require_file(path)
    if Path(path).suffix == SUFFIXES["torchscript"]:
        with _quiet():
            trace = torch.jit.load(path, map_location="cpu")
        return lambda image: _by_name(trace(image.float()))
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError("ONNX files run in onnxruntime: pip install onnxruntime.") from None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: _by_name(session.run(None, {"image": image.float().numpy()}))


@torch.no_grad()
def detect(model: nn.Module, image: torch.Tensor) -> Detections:
    """What the model itself detects, in the form of an exported one."""
    return {name: x.numpy() for name, x in _detect(model, [{"image": image.float()}]).items()}


def export_predictor(
    predictor: LongTailPredictor,
    paths: Sequence[str | os.PathLike],
    folder: str | os.PathLike,
    formats: Sequence[str],
) -> str:
    """Write a predictor on the CPU as ``model.onnx`` or ``model.ts``, and compare them with it.

    ``model.json`` says how images are to be prepared, and what the classes are called.

    Returns:
        A table of the deviations over the images; DataError if one is too large, ConfigError if
        ONNX is asked for and not installed.
    """
    absent = [name for name in ("onnx", "onnxruntime") if not importlib.util.find_spec(name)]
    if "onnx" in formats and absent:
        raise ConfigError(
            f"ONNX needs what is not installed here: pip install {' '.join(absent)}, or add "
            "--formats torchscript."
        )
    images = [predictor.prepare(path)["image"] for path in paths]
    expected = [detect(predictor.model, image) for image in images]
    counts = [len(found["scores"]) for found in expected]
    rows = []
    for name in formats:
        path = Path(folder) / f"model{SUFFIXES[name]}"
        export_model(predictor.model, images[int(np.argmax(counts))], path)
        worst = compare(expected, map(load_exported(path), images))
        rows.append((path, len(images), sum(counts), *astuple(worst)))
        if not worst.is_small:
            raise DataError(f"'{path}' differs too much from the model to be of use: {worst}.")
    about = {
        "classes": predictor.class_names,
        "channels": predictor.input_format,
        "shortest_side": predictor.cfg.INPUT.MIN_SIZE_TEST,
        "longest_side": predictor.cfg.INPUT.MAX_SIZE_TEST,
        "outputs": list(expected[0]),
    }
    write_json(Path(folder) / "model.json", about)
    headers = ("file", "images", "detections", "boxes (px)", "scores", "masks", "unmatched")
    return tabulate(rows, headers, "pipe", floatfmt=".1e")


def compare(expected: Sequence[Detections], found: Sequence[Detections]) -> Deviation:
    """Compare the detections of images.

    Each is compared with the nearest one of its class; beyond a pixel it has no counterpart. Which
    of those within 1e-4 of the lowest score are cut off is left to rounding.
    """
    worst = Deviation()
    for a, b in zip(expected, found, strict=True):
        distances = np.abs(a["boxes"][:, None] - b["boxes"]).max(axis=2)
        distances[a["classes"][:, None] != b["classes"]] = np.inf
        lowest = max((d["scores"].min() for d in (a, b) if len(d["scores"])), default=0)
        for side, table in ((a, distances), (b, distances.T)):
            alone = table.min(axis=1, initial=np.inf) > 1
            worst.unmatched += int((alone & (side["scores"] > lowest + 1e-4)).sum())
        nearest = distances.min(axis=1, keepdims=True, initial=np.inf)
        i, j = np.nonzero((distances <= 1) & (distances == nearest))
        for name in {*a} - {"classes"}:
            largest = float(np.abs(a[name][i] - b[name][j]).max(initial=0))
            setattr(worst, name, max(getattr(worst, name), largest))
    return worst


def _detect(model: nn.Module, inputs: list[dict]) -> dict[str, torch.Tensor]:
    found = model.inference(inputs, do_postprocess=False)[0]
    outputs = {"boxes": found.pred_boxes.tensor, "classes": found.pred_classes}
    if found.has("pred_masks"):
        outputs["masks"] = found.pred_masks[:, 0]
    return {**outputs, "scores": found.scores}


def _output_names(number: int) -> list[str]:
    return ["boxes", "classes", *(["masks"] if number == 4 else []), "scores"]


def _by_name(outputs: Sequence) -> Detections:
    return dict(zip(_output_names(len(outputs)), map(np.asarray, outputs), strict=True))


@contextlib.contextmanager
def _quiet():
    """Without warnings of branches in Detectron2 that are recorded as they are."""
    logger = logging.getLogger("torch.fx._symbolic_trace")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
