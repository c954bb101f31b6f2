"""Checkpoint files as data: reading one runs no code that it brings.

A pickle can name any function for Python to call. Nothing but tensors and plain containers is built
from a file, unless the user trusts all checkpoints of a run by ``BAGS_D2_TRUST_CHECKPOINTS=1`` in
the environment. A config key would not do: configs are passed around together with checkpoints.
torch's own ``weights_only`` is no substitute, since hostile files crash or hang it.
"""

import collections
import io
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from typing import IO, Any

import numpy as np
import torch
from torch import nn

from ..errors import ConfigError, DataError
from ..utils.files import require_file
from .plain_pickle import Budget, UnsafePickleError, plain_dict, read_plain_pickle

TRUST_VARIABLE = "BAGS_D2_TRUST_CHECKPOINTS"

# What torch.save's older format starts with.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

# Storages are named after C's types.
_DTYPES = {
    **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8},
    **{"Byte": torch.uint8, "Bool": torch.bool, "BFloat16": torch.bfloat16},
    **{"ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128},
}


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint in any form that Detectron2 reads, without running code from it.

    The forms: ``.pth`` of Detectron2 or a bare state dict; ``.pyth`` of pycls; ``.pkl`` of
    Detectron2's model zoo and of Caffe2.

    Returns:
        The weights under "model" (tensors or, from a ``.pkl``, numpy arrays), and whatever else
        the file holds.

    Raises:
        MissingFileError: if there is no such file.
        DataError: if it is damaged, no checkpoint, or would build objects other than data.
    """
    name = os.fspath(path)
    is_pickle = require_file(path).endswith(".pkl")
    content = _read(path, _unpickle if is_pickle else _load)
    if not isinstance(content, dict) or not content:
        raise DataError(f"'{name}' is not a checkpoint: it holds no dictionary of weights.")
    if is_pickle and not ("model" in content and "__author__" in content):
        # Caffe2: detection models have their weights under "blobs", ImageNet models have not.
        content = _foreign(name, content.get("blobs", content), "_momentum", "Caffe2")
    elif "model_state" in content:
        content = _foreign(name, content["model_state"], "num_batches_tracked", "pycls")
    elif "model" not in content:
        content = {"model": content}
    _check_weights(name, content["model"])
    return content


def read_model_weights(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint by name; see :func:`read_checkpoint`."""
    weights = read_checkpoint(path)["model"]
    return {name: torch.as_tensor(value) for name, value in weights.items()}


def read_torch(path: str | os.PathLike) -> Any:
    """Plain data that ``torch.save`` has written, on the CPU; raises as :func:`read_checkpoint`."""
    return _read(path, _load)


def read_tensor(path: str | os.PathLike) -> torch.Tensor:
    """One tensor that ``torch.save`` has written; see :func:`read_torch`."""
    content = read_torch(path)
    if not isinstance(content, torch.Tensor):
        raise DataError(f"'{os.fspath(path)}' must hold a tensor, found {type(content).__name__}.")
    return content


def _read(path: str | os.PathLike, read: Callable[..., Any]) -> Any:
    name, trusted = os.fspath(path), _is_trusted()
    with open(require_file(path), "rb") as file:
        try:
            return read(file, os.fstat(file.fileno()).st_size, trusted)
        except UnsafePickleError as error:
            raise DataError(
                f"Checkpoint '{name}' would build other objects than tensors when loaded "
                f"({error}), which can run any code; if you trust whoever made it, set "
                f"{TRUST_VARIABLE}=1."
            ) from None
        except Exception as error:  # damaged files raise nearly anything
            detail = (str(error).strip().splitlines() or [""])[0]
            raise DataError(
                f"'{name}' is truncated or not a checkpoint "
                f"({type(error).__name__}: {detail[:120]}); copy or make it again."
            ) from None


def _unpickle(file: IO[bytes], size: int, trusted: bool) -> Any:
    if trusted:
        return pickle.load(file, encoding="latin1")
    # Twice: of Python 2's pickles, arrays are text first.
    return read_plain_pickle(file, 2 * size)


def _load(file: IO[bytes], size: int, trusted: bool) -> Any:
    is_zip = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    if trusted:
        if is_zip and (damaged := zipfile.ZipFile(file).testzip()):
            raise zipfile.BadZipFile(f"Bad CRC-32 for file '{damaged}'")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=False)
    return (_load_zip if is_zip else _load_legacy)(file, size)


