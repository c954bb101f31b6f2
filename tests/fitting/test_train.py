"""Pass 2 of classifier fitting: the same training as online, on cached features."""

import errno
import functools
import itertools
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.engine import default_argument_parser
from detectron2.modeling.sampling import subsample_labels
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage, get_event_storage
from interrupted import interrupt_fit

from bags_d2 import BAGSTrainer, ConfigError, DataError, MissingFileError, add_bags_config
from bags_d2.data import register_lvis_format
from bags_d2.data.build import training_records
from bags_d2.data.samplers import epoch_order, shuffled
from bags_d2.engine import training
from bags_d2.errors import NonFiniteLossError
from bags_d2.fitting.cache import FeatureCache
from bags_d2.fitting.extract import (
    extract_features,
    load_frozen_detector,
    roi_features,
)
from bags_d2.fitting.train import (
    ClassifierLoss,
    ClassifierTrainer,
    cached_batches,
    epoch_keys,
    fit_classifier,
    sample_rois,
)
from bags_d2.utils.files import FolderInUseError, lock_folder

TINY = Path(__file__).parents[1] / "tiny.yaml"
SETS = {"fitted_train": "train", "fitted_val": "val"}
OPTIONS = [
    *("DATASETS.TRAIN", "('fitted_train',)", "DATASETS.TEST", "('fitted_val',)"),
    *("MODEL.TRAINABLE_PARAMS", "('roi_heads.box_predictor*cls_score.*',)"),
    *("MODEL.BAGS.GROUP_THRESHOLDS", "(10, 100)"),
]
BAGS = ("MODEL.ROI_BOX_PREDICTOR.NAME", "BAGSOutputLayers")
SOFTMAX = ("MODEL.ROI_BOX_PREDICTOR.NAME", "FastRCNNOutputLayers")
SIGMOID = (*SOFTMAX, "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", "True")
NUM_IMAGES, NUM_CLASSES = 35, 6
ORDER = functools.partial(shuffled, torch.arange(NUM_IMAGES))


def make_cfg(weights, output_dir, *opts):
    cfg = get_cfg()
    add_bags_config(cfg)
    cfg.merge_from_file(str(TINY))
    cfg.merge_from_list(OPTIONS)
    cfg.merge_from_list(["MODEL.WEIGHTS", str(weights), "OUTPUT_DIR", str(output_dir), *opts])
    return cfg


@pytest.fixture(scope="module")
def stage1(tmp_path_factory, datasets_root):
    """Folder with an untrained detector and a cache of its features on the tiny data set."""
    root = tmp_path_factory.mktemp("stage1")
    images = datasets_root / "glyphs_tiny"
    for name, split in SETS.items():
        json_file = images / "annotations" / f"glyphs_tiny_{split}.json"
        register_lvis_format(name, str(json_file), str(images))
    cfg = make_cfg("", root)
    seed_all_rng(3)
    torch.save({"model": BAGSTrainer.build_model(cfg).state_dict()}, root / "model.pth")
    cfg = make_cfg(root / "model.pth", root, *BAGS)
    extract_features(cfg, root / "cache", views=2, dtype="float16")
    yield root
    for name in SETS:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def cfg_of(stage1, tmp_path):
    """``cfg_of(*opts, run="run")``: config of a fit that writes to ``tmp_path / run``."""
    return lambda *opts, run="run": make_cfg(stage1 / "model.pth", tmp_path / run, *opts)


