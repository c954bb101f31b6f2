"""Inference from a config and a checkpoint alone."""

import numpy as np
import pytest
import torch
from conftest import TINY_COUNTS
from detectron2.modeling import build_model

from bags_d2 import ConfigError, DataError, LongTailPredictor, MissingFileError
from bags_d2.data.class_statistics import ClassStatistics
from bags_d2.engine import LongTailCheckpointer

NAMES = tuple("abcdef")
IMAGE = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)


@pytest.fixture
def make_cfg(tiny_cfg, tmp_path):
    """``make_cfg(record, *opts)``: a config with a checkpoint that has a record of the classes."""

    def make(record, *opts):
        cfg = tiny_cfg("OUTPUT_DIR", str(tmp_path / "out"), *opts)
        torch.manual_seed(0)
        LongTailCheckpointer(build_model(cfg), str(tmp_path), classes=record).save("model")
        cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("of_another_machine",)
        cfg.MODEL.LONG_TAIL.CLASS_COUNTS_FILE = ""
        return cfg

    return make


@pytest.mark.parametrize("name", ["FastRCNNOutputLayers", "BAGSOutputLayers"])
def test_detects_without_any_data_set(make_cfg, name):
    cfg = make_cfg(ClassStatistics(NAMES, tuple(TINY_COUNTS)), "MODEL.ROI_BOX_PREDICTOR.NAME", name)
    predictor = LongTailPredictor(cfg)
    instances = predictor(IMAGE)["instances"]
    assert instances.image_size == IMAGE.shape[:2]
    assert len(instances) > 0
    assert predictor.class_names == list(NAMES)
    assert predictor.class_counts.tolist() == TINY_COUNTS


def test_counts_of_the_groups_serve_where_there_is_no_record(make_cfg):
    predictor = LongTailPredictor(
        make_cfg(None, "MODEL.ROI_BOX_PREDICTOR.NAME", "BAGSOutputLayers")
    )
    assert predictor.class_counts.tolist() == TINY_COUNTS
    assert predictor.class_names == [f"class {i}" for i in range(len(TINY_COUNTS))]


def test_names_and_counts_may_be_unknown(make_cfg):
    cfg = make_cfg(None, "MODEL.ROI_BOX_PREDICTOR.NAME", "FastRCNNOutputLayers")
    predictor = LongTailPredictor(cfg)
    assert predictor.class_counts is None
    assert predictor.class_names[0] == "class 0"


def test_registered_names_serve_without_files(make_cfg, register):
    cfg = make_cfg(None, "MODEL.ROI_BOX_PREDICTOR.NAME", "FastRCNNOutputLayers")
    name = register("names_only", "nowhere.json", thing_classes=list(NAMES))
    cfg.DATASETS.TEST = (name,)
    assert LongTailPredictor(cfg).class_names == list(NAMES)


def test_bgr_images_reach_rgb_models_as_rgb(make_cfg):
    cfg = make_cfg(None, "MODEL.ROI_BOX_PREDICTOR.NAME", "FastRCNNOutputLayers")
    of_bgr = LongTailPredictor(cfg)(IMAGE)["instances"]
    cfg.INPUT.FORMAT = "RGB"
    of_rgb = LongTailPredictor(cfg)(IMAGE[:, :, ::-1])["instances"]
    assert torch.equal(of_bgr.scores, of_rgb.scores)


def test_a_checkpoint_of_another_model_is_refused(make_cfg):
    cfg = make_cfg(None, "MODEL.ROI_BOX_PREDICTOR.NAME", "FastRCNNOutputLayers")
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    with pytest.raises(ConfigError, match="evaluated without training"):
        LongTailPredictor(cfg)


def test_a_record_of_other_classes_is_refused(make_cfg):
    cfg = make_cfg(
        ClassStatistics(("x", "y"), None), "MODEL.ROI_BOX_PREDICTOR.NAME", "FastRCNNOutputLayers"
    )
    with pytest.raises(ConfigError, match="names of 2 classes but"):
        LongTailPredictor(cfg)


def test_from_a_name_of_the_zoo(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    predictor = LongTailPredictor.from_config_file("glyphs_bags.yaml")
    assert "latin capital letter a" in predictor.class_names
    assert predictor.class_counts.sum() > 10_000
    assert not predictor.model.training
    assert len(predictor(IMAGE)["instances"]) > 0
    # The same by its path, with weights of the user's own.
    with pytest.raises(MissingFileError, match=r"mine\.pth"):
        LongTailPredictor.from_config_file("glyphs_bags.yaml", weights="mine.pth")
    with pytest.raises(MissingFileError, match=r"other\.pth"):
        LongTailPredictor.from_config_file("glyphs_bags.yaml", opts=["MODEL.WEIGHTS", "other.pth"])


def test_what_was_trained_goes_before_what_is_carried(monkeypatch, tmp_path, make_cfg):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output" / "glyphs_bags").mkdir(parents=True)
    (tmp_path / "output" / "glyphs_bags" / "model_final.pth").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"output/glyphs_bags/model_final\.pth"):
        LongTailPredictor.from_config_file("glyphs_bags.yaml")


def test_a_config_without_a_trained_checkpoint_says_so(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError, match=r"No trained checkpoint of .*lvis_bags_R50"):
        LongTailPredictor.from_config_file("lvis_bags_R50.yaml")
    with pytest.raises(MissingFileError, match="is no config"):
        LongTailPredictor.from_config_file("none.yaml")


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (IMAGE.astype(np.uint16), "uint16"),
        (IMAGE / 255, "float64"),
        (IMAGE[:, :, 0], r"uint8 \(60, 80\)"),
        (None, "NoneType"),  # what cv2.imread gives of a missing file
    ],
)
def test_what_is_no_image_of_8_bits_is_refused(make_cfg, image, found):
    predictor = LongTailPredictor(make_cfg(ClassStatistics(NAMES, tuple(TINY_COUNTS))))
    with pytest.raises(DataError, match=rf"must be a uint8 array .* found {found}"):
        predictor(image)


@pytest.mark.parametrize("shape", [(1, 9000, 3), (9000, 1, 3), (0, 5, 3)])
def test_an_image_too_narrow_to_be_resized_is_refused(make_cfg, shape):
    predictor = LongTailPredictor(make_cfg(ClassStatistics(NAMES, tuple(TINY_COUNTS))))
    with pytest.raises(DataError, match=rf"{shape[1]} x {shape[0]} pixels is too narrow"):
        predictor(np.zeros(shape, dtype=np.uint8))
    assert "instances" in predictor(np.zeros((1, 1, 3), dtype=np.uint8))
