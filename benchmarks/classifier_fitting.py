#!/usr/bin/env python
"""Fitting a classifier from cached features against training it online (docs/fitting.md).

Each round runs some online steps, the whole of pass 1 and the whole of pass 2, in turn in one
process; the table has medians over the rounds. With --seeds it also trains online and from cached
features with each seed and compares AP on the validation set.
"""

import argparse
import functools
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from detectron2.layers import ShapeSpec
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from bags_d2 import BAGSTrainer, build_box_predictor
from bags_d2.data.samplers import shuffled
from bags_d2.engine import LongTailCheckpointer, setup_cfg
from bags_d2.fitting.cache import (
    DEFAULT_DTYPE,
    FORMAT,
    FeatureCache,
    encode_features,
    plan_shards,
    write_shard,
)
from bags_d2.fitting.extract import extract_features, load_frozen_detector, roi_features
from bags_d2.fitting.train import ClassifierLoss, cached_batches, fit_classifier
from bags_d2.modeling.roi_heads import box_stages
from bags_d2.utils.files import write_json

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARM_UP_STEPS = 5
MEASURES = ("AP", "bAP", "AP1", "AP2", "AP3", "AP4")


def measure(clock, function, *args):
    """Run a function; returns its result, its seconds and the process's peak memory in bytes."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from here
    start = clock()
    result = function(*args)
    seconds = clock() - start
    if torch.cuda.is_available():
        return result, seconds, torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return result, seconds, int(status["VmHWM"].split()[0]) * 1024


def online_step_seconds(clock, cfg, num_steps):
    """Seconds of an online step, waiting for data included."""
    trainer = BAGSTrainer(cfg)
    trainer.resume_or_load()
    trainer.iter = 0
    with EventStorage() as storage:
        for step in range(WARM_UP_STEPS + num_steps):
            if step == WARM_UP_STEPS:
                start = clock()
            trainer.run_step()
            storage.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (clock() - start) / num_steps


def check_equality(cfg):
    """The classifier's gradient from float16 features is that of an online step, RoI for RoI."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.BAGS.OTHERS_SAMPLE_RATIO = float("inf")  # no sampling that could differ
    model = load_frozen_detector(cfg)
    batch = next(iter(BAGSTrainer.build_train_loader(cfg)))
    predictors = [predictor for _, predictor in box_stages(model.roi_heads)]
    weight = predictors[-1].cls_score.weight
    with EventStorage():
        seed_all_rng(1)
        sum(x for name, x in model(batch).items() if "loss_cls" in name).backward()
        online, weight.grad = weight.grad, None
        seed_all_rng(1)
        rois = roi_features(model, batch)
        features, labels = (torch.cat(parts) for parts in zip(*rois, strict=True))
        losses = ClassifierLoss(predictors)([(features.half().float(), labels)])
        sum(losses.values()).backward()
    difference = float((weight.grad - online).norm() / online.norm())
    assert difference < 5e-3, difference
    return difference


def train_online(cfg):
    seed_all_rng(cfg.SEED)
    trainer = BAGSTrainer(cfg)
    trainer.resume_or_load()
    trainer.train()
    return os.path.join(cfg.OUTPUT_DIR, "model_final.pth")


def evaluate(cfg, weights):
    model = BAGSTrainer.build_model(cfg)
    LongTailCheckpointer(model, evaluating=True).load(str(weights))
    return BAGSTrainer.test(cfg, model)["bbox"]


def compare_accuracy(cfg, cache, seeds, folder):
    """AP online and from cached features, for each seed."""
    ways = {"online": train_online, "cached features": lambda cfg: fit_classifier(cfg, cache)}
    rows = []
    for way, train in ways.items():
        for seed in range(1, seeds + 1):
            run = cfg.clone()
            run.defrost()
            run.SEED = seed
            run.DATASETS.TEST = ()
            run.OUTPUT_DIR = str(folder / way / str(seed))
            os.makedirs(run.OUTPUT_DIR, exist_ok=True)
            values = evaluate(cfg, train(run))
            rows.append([way, seed, *(values[m] for m in MEASURES)])
            print(*rows[-1], flush=True)
    return tabulate(rows, headers=["trained", "seed", *MEASURES], floatfmt=".1f")


