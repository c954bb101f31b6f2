"""Checkpoint files as data: reading one runs no code that it brings.

A pickle can name any function for Python to call. Weights need tensors and plain containers only,
so nothing else is built from a file, unless the user trusts all checkpoints of a run by setting
the environment variable ``BAGS_D2_TRUST_CHECKPOINTS=1``. A config key would not do: configs are
passed around together with checkpoints.
"""

import collections
import os
import pickle
import re
from typing import Any, ClassVar

import numpy as np
import torch
from detectron2.utils.file_io import PathManager

from ..errors import DataError, MissingFileError

__all__ = ["TRUST_VARIABLE", "read_checkpoint", "read_model_weights", "read_tensor"]

TRUST_VARIABLE = "BAGS_D2_TRUST_CHECKPOINTS"

# torch.load has one exception for what it refuses to build and for what it cannot read.
_UNSAFE_TO_TORCH = re.compile("unsupported (global|class)", re.IGNORECASE)


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint in any form that Detectron2 reads, without running code from it.

    The forms: ``.pth`` of Detectron2 or a bare state dict; ``.pyth`` of pycls; ``.pkl`` of
    Detectron2's model zoo and of Caffe2.

    Args:
        path: the file, or a URL that Detectron2's PathManager knows.

    Returns:
        A dict with the weights under "model" (tensors or, from a ``.pkl``, numpy arrays), and
        whatever else the file holds.

    Raises:
        MissingFileError: if there is no such file.
        DataError: if it is truncated, no checkpoint, or would build objects other than data.
    """
    name = os.fspath(path)
    local = PathManager.get_local_path(name)
    if not os.path.isfile(local):
        raise MissingFileError(f"Checkpoint '{name}' does not exist.")
    content = _read_pickle(local, name) if local.endswith(".pkl") else _read_torch(local, name)
    if not isinstance(content, dict) or not content:
        raise DataError(f"'{name}' is not a checkpoint: it holds no dictionary of weights.")
    if local.endswith(".pkl"):
        return _from_pickle(content)
    if "model_state" in content:  # pycls
        weights = content["model_state"]
        return {
            "model": {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")},
            "__author__": "pycls",
            "matching_heuristics": True,
        }
    return content if "model" in content else {"model": content}


def read_model_weights(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint by name; see :func:`read_checkpoint`.

    Raises:
        MissingFileError: if there is no such file.
        DataError: if it is no checkpoint, or something under "model" is not a tensor.
    """
    weights = read_checkpoint(path)["model"]
    try:
        return {name: torch.as_tensor(value) for name, value in weights.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"'{os.fspath(path)}' is not a checkpoint: 'model' must map names to tensors ({error})."
        ) from None


def read_tensor(path: str | os.PathLike) -> torch.Tensor:
    """One tensor, as ``torch.save`` writes it.

    Raises:
        MissingFileError: if there is no such file.
        DataError: if it holds anything else.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise MissingFileError(f"'{name}' does not exist.")
    content = _read_torch(name, name)
    if not isinstance(content, torch.Tensor):
        raise DataError(f"'{name}' must hold a tensor, found {type(content).__name__}.")
    return content


def _read_torch(local: str, name: str) -> Any:
    trusted = _is_trusted()
    try:
        return torch.load(local, map_location="cpu", weights_only=not trusted)
    except pickle.UnpicklingError as error:
        if _UNSAFE_TO_TORCH.search(str(error)):
            raise DataError(_unsafe_message(name, str(error))) from None
        raise DataError(_damaged_message(name, error)) from None
    except (EOFError, KeyError, RuntimeError, ValueError, AttributeError) as error:
        raise DataError(_damaged_message(name, error)) from None


def _read_pickle(local: str, name: str) -> Any:
    unpickler = pickle.Unpickler if _is_trusted() else _DataUnpickler
    with open(local, "rb") as file:
        try:
            return unpickler(file, encoding="latin1").load()
        except _UnsafeGlobalError as error:
            raise DataError(_unsafe_message(name, str(error))) from None
        except Exception as error:  # damaged pickles raise nearly anything
            raise DataError(_damaged_message(name, error)) from None


def _from_pickle(content: dict) -> dict[str, Any]:
    if "model" in content and "__author__" in content:
        return content
    # Caffe2: detection models have their weights under "blobs", ImageNet models have not.
    weights = content.get("blobs", content)
    return {
        "model": {k: v for k, v in weights.items() if not k.endswith("_momentum")},
        "__author__": "Caffe2",
        "matching_heuristics": True,
    }


class _UnsafeGlobalError(pickle.UnpicklingError):
    pass


def _encode_latin1(text: str, encoding: str) -> bytes:
    """What numpy's pickles of protocol 2 call to turn text into bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise _UnsafeGlobalError(f"_codecs.encode to {encoding}")
    return text.encode("latin1")


def _array_from_buffer(data: bytes, dtype: np.dtype, shape: tuple, order: str) -> np.ndarray:
    """What numpy's pickles of protocol 5 call."""
    return np.frombuffer(data, dtype).reshape(shape, order=order)


class _DataUnpickler(pickle.Unpickler):
    """Builds numpy arrays and plain containers, and refuses to look up anything else."""

    # numpy's rebuilding functions are private and their module has been renamed (numpy.core,
    # numpy._core), so they are taken from where numpy itself refers to them.
    _KNOWN: ClassVar = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy.multiarray", "scalar"): np.float64(0).__reduce__()[0],
        ("numpy.numeric", "_frombuffer"): _array_from_buffer,
        ("_codecs", "encode"): _encode_latin1,
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("builtins", "bytes"): bytes,
        ("__builtin__", "bytes"): bytes,
    }

    def find_class(self, module: str, name: str) -> Any:
        key = re.sub(r"^numpy\._?core\.", "numpy.", module), name
        if key not in self._KNOWN:
            raise _UnsafeGlobalError(f"{module}.{name}")
        return self._KNOWN[key]


def _is_trusted() -> bool:
    return os.environ.get(TRUST_VARIABLE, "0") not in ("", "0")


def _unsafe_message(name: str, what: str) -> str:
    # torch explains itself over many lines; the first names what it refused.
    detail = next((x for x in what.splitlines() if _UNSAFE_TO_TORCH.search(x)), what).strip()
    return (
        f"Checkpoint '{name}' would build other objects than tensors when loaded ({detail}), which "
        f"can run any code; if you trust whoever made it, set {TRUST_VARIABLE}=1."
    )


def _damaged_message(name: str, error: Exception) -> str:
    detail = (str(error).strip().splitlines() or [""])[0]
    return f"'{name}' is truncated or not a checkpoint ({type(error).__name__}: {detail[:120]})."
