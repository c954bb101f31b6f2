"""Errors that a user can fix: each message names the file or key and the remedy.

Entry points print these as one sentence; anything else keeps its traceback.
"""

import contextlib
import errno
import re
import sys
from collections.abc import Iterator

__all__ = [
    "BagsError",
    "ConfigError",
    "DataError",
    "MissingFileError",
    "NonFiniteLossError",
    "exit_on_user_error",
    "one_sentence",
    "worker_error",
]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BagsError(Exception):
    """Base of the errors below."""


class ConfigError(BagsError, ValueError):
    """A config key, or an argument that stands for one, has a value that cannot work."""


class DataError(BagsError, ValueError):
    """A data set or one of its files contradicts its format or the config."""


class MissingFileError(BagsError, FileNotFoundError):
    """A file that the config asks for does not exist."""


class NonFiniteLossError(BagsError, FloatingPointError):
    """A loss has become infinite or NaN in training."""


def one_sentence(error: BaseException) -> str:
    """The message of an error, found at the end of the traceback that another process hands on."""
    text = str(error)
    own = re.findall(r"^bags_d2\.[\w.]+: (.*)$", text, re.MULTILINE)
    return own[-1] if own else text


def worker_error(error: RuntimeError) -> BagsError | None:
    """The error for a data loader's worker process that has died; None for other errors."""
    died = re.search(r"DataLoader worker .*(?:killed|exited)[^\n]*", str(error))
    if died is None:
        return None
    return BagsError(
        f"{died[0].rstrip('. ')}, as when memory runs out; lower "
        "DATALOADER.NUM_WORKERS, and run the same command again with --resume."
    )


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """For entry points: end with a sentence, not a traceback, where the user can fix the cause."""
    try:
        yield
    except BagsError as error:
        sys.exit(f"Error: {one_sentence(error)}")
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "detectron2"):
            raise
        name = error.name.capitalize().replace("Torch", "PyTorch")
        sys.exit(f"Error: {name} is not installed here (docs/getting_started.md).")
    except RuntimeError as error:
        if own := worker_error(error):
            sys.exit(f"Error: {own}")
        raise
    except OSError as error:
        if error.errno not in _FULL:
            raise
        where = f"'{error.filename}'" if error.filename else "A file"
        sys.exit(
            f"Error: {where} could not be written ({error.strerror}); free some space, and run the "
            "same command again (with --resume where there is such a flag)."
        )
