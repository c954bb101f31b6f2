"""A class that joins a trained BAGS detector: what moves, and what does not."""

import json
from pathlib import Path

import pytest
import torch
from commands import run_command
from torch.nn import functional as F

from bags_d2 import BAGSTrainer, ClassGroups, ConfigError, DataError
from bags_d2.data.annotations import read_annotations
from bags_d2.fitting import FeatureCache
from bags_d2.fitting.add_class import add_class, fit_column, widened
from bags_d2.fitting.calibration import load_detector

BAGS = ("MODEL.ROI_BOX_PREDICTOR.NAME", "BAGSOutputLayers")
THRESHOLDS = (10, 100)


@pytest.fixture
def glyphs(datasets_root):
    """The annotation file and the folder of glyphs_tiny."""
    root = datasets_root / "glyphs_tiny"
    return str(root / "annotations" / "glyphs_tiny_train.json"), str(root)


@pytest.fixture
def detector(tiny_cfg, register, glyphs, tmp_path):
    """``detector(*opts)``: config of an untrained BAGS detector with its checkpoint, and its last
    class, which it does not know: of its training set all objects of that class are missing."""
    json_file, root = glyphs
    content = json.loads(Path(json_file).read_text())
    last = content["categories"].pop()
    for image in content["images"]:
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            image[key] = [i for i in image[key] if i != last["id"]]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != last["id"]]
    before = tmp_path / "before.json"
    before.write_text(json.dumps(content))
    register("before_the_class", str(before), root)

    def build(*opts):
        cfg = tiny_cfg(
            *(*BAGS, "MODEL.BAGS.GROUP_THRESHOLDS", THRESHOLDS),
            *("DATASETS.TRAIN", ("before_the_class",), "DATASETS.TEST", ()),
            *("MODEL.LONG_TAIL.CLASS_COUNTS_FILE", "", "DATALOADER.NUM_WORKERS", 0),
            *("MODEL.ROI_HEADS.NUM_CLASSES", len(content["categories"])),
            *("MODEL.WEIGHTS", str(tmp_path / "bags.pth"), "OUTPUT_DIR", str(tmp_path / "out")),
            *opts,
        )
        torch.manual_seed(0)
        model = BAGSTrainer.build_model(cfg)
        for predictor in model.roi_heads.box_predictor.modules():
            if hasattr(predictor, "cls_score"):
                torch.nn.init.normal_(predictor.cls_score.weight, std=0.3)
        names = [c["name"] for c in content["categories"]]
        counts = read_annotations(str(before)).instance_counts().tolist()
        record = {"names": names, "training_instances": counts}
        torch.save({"model": model.state_dict(), "classes": record}, cfg.MODEL.WEIGHTS)
        return cfg, last["name"]

    return build


def wider_cfg(cfg, path):
    cfg = cfg.clone()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES += 1
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, cfg.DATASETS.TRAIN = str(path), f"{path}_", ()
    return cfg


@pytest.mark.parametrize("masks", [False, True])
def test_one_column_is_new_and_all_others_keep_their_bits(detector, glyphs, masks):
    cfg, name = detector("MODEL.MASK_ON", masks)
    path, changes = add_class(cfg, name, ("lvis", *glyphs))
    before = load_detector(cfg)
    after = load_detector(wider_cfg(cfg, path))
    record = torch.load(path, weights_only=True)["classes"]
    count = read_annotations(glyphs[0]).instance_counts()[-1]
    assert record["names"][-1] == name
    assert record["training_instances"][-1] == count
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".pth"] == ["model_final.pth"]

    old, new = (m.roi_heads.box_predictor for m in (before, after))
    K = old.num_classes
    group = sum(count >= edge for edge in THRESHOLDS) + 1
    assert new.groups.class_to_group.tolist() == [*old.groups.class_to_group.tolist(), group]
    assert new.groups.class_counts.tolist() == record["training_instances"]
    kept = [c for c in range(new.groups.num_logits) if c != new.groups.class_to_column[K]]
    for p, q in zip(old.cls_score.parameters(), new.cls_score.parameters(), strict=True):
        assert torch.equal(p, q[kept])
    assert new.cls_score.weight[new.groups.class_to_column[K]].any()
    # In the scores, to the bit: group 0 and all groups but one; there, ratios of probabilities.
    features = torch.randn(500, old.cls_score.in_features)
    parts = [p.cls_score(features).split(p.groups.widths, dim=1) for p in (old, new)]
    for g, (a, b) in enumerate(zip(*parts, strict=True)):
        assert torch.equal(a.softmax(dim=1), b.softmax(dim=1)) == (g != group)
    a, b = parts[0][group].softmax(dim=1), parts[1][group].softmax(dim=1)
    torch.testing.assert_close(a, b[:, :-1] / b[:, :-1].sum(dim=1, keepdim=True))
    # All else is as it was; what a class has of its own is its group's mean.
    states = before.state_dict(), after.state_dict()
    of_group = (old.groups.class_to_group == group).nonzero()[:, 0]
    for key, tensor in states[0].items():
        wider = states[1][key]
        if ".bbox_pred." in key or "mask_head.predictor" in key:
            own = tensor.unflatten(0, (K, -1))[of_group].mean(dim=0)
            assert torch.equal(wider, torch.cat([tensor, own]))
        elif ".cls_score." not in key and ".groups." not in key:
            assert torch.equal(wider, tensor)
    names = [record["names"][c] for c in of_group]
    assert changes[0].name == "others"
    assert {c.name for c in changes} <= {"others", name, *names}
    assert changes[-1].name == name
    assert changes[-1].prob_before == 0
    assert changes[-1].prob_after > 0.1
    assert all(c.prob_after <= c.prob_before for c in changes[:-1])


