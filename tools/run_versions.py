#!/usr/bin/env python
"""Run the test suite under several Pythons, one by one, and write a table of the outcomes.

Each gets an environment of its own (6 GB, deleted afterwards) from requirements.txt; the oldest
torch that is supported can be asked for as well.
"""

import argparse
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tabulate import tabulate

from bags_d2.utils.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
OLDEST = ("torch==2.4.0", "torchvision==0.19.0", "numpy<2.3")


def run_suite(python: str, pins: tuple[str, ...]) -> list[str]:
    """Set up an environment, run the suite, and give the row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        interpreter = f"{folder}/bin/python"
        subprocess.run([python, "-m", "venv", folder], check=True)
        install = [interpreter, "-m", "pip", "install", "--quiet"]
        first = pins or re.findall(r"^torch\S+", (ROOT / "requirements.txt").read_text(), re.M)
        for wanted in (first, ["./third_party/detectron2"], ["-e", ".[test]"]):
            # What is there stays: later requirements may not replace the torch that is tested.
            subprocess.run([*install, *wanted, *first], check=True, cwd=ROOT)
        tests = [interpreter, "-m", "pytest", "-n", "2", "-q"]
        done = subprocess.run(tests, cwd=ROOT, capture_output=True, text=True)
        code = "import sys, torch; print(sys.version.split()[0], torch.__version__)"
        versions = subprocess.run([interpreter, "-c", code], capture_output=True, text=True)
    summary = next((x for x in reversed(done.stdout.splitlines()) if " in " in x), "no summary")
    return [*versions.stdout.split(), summary.strip("= ")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--pythons", nargs="+", default=["python3.10", "python3.11", "python3.12", "python3.13"]
    )
    parser.add_argument("--oldest-torch", action="store_true", help="with torch 2.4")
    parser.add_argument("--output", type=Path, default=Path("output/versions.md"))
    args = parser.parse_args()
    rows = []
    for python in args.pythons:
        found = shutil.which(python)
        rows.append(
            run_suite(found, OLDEST if args.oldest_torch else ())
            if found
            else [python, "-", "not installed here"]
        )
        table = tabulate(rows, ("Python", "torch", "tests"), "github")
        with write_atomically(args.output) as file:
            file.write(f"{table}\n")
    print(table)


if __name__ == "__main__":
    main()
