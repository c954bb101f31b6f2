"""Calibrations against slow references of their formulas, and their command."""

import argparse
import functools
import math

import numpy as np
import pytest
import torch
from conftest import TINY_COUNTS
from detectron2.data import DatasetCatalog
from detectron2.layers import ShapeSpec

from bags_d2 import BAGSTrainer, ConfigError, build_box_predictor
from bags_d2.cli import build_parser
from bags_d2.cli import calibrate as command
from bags_d2.data.annotations import read_annotations
from bags_d2.fitting import calibration
from bags_d2.fitting.calibration import CALIBRATIONS, calibrate, fractal_dimension, softmaxes

K = 6
SOFTMAX, BAGS = "FastRCNNOutputLayers", "BAGSOutputLayers"
# Classes by group; the softmax is one group. Of the fixture: 0 and 4, 1 and 5, 2, 3.
GROUPS = {SOFTMAX: [[0, 1, 2, 3, 4, 5]], BAGS: [[0, 4], [1, 5], [2], [3]]}
# (image, class): class 1 twice in an image.
OBJECTS = [(1, 0), (1, 1), (1, 1), (2, 1), (3, 1), (3, 2), *[(i, 3) for i in range(1, 9)], (4, 4)]
IMAGES = {
    0: 1,
    1: 3,
    2: 1,
    3: 8,
    4: 1,
    5: 1,
}  # class 5 has none: counts as 1
COUNTED = ("MODEL.LONG_TAIL.CLASS_COUNTS_FILE", "")
GENERATOR = torch.Generator().manual_seed(0)
FEATURES = torch.randn(300, 8, generator=GENERATOR)
LABELS = torch.randint(K - 1, (300,), generator=GENERATOR)  # no RoI of class 5
LABELS[100:] = K


@pytest.fixture
def make(tiny_cfg, write_lvis, register):
    """``make(name, *opts)``: a config with a training set, and a predictor of its kind."""
    rows = [(image, c + 1) for image, c in OBJECTS]
    path = write_lvis({i + 1: f"c{i}" for i in range(K)}, rows)
    register("calibrated_train", path, class_instance_count=TINY_COUNTS)  # which group classes

    def build(name, *opts):
        name = ("MODEL.ROI_BOX_PREDICTOR.NAME", name)
        cfg = tiny_cfg(*name, "DATASETS.TRAIN", ("calibrated_train",), *COUNTED, *opts)
        torch.manual_seed(1)
        predictor = build_box_predictor(cfg, ShapeSpec(channels=8))
        torch.nn.init.normal_(predictor.cls_score.weight)
        torch.nn.init.normal_(predictor.cls_score.bias)
        return cfg, predictor

    return build


@torch.no_grad()
def calibrated(cfg, predictor, method, strength=None):
    """Calibrate a predictor in place; returns scores (R, K + 1) before and after of all RoIs."""
    rois = functools.partial(predictor.cls_score, FEATURES)
    before = (
        predictor.class_probs(rois()) if hasattr(predictor, "class_probs") else rois().softmax(1)
    )
    function, default = CALIBRATIONS[method]
    logits = rois()
    for softmax in softmaxes(predictor, cfg, None, lambda: calibration._box_centers(cfg)):
        softmax = softmax._replace(rois=lambda: (logits, LABELS))
        parts = function(softmax, default if strength is None else strength)
        calibration._map_logits(softmax, *parts, method)
    after = (
        predictor.class_probs(rois()) if hasattr(predictor, "class_probs") else rois().softmax(1)
    )
    return before.double(), after.double()


def reference(name, row, change):
    """A RoI's scores after ``change(group, {class: conditional score}, rest) -> new scores``.

    The rest is P(background) of a softmax, or P("others") of a group.
    """
    foreground = 1.0 if name == SOFTMAX else row["foreground"]
    scores = [0.0] * (K + 1)
    for group in GROUPS[name]:
        new, rest = change(group, {c: row["groups"][c] for c in group}, row["rest"][group[0]])
        for c, value in new.items():
            scores[c] = value * foreground
    scores[K] = rest if name == SOFTMAX else 1 - foreground
    return scores


