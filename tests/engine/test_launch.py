"""Processes of a run: spawned, or joined under torchrun; and what is left of them after a fault."""

import os
import signal
import subprocess
import sys
import time

import pytest
from detectron2.engine import default_argument_parser
from detectron2.utils import comm

from bags_d2 import BagsError, ConfigError
from bags_d2.engine import launch

pytestmark = pytest.mark.slow


def _args(num_processes):
    return default_argument_parser().parse_args(
        ["--num-gpus", str(num_processes), "--dist-url", "auto"]
    )


def _write_rank(folder):
    ranks = comm.all_gather(comm.get_rank())
    (folder / f"{comm.get_local_rank()}").write_text(f"{comm.get_world_size()} {ranks}")


def _refuse(wait):
    if comm.get_rank() == 1:
        raise ConfigError("MODEL.X is wrong.")
    time.sleep(wait)


def _die(folder):
    if comm.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.synchronize()  # waits for a process that is no more
    (folder / "survived").write_text("")


def _bug():
    raise ZeroDivisionError("a bug")


def test_processes_know_each_other(tmp_path):
    launch(_write_rank, _args(2), (tmp_path,))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys(
        ("0", "1"), "2 [0, 1]"
    )


def test_an_error_of_one_process_ends_all_with_its_sentence():
    start = time.monotonic()
    with pytest.raises(BagsError, match=r"^MODEL\.X is wrong\.$"):
        launch(_refuse, _args(2), (120,))
    assert time.monotonic() - start < 60


def test_a_killed_process_ends_all_instead_of_hanging(tmp_path):
    with pytest.raises(BagsError, match=r"Process 1 .*SIGKILL.*--resume") as info:
        launch(_die, _args(2), (tmp_path,))
    assert "\n" not in str(info.value)
    assert not (tmp_path / "survived").exists()


def test_bugs_keep_their_traceback():
    with pytest.raises(Exception, match="ZeroDivisionError: a bug"):
        launch(_bug, _args(2), ())
    with pytest.raises(ZeroDivisionError):
        launch(_bug, _args(1), ())


def test_torchruns_processes_are_joined(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        f"sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from test_launch import _args, _write_rank\n"
        "from bags_d2.engine import launch\n"
        f"launch(_write_rank, _args(1), (Path({str(tmp_path / 'out')!r}),))\n"
    )
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--standalone", str(script)]
    # Not the exit status: gloo aborts now and then while processes end, with all work done.
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert len(list((tmp_path / "out").iterdir())) == 2, done.stderr
    assert {p.name: p.read_text() for p in (tmp_path / "out").iterdir()} == dict.fromkeys(
        ("0", "1"), "2 [0, 1]"
    )
