"""Propose class groups and beta for BAGS from the training set.

Fits BAGS on either half of the training images, and ranks each choice by the AP over the RoIs of
the other half. Takes forty fits of half the config's schedule.

Example:
    bags-d2 propose-groups --config-file configs/glyphs_bags.yaml
"""

import argparse

from .flags import add_config_flags, add_trailing_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache", metavar="FOLDER", help="box features; default: those of fit")
    add_config_flags(parser)
    add_trailing_options(parser)


def run(args: argparse.Namespace) -> None:
    from tabulate import tabulate

    from ..engine import check_files, setup_cfg
    from ..fitting.propose_groups import propose_groups

    cfg = setup_cfg(args)
    check_files(cfg)
    proposals = propose_groups(cfg, args.cache)
    rows = [(str(p.thresholds), p.beta, *p.bins.values(), p.bap) for p in proposals]
    headers = ("GROUP_THRESHOLDS", "beta", *proposals[0].bins, "mean")
    print("AP over held-out RoIs:")
    print(tabulate(rows, headers, tablefmt="pipe", floatfmt=("", "g", *[".1f"] * len(rows[0]))))
    beta = str(proposals[0].beta).replace("inf", ".inf")
    print(
        f"The best: MODEL.BAGS.GROUP_THRESHOLDS '{proposals[0].thresholds}' "
        f"MODEL.BAGS.OTHERS_SAMPLE_RATIO {beta}"
    )
