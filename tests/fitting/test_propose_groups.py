"""Groups and beta from an inner split of the training set."""

import numpy as np
import pytest
import torch
from commands import run_command
from detectron2.data import DatasetCatalog

from bags_d2 import BAGSTrainer, ConfigError
from bags_d2.data.annotations import read_annotations
from bags_d2.fitting import propose_groups as module
from bags_d2.fitting.propose_groups import propose_groups, roi_ap


def test_ap_of_a_class_is_the_mean_precision_at_its_rois():
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.permutation(200).reshape(40, 5) / 200)  # no ties
    labels = torch.from_numpy(rng.integers(1, 5, 40))  # class 0 has none; 4 is background
    for c, found in enumerate(roi_ap(scores, labels)):
        ranked = sorted(range(40), key=lambda i: -scores[i, c])
        hits = [labels[i] == c for i in ranked]
        precisions = [sum(hits[: i + 1]) / (i + 1) for i in range(40) if hits[i]]
        assert found == pytest.approx(np.mean(precisions)) if precisions else np.isnan(found)


@pytest.fixture
def cfg(tiny_cfg, register, datasets_root, tmp_path):
    root = datasets_root / "glyphs_tiny"
    json_file = root / "annotations" / "glyphs_tiny_train.json"
    register("grouped_tiny", str(json_file), str(root))
    cfg = tiny_cfg(
        *("MODEL.ROI_BOX_PREDICTOR.NAME", "BAGSOutputLayers", "DATALOADER.NUM_WORKERS", 0),
        *("DATASETS.TRAIN", ("grouped_tiny",), "DATASETS.TEST", ("grouped_tiny",)),
        *("MODEL.LONG_TAIL.CLASS_COUNTS_FILE", "", "MODEL.WEIGHTS", str(tmp_path / "model.pth")),
        *("MODEL.ROI_HEADS.NUM_CLASSES", len(read_annotations(json_file).names)),
        *("MODEL.TRAINABLE_PARAMS", ("roi_heads.box_predictor*cls_score.*",)),
        *("SOLVER.MAX_ITER", 8, "SOLVER.STEPS", (), "OUTPUT_DIR", str(tmp_path / "out")),
    )
    torch.manual_seed(0)
    weights = BAGSTrainer.build_model(cfg).state_dict()
    kept = {k: v for k, v in weights.items() if ".cls_score." not in k and ".groups." not in k}
    torch.save({"model": kept}, cfg.MODEL.WEIGHTS)
    return cfg


def test_each_choice_is_judged_on_images_that_it_has_not_seen(cfg, tmp_path, monkeypatch):
    seen, fit = [], module._fit
    monkeypatch.setattr(
        module, "_fit", lambda *args: seen.append(set(args[3].tolist())) or fit(*args)
    )
    read, held_out = module.read_rois, []
    monkeypatch.setattr(
        module, "read_rois", lambda *args: held_out.append(set(args[1])) or read(*args)
    )
    found = propose_groups(cfg, tmp_path / "cache", [(10,), (10, 100)], [1.0, float("inf")])
    assert {(p.thresholds, p.beta) for p in found} == {
        ((10,), 1.0),
        ((10,), float("inf")),
        ((10, 100), 1.0),
        ((10, 100), float("inf")),
    }
    assert [p.bap for p in found] == sorted((p.bap for p in found), reverse=True)
    assert all(np.isclose(p.bap, np.nanmean(list(p.bins.values()))) for p in found)
    a, b = held_out
    assert not a & b
    assert len(a | b) == len(DatasetCatalog.get("grouped_tiny"))
    assert seen == [a, b] * 4
    assert not list((tmp_path / "out").glob("*"))


def test_the_command_prints_a_ranking_and_keys_of_the_config(cfg, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module.propose_groups, "__defaults__", (None, ((10,),), (float("inf"),)))
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    run_command("propose-groups", "--config-file", path, "--cache", tmp_path / "cache")
    printed = capsys.readouterr().out
    assert "| (10,) " in printed
    assert "'(10,)' MODEL.BAGS.OTHERS_SAMPLE_RATIO .inf" in printed


def test_other_classifiers_are_refused(cfg, tmp_path):
    cfg.MODEL.ROI_BOX_PREDICTOR.NAME = "FastRCNNOutputLayers"
    with pytest.raises(ConfigError, match="proposed for BAGSOutputLayers"):
        propose_groups(cfg, tmp_path / "cache")