def test_objects_of_the_training_images_are_negatives_too(detector, glyphs, tmp_path):
    cfg, name = detector()
    alone = {c.name: c.rois for c in add_class(cfg, name, ("lvis", *glyphs))[1]}
    cache = tmp_path / "cache"
    both = {c.name: c.rois for c in add_class(cfg, name, ("lvis", *glyphs), folder=cache)[1]}
    counts = torch.zeros(cfg.MODEL.ROI_HEADS.NUM_CLASSES + 1, dtype=torch.long)
    for _, labels in FeatureCache(cache).parts():
        counts += labels.flatten().bincount(minlength=len(counts))
    assert both[name] == alone[name]
    assert sum(both.values()) - sum(alone.values()) == counts[:-1].sum() > 0


def test_the_column_is_the_minimum_of_the_loss():
    generator = torch.Generator().manual_seed(0)
    features, frozen = torch.randn(60, 3, generator=generator), torch.randn(60, 4)
    positive = features[:, 0] + 0.5 * torch.randn(60, generator=generator) > 0.5
    weights = torch.rand(60, generator=generator)
    weight, bias = fit_column(features, positive, frozen.logsumexp(1), weights, 0.01)

    def loss(weight, bias):
        logits = torch.cat([frozen, (features @ weight + bias)[:, None]], dim=1).double()
        # Which of the frozen columns is the target makes no difference to what is fitted.
        targets = torch.where(positive, 4, torch.arange(60) % 4)
        losses = F.cross_entropy(logits, targets, reduction="none")
        return (weights * losses).sum() / weights.sum() + 0.01 / 2 * weight.square().sum()

    least = loss(weight, bias)
    for i in range(3):
        for step in (-0.02, 0.02):
            moved = weight.clone()
            moved[i] += step
            assert loss(moved, bias) > least
            assert loss(weight, bias + step) > least


def test_the_first_class_of_a_group_has_the_mean_of_all():
    old = ClassGroups.from_counts([5, 700], (10, 100))
    new = ClassGroups.from_counts([5, 700, 50], (10, 100))
    state = {"b.bbox_pred.bias": torch.arange(8.0), "b.cls_score.bias": torch.arange(7.0)}
    wider = {"b.bbox_pred.bias": torch.zeros(12), "b.cls_score.bias": torch.zeros(8)}
    result = widened(state, wider, old, new)
    assert result["b.bbox_pred.bias"].tolist() == [*range(8), 2, 3, 4, 5]
    assert result["b.cls_score.bias"].tolist() == [0, 1, 2, 3, 4, 0, 5, 6]


def test_what_cannot_be_added_is_refused_in_one_sentence(detector, glyphs, tmp_path):
    cfg, name = detector()
    data = ("lvis", *glyphs)
    with pytest.raises(DataError, match="--name 'owl' has no object in"):
        add_class(cfg, "owl", data)
    known = read_annotations(glyphs[0]).names[0]
    with pytest.raises(DataError, match=f"--name '{known}' is a class of the checkpoint"):
        add_class(cfg, known, data)
    with pytest.raises(ConfigError, match="--data is of kind 'voc'"):
        add_class(cfg, name, ("voc", *glyphs))
    cfg, name = detector("MODEL.ROI_BOX_PREDICTOR.NAME", "FastRCNNOutputLayers")
    with pytest.raises(ConfigError, match="cannot take in a class: it must be a BAGS"):
        add_class(cfg, name, data)


def test_the_command_prints_what_has_changed(detector, glyphs, tmp_path, capsys):
    cfg, name = detector()
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    run_command("add-class", "--name", name, "--data", "lvis", *glyphs, "--config-file", path)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith(f"| {name} | ")
    assert printed[-1].count("|") == 6
