"""Pass 1 of classifier fitting: what is cached, and what becomes of interruptions and mistakes."""

import copy
import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.engine import launch
from detectron2.structures import pairwise_iou
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from bags_d2 import BAGSTrainer, ConfigError, DataError, MissingFileError, add_bags_config
from bags_d2.data.build import training_records
from bags_d2.data.datasets import load_lvis_format, register_lvis_format
from bags_d2.fitting import extract as pass1
from bags_d2.fitting.cache import (
    DTYPES,
    FEATURE_KEYS,
    FeatureCache,
    bytes_per_roi,
    cache_settings,
    decode_features,
    encode_features,
)
from bags_d2.fitting.extract import extract_features, load_frozen_detector, roi_features
from bags_d2.fitting.train import fit_classifier
from bags_d2.utils.files import FolderInUseError, lock_folder
from bags_d2.utils.settings import select_config

TINY = Path(__file__).parents[1] / "tiny.yaml"
BAGS = ("MODEL.ROI_BOX_PREDICTOR.NAME", "BAGSOutputLayers")
NUM_IMAGES, NUM_CLASSES = 35, 6


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder for the checkpoint of a softmax detector, untrained."""
    return tmp_path_factory.mktemp("fitting")


@pytest.fixture
def make_cfg(root, datasets_root, register, tmp_path):
    """``make_cfg(*opts)``: config of stage 2, BAGS unless the options say otherwise."""
    images = datasets_root / "glyphs_tiny"
    json_file = str(images / "annotations" / "glyphs_tiny_train.json")

    def load():
        return load_lvis_format(json_file, str(images), "fitting_train")

    register("fitting_train", load, json_file=json_file)

    def make(*opts):
        cfg = get_cfg()
        add_bags_config(cfg)
        cfg.merge_from_file(str(TINY))
        cfg.merge_from_list(["DATASETS.TRAIN", ("fitting_train",), "DATASETS.TEST", ()])
        cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", str(root / "one.pth")])
        if not (root / "one.pth").exists():
            seed_all_rng(3)
            torch.save({"model": BAGSTrainer.build_model(cfg).state_dict()}, root / "one.pth")
        cfg.MODEL.TRAINABLE_PARAMS = ("roi_heads.box_predictor*cls_score.*",)
        cfg.merge_from_list([*BAGS, *opts])
        return cfg

    return make


def contents(folder):
    """Bytes of every file below a folder, but for its lock."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def kill_at_call(number, module, name):
    """Replace a function by one that ends the process as ``kill -9`` does, at its n-th call."""
    original, calls = getattr(module, name), iter(range(1, 10_000))

    def function(*args, **kwargs):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(module, name, function)


