"""Detectors as TorchScript and ONNX give what they give themselves."""

import json

import numpy as np
import pytest
import torch
from commands import run_command
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.structures import Boxes

from bags_d2 import ConfigError, DataError, LongTailPredictor
from bags_d2.engine.export import compare, detect, export_model, load_exported
from benchmarks.export_parity import DETECTORS, NAMES, make_model, measure

pytest.importorskip("onnxruntime")

CONFIG = ("--config-file", "glyphs_bags.yaml")


def _check(model, format, **sizes):
    worst, count = measure(model, format, **sizes)
    assert count > 50
    assert worst.is_small, worst


@pytest.mark.parametrize(
    ("detector", "format", "merge"),
    [("mask", "onnx", "paper"), ("cascade", "torchscript", "joint")],
)
def test_bags_exports(detector, format, merge):
    _check(make_model("BAGSOutputLayers", detector, "MODEL.BAGS.MERGE", merge), format)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torchscript"])
@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("name", NAMES)
def test_every_predictor_exports(name, detector, format):
    _check(make_model(name, detector), format)


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["paper", "joint"])
@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_a_thousand_classes_export(merge, format):
    options = ("MODEL.BAGS.MERGE", merge, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1e-4)
    model = make_model("BAGSOutputLayers", "cascade_mask", *options, num_classes=1203)
    _check(model, format)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["average", "normalized"])
def test_options_of_the_heads_export(option):
    key = {
        "average": ("MODEL.LONG_TAIL.CASCADE_AVERAGE", "probs"),
        "normalized": ("MODEL.ROI_BOX_PREDICTOR.NORMALIZED", True),
    }[option]
    _check(make_model("SeesawOutputLayers", "cascade", *key), "onnx", sizes=((96, 128), (64, 64)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_detectron2s_own_adapter_serves_other_sizes_too():
    model = make_model("BAGSOutputLayers", "faster").requires_grad_(False)

    def inference(model, inputs):
        return model.inference(inputs, do_postprocess=False)[0]

    images = [torch.rand(3, *size) * 255 for size in ((96, 96), (40, 64))]
    adapter = TracingAdapter(model, [{"image": images[0]}], inference)
    trace = torch.jit.trace(adapter, (images[0],), check_trace=False)
    for image in images:
        for found, expected in zip(trace(image), adapter(image), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["BAGSOutputLayers", "FastRCNNOutputLayers"])
def test_scripting_is_refused_by_name(name):
    fields = {"proposal_boxes": Boxes, "objectness_logits": torch.Tensor}
    fields |= {"pred_boxes": Boxes, "scores": torch.Tensor, "pred_classes": torch.Tensor}
    with pytest.raises(ConfigError, match=rf"{name} cannot be scripted .*bags-d2 export"):
        scripting_with_instances(make_model(name, "faster"), fields)


def test_what_cannot_be_exported_is_refused(tmp_path):
    model, image = make_model("BAGSOutputLayers", "faster"), torch.rand(3, 64, 64)
    with pytest.raises(ConfigError, match=r"must end in one of \.onnx, \.ts"):
        export_model(model, image, tmp_path / "model.pb")
    with pytest.raises(ConfigError, match="META_ARCHITECTURE is Linear"):
        export_model(torch.nn.Linear(1, 1), image, tmp_path / "model.ts")
    model.roi_heads.box_predictor.test_score_thresh = 1.0
    with pytest.raises(DataError, match="Nothing is detected"):
        export_model(model, image, tmp_path / "model.ts")
    assert not list(tmp_path.iterdir())


def _detections(**changes):
    found = {
        "boxes": np.array([[0, 0, 9, 9], [20, 0, 29, 9]], dtype=np.float32),
        "classes": np.array([3, 4]),
        "scores": np.array([0.9, 0.5], dtype=np.float32),
    }
    return found | changes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (0, 0, 0)),
        ({"boxes": _detections()["boxes"] + 0.5}, (0.5, 0, 0)),
        ({"scores": np.array([0.9, 0.4], dtype=np.float32)}, (0, 0.1, 0)),
        # Of another class it is missing on both sides; that of the lowest score may go either way.
        ({"classes": np.array([2, 4])}, (0, 0, 2)),
        ({"classes": np.array([3, 5])}, (0, 0, 0)),
        ({name: array[:0] for name, array in _detections().items()}, (0, 0, 1)),
        ({name: array[::-1] for name, array in _detections().items()}, (0, 0, 0)),
    ],
)
def test_deviation(changes, expected):
    found = compare([_detections()], [_detections(**changes)])
    assert (found.boxes, found.scores, found.unmatched) == pytest.approx(expected, abs=1e-6)
    assert found.is_small == (not any(expected))


def test_the_command_exports_what_it_loads(tmp_path, monkeypatch, datasets_root, capsys):
    monkeypatch.chdir(tmp_path)
    images = sorted((datasets_root / "glyphs_tiny" / "val").iterdir())[:2]
    run_command("export", *CONFIG, "--input", *images, "--output", "out")
    table = capsys.readouterr().out
    assert "model.onnx" in table
    assert "model.ts" in table
    about = json.loads((tmp_path / "out" / "model.json").read_text())
    predictor = LongTailPredictor.from_config_file("glyphs_bags.yaml")
    assert about["classes"] == predictor.class_names
    image = predictor.prepare(images[0])["image"]
    expected = detect(predictor.model, image)
    assert about["outputs"] == list(expected) == ["boxes", "classes", "scores"]
    for name in ("model.onnx", "model.ts"):
        assert compare([expected], [load_exported(tmp_path / "out" / name)(image)]).is_small
