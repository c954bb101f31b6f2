"""Config files: every baseline and every method builds, alone and together, under old names too."""

from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from bags_d2 import (
    BAGSOutputLayers,
    BAGSTrainer,
    ConfigError,
    LongTailCascadeROIHeads,
    LongTailROIHeads,
    MissingFileError,
    add_bags_config,
)
from bags_d2.config import find_config, list_methods, merge_config_file, read_config_file
from bags_d2.modeling import FastRCNNOutputLayers

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(p.relative_to(CONFIGS) for s in ("yaml", "py") for p in CONFIGS.rglob(f"*.{s}"))
RUNNABLE = [
    str(p.with_suffix(""))
    for p in FILES
    if p.suffix == ".yaml"
    and not p.name.startswith("Base-")
    and p.parent.name not in ("methods", "ablations")
]
BASELINES = [name for name in RUNNABLE if "baseline" in name]
FRONT_DOORS = ["glyphs_bags", "lvis_bags_R50", "lvis_bags_mask_R50"]
METHODS, ABLATIONS = list_methods(), list_methods(ablations=True)
NUM_CLASSES = {"lvis": 1203, "lvis_v0.5": 1230, "coco": 80, "glyphs": 40, "glyphs_lvis": 1203}
NUM_CLASSES["muscima"] = 107
CLASSIFIER = ("roi_heads.box_predictor*cls_score.*",)


def load(name, method=None):
    cfg = get_cfg()
    add_bags_config(cfg)
    merge_config_file(cfg, CONFIGS / f"{name}.yaml", method)
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


