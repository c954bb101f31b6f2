"""Run a command as a user would, with its whole output in a file and its progress on the screen."""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import BagsError

_PROGRESS = (" iter: ", "Inference done", "Newly init", "box features:", "Error:", "Error ")


class ProcessError(BagsError):
    """A command that was run ended with an error."""


def bags_d2_command(*arguments: str) -> list[str]:
    """What runs ``bags-d2`` with these arguments, wherever its script may be."""
    return [sys.executable, "-m", "bags_d2", *arguments]


def run_logged(command: Sequence[str], log: Path) -> float:
    """Run a command to its end, with its output appended to a log; it ends if this process does.

    Shown are its progress and, of ``bags-d2``, the command as a user would type it.

    Returns:
        The seconds that it took.

    Raises:
        ProcessError: if it fails, with the last line of its output.
    """
    if list(command[1:3]) == ["-m", "bags_d2"]:
        print(f"\n$ bags-d2 {shlex.join(command[3:])}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    last = ""
    with (
        open(log, "a", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="backslashreplace",
            # Small layers gain nothing from a second thread, and two threads that wait for each
            # other on busy cores lose tenfold.
            env={"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "5", **os.environ},
            preexec_fn=_end_with_parent(),
        ) as process,
    ):
        try:
            for line in process.stdout:
                file.write(line)
                last = line.strip() or last
                if any(mark in line for mark in _PROGRESS):
                    print(line.rstrip()[:160], flush=True)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise ProcessError(f"'{' '.join(command[:4])} ...' failed: {last} (all of it is in {log}).")
    return time.perf_counter() - start


def _end_with_parent() -> Callable[[], None] | None:
    """For a child to call: have Linux kill it when this process ends (elsewhere None)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None:
        return None
    parent = os.getpid()

    def ask() -> None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # ended before it was asked
            os._exit(1)

    return ask
