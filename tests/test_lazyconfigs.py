"""LazyConfigs are configs like any other, and Detectron2's own script could train them too."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch
from commands import run_command
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from bags_d2 import (
    BAGSOutputLayers,
    BAGSTrainer,
    ConfigError,
    LongTailPredictor,
    LongTailROIHeads,
    model_zoo,
)
from bags_d2.analysis.method_runs import Comparison
from bags_d2.config.lazy_reader import lazy_config
from bags_d2.data import register_lvis_format
from bags_d2.data.loader import LongTailDatasetMapper
from bags_d2.engine import setup_cfg
from bags_d2.fitting.cache import FEATURE_KEYS
from bags_d2.utils.settings import select_config

ROOT = Path(__file__).resolve().parents[1]
LAZY = sorted(path.stem for path in (ROOT / "configs" / "lazy").glob("*.py"))
LAZY += [name.replace("baseline", "bags") for name in LAZY]  # by their names, without a file
BASELINE, BAGS = "lvis_baseline_mask_R50", "lvis_bags_mask_R50"
SWIN = "lvis_baseline_cascade_mask_swin_b"
HEADS, SIZES = "model.roi_heads", ("short_edge_length", "max_size")
SMALL_CASCADE = [
    *("model.backbone.square_pad=64", f"{HEADS}.mask_head.conv_dims=[8,8]"),
    *(f"{HEADS}.box_heads.{i}.conv_dims=[8]" for i in range(3)),
    *(f"{HEADS}.box_heads.{i}.fc_dims=[16]" for i in range(3)),
    *(f"{HEADS}.box_predictors.{i}.input_shape.channels=16" for i in range(3)),
    *(f"dataloader.train.mapper.augmentations.1.target_{s}=64" for s in ("height", "width")),
    "dataloader.train.mapper.augmentations.2.crop_size=[64,64]",
]
SMALL = {
    "R50": [
        "dataloader.train.mapper.augmentations.0.short_edge_length=64",
        "model.backbone.bottom_up.stages.norm=BN",
    ],
    "vitdet_b": [
        *SMALL_CASCADE,
        *("model.backbone.net.embed_dim=16", "model.backbone.net.depth=2"),
        *("model.backbone.net.num_heads=2", "model.backbone.net.window_block_indexes=[0]"),
        *("model.backbone.net.img_size=64", "model.backbone.net.drop_path_rate=0.0"),
    ],
    "swin_b": [
        *SMALL_CASCADE,
        *("model.backbone.bottom_up.embed_dim=8", "model.backbone.bottom_up.depths=[1,1,1,1]"),
        *("model.backbone.bottom_up.num_heads=[1,1,1,1]",),
        *("model.backbone.bottom_up.drop_path_rate=0.0",),
    ],
}


@pytest.fixture(scope="module")
def tiny(datasets_root):
    """``tiny(name)``: overrides that make a config a small model on the tiny data set."""
    folder = datasets_root / "glyphs_tiny"
    for split in ("train", "val"):
        path = folder / "annotations" / f"glyphs_tiny_{split}.json"
        register_lvis_format(f"lazy_tiny_{split}", str(path), str(folder))

    def overrides(name):
        return [
            *next(small for kind, small in SMALL.items() if name.endswith(kind)),
            "dataloader.train.dataset.names=lazy_tiny_train",
            "dataloader.test.dataset.names=lazy_tiny_val",
            *(f"dataloader.test.mapper.augmentations.0.{s}=64" for s in SIZES),
            *("dataloader.train.total_batch_size=2", "dataloader.train.num_workers=0"),
            *(f"{HEADS}.num_classes=6", f"{HEADS}.batch_size_per_image=16"),
            *("train.device=cpu", "train.amp.enabled=False"),
            *("train.max_iter=2", "train.eval_period=2"),
        ]

    return overrides


OWN = """
from bags_d2 import model_zoo
_base = model_zoo.get_config("lazy/{swin}.py")
model, dataloader, optimizer, lr_multiplier, train = (
    _base[part] for part in ("model", "dataloader", "optimizer", "lr_multiplier", "train")
)
dataloader.train.dataset.names, dataloader.test.dataset.names = "lazy_own_train", "lazy_own_val"
dataloader.test.mapper.augmentations[0].update(short_edge_length=64, max_size=64)
dataloader.train.mapper.augmentations = dataloader.test.mapper.augmentations
datasets = dict(
    register=[
        [f"lazy_own_{{s}}", "lvis", f"{folder}/annotations/glyphs_tiny_{{s}}.json", "{folder}"]
        for s in ("train", "val")
    ]
)
stage2 = dict(weights=_base.stage2.weights, max_iter=3)
"""


def read(name, *opts, method=None):
    path = str(ROOT / "configs" / "lazy" / f"{name}.py")
    return setup_cfg(argparse.Namespace(config_file=path, method=method, opts=list(opts)))


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def values(model):
    return {k: v.detach().clone() for k, v in model.named_parameters()}


@pytest.mark.parametrize("name", LAZY)
def test_each_builds_and_trains_one_step(name, tiny, tmp_path):
    for package in ("timm", "shapely") if "cascade" in name else ():
        pytest.importorskip(package)
    cfg = read(name, *tiny(name), "MODEL.WEIGHTS", "", "OUTPUT_DIR", str(tmp_path), "SEED", "1")
    trainer = BAGSTrainer(cfg)
    before = values(trainer.model)
    with EventStorage(0) as trainer.storage:
        trainer.iter = 0
        trainer.run_step()
    changed = {k for k, v in values(trainer.model).items() if not torch.equal(v, before[k])}
    classifiers = {k for k in before if "cls_score" in k}
    if "bags" in name:
        assert changed == trainable(trainer.model) == classifiers
    else:
        # What no object of the step reaches, such as the masks of other classes, may stay.
        assert classifiers <= changed <= trainable(trainer.model)
        assert any(k.startswith("backbone.") for k in changed)


@pytest.fixture
def of_bags(tmp_path):
    """``of_bags(name)``: a file that makes stage 2 of a baseline, for Detectron2's own script."""

    def write(name):
        text = (ROOT / "docs" / "lazyconfigs.md").read_text()
        snippet = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[-1]
        (tmp_path / "own_bags.py").write_text(snippet.replace(BASELINE, name))
        return str(tmp_path / "own_bags.py")

    return write