def rows_of(name, predictor):
    """What :func:`reference` takes of each RoI, by plain Python from the logits."""
    with torch.no_grad():
        logits = predictor.cls_score(FEATURES).double().tolist()
    for z in logits:
        if name == SOFTMAX:
            total = sum(map(math.exp, z))
            groups = {c: math.exp(z[c]) / total for c in range(K)}
            yield {"groups": groups, "rest": {0: math.exp(z[K]) / total}}
            continue
        row = {"groups": {}, "rest": {}, "foreground": 1 / (1 + math.exp(z[0] - z[1]))}
        column = 2
        for group in GROUPS[BAGS]:
            part = [math.exp(x) for x in z[column : column + 1 + len(group)]]
            row["rest"][group[0]] = part[0] / sum(part)
            row["groups"] |= {c: p / sum(part) for c, p in zip(group, part[1:], strict=True)}
            column += len(part)
        yield row


def by_factors(factor):
    """Divide scores of classes by their factors and normalise, the rest included."""

    def change(_, scores, rest):
        scores = {c: s * factor(c) for c, s in scores.items()}
        total = sum(scores.values()) + rest
        return {c: s / total for c, s in scores.items()}, rest / total

    return change


def check(name, make, method, change, strength=None):
    cfg, predictor = make(name)
    expected = [reference(name, row, change) for row in rows_of(name, predictor)]
    before, after = calibrated(cfg, predictor, method, strength)
    np.testing.assert_allclose(after, expected, rtol=0, atol=1e-6)
    assert (after - before).abs().max() > 0.01


both = pytest.mark.parametrize("name", [SOFTMAX, BAGS])


@both
@pytest.mark.parametrize("gamma", [None, 0.3, 1.5])
def test_norcal_divides_by_a_power_of_the_counts_and_normalises(make, name, gamma):
    exponent = 0.6 if gamma is None else gamma
    check(name, make, "norcal", by_factors(lambda c: IMAGES[c] ** -exponent), gamma)


@both
def test_fracal_adjusts_logits_and_divides_by_the_dimension(make, name, monkeypatch):
    dimensions = [1.0, 1.3, 1.9, 1.1, 1.0, 2.0]
    monkeypatch.setattr(calibration, "_box_centers", lambda cfg: list(range(K)))
    monkeypatch.setattr(calibration, "fractal_dimension", lambda c: dimensions[c])

    def factor(c):
        shift = -math.log10(IMAGES[c] / 8) - math.log10(K)
        return math.exp(shift) / dimensions[c] ** 2

    check(name, make, "fracal", by_factors(factor))


@both
def test_logn_normalises_by_mean_and_deviation_over_rois(make, name):
    cfg, predictor = make(name)
    with torch.no_grad():
        logits = predictor.cls_score(FEATURES).double()
    columns = {c: c for c in range(K)}
    if name == BAGS:
        columns = dict(zip(range(K), predictor.groups.class_to_column.tolist(), strict=True))
    mean = {c: logits[:, columns[c]].mean().item() for c in range(K)}
    variance = {c: ((logits[:, columns[c]] - mean[c]) ** 2).mean().item() for c in range(K)}
    expected = []
    for row, z in zip(rows_of(name, predictor), logits.tolist(), strict=True):

        def change(group, scores, rest, z=z):
            shift = min(mean[c] for c in group)
            new = {c: (z[columns[c]] - mean[c] + shift) / variance[c] ** 0.5 for c in group}
            # The logit of the rest, of which only its share is at hand.
            other = math.log(rest) + z[columns[group[0]]] - math.log(scores[group[0]])
            total = sum(map(math.exp, new.values())) + math.exp(other)
            return {c: math.exp(x) / total for c, x in new.items()}, math.exp(other) / total

        expected.append(reference(name, row, change))
    _, after = calibrated(cfg, predictor, "logn")
    np.testing.assert_allclose(after, expected, rtol=0, atol=1e-6)


@both
@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0, 1.7])
def test_tau_divides_rows_by_a_power_of_their_norm(make, name, tau):
    cfg, predictor = make(name)
    weight, bias = (p.detach().clone() for p in predictor.cls_score.parameters())
    calibrated(cfg, predictor, "tau_norm", tau)
    rest = [K] if name == SOFTMAX else [0, 1, 2, 5, 8, 10]
    for row, (old, new) in enumerate(zip(weight, predictor.cls_score.weight, strict=True)):
        norm = 1.0 if row in rest else sum(x * x for x in old.tolist()) ** 0.5
        torch.testing.assert_close(new, old / norm**tau, rtol=0, atol=1e-6)
        assert row not in rest or torch.equal(new, old)
    assert torch.equal(predictor.cls_score.bias, bias)


