"""LazyConfigs train a step, with this project's entry and as Detectron2's own would."""

from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import SimpleTrainer, default_argument_parser
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from bags_d2 import BAGSOutputLayers, BAGSTrainer, ConfigError, LongTailROIHeads, model_zoo
from bags_d2.data import register_lvis_format
from bags_d2.engine import lazy_training

ROOT = Path(__file__).resolve().parents[1]
LAZY = sorted((ROOT / "configs" / "lazy").glob("*.py"))
BASELINE, BAGS = "lazy/lvis_baseline_mask_R50.py", "lazy/lvis_bags_mask_R50.py"


@pytest.fixture(scope="module")
def tiny(datasets_root):
    """Overrides that make either config a small model on the tiny data set."""
    folder = datasets_root / "glyphs_tiny"
    annotations = {s: folder / "annotations" / f"glyphs_tiny_{s}.json" for s in ("train", "val")}
    for split, path in annotations.items():
        register_lvis_format(f"lazy_tiny_{split}", str(path), str(folder))
    return [
        "dataloader.train.dataset.names=lazy_tiny_train",
        "dataloader.test.dataset.names=lazy_tiny_val",
        "dataloader.train.mapper.augmentations.0.short_edge_length=64",
        "dataloader.test.mapper.augmentations.0.short_edge_length=64",
        "dataloader.train.total_batch_size=2",
        "dataloader.train.num_workers=0",
        "dataloader.test.num_workers=0",
        "dataloader.evaluator.class_counts.num_classes=6",
        "model.roi_heads.num_classes=6",
        "model.roi_heads.batch_size_per_image=16",
        "model.backbone.bottom_up.stages.norm=BN",
        "train.device=cpu",
        "train.max_iter=1",
        "train.eval_period=1",
    ]


GROUPS = [
    "model.roi_heads.box_predictor.groups.dataset_name=lazy_tiny_train",
    "model.roi_heads.box_predictor.groups.num_classes=6",
]


def run(name, opts, *flags):
    args = default_argument_parser().parse_args(
        ["--config-file", model_zoo.get_config_file(name), *flags, *opts]
    )
    return lazy_training.main(args)


def weights_of(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


@pytest.mark.slow
def test_both_stages_train_and_evaluate(tiny, tmp_path):
    stage1, stage2 = tmp_path / "stage1", tmp_path / "stage2"
    run(BASELINE, [*tiny, f"train.output_dir={stage1}", "train.init_checkpoint=''"])
    start = f"train.init_checkpoint={stage1}/model_final.pth"
    run(BAGS, [*tiny, *GROUPS, f"train.output_dir={stage2}", start])
    before, after = weights_of(stage1), weights_of(stage2)
    prefix = "roi_heads.box_predictor."
    assert after[f"{prefix}cls_score.weight"].shape[0] == 6 + 4 + 2
    for key, value in before.items():
        if "cls_score" not in key and "num_batches_tracked" not in key:
            assert torch.equal(after[key], value), key
    done = f"train.init_checkpoint={stage2}/model_final.pth"
    results = run(BAGS, [*tiny, *GROUPS, f"train.output_dir={stage2}", done], "--eval-only")
    assert {"AP", "AP1", "bAP"} <= set(results["bbox"])
    assert "segm" in results
    with pytest.raises(ConfigError, match="evaluated without training"):
        run(BAGS, [*tiny, *GROUPS, f"train.output_dir={stage2}", start], "--eval-only")


def test_detectron2s_own_script_would_do(tiny, tmp_path):
    """The steps of its ``do_train``, which is not in the installed package."""
    cfg = LazyConfig.apply_overrides(
        LazyConfig.load(model_zoo.get_config_file(BAGS)), [*tiny, *GROUPS]
    )
    model = instantiate(cfg.model)
    assert isinstance(model.roi_heads, LongTailROIHeads)
    assert isinstance(model.roi_heads.box_predictor, BAGSOutputLayers)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    trainer = SimpleTrainer(model, instantiate(cfg.dataloader.train), optimizer)
    checkpointer = DetectionCheckpointer(model, str(tmp_path), trainer=trainer)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with EventStorage(0) as trainer.storage:
        trainer.iter = 0
        trainer.run_step()
    checkpointer.save("x")
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"roi_heads.box_predictor.cls_score.{k}" for k in ("weight", "bias")}


@pytest.mark.parametrize("name", [BASELINE, BAGS])
def test_a_lazyconfig_is_the_model_and_solver_of_its_yaml(name):
    lazy = model_zoo.get_config(name)
    cfg = model_zoo.get_config(name.removeprefix("lazy/").replace(".py", ".yaml"))
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
    trainable = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
    assert trainable[0] == trainable[1]
    for key in ("lr", "momentum"):
        assert optimizer.defaults[key] == expected.defaults[key]
    schedule = instantiate(lazy.lr_multiplier)
    steps = BAGSTrainer.build_lr_scheduler(cfg, expected)
    for i in (0, 100, 499, 500, 50_099, 50_100, 68_900, 75_099):
        # What Detectron2's LRMultiplier does with either.
        assert schedule(i / lazy.train.max_iter) == pytest.approx(
            steps._multiplier(i / cfg.SOLVER.MAX_ITER)
        )
