"""Files as data, whole or not there, and locked folders."""

import json
import multiprocessing
import os
import subprocess
import sys
import time

import pytest

from bags_d2.errors import ConfigError, DataError, MissingFileError
from bags_d2.utils.files import (
    FolderInUseError,
    content_hash,
    load_json,
    load_yaml,
    lock_folder,
    write_atomically,
    write_csv,
    write_json,
)


@pytest.mark.parametrize(
    "text", ['{"a": 1', "\xff", "[" * 100_000, "9" * 5_000, "", '{"a": "\udc80"}']
)
def test_faulty_json_is_one_sentence(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin1", "surrogateescape"))
    with pytest.raises(DataError, match=r"a\.json' is not valid JSON") as error:
        load_json(path)
    assert "\n" not in str(error.value)


def test_missing_files_pipes_and_folders_are_told_apart(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        load_json(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        load_json(tmp_path)
    with pytest.raises(MissingFileError, match="does not exist"):
        load_json(tmp_path / "none")
    with pytest.raises(MissingFileError, match="does not exist"):
        load_json("a\0b")


def test_yaml_builds_no_objects(tmp_path):
    marker = tmp_path / "marker"
    path = tmp_path / "a.yaml"
    path.write_text(f"KEY: !!python/object/apply:os.system ['touch {marker}']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_yaml(path)
    assert not marker.exists()
    path.write_text("A: [1, .inf]\n")
    assert load_yaml(path) == {"A": [1, float("inf")]}


def test_what_stood_there_stays_until_the_new_file_is_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with write_atomically(path) as file:
        file.write("first")
    with pytest.raises(RuntimeError), write_atomically(path) as file:  # noqa: PT012
        file.write("second")
        raise RuntimeError
    assert path.read_text() == "first"
    assert os.listdir(path.parent) == ["a.txt"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_a_full_disk_is_one_sentence():
    with pytest.raises(DataError, match="could not be written"):
        write_json("/proc/none/a.json", {})


def test_json_is_strict(tmp_path):
    write_json(tmp_path / "a.json", {"AP": float("nan"), "all": (1.0, float("inf"))})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"AP": None, "all": [1.0, None]}


def test_content_hash_sees_an_edit_that_keeps_size_and_time(tmp_path):
    path = tmp_path / "a"
    path.write_text("one")
    before, times = content_hash(path), path.stat()
    path.write_text("two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert content_hash(path) != before


def test_a_folder_has_one_writer_and_a_killed_one_leaves_no_lock(tmp_path):
    code = (
        "import sys, time; from bags_d2.utils.files import lock_folder\n"
        "with lock_folder(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(FolderInUseError, match=f"in use by process {other.pid}"):
        lock_folder(tmp_path).__enter__()
    other.kill()
    other.wait()
    other.stdout.close()
    with lock_folder(tmp_path):
        pass


def test_a_forked_process_does_not_keep_the_lock(tmp_path):
    lock = lock_folder(tmp_path)
    lock.__enter__()
    fork = multiprocessing.get_context("fork")
    ours, its = fork.Pipe()

    def work():
        its.send("started")
        time.sleep(60)

    process = fork.Process(target=work)
    process.start()
    assert ours.recv() == "started"
    lock.__exit__(None, None, None)
    with lock_folder(tmp_path):
        assert process.is_alive()
    process.kill()
    process.join()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_tables_are_utf8_and_whole(tmp_path):
    path = tmp_path / "new" / "table.csv"
    write_csv(path, ("id", "näme"), [(1, 'a "b", c'), (2, "")])
    assert path.read_bytes() == 'id,näme\r\n1,"a ""b"", c"\r\n2,\r\n'.encode()

    def rows():
        yield (3, "x")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_csv(path, ("id",), rows())
    assert path.read_bytes().startswith("id,nä".encode())
