#!/usr/bin/env python
"""Train, fit and evaluate what is missing of a comparison of methods; write its table and chart.

Interrupted or extended (more methods, more seeds), the same command resumes where it stopped.
"""

import argparse
import contextlib
import sys
from pathlib import Path

from bags_d2 import ConfigError
from bags_d2.analysis.comparison import write_comparison
from bags_d2.analysis.method_runs import BASELINE, Comparison
from bags_d2.config import list_methods
from bags_d2.errors import exit_on_user_error
from bags_d2.utils.files import lock_folder
from bags_d2.utils.processes import run_logged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", type=Path, required=True, help="config of the baseline")
    parser.add_argument(
        "--methods",
        help='comma-separated names or paths, as --method of train_net.py takes them; "ablations" '
        "stands for all of these; default: all of configs/methods",
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1, 2, ... of each method")
    parser.add_argument("--output", type=Path, default=Path("output/compare"))
    parser.add_argument("--num-gpus", type=int, default=0)
    parser.add_argument("--task", choices=("bbox", "segm"), default="bbox")
    parser.add_argument("--report-only", action="store_true", help="tabulate what is complete")
    parser.add_argument("opts", nargs="*", default=[], help="config keys and values for all runs")
    args = parser.parse_args()

    sys.stdout.reconfigure(errors="replace")  # the table has a ±, which ASCII lacks
    if args.seeds < 1:
        raise ConfigError(f"--seeds must be 1 or more, found {args.seeds}.")
    comparison = Comparison(args.config_file, args.output, args.opts, args.num_gpus)
    methods = chosen_methods(comparison, args.methods)
    # A report needs no data, and may be made beside a comparison at work.
    with contextlib.nullcontext() if args.report_only else lock_folder(args.output):
        if not args.report_only:
            comparison.require_data()
        runs = [comparison.run(m, seed) for seed in range(1, args.seeds + 1) for m in methods]
        for i, run in enumerate([] if args.report_only else runs, 1):
            is_complete = run.is_complete
            state = "complete" if is_complete else run.kind.value
            if is_complete and not run.is_recorded:
                state += ", of data and a detector that were not recorded"
            print(f"[{i}/{len(runs)}] {run.method}, seed {run.seed}: {state}", flush=True)
            if not is_complete:
                comparison.make(run, run_logged)
        complete = [run for run in runs if run.is_complete]
        if not complete:
            raise ConfigError(f"No run in '{args.output}' is complete yet.")
        title = f"Methods on {args.config_file.stem.replace(BASELINE, '').strip('_')}"
        print(f"\n{write_comparison(complete, args.output, title, args.task)}\nin {args.output}")


def chosen_methods(comparison: Comparison, names: str | None) -> list[str]:
    """The baseline, which goes first as others start from it, and the methods that were named."""
    if names is None:
        return comparison.methods()
    chosen = []
    for name in filter(None, map(str.strip, names.split(","))):
        chosen += list_methods(ablations=True) if name == "ablations" else [name]
    if not chosen:
        raise ConfigError(f"--methods names none; there are {', '.join(comparison.methods())}.")
    return list(dict.fromkeys([BASELINE, *chosen]))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
