"""What dependencies say to programmers, kept from the terminals of those who run commands."""

import logging
import os
import re
import warnings

_WARNINGS = (
    ("", DeprecationWarning),
    ("", FutureWarning),
    ("torch.meshgrid", UserWarning),
    ("pkg_resources is deprecated", UserWarning),
    ("The given NumPy array is not writable", UserWarning),
    ("This DataLoader will create", UserWarning),
)
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