@pytest.mark.parametrize("name", [SOFTMAX, "SeesawOutputLayers"])
def test_no_other_temperatures_fit_better(make, name):
    cfg, predictor = make(name)
    foreground = LABELS < (K + 1 if name == SOFTMAX else K)
    columns = K + 1 if name == SOFTMAX else K

    @torch.no_grad()
    def loss():
        logits = predictor.cls_score(FEATURES).double()[foreground, :columns]
        return torch.nn.functional.cross_entropy(logits, LABELS[foreground]).item()

    before, old = loss(), predictor.cls_score.weight.detach().clone()
    calibrated(cfg, predictor, "temperature")
    least, weight = loss(), predictor.cls_score.weight
    assert least < before - 0.1
    ratio = weight / old
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    assert (ratio > 0).all()
    assert torch.equal(weight[5:], old[5:])  # a class without RoIs, and what is no class
    for c in range(5):
        for factor in (0.9, 1.1):
            with torch.no_grad():
                weight[c] *= factor
                predictor.cls_score.bias[c] *= factor
                assert loss() > least - 1e-5
                weight[c] /= factor
                predictor.cls_score.bias[c] /= factor


def test_the_dimension_of_a_line_an_area_and_a_point():
    rng = np.random.default_rng(0)
    line = np.stack([rng.random(5000), np.full(5000, 0.5)], axis=1)
    assert fractal_dimension(line) == pytest.approx(1.0, abs=0.02)
    assert fractal_dimension(rng.random((30_000, 2))) == pytest.approx(2.0, abs=0.05)
    assert fractal_dimension(np.full((5000, 2), 0.3)) == 1.0
    assert fractal_dimension(rng.random((3, 2))) == 1.0
    corners = np.array([[0.1, 0.1], [0.9, 0.1], [0.1, 0.9], [1, 1]])
    assert fractal_dimension(corners) == pytest.approx(2.0)
    diagonal = np.stack([np.linspace(0, 1, 17)] * 2, axis=1)
    assert fractal_dimension(diagonal) == pytest.approx(1.0)


def test_centers_are_those_of_the_objects(make):
    cfg, _ = make(SOFTMAX)
    centers = calibration._box_centers(cfg)
    assert [len(c) for c in centers] == [1, 4, 1, 8, 1, 0]
    np.testing.assert_allclose(centers[1], [[(1 + 1.5) / 30, (2 + 2) / 20]] * 4)


