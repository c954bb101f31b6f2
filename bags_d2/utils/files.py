"""The boundary to the file system: every file that is read as data or written passes here.

Reading builds plain data only, whatever a file says. A file that is written appears under its name
once it is whole, so that a kill or a full disk leaves the one before it. A lock keeps two processes
from writing to one folder.
"""

import contextlib
import csv
import errno
import fcntl
import functools
import gc
import hashlib
import json
import math
import os
import secrets
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import yaml
from detectron2.utils.file_io import Detectron2Handler, PathManager

from ..errors import BagsError, ConfigError, DataError, MissingFileError

_MAX_YAML_NODES = 1_000_000


class FolderInUseError(BagsError):
    """Another process writes to the folder."""


def local_path(path: str | os.PathLike, key: str = "") -> str:
    """The path of a file, which is downloaded first if it is a URL that Detectron2 knows.

    Raises:
        MissingFileError: if it cannot be; ``key`` is the config's that can name a file instead.
    """
    path = os.fspath(path)
    try:
        return PathManager.get_local_path(path)
    # RuntimeError and KeyError: no such name in Detectron2's catalog.
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if "://" not in path:
            raise
        remedy = f"set {key} to that file" if key else "name that file instead"
        raise MissingFileError(
            f"'{path}' could not be downloaded ({getattr(error, 'reason', error)}); fetch "
            f"{_address(path)} where there is a network, and {remedy}."
        ) from None


def _address(path: str) -> str:
    """Where on the web Detectron2 looks for a file."""
    from detectron2.checkpoint.catalog import ModelCatalog  # which imports torch

    scheme, _, name = path.partition("://")
    if scheme == "catalog":
        with contextlib.suppress(RuntimeError, KeyError):
            return ModelCatalog.get(name)
    return Detectron2Handler.S3_DETECTRON2_PREFIX + name if scheme == "detectron2" else path


def require_file(path: str | os.PathLike) -> str:
    """The local path of a regular file, given by path or by a URL that Detectron2 knows.

    Raises:
        MissingFileError: if it does not exist or cannot be downloaded.
        DataError: if it is something else, such as a folder or a named pipe.
    """
    local = local_path(path)
    try:
        mode = os.stat(local).st_mode
    except (OSError, ValueError):  # ValueError: a null byte in the path
        raise MissingFileError(f"'{os.fspath(path)}' does not exist.") from None
    if not stat.S_ISREG(mode):
        raise DataError(f"'{os.fspath(path)}' is not a regular file; name one.")
    return local


def load_json(path: str | os.PathLike) -> Any:
    """Parse a JSON file.

    Raises:
        MissingFileError: if there is no such file.
        DataError: if it is truncated, nested too deeply or otherwise not JSON.
    """
    local = require_file(path)
    # Millions of small objects are built and none of them is garbage.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with open(local, encoding="utf-8") as file:
            return json.load(file)
    # ValueError: malformed JSON or UTF-8, or a number of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"'{os.fspath(path)}' is not valid JSON ({error}); download or build it again."
        ) from None
    finally:
        if collecting:
            gc.enable()


def load_yaml(path: str | os.PathLike) -> Any:
    """Parse a YAML file as plain data; tags that name Python objects are errors.

    Raises:
        MissingFileError: if there is no such file.
        ConfigError: if it is not such YAML.
    """
    with open(require_file(path), encoding="utf-8") as file:
        try:
            content = yaml.load(file, Loader=_BoundedLoader)
            _check_expanded_size(content)
        except Exception as error:  # malformed scalars raise nearly anything
            detail = " ".join(str(error).split())[:300]
            raise ConfigError(f"'{os.fspath(path)}' is not valid YAML ({detail}).") from None
    return content


class _BoundedLoader(yaml.SafeLoader):
    """``SafeLoader`` that bounds what merges (``<<``) copy."""

    pairs = 0

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        self.pairs += len(node.value)
        if self.pairs > _MAX_YAML_NODES:
            raise yaml.YAMLError("its merges expand to too much")


def _check_expanded_size(content: Any) -> None:
    # A few aliases of aliases mean billions of values to whoever walks over them.
    pending, count = [content], 0
    while pending:
        node = pending.pop()
        count += 1
        if count > _MAX_YAML_NODES:
            raise yaml.YAMLError("its aliases expand to too much")
        if isinstance(node, dict | list | set | tuple):
            pending.extend(node.values() if isinstance(node, dict) else node)


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Open a file for writing that appears under its name once the block ends without an error.

    Args:
        path: a local path; its folder is created.
        mode: "w" (UTF-8, newlines as they are) or "wb".

    Raises:
        DataError: if it cannot be written, as on a full disk; what stood there before stays.
    """
    path = Path(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    # Beside the file, since a rename is atomic within a file system only.
    partial = path.parent / f".{path.name[:100]}.{secrets.token_hex(8)}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, mode.replace("w", "x"), **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        # torch.save hides the system's error behind one of its own.
        system = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(system, OSError) and not isinstance(system, BagsError):
            raise DataError(
                f"'{path}' could not be written ({system.strerror or system}); free some space or "
                "correct the path, and run the same command again."
            ) from None
        raise


def dump_json(content: Any) -> str:
    """Strict JSON, indented: NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write strict JSON (:func:`dump_json`) atomically."""
    with write_atomically(path) as file:
        file.write(dump_json(content))


def write_csv(path: str | os.PathLike, header: Iterable, rows: Iterable[Iterable]) -> None:
    """Write a table as CSV (UTF-8) atomically."""
    with write_atomically(path) as file:
        csv.writer(file).writerows([header, *rows])


def content_hash(path: str | os.PathLike) -> str:
    """SHA-256 of a file, computed once for each version of it."""
    local = require_file(path)
    return _hash_of_version(os.path.abspath(local), file_version(local))


def file_version(path: str | os.PathLike) -> tuple[int, ...]:
    """What changes whenever a file does."""
    found = os.stat(path)
    # The time of the last change of status cannot be set back, as that of the content can.
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@functools.lru_cache(maxsize=256)
def _hash_of_version(path: str, version: tuple[int, ...]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def lock_folder(folder: str | os.PathLike) -> Iterator[None]:
    """Hold a local folder (created if need be) until the block ends or the process, in any way.

    Raises:
        FolderInUseError: if another process holds it.
        DataError: if it cannot be written to.
    """
    path = Path(folder) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise DataError(
            f"'{os.fspath(folder)}' cannot be written to ({error.strerror}); name another folder."
        ) from None
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                yield  # a file system without locks
                return
            holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
            raise FolderInUseError(
                f"'{os.fspath(folder)}' is in use by {holder}; wait for it to end, or name another "
                "folder."
            ) from None
        command = " ".join(sys.argv)[:300]
        with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} ({command})\n".encode(errors="replace"))
        yield
    finally:
        if descriptor in _held:
            _held.remove(descriptor)
            os.close(descriptor)


# A lock ends with the last process that has its file open: a worker process that outlives a killed
# parent for some seconds would keep it, so forked processes let go at once.
_held: set[int] = set()


def _release_in_child() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_release_in_child)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