@pytest.mark.parametrize("name", [BASELINE, SWIN])
def test_to_bags_is_the_method(name, tiny, of_bags):
    args = argparse.Namespace(config_file=of_bags(name), opts=tiny(name))
    ours, laid = setup_cfg(args), read(name, *tiny(name), method="bags")
    for key in ("SOLVER", "DATALOADER", "DATASETS", "INPUT"):
        assert laid[key] == ours[key], key
    assert laid.MODEL.WEIGHTS == ours.MODEL.WEIGHTS
    models = [BAGSTrainer.build_model(cfg) for cfg in (ours, laid)]
    assert str(models[0]) == str(models[1])
    assert trainable(models[0]) == trainable(models[1])
    features = [select_config(cfg, FEATURE_KEYS) for cfg in (ours, laid)]
    assert features[0] == features[1]
    assert any(key.startswith("LAZY.model.backbone.") for key in features[0])


def test_keys_and_overrides_meet(tiny):
    cfg = read(
        SWIN, *tiny(SWIN), "train.output_dir=x", "SOLVER.BASE_LR", "0.5", method="bags_joint"
    )
    assert (cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == ("x", 2, 0.5)
    assert cfg.DATALOADER.SAMPLER_TRAIN == "ClassBalancedTrainingSampler"
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.25
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    lazy = lazy_config(cfg.clone())
    assert [p.test_score_thresh for p in lazy.model.roi_heads.box_predictors] == [0.25] * 3
    assert (lazy.model.roi_heads.num_classes, lazy.optimizer.lr) == (5, 0.5)
    assert lazy.optimizer.params.base_lr == 0.5
    cosine = BAGSTrainer.build_model(read(SWIN, *tiny(SWIN), method="crt+cosine"))
    for predictor in cosine.roi_heads.box_predictor:
        assert predictor.use_sigmoid_ce
        assert predictor.use_fed_loss
        assert predictor.test_score_thresh == 0.02
        assert predictor.cls_score.temperature == 20


def test_what_has_no_effect_or_no_sense_is_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"MODEL.RESNETS.DEPTH has no effect"):
        read(BASELINE, "MODEL.RESNETS.DEPTH", "101")
    with pytest.raises(ConfigError, match="Non-existent key: MODEL"):
        read(BASELINE, "MODEL.WEIGHS", "x")
    base = f"from detectron2.config import LazyConfig\ncfg = LazyConfig.load('{ROOT}/configs/lazy/"

    def read_own(text, *opts):
        path = tmp_path / f"{abs(hash(text))}.py"
        parts = "dataloader, model, optimizer, train = [cfg[k] for k in ('dataloader', 'model', "
        parts += (
            "'optimizer', 'train')]\ndel cfg.stage2\nlr_multiplier = cfg.pop('lr_multiplier')\n"
        )
        path.write_text(f"{base}{BASELINE}.py')\n{parts}{text}\ndel cfg\n")
        return setup_cfg(argparse.Namespace(config_file=str(path), opts=list(opts)))

    with pytest.raises(ConfigError, match=r"has no 'optimizer'; a LazyConfig needs"):
        read_own("del optimizer")
    with pytest.raises(ConfigError, match="must be one ResizeShortestEdge"):
        read_own("dataloader.test.mapper.augmentations = []")
    with pytest.raises(ConfigError, match="division by zero"):
        read_own("1/0")
    cfg = read_own("dataloader.train.mapper._target_ = list", *tiny(BASELINE))
    assert cfg.DATALOADER.SAMPLER_TRAIN == "dataloader.train"
    with pytest.raises(ConfigError, match=r"mapper .* is unknown here"):
        LongTailDatasetMapper(cfg, True)
    record = tmp_path / "config.yaml"
    record.write_text(read(BASELINE).dump())
    with pytest.raises(ConfigError, match=rf"records a run by the LazyConfig '.*{BASELINE}.py'"):
        setup_cfg(argparse.Namespace(config_file=str(record), opts=[]))
    record.write_text("MODEL: {META_ARCHITECTURE: LazyModel}")
    with pytest.raises(ConfigError, match=r"name its .py as the config"):
        BAGSTrainer.build_model(
            setup_cfg(argparse.Namespace(config_file=str(record), opts=["MODEL.DEVICE", "cpu"]))
        )


