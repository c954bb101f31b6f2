"""Compare methods, with seeds, in a table and a chart.

Trains, fits and evaluates what is missing. Interrupted or extended (more methods, more seeds), the
same command resumes where it stopped.

Example:
    bags-d2 compare --config-file configs/glyphs_baseline.yaml --methods bags,seesaw --seeds 3
"""

import argparse
import contextlib
import itertools
import sys
from pathlib import Path

from .flags import add_trailing_options

INTERRUPTED = "Run the same command again to go on where it stopped."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config-file", type=Path, required=True, metavar="FILE", help="config of the baseline"
    )
    parser.add_argument(
        "--methods",
        metavar="NAME,NAME",
        help='names or paths, as --method of "bags-d2 train" takes them; "ablations" stands for '
        "all of these; default: what trains a classifier on the baseline's box features, or "
        "nothing, and not what trains the detector anew",
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1, 2, ... of each method")
    parser.add_argument(
        "--detectors",
        type=int,
        help="seeds of the baseline, shared in turn by those of the methods; default: one for each",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("output/compare"), help="folder of all runs"
    )
    parser.add_argument("--num-gpus", type=int, default=0, help="0: the CPU")
    parser.add_argument("--task", choices=("bbox", "segm"), default="bbox", help="boxes or masks")
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=0,
        metavar="DRAWS",
        help="also 95%% intervals, by drawing the test images so often; 1000 is usual",
    )
    parser.add_argument(
        "--against", metavar="METHOD", help="what differences are from; default: the baseline"
    )
    parser.add_argument("--report-only", action="store_true", help="tabulate what is complete")
    add_trailing_options(parser)


def run(args: argparse.Namespace) -> None:
    from ..analysis.comparison import write_comparison
    from ..analysis.intervals import bootstrap_runs
    from ..analysis.method_runs import BASELINE, Comparison
    from ..errors import ConfigError
    from ..utils.files import lock_folder
    from ..utils.processes import run_logged

    sys.stdout.reconfigure(errors="replace")  # the table has a ±, which ASCII lacks
    for flag, number in (("seeds", args.seeds), ("detectors", args.detectors)):
        if number is not None and number < 1:
            raise ConfigError(f"--{flag} must be 1 or more, found {number}.")
    comparison = Comparison(args.config_file, args.output, args.opts, args.num_gpus, args.detectors)
    methods = comparison.choose(args.methods)
    # A report needs no data, and may be made beside a comparison at work.
    with contextlib.nullcontext() if args.report_only else lock_folder(args.output):
        if not args.report_only:
            comparison.require_data()
        runs = comparison.runs(methods, args.seeds)
        if not args.report_only:
            numbers = itertools.count(1)

            def report(run, state):
                number = f"[{next(numbers)}/{len(runs)}]"
                print(f"{number} {run.method}, seed {run.seed}: {state}", flush=True)

            comparison.make_all(runs, run_logged, report)
        complete = [run for run in runs if run.is_complete]
        if not complete:
            raise ConfigError(f"No run in '{args.output}' is complete yet.")
        draws, against = None, args.against or BASELINE
        if args.bootstrap:
            draws = bootstrap_runs(complete, comparison.test_set, args.task, args.bootstrap)
        title = f"Methods on {args.config_file.stem.replace(BASELINE, '').strip('_')}"
        text = write_comparison(complete, args.output, title, args.task, draws, against)
        print(f"\n{text}\nin {args.output}")
