"""Every config file loads, says what its name says, and builds."""

from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from bags_d2 import (
    BAGSOutputLayers,
    BAGSTrainer,
    LongTailCascadeROIHeads,
    LongTailROIHeads,
    add_bags_config,
)
from bags_d2.modeling import FastRCNNOutputLayers

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RUNNABLE = sorted(
    str(p.relative_to(CONFIGS).with_suffix(""))
    for p in CONFIGS.rglob("*.yaml")
    if not p.name.startswith("Base-")
)
NUM_CLASSES = {"lvis": 1203, "lvis_v0.5": 1230, "coco": 80, "glyphs": 40, "glyphs_lvis": 1203}
STAGE_1 = {"lvis": "lvis_baseline", "lvis_v0.5": "lvis_v0.5_baseline", "coco": "coco_baseline"}
# Published recipes that differ from the others'.
OWN_RECIPE = ("_RFS", "_rfs", "_2x", "_AP_fixed", "_finetune", "_train_all", "_crt", "_norcal")


def load(name):
    cfg = get_cfg()
    add_bags_config(cfg)
    cfg.merge_from_file(str(CONFIGS / f"{name}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def dataset_of(name):
    stem = Path(name).name
    return max((data for data in NUM_CLASSES if stem.startswith(f"{data}_")), key=len)


@pytest.fixture
def without_random_init(monkeypatch):
    """Random weights take most of the time of building a large model, and nothing reads them."""
    for name in ("normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_", "xavier_uniform_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)


def test_front_door_configs_exist():
    for name in ("lvis_bags_R50", "lvis_baseline_R50", "lvis_v0.5_bags_R50", "coco_bags_R50"):
        assert name in RUNNABLE


@pytest.mark.parametrize("name", RUNNABLE)
def test_config_holds_what_its_name_says(name):
    cfg = load(name)
    data = dataset_of(name)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == NUM_CLASSES[data]
    assert cfg.MODEL.MASK_ON == ("_mask_" in name)
    assert ("Cascade" in cfg.MODEL.ROI_HEADS.NAME) == ("_cascade_" in name)
    assert cfg.OUTPUT_DIR in (f"output/{name}", f"output/{Path(name).name}")
    assert all(d in DatasetCatalog for d in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    if name.startswith("mmdet/"):
        assert f"converted/{Path(name).name}.pth" == cfg.MODEL.WEIGHTS
    elif cfg.MODEL.TRAINABLE_PARAMS and data in STAGE_1:
        # Stage 2 starts from what a stage 1 of these configs leaves behind.
        stage1 = Path(cfg.MODEL.WEIGHTS).parent.name
        assert f"output/{stage1}/model_final.pth" == cfg.MODEL.WEIGHTS
        assert stage1 in RUNNABLE
        assert stage1.startswith(STAGE_1[data])
    if name.endswith("_RFS"):
        assert cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler"
    assert max(cfg.SOLVER.STEPS, default=-1) < cfg.SOLVER.MAX_ITER


def test_every_method_has_an_output_folder_of_its_own():
    folders = [load(name).OUTPUT_DIR for name in RUNNABLE if "/" not in name]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("name", [n for n in RUNNABLE if "_bags_" in n and "mask" in n])
def test_bags_configs_differ_from_their_baselines_in_the_classifier_alone(name):
    bags, baseline = (
        load(name),
        load(name.replace("_bags_", "_baseline_").removesuffix("_AP_fixed")),
    )
    for cfg in (bags, baseline):
        cfg.OUTPUT_DIR = cfg.MODEL.WEIGHTS = ""
        cfg.MODEL.TRAINABLE_PARAMS = ()
        cfg.MODEL.ROI_BOX_PREDICTOR.NAME = ""
        cfg.TEST = None
    assert bags == baseline


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in RUNNABLE
        if n.startswith("lvis") and not any(part in n for part in (*OWN_RECIPE, "/"))
    ],
)
def test_lvis_configs_are_the_recipe_of_the_paper(name):
    cfg = load(name)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.IMS_PER_BATCH) == (0.01, 16)
    assert (cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY) == (0.9, 1e-4)
    clip = cfg.SOLVER.CLIP_GRADIENTS
    assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE) == (True, "full_model", 35.0)
    assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN) == ((800,), 1333)
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 300
    num_images = 57_000 if "v0.5" in name else 100_170
    assert cfg.SOLVER.MAX_ITER * 16 / num_images == pytest.approx(12, rel=0.01)
    assert cfg.MODEL.BAGS.OTHERS_SAMPLE_RATIO == 8.0
    assert cfg.MODEL.BAGS.GROUP_THRESHOLDS == (10, 100, 1000)


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.usefixtures("without_random_init")
def test_config_builds(name):
    cfg = load(name)
    model = BAGSTrainer.build_model(cfg)
    heads = LongTailCascadeROIHeads if "_cascade_" in name else LongTailROIHeads
    assert isinstance(model.roi_heads, heads)
    predictors = model.roi_heads.box_predictor
    predictors = predictors if isinstance(predictors, torch.nn.ModuleList) else [predictors]
    assert len(predictors) == (3 if "_cascade_" in name else 1)
    for predictor in predictors:
        assert type(predictor).__name__ == cfg.MODEL.ROI_BOX_PREDICTOR.NAME
        assert isinstance(predictor, BAGSOutputLayers) == ("_bags" in name)
        assert isinstance(predictor, FastRCNNOutputLayers)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    if "_bags" in name and "_train_" not in name:
        assert len(trainable) == 2 * len(predictors)
        assert all(".cls_score." in n for n in trainable)


def test_defaults_leave_stock_models_untouched():
    stock = get_cfg()
    stock.MODEL.DEVICE = "cpu"
    ours = stock.clone()
    add_bags_config(ours)
    assert str(build_model(ours)) == str(build_model(stock))