def test_what_has_no_meaning_is_refused_in_one_sentence(make):
    cfg, groups = make(BAGS)
    with pytest.raises(ConfigError, match="temperature has no meaning for groups"):
        calibrated(cfg, groups, "temperature")
    for name in ("EQLv2OutputLayers", "LWSOutputLayers", "NearestMeanOutputLayers"):
        with pytest.raises(ConfigError, match=f"{name} .* does not score by a softmax"):
            softmaxes(make(name)[1], cfg, None, None)
    cfg, sigmoid = make(SOFTMAX, "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True)
    with pytest.raises(ConfigError, match="does not score by a softmax"):
        softmaxes(sigmoid, cfg, None, None)
    cfg, cosine = make("BalancedSoftmaxOutputLayers", "MODEL.ROI_BOX_PREDICTOR.NORMALIZED", True)
    with pytest.raises(ConfigError, match=r"tau_norm scales .* a cosine classifier"):
        calibrated(cfg, cosine, "tau_norm")
    calibrated(cfg, cosine, "norcal")
    for arguments, sentence in (
        (("magic",), "--calibration must be one of norcal, fracal, "),
        (("logn", 1.0), "--strength is 1.0, but logn has none"),
        (("fracal", -1.0), "--strength is -1.0, but fracal takes"),
        (("norcal", math.inf), "--strength is inf, but norcal takes"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            calibrate(cfg, arguments[0], strength=arguments[1] if arguments[1:] else None)


@pytest.fixture
def detector(tiny_cfg, datasets_root, register, tmp_path):
    """``detector(*opts)``: config of an untrained detector with its checkpoint, on glyphs_tiny."""
    root = datasets_root / "glyphs_tiny"
    path = root / "annotations" / "glyphs_tiny_train.json"
    names = read_annotations(path).names
    register("calibrated_tiny", str(path), str(root))

    def build(*opts):
        output = ("OUTPUT_DIR", str(tmp_path / "out"), "DATALOADER.NUM_WORKERS", 0)
        cfg = tiny_cfg(
            *("DATASETS.TRAIN", ("calibrated_tiny",), "DATASETS.TEST", ("calibrated_tiny",)),
            *(*COUNTED, "MODEL.ROI_HEADS.NUM_CLASSES", len(names)),
            *("MODEL.WEIGHTS", str(tmp_path / "in" / "model.pth"), *output, *opts),
        )
        torch.manual_seed(0)
        (tmp_path / "in").mkdir(exist_ok=True)
        torch.save({"model": BAGSTrainer.build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
        return cfg

    return build


def classifier_of(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize("method", CALIBRATIONS)
def test_a_checkpoint_differs_in_its_classifier_and_knows_its_classes(detector, method):
    cfg = detector("MODEL.ROI_BOX_PREDICTOR.NAME", SOFTMAX)
    path = calibrate(cfg, method)
    before, after = classifier_of(cfg.MODEL.WEIGHTS), classifier_of(path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed
    assert all(".cls_score." in name for name in changed)
    record = torch.load(path, weights_only=True)["classes"]
    assert len(record["names"]) == cfg.MODEL.ROI_HEADS.NUM_CLASSES
    calibration.load_detector(cfg.clone())  # which is what evaluation loads


def test_a_cache_of_stage_1_serves_if_the_detector_is_the_same(detector, tmp_path):
    cfg = detector("MODEL.ROI_BOX_PREDICTOR.NAME", BAGS)
    stage1 = str(tmp_path / "stage1.pth")
    weights = classifier_of(cfg.MODEL.WEIGHTS)
    torch.save({"model": weights, "note": 1}, stage1)
    calibrate(cfg, "logn", detector=stage1, folder=tmp_path / "cache")
    with pytest.raises(ConfigError, match="made with other settings or data: checkpoint"):
        calibrate(cfg, "logn", folder=tmp_path / "cache")
    weights["roi_heads.box_head.fc1.bias"] += 1
    torch.save({"model": weights}, stage1)
    with pytest.raises(ConfigError, match=r"'roi_heads\.box_head\.fc1\.bias' is not the same"):
        calibrate(cfg, "logn", detector=stage1)


def test_rare_classes_alone_and_every_stage_of_a_cascade(detector):
    heads = ("MODEL.ROI_HEADS.NAME", "LongTailCascadeROIHeads")
    agnostic = ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
    cfg = detector("MODEL.ROI_BOX_PREDICTOR.NAME", SOFTMAX, *heads, *agnostic)
    counts = read_annotations(DatasetCatalog["calibrated_tiny"].args[0]).instance_counts()
    limit = int(np.median(counts))
    before = classifier_of(cfg.MODEL.WEIGHTS)
    after = classifier_of(calibrate(cfg, "tau_norm", max_count=limit))
    names = [n for n in before if n.endswith("cls_score.weight")]
    assert len(names) == 3
    for name in names:
        changed = (before[name] != after[name]).any(dim=1)
        assert changed.tolist() == [*(counts < limit), False]
    logits = classifier_of(calibrate(cfg, "logn"))
    assert all((before[name] != logits[name]).any(dim=1)[:-1].all() for name in names)


def test_the_checkpoint_is_not_overwritten(detector):
    cfg = detector("MODEL.ROI_BOX_PREDICTOR.NAME", SOFTMAX)
    for weights in ("", f"{cfg.OUTPUT_DIR}/model_final.pth"):
        cfg.MODEL.WEIGHTS = weights
        with pytest.raises(ConfigError, match=r"MODEL\.WEIGHTS is .*OUTPUT_DIR to another"):
            calibrate(cfg, "norcal")


def test_the_command_passes_on_what_it_is_given(monkeypatch, tmp_path):
    called = {}
    monkeypatch.setattr(calibration, "calibrate", lambda *args, **kwargs: called.update(kwargs))
    monkeypatch.setattr("bags_d2.engine.check_files", lambda cfg: None)
    config = ["--config-file", "configs/glyphs_baseline.yaml", "OUTPUT_DIR", str(tmp_path)]
    flags = ["--calibration", "fracal", "--strength", "1", "--max-count", "7", "--cache", "x"]
    args = build_parser("calibrate").parse_args([*flags, "--detector", "y", *config])
    assert isinstance(args, argparse.Namespace)
    command.run(args)
    expected = {"strength": 1.0, "max_count": 7, "folder": "x", "detector": "y"}
    assert called == expected