def weights_of(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize("predictor", [BAGS, SOFTMAX, SIGMOID], ids=["bags", "softmax", "sigmoid"])
def test_gradient_of_a_step_is_that_of_the_online_step(predictor, cfg_of, stage1):
    cfg = cfg_of(*predictor, "MODEL.BAGS.OTHERS_SAMPLE_RATIO", float("inf"))
    model = load_frozen_detector(cfg)
    mapper = DatasetMapper(cfg, is_train=True)
    batch = [mapper(record) for record in DatasetCatalog.get("fitted_train")[:4]]
    classifier = model.roi_heads.box_predictor.cls_score

    def gradients(loss):
        classifier.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in classifier.parameters()]

    with EventStorage():
        seed_all_rng(5)
        online_loss = model(batch)["loss_cls"]
        online = gradients(online_loss)
        seed_all_rng(5)
        rois = roi_features(model, batch)
        features = torch.cat([f for f, _ in rois])
        labels = torch.cat([x for _, x in rois])
        loss_of = ClassifierLoss([model.roi_heads.box_predictor])
        exact = gradients(loss_of([(features, labels)])["loss_cls"])
        stored_loss = loss_of([(features.half().float(), labels)])["loss_cls"]
        stored = gradients(stored_loss)
    assert sum(g.abs().sum() for g in online) > 0
    torch.testing.assert_close(exact, online, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stored_loss, online_loss, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(stored, online, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("num_rois", [1, 7, 32, 500])
@pytest.mark.parametrize("positive_fraction", [0.0, 0.25, 1.0])
def test_rois_are_sampled_as_detectron2_does(num_rois, positive_fraction):
    generator = np.random.default_rng(1)
    sizes = [40, 0, 1, 25, 30, 12]
    labels = torch.from_numpy(generator.integers(NUM_CLASSES + 1, size=sum(sizes)))
    labels[-30:-12], labels[-12:] = NUM_CLASSES, 2  # background alone, foreground alone
    times_seen = torch.zeros(len(labels))
    for _ in range(400):
        sampled = torch.from_numpy(
            sample_rois(labels.numpy(), sizes, generator, num_rois, positive_fraction, NUM_CLASSES)
        )
        assert torch.equal(sampled, sampled.unique())
        times_seen[sampled] += 1
    of_image = zip(
        sampled.bincount(minlength=len(labels)).split(sizes),
        labels.split(sizes),
        times_seen.split(sizes),
        strict=True,
    )
    for chosen, own, seen in of_image:
        positive, negative = subsample_labels(own, num_rois, positive_fraction, NUM_CLASSES)
        for indices, of_kind in ((positive, own != NUM_CLASSES), (negative, own == NUM_CLASSES)):
            assert chosen[of_kind].sum() == len(indices)
            if len(indices):  # each is drawn as often as any other
                share = len(indices) / of_kind.sum()
                deviation = (400 * share * (1 - share)) ** 0.5
                assert (seen[of_kind] - 400 * share).abs().max() <= 4.5 * deviation


def test_rois_are_sampled_afresh_in_each_epoch(cfg_of, stage1):
    cache = FeatureCache(stage1 / "cache")
    epoch = cached_batches(
        cfg_of("SOLVER.IMS_PER_BATCH", NUM_IMAGES), cache, lambda _: torch.arange(NUM_IMAGES)
    )
    (first,), _, (third,) = itertools.islice(epoch, 3)  # views alternate
    assert len(first[1]) == len(third[1]) == NUM_IMAGES * 32
    assert not torch.equal(first[0], third[0])
    everything = cache.read([(0, i) for i in range(NUM_IMAGES)])[0]
    rows = {row.numpy().tobytes() for row in everything}
    assert all(row.numpy().tobytes() in rows for features, _ in (first, third) for row in features)


def test_loss_is_the_mean_over_devices(cfg_of, stage1):
    cache = FeatureCache(stage1 / "cache")
    cfg = cfg_of(*SOFTMAX, "SOLVER.IMS_PER_BATCH", 6, "SOLVER.REFERENCE_WORLD_SIZE", 3)
    model = load_frozen_detector(cfg)
    loss_of = ClassifierLoss([model.roi_heads.box_predictor])
    batch = next(cached_batches(cfg, cache, ORDER))
    assert len(batch) == 3
    with EventStorage():
        parts = torch.stack([loss_of([part])["loss_cls"] for part in batch])
        torch.testing.assert_close(loss_of(batch)["loss_cls"], parts.mean())


def test_every_image_comes_once_in_an_epoch_and_views_alternate(cfg_of, stage1):
    cache = FeatureCache(stage1 / "cache")
    keys = list(itertools.islice(epoch_keys(ORDER, 2, seed=1), 3 * NUM_IMAGES))
    epochs = [keys[i : i + NUM_IMAGES] for i in range(0, len(keys), NUM_IMAGES)]
    for number, epoch in enumerate(epochs):
        assert {view for view, _ in epoch} == {number % 2}
        assert sorted(image for _, image in epoch) == list(range(NUM_IMAGES))
    assert epochs[0] != [(0, image) for _, image in epochs[2]]
    # A batch follows from its step alone, also over the end of an epoch.
    options = ("SOLVER.IMS_PER_BATCH", 4, "SOLVER.REFERENCE_WORLD_SIZE", 2, "SEED", 1)
    batches = functools.partial(cached_batches, cfg_of(*options), cache, ORDER)
    expected = list(itertools.islice(batches(), 12))[7:]
    torch.testing.assert_close(list(itertools.islice(batches(7), 5)), expected, rtol=0, atol=0)


def test_fitted_detector_evaluates_and_differs_in_the_classifier_alone(cfg_of, stage1, tmp_path):
    before = weights_of(stage1 / "model.pth")
    for run, predictor in (("bags", BAGS), ("softmax", SOFTMAX)):
        cfg = cfg_of(*predictor, "SOLVER.MAX_ITER", 30, "SOLVER.STEPS", (), run=run)
        path = fit_classifier(cfg, stage1 / "cache")
        assert path == tmp_path / run / "model_final.pth"
        after = weights_of(path)
        new = {k for k in after if "cls_score" in k or ".groups." in k}
        assert after.keys() - new == {k for k in before if "cls_score" not in k}
        assert all(torch.equal(after[k], before[k]) for k in after.keys() - new)
        name = "roi_heads.box_predictor.cls_score.bias"
        assert after[name].abs().sum() > 0
        rows = [json.loads(r) for r in (tmp_path / run / "metrics.json").read_text().splitlines()]
        assert not any("loss_box_reg" in row for row in rows)

        options = [*OPTIONS, *predictor, "MODEL.WEIGHTS", str(path)]
        options += ["OUTPUT_DIR", str(tmp_path / "eval"), "INPUT.MIN_SIZE_TEST", "64"]
        flags = ["--config-file", str(TINY), "--eval-only"]
        args = default_argument_parser().parse_args([*flags, *options])
        assert "bAP" in training.main(args)["bbox"]


def test_training_lowers_the_loss(cfg_of, stage1):
    cfg = cfg_of(*BAGS, "SOLVER.MAX_ITER", 60, "SOLVER.STEPS", (), "SOLVER.BASE_LR", 1e-3)
    whole_epoch = cfg_of("SOLVER.IMS_PER_BATCH", NUM_IMAGES)
    batch = next(cached_batches(whole_epoch, FeatureCache(stage1 / "cache"), ORDER))

    def loss(weights):
        model = load_frozen_detector(cfg_of(*BAGS, "MODEL.WEIGHTS", str(weights)))
        with EventStorage(), torch.no_grad():
            return float(ClassifierLoss([model.roi_heads.box_predictor])(batch)["loss_cls"])

    torch.manual_seed(0)
    before = loss(stage1 / "model.pth")
    assert loss(fit_classifier(cfg, stage1 / "cache")) < 0.8 * before


@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_killed_fit_goes_on_to_the_same_weights(cfg_of, stage1, tmp_path, sampler):
    in_order = ("DATALOADER.SAMPLER_TRAIN", sampler, "DATALOADER.REPEAT_THRESHOLD", 0.5)

    def fit(run, kill_after=None):
        options = ("SOLVER.MAX_ITER", 15, "SOLVER.CHECKPOINT_PERIOD", 5, "SOLVER.STEPS", (8, 12))
        cfg = cfg_of(*BAGS, *options, *in_order, "SOLVER.REFERENCE_WORLD_SIZE", 2, run=run)
        if kill_after:
            save = ClassifierTrainer.after_step

            def after_step(self):
                save(self)
                if self.iter + 1 == kill_after:
                    os.kill(os.getpid(), signal.SIGKILL)

            ClassifierTrainer.after_step = after_step
        return fit_classifier(cfg, stage1 / "cache")

    whole = weights_of(fit("whole"))
    for kill_after in (7, 12, 15):  # the last one between the last step and model_final.pth
        process = multiprocessing.get_context("fork").Process(
            target=fit, args=("killed", kill_after)
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        saved = torch.load(tmp_path / "killed" / "fitting.pth", weights_only=True)
        assert saved["trainer"]["iteration"] + 1 == kill_after // 5 * 5
    with pytest.raises(
        ConfigError, match=r"fitting\.pth.* SOLVER\.BASE_LR is 0.01 there and 0.5 now"
    ):
        fit_classifier(
            cfg_of(*BAGS, *in_order, "SOLVER.BASE_LR", 0.5, run="killed"), stage1 / "cache"
        )
    other = ("DATALOADER.SAMPLER_TRAIN", "ClassBalancedTrainingSampler")
    with pytest.raises(ConfigError, match=rf"DATALOADER\.SAMPLER_TRAIN is {sampler} there and Cl"):
        fit_classifier(cfg_of(*BAGS, *in_order, *other, run="killed"), stage1 / "cache")
    resumed = weights_of(fit("killed"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    left = {p.name for p in (tmp_path / "killed").iterdir() if not p.name.startswith("events.")}
    assert left == {".lock", "metrics.json", "model_final.pth"}


def test_seeds_give_fits_of_their_own(cfg_of, stage1):
    fits = [
        weights_of(fit_classifier(cfg_of(*BAGS, "SEED", seed, run=run), stage1 / "cache"))
        for run, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    name = "roi_heads.box_predictor.cls_score.weight"
    assert torch.equal(fits[0][name], fits[1][name])
    assert not torch.equal(fits[0][name], fits[2][name])


def test_mistakes_are_named(cfg_of, stage1, tmp_path):
    with pytest.raises(MissingFileError, match=r"bags-d2 fit"):
        fit_classifier(cfg_of(*BAGS), tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"MODEL\.RPN\.NMS_THRESH is 0.7 there and 0.5 now"):
        fit_classifier(cfg_of(*BAGS, "MODEL.RPN.NMS_THRESH", 0.5), stage1 / "cache")
    with pytest.raises(ConfigError, match="is not a multiple of"):
        fit_classifier(cfg_of(*BAGS, "SOLVER.REFERENCE_WORLD_SIZE", 3), stage1 / "cache")


def test_logs_say_what_is_fitted(cfg_of, stage1, log_lines):
    lines = log_lines("bags_d2")
    fit_classifier(cfg_of(*BAGS), stage1 / "cache")
    assert any("Fitting the classifier of BAGSOutputLayers" in line for line in lines)


# Samplers, new classifiers, and classifiers that are computed


@pytest.mark.parametrize(
    "sampler",
    ["RepeatFactorTrainingSampler", "ClassBalancedTrainingSampler", "TailTrainingSampler"],
)
def test_batches_follow_the_sampler_and_go_on_anywhere(cfg_of, stage1, sampler):
    cfg = cfg_of(
        *("DATALOADER.SAMPLER_TRAIN", sampler, "DATALOADER.REPEAT_THRESHOLD", 0.5),
        *("DATALOADER.TAIL_MAX_COUNT", 20),
    )
    order = epoch_order(cfg, training_records(cfg))
    keys = list(itertools.islice(epoch_keys(order, 2, 7), 300))
    expected = []
    for epoch in itertools.count():
        generator = torch.Generator().manual_seed(7 * 1_000_003 + epoch)
        expected += [(epoch % 2, image) for image in order(generator).tolist()]
        if len(expected) >= 300:
            break
    assert keys == expected[:300]
    assert {image for _, image in keys} <= set(range(NUM_IMAGES))
    for start in (1, 34, 35, 36, 170):
        resumed = itertools.islice(epoch_keys(order, 2, 7, start), 40)
        assert list(resumed) == keys[start : start + 40]


def test_an_unknown_sampler_is_refused(cfg_of, stage1):
    cfg = cfg_of(*BAGS, "DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler")
    with pytest.raises(ConfigError, match=r"DATALOADER\.SAMPLER_TRAIN is 'RandomSubset"):
        fit_classifier(cfg, stage1 / "cache")


def test_a_classifier_is_kept_or_drawn_anew(cfg_of, stage1):
    stored = weights_of(stage1 / "model.pth")
    name = "roi_heads.box_predictor.cls_score.weight"
    kept = load_frozen_detector(cfg_of(*SOFTMAX)).state_dict()
    # The stage-1 detector of these tests is a softmax one: its classifier fits.
    assert torch.equal(kept[name], stored[name])
    new = load_frozen_detector(
        cfg_of(*SOFTMAX, "MODEL.ROI_BOX_PREDICTOR.REINITIALIZE", True)
    ).state_dict()
    assert not torch.equal(new[name], stored[name])
    different = {k for k in stored if not torch.equal(new[k], stored[k])}
    assert different <= {name, "roi_heads.box_predictor.cls_score.bias"}


def test_class_means_are_fitted_and_evaluated(cfg_of, stage1):
    cfg = cfg_of("MODEL.ROI_BOX_PREDICTOR.NAME", "NearestMeanOutputLayers")
    path = fit_classifier(cfg, stage1 / "cache")
    means = weights_of(path)["roi_heads.box_predictor.class_means"]
    cache = FeatureCache(stage1 / "cache")
    rois = [cache.read([(view, i)]) for view in range(2) for i in range(NUM_IMAGES)]
    features = torch.cat([f[:, 0] for f, _ in rois]).double()
    labels = torch.cat([x[:, 0] for _, x in rois])
    for c in labels.unique()[:-1].tolist():
        torch.testing.assert_close(means[c], features[labels == c].mean(0).float())
    arguments = ["--config-file", str(TINY), "--eval-only", *map(str, OPTIONS)]
    arguments += ["MODEL.ROI_BOX_PREDICTOR.NAME", "NearestMeanOutputLayers"]
    arguments += ["MODEL.WEIGHTS", str(path), "OUTPUT_DIR", str(path.parent)]
    results = training.main(default_argument_parser().parse_args(arguments))
    assert "AP" in results["bbox"]


# What is not finite, damaged or in use


@pytest.mark.parametrize("predictor", [BAGS, SOFTMAX], ids=["bags", "softmax"])
def test_divergence_is_an_error_and_nothing_is_written(predictor, cfg_of, stage1, tmp_path):
    cfg = cfg_of(*predictor, "SOLVER.BASE_LR", 1e30, "SOLVER.MAX_ITER", 40, "SOLVER.STEPS", ())
    message = r"^Infinite or NaN loss at iteration \d+: loss_cls[^;]*; lower SOLVER\.BASE_LR"
    with pytest.raises(NonFiniteLossError, match=message):
        fit_classifier(cfg, stage1 / "cache")
    assert not list((tmp_path / "run").glob("*.pth"))


def test_progress_of_a_fit_that_diverges_is_good(cfg_of, stage1, tmp_path):
    options = ("SOLVER.BASE_LR", 1e30, "SOLVER.MAX_ITER", 40, "SOLVER.CHECKPOINT_PERIOD", 1)
    with pytest.raises(NonFiniteLossError, match=r"delete '.*fitting\.pth' if it exists"):
        fit_classifier(cfg_of(*BAGS, *options, "SOLVER.STEPS", ()), stage1 / "cache")
    weights = weights_of(tmp_path / "run" / "fitting.pth")
    assert all(w.isfinite().all() for w in weights.values())


def test_weights_that_overflow_in_the_last_step_are_not_written(cfg_of, stage1, tmp_path):
    # The loss of the only step is finite, and no later one tells.
    huge = ("SOLVER.BASE_LR", 1e38, "SOLVER.WEIGHT_DECAY", 1e9, "SOLVER.WARMUP_ITERS", 0)
    cfg = cfg_of(*BAGS, *huge, "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", ())
    with pytest.raises(NonFiniteLossError, match=r"Weights of '.*' .* infinite or NaN; lower"):
        fit_classifier(cfg, stage1 / "cache")
    assert not list((tmp_path / "run").glob("*.pth"))


def test_some_steps_whose_loss_is_not_finite_may_be_left_out(cfg_of, stage1, monkeypatch):
    original = ClassifierLoss.forward
    calls = itertools.count()

    def forward(self, batch):
        losses = original(self, batch)
        return {k: x * float("nan") for k, x in losses.items()} if next(calls) == 2 else losses

    monkeypatch.setattr(ClassifierLoss, "forward", forward)
    cfg = cfg_of(*BAGS, "SOLVER.MAX_NONFINITE_STEPS", 1)
    assert all(
        w.isfinite().all() for w in weights_of(fit_classifier(cfg, stage1 / "cache")).values()
    )


def test_steps_that_were_left_out_count_after_a_resume(unfinished, stage1, monkeypatch):
    cfg, path = unfinished
    cfg.SOLVER.MAX_NONFINITE_STEPS = 1
    assert torch.load(path, weights_only=True)["trainer"]["skips"] == 0
    resave(path, lambda content: content["trainer"].update(skips=1))
    original = ClassifierLoss.forward
    nan = {"loss_cls": torch.tensor(float("nan"), requires_grad=True)}
    calls = itertools.count()
    monkeypatch.setattr(
        ClassifierLoss, "forward", lambda *args: original(*args) if next(calls) != 3 else nan
    )
    with pytest.raises(NonFiniteLossError, match="loss at iteration 8"):
        fit_classifier(cfg, stage1 / "cache")


@pytest.mark.parametrize("rate", [float("inf"), 1e39, float("nan")])
def test_a_learning_rate_beyond_float32_is_refused(rate, cfg_of, stage1):
    with pytest.raises(ConfigError, match=r"^SOLVER\.BASE_LR is \S+; it must be at least 0 and"):
        fit_classifier(cfg_of(*BAGS, "SOLVER.BASE_LR", rate), stage1 / "cache")


@pytest.mark.parametrize("predictor", ["BAGSOutputLayers", "NearestMeanOutputLayers"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_not_trained_on(
    predictor, value, cfg_of, stage1, tmp_path
):
    cache = shutil.copytree(stage1 / "cache", tmp_path / "cache")
    path = cache / "view0" / "shard00000" / "features.npy"
    features = np.load(path)
    features[::10, 0, 3] = value
    np.save(path, features)
    with pytest.raises(DataError, match=r"shard00000/features\.npy' is damaged \(infinite"):
        fit_classifier(cfg_of("MODEL.ROI_BOX_PREDICTOR.NAME", predictor), cache)
    assert not (tmp_path / "run" / "model_final.pth").exists()


def test_one_fit_at_a_time_writes_to_a_folder(cfg_of, stage1, tmp_path):
    with (
        lock_folder(tmp_path / "run"),
        pytest.raises(FolderInUseError, match=f"run' is in use by process {os.getpid()}"),
    ):
        fit_classifier(cfg_of(*BAGS), stage1 / "cache")


UNFINISHED = (
    *(*BAGS, "SOLVER.MAX_ITER", 15),
    *("SOLVER.CHECKPOINT_PERIOD", 5, "SOLVER.STEPS", (8, 12)),
)


@pytest.fixture(scope="module")
def interrupted(stage1):
    """Folder of a fit that was interrupted."""
    cfg = make_cfg(stage1 / "model.pth", stage1 / "interrupted", *UNFINISHED)
    return interrupt_fit(cfg, stage1 / "cache").parent


@pytest.fixture
def unfinished(interrupted, cfg_of, tmp_path):
    """The config of a fit that was interrupted, and its progress."""
    folder = shutil.copytree(interrupted, tmp_path / "run")
    return cfg_of(*UNFINISHED), folder / "fitting.pth"


def resave(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


DAMAGES = {
    "empty": lambda p: p.write_bytes(b""),
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-100]),
    "text": lambda p: p.write_text("progress"),
    "a tensor": lambda p: torch.save(torch.zeros(3), p),
    "folder": lambda p: (p.unlink(), p.mkdir()),
    "no trainer": lambda p: resave(p, lambda c: c.pop("trainer")),
    "no settings": lambda p: resave(p, lambda c: c.pop("settings")),
    "settings a list": lambda p: resave(p, lambda c: c.update(settings=[1])),
    "weights of another shape": lambda p: resave(
        p, lambda c: c["model"].update({"0.cls_score.bias": torch.zeros(2)})
    ),
    "NaN": lambda p: resave(p, lambda c: c["model"]["0.cls_score.bias"].fill_(torch.nan)),
    "iteration a text": lambda p: resave(p, lambda c: c["trainer"].update(iteration="5")),
    "iteration negative": lambda p: resave(p, lambda c: c["trainer"].update(iteration=-7)),
    "iteration beyond the end": lambda p: resave(p, lambda c: c["trainer"].update(iteration=99)),
    "left-out steps a text": lambda p: resave(p, lambda c: c["trainer"].update(skips="1")),
    "trainer a number": lambda p: resave(p, lambda c: c.update(trainer=3)),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_progress_is_named(case, unfinished, stage1):
    cfg, path = unfinished
    DAMAGES[case](path)
    with pytest.raises(DataError, match=r"fitting\.pth' is not the progress of a fit .*; delete"):
        fit_classifier(cfg, stage1 / "cache")


def test_an_interrupted_fit_goes_on_elsewhere(unfinished, stage1, tmp_path, cfg_of):
    cfg, path = unfinished
    whole = cfg.clone()
    whole.OUTPUT_DIR = str(tmp_path / "whole")
    expected = weights_of(fit_classifier(whole, stage1 / "cache"))
    cfg.MODEL.WEIGHTS = str(shutil.copy(cfg.MODEL.WEIGHTS, tmp_path / "copy.pth"))
    cfg.SOLVER.MAX_NONFINITE_STEPS = 3
    resumed = weights_of(fit_classifier(cfg, stage1 / "cache"))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert not path.exists()


def test_a_full_disk_keeps_the_progress(unfinished, stage1, monkeypatch):
    cfg, path = unfinished
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(DataError, match=r"fitting\.pth' could not be written \(No space"):
            fit_classifier(cfg, stage1 / "cache")
    assert path.read_bytes() == before
    fit_classifier(cfg, stage1 / "cache")


def test_metrics_are_strict_json_with_the_total_loss(cfg_of, stage1, tmp_path, monkeypatch):
    cfg = cfg_of(*BAGS, "SOLVER.MAX_ITER", 230, "SOLVER.STEPS", ())
    original = ClassifierLoss.forward

    def forward(self, batch):
        get_event_storage().put_scalar("undefined", float("nan"))
        return original(self, batch)

    monkeypatch.setattr(ClassifierLoss, "forward", forward)
    fit_classifier(cfg, stage1 / "cache")

    def refuse(name):
        raise AssertionError(name)

    lines = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["iteration"] for row in rows if "total_loss" in row] == [99, 199]
    assert all(row["undefined"] is None for row in rows if "total_loss" in row)
    assert list((tmp_path / "run").glob("events.out.tfevents*"))