def test_features_and_labels_are_those_of_a_training_step(make_cfg, tmp_path):
    cfg = make_cfg()
    sampled = cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
    options = {"rois_per_image": sampled, "images_per_shard": 16, "dtype": "float16"}
    extract_features(cfg, tmp_path / "cache", **options)
    cache = FeatureCache(tmp_path / "cache")
    assert cache.settings["num_images"] == NUM_IMAGES

    model = load_frozen_detector(cfg)
    predictor = model.roi_heads.box_predictor
    seen = {}

    def losses(predictions, proposals):
        seen["labels"] = torch.cat([p.gt_classes for p in proposals])
        return {"loss_cls": predictions[0].sum()}

    predictor.cls_score.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    predictor.losses = losses
    # The second batch of the second shard, through the whole model.
    keys = [(0, i) for i in range(24, 32)]
    records = training_records(cfg)
    images = pass1._Images(records, DatasetMapper(cfg, is_train=True))
    batch = [images[key] for key in keys]
    with EventStorage():
        pass1.seed_generators(pass1._seed("sampling", *keys[0]))
        model(batch)

    features, labels = cache.read(keys)
    assert torch.equal(labels, seen["labels"][:, None])
    assert (labels < NUM_CLASSES).any()
    assert (labels == NUM_CLASSES).any()
    torch.testing.assert_close(features[:, 0], seen["x"], rtol=1e-3, atol=1e-4)
    # In another order than written, and single images.
    mixed = cache.read([(0, 33), (0, 2)])[0]
    assert torch.equal(mixed, torch.cat([cache.read([(0, 33)])[0], cache.read([(0, 2)])[0]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positive", [True, False])
def test_stored_features_are_near_and_zeros_exact(dtype, positive):
    features = torch.randn(50, 3, 64, generator=torch.Generator().manual_seed(1)) * 9
    features = features.relu() if positive else features
    features[0], features[1] = 0, 2.5
    stored = encode_features(features, dtype)
    decoded = decode_features(stored, dtype)
    assert stored.nbytes + 50 * 3 * 4 == 50 * bytes_per_roi(64, dtype, num_stages=3)
    if positive:
        assert (decoded[features == 0] == 0).all()
    if dtype == "float16":
        assert torch.equal(decoded, features.half().float())
        return
    # A reference, number by number.
    for roi, found in zip(features.flatten(0, 1)[:9], decoded.flatten(0, 1), strict=False):
        low, high = float(roi.min()), float(roi.max())
        step = (high - low) / (2 ** DTYPES[dtype] - 1)
        levels = [low + n * step for n in range(2 ** DTYPES[dtype])] if step else [low]
        for x, y in zip(roi.tolist(), found.tolist(), strict=True):
            nearest = min(levels, key=lambda level, x=x: abs(level - x))
            assert abs(y - nearest) < 1e-5
    # What was stored is stored as it is.
    torch.testing.assert_close(decode_features(encode_features(decoded, dtype), dtype), decoded)


def test_features_that_fill_no_whole_bytes_are_refused():
    with pytest.raises(ConfigError, match=r"uint2 cannot hold 6 features .* set it to uint8"):
        encode_features(torch.zeros(2, 6), "uint2")


def test_lvis_v1_fits_50_gigabytes():
    images, proposals, objects = 100_170, 1000, 12.7
    assert images * (proposals + objects) * bytes_per_roi(1024, "uint2") < 28e9
    assert images * 940 * bytes_per_roi(1024, "uint4") < 50e9


def test_views_differ_by_augmentation(make_cfg, tmp_path):
    extract_features(make_cfg("INPUT.RANDOM_FLIP", "horizontal"), tmp_path / "cache", views=2)
    cache = FeatureCache(tmp_path / "cache")
    same = [torch.equal(cache.read([(0, i)])[0], cache.read([(1, i)])[0]) for i in range(5)]
    assert not any(same)


def test_all_labelled_proposals_are_kept(make_cfg, tmp_path):
    cfg = make_cfg()
    extract_features(cfg, tmp_path / "cache")
    cache = FeatureCache(tmp_path / "cache")
    model = load_frozen_detector(cfg)
    heads = model.roi_heads
    records = training_records(cfg)
    images = pass1._Images(records, DatasetMapper(cfg, is_train=True))
    batch = [images[0, i] for i in range(8)]
    with EventStorage():
        pictures = model.preprocess_image(batch)
        targets = [x["instances"] for x in batch]
        with torch.no_grad():
            proposals, _ = model.proposal_generator(
                pictures, model.backbone(pictures.tensor), targets
            )
    for image, (proposal, target) in enumerate(zip(proposals, targets, strict=True)):
        # Every proposal and every object has a label: 1 from the IoU threshold on, 0 below it.
        overlap = pairwise_iou(target.gt_boxes, proposal.proposal_boxes)
        best, match = overlap.max(dim=0)
        expected = torch.where(best >= 0.5, target.gt_classes[match], NUM_CLASSES)
        expected = torch.cat([expected, target.gt_classes])
        _, labels = cache.read([(0, image)])
        assert len(labels) > heads.batch_size_per_image
        assert sorted(labels[:, 0].tolist()) == sorted(expected.tolist())


@pytest.mark.parametrize(
    ("kept", "foreground"),
    # A step samples 32 RoIs, at most 8 of them foreground.
    [(4, 4), (20, 8), (32, 8), (40, 12), (43, 13)],
)
def test_kept_rois_hold_the_foreground_that_a_step_needs(kept, foreground, make_cfg, tmp_path):
    cfg = make_cfg("MODEL.RPN.POST_NMS_TOPK_TRAIN", 300, "MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.1])
    extract_features(cfg, tmp_path / "all", dtype="float16")
    extract_features(cfg, tmp_path / "some", rois_per_image=kept, dtype="float16")
    everything, some = FeatureCache(tmp_path / "all"), FeatureCache(tmp_path / "some")
    full = 0
    for image in range(NUM_IMAGES):
        features, labels = everything.read([(0, image)])
        chosen, chosen_labels = some.read([(0, image)])
        available = int((labels < NUM_CLASSES).sum())
        assert int((chosen_labels < NUM_CLASSES).sum()) == min(available, foreground)
        assert len(chosen_labels) == min(kept, len(labels))
        full += available >= foreground
        # Each is one of all rows; other batch shapes round otherwise.
        difference = (chosen[:, None] - features[None]).abs().amax(dim=(2, 3))
        assert difference.amin(dim=1).max() < 1e-3
    assert full > 3


def test_chosen_rois_are_read_in_order(make_cfg, tmp_path):
    extract_features(make_cfg(), tmp_path / "cache", images_per_shard=16)
    cache = FeatureCache(tmp_path / "cache")
    keys = [(0, 33), (0, 2), (0, 17)]
    features, labels = cache.read(keys)
    sizes = [len(cache.read([key])[1]) for key in keys]
    # Of the last image none, of the first its last one, of the second all.
    rows = np.arange(sizes[0] - 1, sizes[0] + sizes[1])

    def sample(found_labels, found_sizes):
        assert found_labels.tolist() == labels[:, 0].tolist()
        assert list(found_sizes) == sizes
        return rows

    chosen, chosen_labels = cache.read(keys, sample)
    assert torch.equal(chosen, features[rows])
    assert torch.equal(chosen_labels, labels[rows])


def test_killed_extraction_goes_on_to_the_same_bytes(make_cfg, tmp_path):
    cfg = make_cfg()

    def extract(folder, kill_at=0):
        if kill_at:
            kill_at_call(kill_at, pass1, "roi_features")
        extract_features(cfg, tmp_path / folder, views=2, images_per_shard=16)

    extract("whole")
    fork = multiprocessing.get_context("fork")
    for batch, num_shards in ((4, 1), (5, 3)):  # shards of 2, 2, 1 batches and again
        process = fork.Process(target=extract, args=("killed", batch))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert len(list((tmp_path / "killed").glob("view*/shard*"))) == num_shards
    with pytest.raises(DataError, match="is not complete"):
        FeatureCache(tmp_path / "killed")
    # As if killed in the middle of writing.
    partial = tmp_path / "killed" / "view1" / "shard00000.tmp"
    partial.mkdir(parents=True)
    (partial / "features.npy").write_bytes(b"half")
    kept = tmp_path / "killed" / "view0" / "shard00000" / "features.npy"
    written = kept.stat().st_mtime_ns
    extract("killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert kept.stat().st_mtime_ns == written


def _extract(cfg, folder):
    torch.set_num_threads(1)
    extract_features(cfg, folder, images_per_shard=8)


@pytest.mark.slow
def test_processes_share_the_work_and_write_the_same_bytes(
    make_cfg, tmp_path, datasets_root, monkeypatch
):
    # The processes know no data sets but the built-in ones.
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets_root))
    cfg = make_cfg("DATASETS.TRAIN", ("glyphs_tiny_train",))
    launch(_extract, 2, dist_url="auto", args=(cfg, tmp_path / "two"))
    extract_features(make_cfg(), tmp_path / "one", images_per_shard=8)
    one, two = (contents(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    del one["cache.json"], two["cache.json"]  # the data sets' names differ
    assert one == two


def test_other_settings_are_refused_and_the_difference_named(make_cfg, tmp_path, root):
    cache = tmp_path / "cache"
    extract_features(make_cfg(), cache)
    with pytest.raises(ConfigError, match=r"cache' .* views is 1 there and 2 now; .*--cache"):
        extract_features(make_cfg(), cache, views=2)
    with pytest.raises(ConfigError, match=r"INPUT.MIN_SIZE_TRAIN is \[96\] there and \[64\] now"):
        extract_features(make_cfg("INPUT.MIN_SIZE_TRAIN", (64,)), cache)
    other = torch.load(make_cfg().MODEL.WEIGHTS, weights_only=True)
    other["model"]["roi_heads.box_head.fc1.bias"] += 1
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="checkpoint is"):
        extract_features(make_cfg("MODEL.WEIGHTS", str(tmp_path / "other.pth")), cache)
    # What concerns the classifier, and where the checkpoint lies, makes no difference.
    shutil.copy(make_cfg().MODEL.WEIGHTS, tmp_path / "copy.pth")
    indifferent = ("MODEL.BAGS.GROUP_THRESHOLDS", (50,), "SOLVER.BASE_LR", 1.0, "SEED", 7)
    indifferent += ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.5)
    indifferent += ("MODEL.WEIGHTS", str(tmp_path / "copy.pth"))
    before = contents(cache)
    extract_features(make_cfg(*indifferent), cache)
    assert contents(cache) == before


@pytest.fixture
def own_data(make_cfg, datasets_root, register, tmp_path):
    """Config on a copy of the tiny data set; its annotation file; and a picture of it."""
    folder = Path(shutil.copytree(datasets_root / "glyphs_tiny", tmp_path / "data"))
    annotations = folder / "annotations" / "glyphs_tiny_train.json"
    register("own_train", str(annotations), str(folder))
    cfg = make_cfg("DATASETS.TRAIN", ("own_train",))
    return cfg, annotations, Path(training_records(cfg)[3]["file_name"])


def edit(path, old, new):
    """Replace text once by as much text, keeping the time of modification."""
    before = path.stat()
    text = path.read_text()
    assert text.count(old) >= 1
    assert len(old) == len(new)
    path.write_text(text.replace(old, new, 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_an_edit_that_keeps_the_size_is_not_served_stale(own_data, tmp_path):
    cfg, annotations, _ = own_data
    extract_features(cfg, tmp_path / "cache")
    before = annotations.stat().st_size
    category = json.loads(annotations.read_text())["annotations"][0]["category_id"]
    edit(annotations, f'"category_id":{category}', f'"category_id":{7 - category}')
    assert annotations.stat().st_size == before
    message = r"made with other settings or data: annotations is \w+ there and \w+ now; delete"
    with pytest.raises(ConfigError, match=message):
        extract_features(cfg, tmp_path / "cache")
    with pytest.raises(ConfigError, match=message):
        fit_classifier(cfg, tmp_path / "cache")


def test_changed_images_are_noticed(own_data):
    cfg, _, image = own_data
    records = training_records(cfg)
    settings = cache_settings(cfg, records)
    time = image.stat().st_mtime_ns
    os.utime(image, ns=(time, time + 1))
    assert cache_settings(cfg, records)["images"] != settings["images"]
    os.utime(image, ns=(time, time))
    assert cache_settings(cfg, records) == settings
    image.write_bytes(image.read_bytes() + b"0")
    os.utime(image, ns=(time, time))
    changed = cache_settings(cfg, records)
    assert changed == {**settings, "images": changed["images"]} != settings


def test_an_image_that_is_gone_is_named(own_data):
    cfg, _, image = own_data
    records = training_records(cfg)
    image.unlink()
    with pytest.raises(MissingFileError, match=f"{image}' does not exist"):
        cache_settings(cfg, records)


def test_names_and_labels_of_classes_decide(own_data):
    cfg, *_ = own_data
    records = training_records(cfg)
    settings = cache_settings(cfg, records)

    def changed(records):
        now = cache_settings(cfg, records)
        return {key for key in settings if settings[key] != now[key]}

    # Another order of the classes gives the same annotation file other labels.
    other = copy.deepcopy(records)
    other[0]["annotations"][0]["category_id"] = 5 - other[0]["annotations"][0]["category_id"]
    assert changed(other) == {"classes"}
    # Other ids of images change nothing; another order of images does.
    assert changed([{**r, "image_id": i} for i, r in enumerate(records)]) == set()
    assert changed(records[::-1]) >= {"images"}
    metadata = MetadataCatalog.get("own_train")
    names = metadata.thing_classes
    MetadataCatalog.remove("own_train")
    MetadataCatalog.get("own_train").set(
        thing_classes=names[::-1], json_file=metadata.json_file, image_root=metadata.image_root
    )
    assert changed(records) == {"classes"}


def test_records_of_a_function_decide_where_there_is_no_file(own_data, register):
    cfg, *_ = own_data
    records = training_records(cfg)
    register("function_train", lambda: records)
    cfg.DATASETS.TRAIN = ("function_train",)
    settings = cache_settings(cfg, records)
    assert cache_settings(cfg, copy.deepcopy(records)) == settings
    other = copy.deepcopy(records)
    other[3]["annotations"][0]["bbox"][0] += 1
    assert cache_settings(cfg, other)["annotations"] != settings["annotations"]
    other = copy.deepcopy(records)
    other[3]["annotations"][0]["segmentation"] = {"counts": b"12", "size": np.array([9, 9])}
    assert cache_settings(cfg, other)["annotations"] != settings["annotations"]


def test_the_place_of_the_data_makes_no_difference(own_data, tmp_path, register):
    cfg, annotations, _ = own_data
    settings = cache_settings(cfg, training_records(cfg))
    (tmp_path / "data").rename(tmp_path / "moved")
    DatasetCatalog.remove("own_train")
    MetadataCatalog.remove("own_train")
    moved = tmp_path / "moved"
    register_lvis_format("own_train", str(moved / "annotations" / annotations.name), str(moved))
    assert cache_settings(cfg, training_records(cfg)) == settings


def test_keys_of_a_backbone_of_the_users_decide(own_data):
    cfg, *_ = own_data
    records = training_records(cfg)
    settings = cache_settings(cfg, records)
    cfg.MODEL.SWIN = CfgNode({"DEPTHS": (2, 2)})
    assert cache_settings(cfg, records) == {**settings, "MODEL.SWIN.DEPTHS": "[2, 2]"}


def test_listed_keys_exist():
    cfg = get_cfg()
    assert all(select_config(cfg, (g,)) for g in FEATURE_KEYS if not g.startswith("LAZY."))
    # Nothing of evaluation, of losses or of the classifier is among them.
    names = set(select_config(cfg, FEATURE_KEYS))
    assert not any(n.endswith("_TEST") or "LOSS" in n or "SMOOTH_L1" in n for n in names)


def test_one_run_at_a_time_fills_a_cache(make_cfg, tmp_path):
    with (
        lock_folder(tmp_path / "cache"),
        pytest.raises(FolderInUseError, match=f"cache' is in use by process {os.getpid()}"),
    ):
        extract_features(make_cfg(), tmp_path / "cache")
    assert not contents(tmp_path / "cache")


def test_a_deleted_shard_is_made_anew(make_cfg, tmp_path):
    cfg = make_cfg()
    extract_features(cfg, tmp_path / "cache", images_per_shard=16)
    before = contents(tmp_path / "cache")
    path = tmp_path / "cache" / "view0" / "shard00001" / "labels.npy"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"delete '(.*)' and run") as caught:
        FeatureCache(tmp_path / "cache")
    shutil.rmtree(re.search("delete '(.*)' and", str(caught.value))[1])
    extract_features(cfg, tmp_path / "cache", images_per_shard=16)
    assert contents(tmp_path / "cache") == before


def test_a_disk_that_fills_up_leaves_no_half_shard(make_cfg, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(DataError, match=r"features\.npy' could not be written \(No space"):
            extract_features(make_cfg(), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("view*/shard?????"))
    extract_features(make_cfg(), tmp_path / "cache")
    FeatureCache(tmp_path / "cache")


def test_a_full_disk_is_told_before_the_work(make_cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 3, 7))
    cfg = make_cfg()
    proposals = NUM_IMAGES * cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN
    objects = sum(len(r["annotations"]) for r in training_records(cfg))
    for kept, num_rois in ((None, proposals + objects), (9, NUM_IMAGES * 9)):
        needed = 2 * num_rois * (32 // 2 + 8 + 4)
        message = rf"needs up to {needed:,} bytes more .* 7 free; set"
        with pytest.raises(ConfigError, match=message):
            extract_features(cfg, tmp_path / "cache", views=2, rois_per_image=kept)
        assert not contents(tmp_path / "cache")


def test_the_size_is_logged_before_the_work(make_cfg, tmp_path, log_lines):
    lines = log_lines("bags_d2")
    extract_features(make_cfg(), tmp_path / "cache")
    (found,) = (line for line in lines if "are free" in line)
    size = bytes_per_roi(32, "uint4")
    assert re.search(rf"'{tmp_path}/cache': 35 images of up to \d+ RoIs of {size} bytes", found)
    stored = sum(p.stat().st_size for p in (tmp_path / "cache").rglob("[fl]*s.npy"))
    estimate = 1e9 * float(re.search(r"are up to (\S+) GB", found)[1])
    assert 0.5 < stored / estimate < 1.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("MODEL.ROI_HEADS.NAME", "LongTailCascadeROIHeads"), r"CLS_AGNOSTIC_BBOX_REG is False"),
        (
            ("MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", ["p2"]),
            "MODEL.ROI_HEADS.NAME 'Res5ROIHeads'",
        ),
        (("MODEL.TRAINABLE_PARAMS", ()), "MODEL.TRAINABLE_PARAMS"),
        (("MODEL.TRAINABLE_PARAMS", ("roi_heads.box_predictor.*",)), "bbox_pred"),
    ],
)
def test_what_a_cache_cannot_stand_for_is_refused(options, message, make_cfg, tmp_path):
    with pytest.raises(ConfigError, match=message):
        extract_features(make_cfg(*options), tmp_path / "cache")


def test_absent_and_damaged_files_are_named(make_cfg, tmp_path):
    with pytest.raises(MissingFileError, match=r"nowhere' is not a feature cache"):
        FeatureCache(tmp_path / "nowhere")
    with pytest.raises(MissingFileError, match=r"absent\.pth.*MODEL\.WEIGHTS"):
        extract_features(make_cfg("MODEL.WEIGHTS", str(tmp_path / "absent.pth")), tmp_path / "c")
    with pytest.raises(ConfigError, match="--views"):
        extract_features(make_cfg(), tmp_path / "c", views=0)
    with pytest.raises(ConfigError, match="--rois-per-image"):
        extract_features(make_cfg(), tmp_path / "c", rois_per_image=0)
    with pytest.raises(
        ConfigError, match="--cache-dtype is 'int3'; it must be one of uint2, uint4"
    ):
        extract_features(make_cfg(), tmp_path / "c", dtype="int3")


def test_features_beyond_float16_are_an_error(make_cfg, tmp_path):
    weights = torch.load(make_cfg().MODEL.WEIGHTS, weights_only=True)
    weights["model"]["roi_heads.box_head.fc2.bias"] += 1e6
    torch.save(weights, tmp_path / "huge.pth")
    cfg = make_cfg("MODEL.WEIGHTS", str(tmp_path / "huge.pth"))
    with pytest.raises(DataError, match=r"not finite as torch\.float16; .*another --cache-dtype"):
        extract_features(cfg, tmp_path / "c", dtype="float16")
    extract_features(cfg, tmp_path / "integers")


def test_images_without_foreground_are_cached_as_background(make_cfg, make_batch):
    model = load_frozen_detector(make_cfg())
    batch = make_batch(2)
    batch[0]["instances"] = batch[0]["instances"][:0]
    with EventStorage():
        (features, labels), _ = roi_features(model, batch)
    assert features.shape == (32, 1, 32)
    assert (labels == NUM_CLASSES).all()


def test_a_mask_head_changes_nothing(make_cfg, make_batch):
    # The mask head is built after the rest, so equal seeds give the rest equal weights.
    seen = []
    for mask_on in (False, True):
        seed_all_rng(4)
        model = BAGSTrainer.build_model(make_cfg("MODEL.MASK_ON", mask_on))
        with EventStorage():
            seed_all_rng(5)
            seen.append(roi_features(model, make_batch(2)))
    assert (seen[0][0][1] < NUM_CLASSES).any()
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)
