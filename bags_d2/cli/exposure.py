"""Show how often images of each bin are drawn, by sampler.

A table of what DATALOADER.SAMPLER_TRAIN may be: the length of an epoch, and for each bin of
training count how many instances of a class an epoch shows, on average. It is computed from the
annotations alone.

Example:
    bags-d2 exposure --config-file configs/glyphs_baseline.yaml
"""

import argparse

from .flags import add_config_flags, add_trailing_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_flags(parser)
    parser.add_argument("--output", metavar="FILE", help="also write the table as CSV")
    add_trailing_options(parser)


def run(args: argparse.Namespace) -> None:
    from tabulate import tabulate

    from ..analysis.exposure import exposure_table
    from ..engine import setup_cfg
    from ..utils.files import write_csv

    header, rows = exposure_table(setup_cfg(args))
    print(tabulate(rows, header, "github", floatfmt=".1f"))
    if args.output:
        write_csv(args.output, header, rows)