def test_there_are_no_more_files_than_that():
    assert len(FILES) <= 75
    assert len(METHODS) + len(ABLATIONS) >= 30
    assert set(FRONT_DOORS) | {"lvis_baseline_R50", "glyphs_baseline"} <= set(RUNNABLE)
    assert {*BASELINES, *FRONT_DOORS} == set(RUNNABLE)


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_holds_what_its_name_says(name):
    cfg = load(name)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == NUM_CLASSES[dataset_of(name)]
    assert cfg.MODEL.ROI_BOX_PREDICTOR.NAME == "FastRCNNOutputLayers"
    assert cfg.MODEL.MASK_ON == ("_mask_" in name)
    assert ("Cascade" in cfg.MODEL.ROI_HEADS.NAME) == ("_cascade_" in name)
    assert (cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler") == ("_RFS" in name)
    registered = {*DatasetCatalog, *(row[0] for row in cfg.DATASETS.REGISTER)}
    assert registered >= {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}
    assert not cfg.STAGE2.ENABLED
    assert max(cfg.SOLVER.STEPS) < cfg.SOLVER.MAX_ITER
    assert max(cfg.STAGE2.STEPS, default=-1) < max(cfg.STAGE2.MAX_ITER, 1)
    # What repeat factors and EQL take for rare: about 100 images.
    assert cfg.DATALOADER.REPEAT_THRESHOLD > 0
    if dataset_of(name) in ("glyphs", "glyphs_lvis"):
        assert cfg.MODEL.EQL.FREQUENCY_THRESHOLD == cfg.DATALOADER.REPEAT_THRESHOLD


def test_every_run_has_an_output_folder_of_its_own():
    runs = [(name, None) for name in RUNNABLE]
    runs += [("glyphs_baseline", m) for m in (*METHODS, *ABLATIONS, "seesaw_classifier", "rfs")]
    folders = {load(*run).OUTPUT_DIR: run for run in runs}
    # methods/bags.yaml on glyphs_baseline.yaml is glyphs_bags.yaml, and "rfs" was named twice.
    assert len(folders) == len(runs) - 2
    assert all(folder.startswith("output/") for folder in folders)


@pytest.mark.parametrize("name", ["lvis_baseline_R50", "lvis_v0.5/lvis_v0.5_baseline_R101"])
def test_lvis_configs_are_the_recipe_of_the_paper(name):
    cfg = load(name, "bags")
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


def check_model(cfg):
    model = BAGSTrainer.build_model(cfg)
    cascade = "Cascade" in cfg.MODEL.ROI_HEADS.NAME
    assert isinstance(model.roi_heads, LongTailCascadeROIHeads if cascade else LongTailROIHeads)
    predictors = model.roi_heads.box_predictor
    predictors = predictors if isinstance(predictors, torch.nn.ModuleList) else [predictors]
    assert len(predictors) == (3 if cascade else 1)
    for predictor in predictors:
        assert type(predictor).__name__ == cfg.MODEL.ROI_BOX_PREDICTOR.NAME
        assert isinstance(predictor, BAGSOutputLayers) == ("BAGS" in type(predictor).__name__)
        assert isinstance(predictor, FastRCNNOutputLayers)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable
    if cfg.MODEL.TRAINABLE_PARAMS == CLASSIFIER:
        assert all(".cls_score." in n for n in trainable)


@pytest.mark.parametrize("method", [None, "bags", "seesaw_classifier"])
@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.usefixtures("without_random_init")
def test_every_baseline_builds_with_methods(name, method):
    check_model(load(name, method))


@pytest.mark.parametrize("method", [*METHODS, *ABLATIONS, "reweight_effective_classifier"])
@pytest.mark.usefixtures("without_random_init")
def test_every_method_builds(method):
    cfg = load("glyphs_baseline", method)
    check_model(cfg)
    stage2 = cfg.STAGE2
    assert (cfg.MODEL.WEIGHTS == stage2.WEIGHTS) == stage2.ENABLED
    if stage2.ENABLED:
        assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (stage2.MAX_ITER, stage2.STEPS)


@pytest.mark.parametrize("name", FRONT_DOORS)
def test_front_doors_are_their_baselines_with_bags_for_any_reader(name):
    expected = load(name.replace("bags", "baseline"), "bags")
    assert load(name) == expected
    theirs = get_cfg()
    add_bags_config(theirs)
    theirs.merge_from_file(str(CONFIGS / f"{name}.yaml"))
    theirs.MODEL.DEVICE = "cpu"
    assert theirs == expected


@pytest.fixture
def mine(tmp_path):
    """``mine(content)``: a baseline of one's own, whose file is called anything."""

    def write(content="", name="detector.yaml"):
        path = tmp_path / name
        path.write_text(content or f"_BASE_: {CONFIGS}/coco/coco_baseline_R50.yaml\n")
        return path

    return write


STAGE2 = """
MODEL: {WEIGHTS: pretrained.pkl, MASK_ON: true}
SOLVER: {MAX_ITER: 100, STEPS: [80]}
STAGE2: {WEIGHTS: stage1.pth, MAX_ITER: 50, STEPS: [40]}
"""


def test_stage_2_goes_before_the_baseline_and_after_the_method(mine):
    content = read_config_file(mine(STAGE2), "bags")
    assert content["MODEL"]["WEIGHTS"] == "stage1.pth"
    assert content["SOLVER"] == {"MAX_ITER": 50, "STEPS": [40]}
    assert content["MODEL"]["MASK_ON"] is True
    # The method's own keys win, and in a file with bases the file's own keys over all.
    own = mine("SOLVER: {MAX_ITER: 0}\nSTAGE2: {ENABLED: true}\n", "evaluated.yaml")
    assert read_config_file(mine(STAGE2), str(own))["SOLVER"] == {"MAX_ITER": 0, "STEPS": [40]}
    bases = f"_BASE_: [detector.yaml, {CONFIGS}/methods/bags.yaml]\n"
    own = mine(bases + "SOLVER: {MAX_ITER: 7}\n", "own.yaml")
    assert read_config_file(own)["SOLVER"] == {"MAX_ITER": 7, "STEPS": [40]}
    # Nothing is taken for a method that trains the whole detector.
    assert read_config_file(mine(STAGE2), "seesaw")["SOLVER"]["MAX_ITER"] == 100
    # It is turned on once: a config that a run has written is read as it is.
    written = STAGE2.replace("STAGE2: {", "STAGE2: {ENABLED: true, ")
    for method in (None, "bags"):
        assert read_config_file(mine(written), method)["SOLVER"]["MAX_ITER"] == 100


def test_without_a_stage_2_of_its_own_a_baseline_gives_its_result_and_its_schedule(mine):
    baseline = "MODEL: {WEIGHTS: pretrained.pkl}\nSOLVER: {MAX_ITER: 100}\n"
    content = read_config_file(mine(baseline), "bags")
    assert content["MODEL"]["WEIGHTS"] == "output/detector/model_final.pth"
    assert content["SOLVER"] == {"MAX_ITER": 100}
    content = read_config_file(mine(baseline + "OUTPUT_DIR: runs/one\n"), "bags")
    assert content["MODEL"]["WEIGHTS"] == "runs/one/model_final.pth"
    assert content["OUTPUT_DIR"] == "runs/one_bags"
    # The baseline is what is no method, wherever it stands in the list.
    for bases in ("detector.yaml, rfs.yaml, bags.yaml", "detector.yaml, bags.yaml, rfs.yaml"):
        mine(baseline)
        bases = bases.replace(" ", f" {CONFIGS}/methods/")
        content = read_config_file(mine(f"_BASE_: [{bases}]\n", "own.yaml"))
        assert content["MODEL"]["WEIGHTS"] == "output/detector/model_final.pth"
        assert content["OUTPUT_DIR"] == "output/own"


def test_a_method_is_a_second_base(mine):
    for method in (*METHODS, *ABLATIONS):
        folder = "methods" if method in METHODS else "ablations"
        mine()
        own = mine(f"_BASE_: [detector.yaml, {CONFIGS}/{folder}/{method}.yaml]\n", "own.yaml")
        expected = read_config_file(mine(), method)
        assert read_config_file(own) == {**expected, "OUTPUT_DIR": "output/own"}


def test_classifier_trains_the_classifier_of_a_method_alone():
    ours, whole = load("lvis_baseline_R50", "seesaw_classifier"), load("lvis_seesaw_R50")
    assert ours.MODEL.ROI_BOX_PREDICTOR == whole.MODEL.ROI_BOX_PREDICTOR
    assert (ours.MODEL.TRAINABLE_PARAMS, whole.MODEL.TRAINABLE_PARAMS) == (CLASSIFIER, ())
    assert ours.MODEL.WEIGHTS == "output/lvis_baseline_R50/model_final.pth"
    assert ours.OUTPUT_DIR == "output/lvis_seesaw_classifier_R50"


def test_twice_the_schedule():
    once, twice = load("lvis_baseline_R50"), load("lvis_baseline_R50", "baseline_2x")
    assert twice.SOLVER.MAX_ITER == 2 * once.SOLVER.MAX_ITER
    assert twice.SOLVER.STEPS == tuple(2 * step for step in once.SOLVER.STEPS)
    assert twice.SOLVER.SCHEDULE_FACTOR == 1.0  # a run's config.yaml is not doubled again


def test_a_step_that_rounding_puts_on_the_end_is_left_out(mine):
    schedule = "SOLVER: {MAX_ITER: 4, STEPS: [2, 3], SCHEDULE_FACTOR: 0.5}\n"
    cfg = load("glyphs_baseline", str(mine(schedule, "half.yaml")))
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (2, (1,))


def test_a_method_is_the_path_of_a_file_too(mine):
    path = mine("SEED: 5\n", "my_method.yaml")
    cfg = load("glyphs_baseline", str(path))
    assert (cfg.SEED, cfg.OUTPUT_DIR) == (5, "output/glyphs_my_method")
    path.write_text("SEED: 5\nOUTPUT_DIR: elsewhere\n")
    assert load("glyphs_baseline", str(path)).OUTPUT_DIR == "elsewhere"


@pytest.mark.parametrize("method", ["nothing", "nothing_classifier", "classifier_", "gone.yaml"])
def test_what_is_no_method_is_named(method):
    with pytest.raises(MissingFileError, match=method):
        load("glyphs_baseline", method)


def test_a_method_that_is_no_config_is_named(mine):
    with pytest.raises(ConfigError, match=r"words\.yaml' is no config"):
        load("glyphs_baseline", str(mine("words\n", "words.yaml")))


# Files of version 0.4: what they are now, and where their results are.
OLD_NAMES = {
    "lvis_seesaw_R50": ("lvis_baseline_R50", "seesaw"),
    "lvis_baseline_2x_R50": ("lvis_baseline_R50", "baseline_2x"),
    "lvis_reweight_effective_classifier_R50": (
        "lvis_baseline_R50",
        "reweight_effective_classifier",
    ),
    "lvis_bags_R50_RFS": ("lvis_baseline_R50_RFS", "bags"),
    "lvis_bags_cascade_mask_X101_64x4d": ("lvis_baseline_cascade_mask_X101_64x4d", "bags"),
    "lvis_bags_R50_AP_fixed": ("lvis_bags_R50", "AP_fixed"),
    "glyphs_bags_AP_fixed": ("glyphs_baseline", "bags_AP_fixed"),
    "glyphs_rfs": ("glyphs_baseline", "rfs"),
    "lvis_v0.5_baseline_R101": ("lvis_v0.5/lvis_v0.5_baseline_R101", None),
    "lvis_v0.5_bags_R50": ("lvis_v0.5/lvis_v0.5_baseline_R50", "bags"),
    "coco_bags_R50": ("coco/coco_baseline_R50", "bags"),
    "glyphs_lvis/glyphs_lvis_baseline": ("glyphs/glyphs_lvis_baseline", None),
    "glyphs_lvis/glyphs_lvis_bags_beta32": ("glyphs/glyphs_lvis_baseline", "bags_beta32"),
    "ablations/lvis_bags_RFS_R50": ("lvis_baseline_R50", "bags_RFS"),
    "ablations/glyphs_bags_beta_all": ("glyphs_baseline", "bags_beta_all"),
    "ablations/glyphs_baseline": ("glyphs_baseline", None),
    "mmdet/lvis_v0.5_bags_R50": ("mmdet/lvis_v0.5_baseline_R50", "bags"),
}


@pytest.mark.parametrize(("old", "new"), list(OLD_NAMES.items()), ids=lambda x: str(x))
def test_old_names_are_their_baseline_with_a_method(old, new):
    assert not (CONFIGS / f"{old}.yaml").exists()
    ours, expected = load(old), load(*new)
    folder, name = old.rpartition("/")[::2]
    if folder in ("ablations", "mmdet") and new[1]:
        name = f"{folder}/{name}"
    assert ours.OUTPUT_DIR == f"output/{name}"
    ours.OUTPUT_DIR = expected.OUTPUT_DIR
    assert ours == expected


def test_old_names_of_parts_are_bases_too(mine):
    old = mine(f"_BASE_: [{CONFIGS}/coco_baseline_R50.yaml, {CONFIGS}/Base-BAGS.yaml]\n")
    content = read_config_file(old)
    assert content["MODEL"]["ROI_BOX_PREDICTOR"]["NAME"] == "BAGSOutputLayers"
    assert content["MODEL"]["WEIGHTS"] == "output/coco_baseline_R50/model_final.pth"
    assert content["SOLVER"]["MAX_ITER"] == 88000
    seesaw = read_config_file(mine(f"_BASE_: {CONFIGS}/lvis_seesaw_R50.yaml\n"))
    assert seesaw["MODEL"]["ROI_BOX_PREDICTOR"]["NAME"] == "SeesawOutputLayers"


@pytest.mark.parametrize("name", ["lvis_nothing_R50", "nothing_bags", "ablations/x", "lvis__R50"])
def test_names_that_mean_nothing_are_of_files_that_do_not_exist(name):
    path = str(CONFIGS / f"{name}.yaml")
    assert find_config(path) == (path, ())
    with pytest.raises(MissingFileError, match=f"{name}\\.yaml' does not exist"):
        load(name)


def test_defaults_leave_stock_models_untouched():
    stock = get_cfg()
    stock.MODEL.DEVICE = "cpu"
    ours = stock.clone()
    add_bags_config(ours)
    assert str(build_model(ours)) == str(build_model(stock))


@pytest.mark.parametrize("reader", ["plain", "of the package"])
def test_configs_of_version_0_5_are_read(mine, reader):
    path = mine("MODEL: {NORCAL: {GAMMA: 0.4}}\nSOLVER: {MAX_ITER: 7}\n")
    cfg = get_cfg()
    add_bags_config(cfg)
    if reader == "plain":
        cfg.merge_from_file(str(path))
    else:
        merge_config_file(cfg, str(path))
    assert cfg.SOLVER.MAX_ITER == 7
    assert "NORCAL" not in cfg.MODEL
