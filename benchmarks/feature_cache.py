#!/usr/bin/env python
"""How a feature cache may be made smaller: disk space, time and AP by setting (docs/fitting.md).

A setting is a --cache-dtype, or DTYPE:ROIS with --rois-per-image. For each of them the detector's
features are computed (pass 1), and every method is fitted to them with every seed (pass 2). All
classifiers are evaluated in one pass. Settings take turns in one process; times are relative to the
first.
"""

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from tabulate import tabulate

from bags_d2.engine import setup_cfg
from bags_d2.engine.evaluate import evaluate_classifiers
from bags_d2.fitting import FeatureCache, extract_features, fit_classifier
from bags_d2.fitting.cache import bytes_per_roi
from bags_d2.utils.files import load_json

SETTINGS = ("float16", "uint8", "uint4", "uint2", "uint4:128")
# LVIS v1's training images, proposals and objects of an image, and the features of a RoI.
LVIS_IMAGES, LVIS_ROIS, LVIS_FEATURES = 100_170, 1000 + 12.7, 1024


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", default="configs/glyphs_baseline.yaml")
    parser.add_argument("--methods", nargs="+", default=["softmax_retrained", "bags"])
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--cpu-time", action="store_true", help="of the main process, not the clock"
    )
    parser.add_argument("--opts", nargs="+", default=[], help="KEY VALUE pairs for the config")
    return parser.parse_args()


def config(args, method, folder, seed=1):
    opts = [*args.opts, "OUTPUT_DIR", str(folder), "SEED", str(seed)]
    return setup_cfg(argparse.Namespace(config_file=args.config_file, method=method, opts=opts))


def main():
    args = parse_args()
    logging.disable(logging.WARNING)
    clock = time.process_time if args.cpu_time else time.perf_counter
    sizes, runs, results = {}, [], {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for setting in args.settings:
            dtype, _, kept = setting.partition(":")
            cache = folder / setting
            start = clock()
            cfg = config(args, args.methods[0], folder / "run")
            extract_features(cfg, cache, rois_per_image=int(kept or 0) or None, dtype=dtype)
            sizes[setting] = describe(cache, clock() - start)
            print(setting, sizes[setting], flush=True)
        for seed in range(1, args.seeds + 1):
            for method in args.methods:
                for setting in args.settings:
                    output = folder / "runs" / f"{setting} {method} {seed}"
                    cfg = config(args, method, output, seed)
                    start = clock()
                    path = fit_classifier(cfg, folder / setting)
                    runs.append((setting, method, cfg, clock() - start))
                    cfg.defrost()
                    cfg.MODEL.WEIGHTS = str(path)
        evaluate_classifiers([cfg for _, _, cfg, _ in runs])
        for setting, method, cfg, seconds in runs:
            found = load_json(Path(cfg.OUTPUT_DIR) / "inference" / "results.json")["bbox"]
            row = (found["AP"], found["bAP"], seconds)
            results.setdefault((setting, method), []).append(row)
    report(args, sizes, results)


def describe(cache, seconds):
    """Seconds, RoIs of an image, features and stages of a RoI, its bytes on disk, and the MB."""
    num_bytes = sum(path.stat().st_size for path in cache.rglob("*.npy"))
    opened = FeatureCache(cache)
    num_rois = sum(len(labels) for _, labels in opened.parts())
    shape = opened.read([(0, 0)])[0].shape[1:]
    per_image = num_rois / opened.settings["num_images"]
    return seconds, per_image, *shape, num_bytes / num_rois, num_bytes / 1e6


def report(args, sizes, results):
    first = args.settings[0]
    rows = []
    for setting, (seconds, per_image, stages, width, per_roi, megabytes) in sizes.items():
        dtype, _, kept = setting.partition(":")
        lvis = bytes_per_roi(LVIS_FEATURES, dtype) * LVIS_IMAGES * LVIS_ROIS / 1e9
        times = [
            statistics.median(s for _, _, s in results[setting, method]) for method in args.methods
        ]
        of_first = [
            statistics.median(s for _, _, s in results[first, method]) for method in args.methods
        ]
        rows.append(
            [
                *(setting, f"{stages} x {width}", per_image, per_roi, megabytes),
                "-" if kept else f"{lvis:.0f}",
                *(seconds, seconds / sizes[first][0], sum(times), sum(times) / sum(of_first)),
            ]
        )
    headers = ["setting", "features", "RoIs an image", "bytes a RoI", "MB", "LVIS v1, all RoIs, GB"]
    headers += ["pass 1 s", "ratio", "pass 2 s, all methods", "ratio"]
    print(f"\n{tabulate(rows, headers=headers, floatfmt='.3g')}\n")
    rows = []
    for method in args.methods:
        reference = np.array(results[first, method])
        for setting in args.settings:
            found = np.array(results[setting, method])
            same_seed = np.abs(found - reference)[:, 1].max()
            for_each = " ".join(f"{x:.2f}" for x in found[:, 1])
            rows.append([method, setting, *found.mean(0)[:2], for_each, same_seed])
    headers = ["method", "setting", "AP", "bAP", "bAP by seed", f"from {first}, same seed, at most"]
    print(tabulate(rows, headers=headers, floatfmt=".2f"))


if __name__ == "__main__":
    main()
