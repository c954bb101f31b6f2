"""What dependencies say to programmers, kept from the terminals of those who run commands."""

import logging
import os
import re
import sys
import warnings

_WARNINGS = (
    ("", DeprecationWarning),
    ("", FutureWarning),
    ("torch.meshgrid", UserWarning),
    ("pkg_resources is deprecated", UserWarning),
    ("The given NumPy array is not writable", UserWarning),
    ("This DataLoader will create", UserWarning),
)
# Messages of hundreds of lines, before the first step.
_LONG = ("Environment info:", "Contents of args.config_file", "Running with full config", "Model:")
# These only say that a machine has no CUDA, and that Detectron2 calls what is renamed in torch.
_LOGGERS = ("torch.utils.cpp_extension", "torch.fx._symbolic_trace")


def silence_dependencies() -> None:
    """Ignore what a user of commands cannot change, here and in processes that are started."""
    for message, category in _WARNINGS:
        warnings.filterwarnings("ignore", re.escape(message), category)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    rules = [f"ignore:{message}:{category.__name__}" for message, category in _WARNINGS]
    # The user's own come last, which gives them precedence.
    os.environ["PYTHONWARNINGS"] = ",".join([*rules, *filter(None, [os.getenv("PYTHONWARNINGS")])])


def shorten_console(logger: logging.Logger) -> None:
    """Leave what a logger says at length about a run to its file, and off the terminal."""
    for handler in logger.handlers:
        if getattr(handler, "stream", None) is sys.stdout:
            handler.addFilter(_is_short)


def _is_short(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_LONG)