def test_a_comparison_reads_it(tiny, tmp_path):
    path = ROOT / "configs" / "lazy" / f"{SWIN}.py"
    comparison = Comparison(path, tmp_path, tiny(SWIN))
    assert {"bags", "bags_joint", "crt"} <= set(comparison.methods())
    run = comparison.run("bags_joint", 2)
    assert (run.kind.name, run.from_detector) == ("FIT", True)
    assert run.settings["LAZY.model.backbone.bottom_up.embed_dim"] == "8"


@pytest.mark.slow
def test_every_command_serves_it(tiny, tmp_path, datasets_root, capsys):
    folder = datasets_root / "glyphs_tiny"
    own = tmp_path / "own.py"
    own.write_text(OWN.format(swin=SWIN, folder=folder))
    opts = [o for o in tiny(SWIN) if "dataset.names" not in o and "train.mapper" not in o]
    config = ["--config-file", own]
    one, two = tmp_path / "lvis_baseline", tmp_path / "lvis_bags"
    run_command("train", *config, "--num-gpus", 0, *opts, "MODEL.WEIGHTS", "", "OUTPUT_DIR", one)
    start = ["MODEL.WEIGHTS", one / "model_final.pth"]
    stage2 = [*config, "--method", "bags_joint", "--num-gpus", 0]
    run_command("fit", *stage2, *opts, *start, "OUTPUT_DIR", two)
    done = ["MODEL.WEIGHTS", two / "model_final.pth", "OUTPUT_DIR", two]
    run_command("train", *stage2, "--eval-only", *opts, *done)
    for run in (one, two):
        assert "LAZY" in (run / "config.yaml").read_text()
        assert '"iteration": 1' in (run / "metrics.json").read_text()
        results = json.loads((run / "inference" / "results.json").read_text())
        assert {"AP", "AP1", "bAP"} <= set(results["bbox"])
        assert "segm" in results
    before, after = (
        torch.load(run / "model_final.pth", weights_only=True)["model"] for run in (one, two)
    )
    assert after["roi_heads.box_predictor.0.cls_score.weight"].shape[0] == 6 + 4 + 2
    for key in {k for k in before if "cls_score" not in k and "fed_loss" not in k}:
        assert torch.equal(after[key], before[key]), key
    with pytest.raises(ConfigError, match="evaluated without training"):
        run_command("train", *stage2, "--eval-only", *opts, *start, "OUTPUT_DIR", tmp_path / "no")
    run_command("runs", one, two, "--output", tmp_path / "pair")
    run_command("report", one, two, "--output", tmp_path / "report.html")
    assert "LAZY.model" not in (tmp_path / "report.html").read_text()  # the same detector
    images = [*folder.glob("val/*")][:2]
    detecting = [*config, "--method", "bags_joint", "--input", *images]
    low = ["--opts", *opts, *done, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    run_command("draw", *detecting, "--output", tmp_path / "drawn", *low)
    assert len([*(tmp_path / "drawn").iterdir()]) == 2
    run_command("predict", *detecting, "--output", tmp_path / "found", *low)
    assert json.loads((tmp_path / "found" / "detections.json").read_text())
    export = ["--formats", "torchscript", "--output", tmp_path / "exported"]
    run_command("export", *detecting, *export, *low)
    both = ["--run", "baseline", *start[1:], tmp_path / "a"]
    both += ["--run", "bags_joint", two / "model_final.pth", tmp_path / "b"]
    run_command("evaluate", *config, *both, "--num-gpus", 0, *opts)
    results = [
        json.loads((f / "inference" / "results.json").read_text()) for f in (tmp_path / "b", two)
    ]
    assert results[0] == results[1]
    run_command("groups", *config, "--opts", *opts)
    assert "training instances" in capsys.readouterr().out
    predictor = LongTailPredictor.from_config_file(
        config[1], two / "model_final.pth", opts, method="bags"
    )
    assert len(predictor.class_names) == 6


def test_detectron2s_own_script_would_do(tiny, of_bags, tmp_path):
    """The steps of its ``do_train``, which is not in the installed package."""
    cfg = LazyConfig.apply_overrides(LazyConfig.load(of_bags(BASELINE)), tiny(BASELINE))
    model = instantiate(cfg.model)
    assert isinstance(model.roi_heads, LongTailROIHeads)
    assert isinstance(model.roi_heads.box_predictor, BAGSOutputLayers)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    instantiate(cfg.dataloader.evaluator)
    trainer = SimpleTrainer(model, instantiate(cfg.dataloader.train), optimizer)
    checkpointer = DetectionCheckpointer(model, str(tmp_path), trainer=trainer)
    before = values(model)
    with EventStorage(0) as trainer.storage:
        trainer.iter = 0
        trainer.run_step()
    checkpointer.save("x")
    changed = {k for k, v in values(model).items() if not torch.equal(v, before[k])}
    assert changed == {f"roi_heads.box_predictor.cls_score.{k}" for k in ("weight", "bias")}


@pytest.mark.parametrize("name", [BASELINE, BAGS])
def test_a_lazyconfig_is_the_model_and_solver_of_its_yaml(name, of_bags):
    path = of_bags(BASELINE) if name == BAGS else model_zoo.get_config_file(f"lazy/{name}.py")
    lazy = LazyConfig.load(path)
    cfg = model_zoo.get_config(f"{name}.yaml")
    cfg.MODEL.DEVICE = "cpu"
    ours, theirs = instantiate(lazy.model), BAGSTrainer.build_model(cfg)
    stock = build_model(cfg)  # without the choice of what trains
    assert str(ours) == str(stock)
    for mine, other in zip(ours.modules(), stock.modules(), strict=True):
        for key in ("smooth_l1_beta", "test_score_thresh", "test_topk_per_image"):
            assert getattr(mine, key, None) == getattr(other, key, None), key
    lazy.optimizer.params.model = ours
    optimizer = instantiate(lazy.optimizer)
    expected = BAGSTrainer.build_optimizer(cfg, theirs)
    assert trainable(ours) == trainable(theirs)
    for key in ("lr", "momentum"):
        assert optimizer.defaults[key] == expected.defaults[key]
    schedule = instantiate(lazy.lr_multiplier)
    steps = BAGSTrainer.build_lr_scheduler(cfg, expected)
    for i in (0, 100, 499, 500, 50_099, 50_100, 68_900, 75_099):
        # What Detectron2's LRMultiplier does with either.
        assert schedule(i / lazy.train.max_iter) == pytest.approx(
            steps._multiplier(i / cfg.SOLVER.MAX_ITER)
        )
