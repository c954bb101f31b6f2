#!/usr/bin/env python
"""Train, fit and evaluate what is missing of a comparison of methods; write its table and chart.

Interrupted or extended (more methods, more seeds), the same command goes on where it stopped.
"""

import argparse
from pathlib import Path

from bags_d2 import ConfigError
from bags_d2.analysis.comparison import write_report
from bags_d2.engine.comparison import BASELINE, Comparison
from bags_d2.engine.logged_process import run_logged
from bags_d2.errors import exit_with_one_sentence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", type=Path, required=True, help="config of the baseline")
    parser.add_argument("--methods", help="comma-separated; default: all with a config beside it")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1, 2, ... of each method")
    parser.add_argument("--output", type=Path, default=Path("output/compare"))
    parser.add_argument("--num-gpus", type=int, default=0)
    parser.add_argument("--task", choices=("bbox", "segm"), default="bbox")
    parser.add_argument("--report-only", action="store_true", help="tabulate what is complete")
    parser.add_argument("opts", nargs="*", default=[], help="config keys and values for all runs")
    args = parser.parse_args()

    comparison = Comparison(args.config_file, args.output, args.opts, args.num_gpus)
    known = comparison.methods()
    methods = args.methods.split(",") if args.methods else known
    unknown = sorted(set(methods) - set(known))
    if unknown:
        raise ConfigError(f"--methods: no config for {unknown}; there are {', '.join(known)}.")
    # The baseline goes first: others start from it.
    methods = [BASELINE, *(m for m in methods if m != BASELINE)]
    runs = [comparison.run(m, seed) for seed in range(1, args.seeds + 1) for m in methods]
    for i, run in enumerate([] if args.report_only else runs, 1):
        state = "complete" if run.is_complete else run.kind.value
        print(f"[{i}/{len(runs)}] {run.method}, seed {run.seed}: {state}", flush=True)
        if not run.is_complete:
            comparison.make(run, run_logged)
    complete = [run for run in runs if run.is_complete]
    if not complete:
        raise ConfigError(f"No run in '{args.output}' is complete yet.")
    title = f"Methods on {args.config_file.stem.replace(BASELINE, '').strip('_')}"
    print(f"\n{write_report(complete, args.output, title, args.task)}\nin {args.output}")


if __name__ == "__main__":
    with exit_with_one_sentence():
        main()
