"""Fitting the classifiers of a cascade: what each stage sees, and the same training as online."""

from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.engine import default_argument_parser
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from interrupted import interrupt_fit

from bags_d2 import ROI_BOX_PREDICTOR_REGISTRY, BAGSTrainer, ConfigError, add_bags_config
from bags_d2.data import register_lvis_format
from bags_d2.engine import training
from bags_d2.fitting.cache import FeatureCache
from bags_d2.fitting.extract import (
    extract_features,
    load_frozen_detector,
    roi_features,
    sample_for_cache,
)
from bags_d2.fitting.train import ClassifierLoss, fit_classifier

TINY = Path(__file__).parents[1] / "tiny.yaml"
OPTIONS = [
    *("DATASETS.TRAIN", "('cascade_train',)", "DATASETS.TEST", "('cascade_val',)"),
    *("MODEL.ROI_HEADS.NAME", "LongTailCascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"),
    # Low, so that the boxes of untrained stages are foreground too.
    *("MODEL.ROI_HEADS.IOU_THRESHOLDS", "[0.2]"),
    *("MODEL.ROI_BOX_CASCADE_HEAD.IOUS", "(0.2, 0.25, 0.3)"),
    *("MODEL.BAGS.GROUP_THRESHOLDS", "(10, 100)"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
]
TRAINABLE = ("MODEL.TRAINABLE_PARAMS", "('roi_heads.box_predictor*cls_score.*',)")
NAMES = sorted(name for name, _ in ROI_BOX_PREDICTOR_REGISTRY)
SIGMOID = ("FastRCNNOutputLayers", "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", "True")
STAGES = 3


def make_cfg(*opts):
    cfg = get_cfg()
    add_bags_config(cfg)
    cfg.merge_from_file(str(TINY))
    cfg.merge_from_list([*OPTIONS, *opts])
    return cfg


@pytest.fixture(scope="module")
def stage1(tmp_path_factory, datasets_root):
    """Folder with an untrained cascade and a cache of its features."""
    root, images = tmp_path_factory.mktemp("cascade"), datasets_root / "glyphs_tiny"
    for split in ("train", "val"):
        json_file = images / "annotations" / f"glyphs_tiny_{split}.json"
        register_lvis_format(f"cascade_{split}", str(json_file), str(images))
    seed_all_rng(3)
    model = BAGSTrainer.build_model(make_cfg())
    for predictor in model.roi_heads.box_predictor:  # boxes move, some out of the image
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.05)
    torch.save({"model": model.state_dict()}, root / "model.pth")
    cfg = make_cfg(*TRAINABLE, "MODEL.WEIGHTS", str(root / "model.pth"))
    extract_features(cfg, root / "cache", images_per_shard=16)
    yield root
    for split in ("train", "val"):
        DatasetCatalog.remove(f"cascade_{split}")
        MetadataCatalog.remove(f"cascade_{split}")


@pytest.fixture
def cfg_of(stage1, tmp_path):
    """``cfg_of(predictor, *opts, run="run")``: config of a fit that writes to a folder ``run``."""

    def make(predictor, *opts, run="run"):
        weights, output = str(stage1 / "model.pth"), str(tmp_path / run)
        names = ("MODEL.ROI_BOX_PREDICTOR.NAME", predictor, "MODEL.WEIGHTS", weights)
        return make_cfg(*TRAINABLE, *names, "OUTPUT_DIR", output, *opts)

    return make


def batch_of(cfg, number=4):
    mapper = DatasetMapper(cfg, is_train=True)
    return [mapper(record) for record in DatasetCatalog.get("cascade_train")[:number]]


@pytest.mark.parametrize(
    "predictor",
    [("BAGSOutputLayers",), ("FastRCNNOutputLayers",), SIGMOID],
    ids=["bags", "softmax", "sigmoid"],
)
def test_gradients_of_every_stage_are_those_of_the_online_step(predictor, cfg_of):
    cfg = cfg_of(*predictor, "MODEL.BAGS.OTHERS_SAMPLE_RATIO", float("inf"))
    model, batch = load_frozen_detector(cfg), batch_of(cfg)
    classifiers = [p.cls_score for p in model.roi_heads.box_predictor]

    def gradients(losses):
        model.zero_grad()
        sum(losses.values()).backward()
        return [[p.grad.clone() for p in c.parameters()] for c in classifiers]

    with EventStorage() as storage:
        seed_all_rng(5)
        online_losses = {k: x for k, x in model(batch).items() if "loss_cls" in k}
        online = gradients(online_losses)
        logged = set(storage.latest())
    with EventStorage() as storage:
        seed_all_rng(5)
        rois = roi_features(model, batch)
        features, labels = (torch.cat(x) for x in zip(*rois, strict=True))
        losses = ClassifierLoss(model.roi_heads.box_predictor)([(features, labels)])
        fitted = gradients(losses)
        # What is logged of classification, stage by stage.
        assert {k for k in logged if "bags/" in k or "cls_accuracy" in k} <= set(storage.latest())
    assert losses.keys() == {f"loss_cls_stage{stage}" for stage in range(STAGES)}
    torch.testing.assert_close(losses, online_losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fitted, online, rtol=1e-4, atol=1e-6)
    assert all(g.abs().sum() > 0 for stage in online for g in stage)
    # The stages label by thresholds of their own, on boxes of their own, of which some are empty.
    background = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    assert (labels[:, 0] >= 0).all()
    for stage in (1, 2):
        assert not torch.equal(labels[:, stage], labels[:, stage - 1])
        assert {-1, background} < set(labels[:, stage].tolist())
        assert (labels[labels[:, stage - 1] < 0, stage] == -1).all()