def _load_zip(file: IO[bytes], size: int) -> Any:
    """``torch.save``'s archive: a pickle, and each storage as a member, whose CRC is checked."""
    archive = zipfile.ZipFile(file)
    budget = Budget(size)
    (root,) = (n.removesuffix("data.pkl") for n in archive.namelist() if n.endswith("/data.pkl"))
    storages: dict[str, torch.Tensor] = {}

    def read(name: str) -> np.ndarray:
        member = archive.getinfo(root + name)
        budget.spend(member.file_size)  # compressed, it could be of any size
        content = np.empty(member.file_size, np.uint8)
        with archive.open(member) as source:
            # The CRC is checked once the end has been seen.
            if source.readinto(content) != len(content) or source.read(1):
                raise EOFError(f"'{name}' ends early")
        return content

    def load_storage(identifier: tuple) -> torch.Tensor:
        _, dtype, key, _, _ = identifier
        if key not in storages:
            storages[key] = torch.from_numpy(read(f"data/{key}"))
        return _viewed(storages[key], dtype)

    has_order = f"{root}byteorder" in archive.namelist()
    if has_order and read("byteorder").tobytes() != sys.byteorder.encode():
        raise ValueError("its byte order is another machine's")
    data = io.BytesIO(read("data.pkl"))
    return read_plain_pickle(data, size, _torch_builders(size), load_storage)


def _load_legacy(file: IO[bytes], size: int) -> Any:
    """The format before torch 1.6: pickles, then the storages that they name."""
    budget = Budget(size)
    if read_plain_pickle(file, size) != _LEGACY_MAGIC:
        raise ValueError("torch.save has not written it")
    read_plain_pickle(file, size)  # version
    read_plain_pickle(file, size)  # sizes of C's types
    storages: dict[str, torch.Tensor] = {}

    def load_storage(identifier: tuple) -> torch.Tensor:
        _, dtype, key, _, length, view = identifier
        if view is not None:
            raise UnsafePickleError("unsupported class of storages: views")
        if key not in storages:
            budget.spend(length * dtype.itemsize)
            storages[key] = torch.zeros(length * dtype.itemsize, dtype=torch.uint8)
        return _viewed(storages[key], dtype)

    content = read_plain_pickle(file, size, _torch_builders(size), load_storage)
    for key in read_plain_pickle(file, size):
        file.seek(8, os.SEEK_CUR)  # its length once more
        if file.readinto(storages[key].numpy()) != len(storages[key]):
            raise EOFError(f"storage '{key}' ends early")
    return content


def _viewed(storage: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # An empty tensor of bytes has no view as anything wider.
    return storage.view(dtype) if len(storage) else torch.empty(0, dtype=dtype)


def _torch_builders(size: int) -> dict[str, Any]:
    """What ``torch.save``'s pickles call; a tensor may repeat its elements, within bounds."""
    budget = Budget(size + (1 << 24))

    def tensor(storage, offset, shape, strides, requires_grad, hooks, *_) -> torch.Tensor:
        if not isinstance(storage, torch.Tensor):
            raise TypeError("a tensor without a storage")
        built = storage.as_strided(shape, strides, offset)
        budget.spend(built.numel() * built.element_size())
        return built.requires_grad_(requires_grad is True)

    return {
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_parameter": lambda data, requires_grad, _: nn.Parameter(
            data, requires_grad is True
        ),
        "collections.Counter": lambda counts: collections.Counter(plain_dict(counts.items())),
        "torch.Size": lambda sizes: torch.Size(sizes),
        "torch.device": lambda *name: torch.device(*name),
        **{f"torch.{name}Storage": dtype for name, dtype in _DTYPES.items()},
        **{str(dtype): dtype for dtype in _DTYPES.values()},
    }


def _foreign(name: str, weights: Any, leave_out: str, author: str) -> dict[str, Any]:
    _check_weights(name, weights)
    return {
        "model": {k: v for k, v in weights.items() if not k.endswith(leave_out)},
        "__author__": author,
        "matching_heuristics": True,
    }


def _check_weights(name: str, weights: Any) -> None:
    valid = isinstance(weights, dict) and all(
        isinstance(key, str) and key.isprintable() and isinstance(value, np.ndarray | torch.Tensor)
        for key, value in weights.items()
    )
    if not valid:
        raise DataError(f"'{name}' is not a checkpoint: 'model' must map names to tensors.")


def _is_trusted() -> bool:
    value = os.environ.get(TRUST_VARIABLE, "").strip().lower()
    if value not in ("1", "true", "yes", "on", "", "0", "false", "no", "off"):
        raise ConfigError(
            f"{TRUST_VARIABLE} is '{value}'; set it to 1 to run what checkpoints bring, or to 0."
        )
    return value in ("1", "true", "yes", "on")