def lvis_rates(folder, rois_per_image, num_steps=5):
    """Seconds of reading and of a whole step of pass 2 at the size of LVIS v1, random features."""
    config_file = "configs/lvis_bags_R50.yaml"
    opts = ["MODEL.DEVICE", DEVICE, "SOLVER.REFERENCE_WORLD_SIZE", "0"]
    cfg = setup_cfg(argparse.Namespace(config_file=config_file, opts=opts))
    num_images, width = 4 * cfg.SOLVER.IMS_PER_BATCH, cfg.MODEL.ROI_BOX_HEAD.FC_DIM
    settings = {
        **{
            "format": FORMAT,
            "dtype": DEFAULT_DTYPE,
            "num_images": num_images,
            "views": 1,
            "rois_per_image": rois_per_image,
        },
        "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
        **{"images_per_shard": num_images, "images_per_batch": 8},
    }
    rois = []
    for _ in range(num_images):
        labels = torch.randint(cfg.MODEL.ROI_HEADS.NUM_CLASSES + 1, (rois_per_image, 1))
        labels[rois_per_image // 4 :] = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        features = torch.rand(rois_per_image, 1, width)
        rois.append((encode_features(features, settings["dtype"]), labels))
    write_json(folder / "cache.json", settings)
    write_shard(next(plan_shards(folder, settings)), range(num_images), rois)
    order = functools.partial(shuffled, torch.arange(num_images))
    batches = cached_batches(cfg, FeatureCache(folder), order)

    predictor = build_box_predictor(cfg, ShapeSpec(channels=width)).to(DEVICE)
    predictor.bbox_pred.requires_grad_(False)
    optimizer = BAGSTrainer.build_optimizer(cfg, predictor)
    loss_of = ClassifierLoss([predictor])
    reading, whole = [], []
    with EventStorage() as storage:
        for _ in range(num_steps + 1):  # the first one warms up
            start = time.perf_counter()
            batch = next(batches)
            reading.append(time.perf_counter() - start)
            optimizer.zero_grad()
            loss_of(batch)["loss_cls"].backward()
            optimizer.step()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            whole.append(time.perf_counter() - start)
            storage.step()
    num_bytes = sum(features.nbytes for features, _ in batch)
    return [
        rois_per_image,
        *(statistics.median(times[1:]) for times in (reading, whole)),
        num_bytes / statistics.median(reading[1:]) / 1e9,
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", default="configs/glyphs_bags.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--online-steps", type=int, default=60, help="steps of a round")
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--rois-per-image", type=int)
    parser.add_argument("--epochs", type=float, default=12, help="reported beside the config's")
    parser.add_argument("--seeds", type=int, default=0, help="seeds of the comparison of AP")
    parser.add_argument(
        "--lvis", action="store_true", help="also the rates of pass 2 at the size of LVIS v1"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure the main process's CPU time, for a machine with other load",
    )
    parser.add_argument("--verbose", action="store_true", help="show logs")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for the config")
    args = parser.parse_args()
    if args.verbose:
        logging.basicConfig(level=logging.INFO)
    else:
        logging.disable(logging.WARNING)

    cfg = setup_cfg(args)
    clock = time.process_time if args.cpu_time else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        cfg.defrost()
        cfg.OUTPUT_DIR = str(folder / "run")
        os.makedirs(cfg.OUTPUT_DIR)
        measured = {"online": [], "pass 1": [], "pass 2": []}
        difference = check_equality(cfg)
        for number in range(args.rounds):
            cache = folder / f"cache{number}"
            step, _, memory = measure(clock, online_step_seconds, clock, cfg, args.online_steps)
            measured["online"].append((step, memory))
            for name, task in (
                (
                    "pass 1",
                    lambda c=cache: extract_features(cfg, c, args.views, args.rois_per_image),
                ),
                ("pass 2", lambda c=cache: fit_classifier(cfg, c)),
            ):
                _, seconds, memory = measure(clock, task)
                measured[name].append((seconds, memory))
        num_images = FeatureCache(cache).settings["num_images"]
        num_bytes = sum(path.stat().st_size for path in cache.rglob("features.npy"))
        report(cfg, args, measured, difference, num_images, num_bytes)
        if args.lvis:
            rows = [lvis_rates(folder / f"lvis{n}", n) for n in (1013, 512, 128)]
            headers = ["LVIS v1: RoIs of an image", "reading s", "whole step s", "reading GB/s"]
            print(f"\n{tabulate(rows, headers=headers, floatfmt='.3g')}")
        if args.seeds:
            print(f"\n{compare_accuracy(cfg, cache, args.seeds, folder)}")


def report(cfg, args, measured, difference, num_images, num_bytes):
    seconds = {k: statistics.median(s for s, _ in rows) for k, rows in measured.items()}
    memory = {k: max(m for _, m in rows) / 1e9 for k, rows in measured.items()}
    steps = cfg.SOLVER.MAX_ITER
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"{args.config_file}: {num_images} images, {args.views} view(s), {num_bytes / 1e6:.0f} MB "
        f"of features, batches of {cfg.SOLVER.IMS_PER_BATCH}; {device}, "
        f"{torch.get_num_threads()} thread(s), load average {os.getloadavg()[0]:.1f}"
    )
    print(f"gradient from float16 features against online: relative difference {difference:.1e}")
    spread = {k: f"{min(r)[0]:.3g}..{max(r)[0]:.3g}" for k, r in measured.items()}
    fit_step = seconds["pass 2"] / steps
    rows = [
        ["online, a step", seconds["online"], spread["online"], memory["online"]],
        ["pass 1, all", seconds["pass 1"], spread["pass 1"], memory["pass 1"]],
        [f"pass 2, {steps} steps", seconds["pass 2"], spread["pass 2"], memory["pass 2"]],
    ]
    headers = [
        "",
        "median CPU s" if args.cpu_time else "median s",
        "range",
        "peak GB of the process",
    ]
    print(f"\n{tabulate(rows, headers=headers, floatfmt='.3g')}\n")
    rows = []
    for epochs in (steps * cfg.SOLVER.IMS_PER_BATCH / num_images, args.epochs):
        num_steps = epochs * num_images / cfg.SOLVER.IMS_PER_BATCH
        online, fit = num_steps * seconds["online"], num_steps * fit_step
        both = seconds["pass 1"] + fit
        rows.append([epochs, num_steps, online, both, fit, online / fit, online / both])
    headers = ["epochs", "steps", "online s", "both passes s", "pass 2 s"]
    headers += ["online / pass 2", "online / both"]
    print(tabulate(rows, headers=headers, floatfmt=".1f"))


if __name__ == "__main__":
    main()