def test_a_cache_of_all_proposals_holds_what_a_step_sees(cfg_of):
    cfg = cfg_of("BAGSOutputLayers")
    model, batch = load_frozen_detector(cfg), batch_of(cfg)
    with EventStorage():
        some = roi_features(model, batch)
        sample_for_cache(model.roi_heads, None)
        everything = roi_features(model, batch)
    for (features, labels), (all_features, all_labels) in zip(some, everything, strict=True):
        assert len(labels) < len(all_labels)
        distance = (features[:, None] - all_features[None]).abs().amax(dim=(2, 3))
        distance += 1e3 * (labels[:, None] != all_labels[None]).any(dim=2)
        assert (distance.amin(dim=1) < 1e-3 * features.abs().max()).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_classifier_can_be_fitted(name, cfg_of, stage1):
    before = torch.load(stage1 / "model.pth", weights_only=True)["model"]
    # LWSOutputLayers learns scales of the softmax classifier.
    own = ("MODEL.TRAINABLE_PARAMS", ("*scale",)) if name == "LWSOutputLayers" else ()
    cfg = cfg_of(name, "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", (), *own)
    path = fit_classifier(cfg, stage1 / "cache")
    after = torch.load(path, weights_only=True)["model"]
    frozen = {k for k in before if ".box_predictor." not in k or ".bbox_pred." in k}
    assert all(torch.equal(after[k], before[k]) for k in frozen)
    for stage in range(STAGES):
        classifier = f"roi_heads.box_predictor.{stage}."
        changed = [
            k
            for k in after
            if k.startswith(classifier) and not (k in before and torch.equal(after[k], before[k]))
        ]
        assert any(k.endswith(("cls_score.weight", "class_means", "scale")) for k in changed)


def test_a_fitted_cascade_is_evaluated(cfg_of, stage1, tmp_path):
    path = fit_classifier(cfg_of("BAGSOutputLayers"), stage1 / "cache")
    names = ("MODEL.ROI_BOX_PREDICTOR.NAME", "BAGSOutputLayers", "MODEL.WEIGHTS", str(path))
    options = [*OPTIONS, *names, "OUTPUT_DIR", str(tmp_path / "eval")]
    flags = ["--config-file", str(TINY), "--eval-only"]
    args = default_argument_parser().parse_args([*flags, *options])
    assert "bAP" in training.main(args)["bbox"]


def test_an_interrupted_fit_goes_on_to_the_same_weights(cfg_of, stage1):
    options = ("SOLVER.MAX_ITER", 9, "SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.STEPS", (5,))
    whole = fit_classifier(cfg_of("BAGSOutputLayers", *options, run="whole"), stage1 / "cache")
    cfg = cfg_of("BAGSOutputLayers", *options)
    assert interrupt_fit(cfg, stage1 / "cache").exists()
    resumed = fit_classifier(cfg, stage1 / "cache")
    resumed, whole = (torch.load(p, weights_only=True)["model"] for p in (resumed, whole))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_other_stages_are_another_cache(cfg_of, stage1):
    cache = FeatureCache(stage1 / "cache")
    assert cache.read([(0, 3)])[0].shape[1:] == (STAGES, 32)
    cfg = cfg_of("BAGSOutputLayers", "MODEL.ROI_BOX_CASCADE_HEAD.IOUS", (0.2, 0.25, 0.4))
    with pytest.raises(ConfigError, match=r"ROI_BOX_CASCADE_HEAD\.IOUS is .* there and"):
        fit_classifier(cfg, stage1 / "cache")


@pytest.mark.parametrize(
    "trainable", ["('roi_heads.box_predictor.1.*',)", "('roi_heads.box_head.2.*',)"]
)
def test_training_what_moves_boxes_or_features_is_refused(cfg_of, stage1, trainable):
    cfg = cfg_of("BAGSOutputLayers", "MODEL.TRAINABLE_PARAMS", trainable)
    with pytest.raises(ConfigError, match=r"MODEL\.TRAINABLE_PARAMS .* but cached features serve"):
        fit_classifier(cfg, stage1 / "cache")
