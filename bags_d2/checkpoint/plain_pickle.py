"""Pickles as data: Python's unpickler, held to the opcodes that weights are written with.

As it is, it calls what a file names, sets what state it likes on the result, and hashes
keys nested so deeply that the interpreter dies. Here a file chooses among the few builders below,
which check what they are given, and what it builds is no larger than the bytes it brings.
"""

import collections
import math
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any

import numpy as np

# dtypes as numpy's pickles name them: numbers only, of fixed size.
_NUMERIC = re.compile(r"b1|[iu][1248]|f[248]|c8|c16")
_KEYS = (str, int, float, bytes, type(None))

# What Python's own unpickler does of these is harmless; the rest is refused or replaced below.
_HARMLESS = [
    getattr(pickle, name)[0]
    for name in (
        *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE"),
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING"),  # text of Python 2
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        *("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT"),
        *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
        *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BINPERSID"),  # of what find_class gives
    )
]


class UnsafePickleError(pickle.UnpicklingError):
    """A pickle would build something other than data."""


class Budget:
    """What arrays built from a file may take up, which is what they take up in the file."""

    def __init__(self, size: int) -> None:
        self.left = size

    def spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise ValueError("it holds less than it promises")


def read_plain_pickle(
    file: IO[bytes],
    size: int,
    builders: Mapping[str, Any] | None = None,
    persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
    """Read one pickle of plain containers, numbers, text and numpy's numeric arrays.

    Args:
        file: open for reading; left behind the end of the pickle.
        size: bytes that its arrays may take up.
        builders: what further names ("module.name") stand for: a callable that checks its
            arguments, or a plain value.
        persistent_load: gives what a persistent id stands for.

    Raises:
        UnsafePickleError: if it asks for anything else.
        Exception: of nearly any type, if it is damaged.
    """
    return _PlainUnpickler(file, Budget(size), builders or {}, persistent_load).load()


# The C implementation has no table of opcodes to choose from.
class _PlainUnpickler(pickle._Unpickler):
    def __init__(self, file, budget, builders, persistent_load) -> None:
        super().__init__(file, encoding="latin1")
        self.budget = budget
        self.builders = {
            "numpy.ndarray": "ndarray",  # an argument of _reconstruct
            "numpy.multiarray._reconstruct": lambda kind, shape, typecode: np.empty(0),
            "numpy.multiarray.scalar": lambda dtype, data: self.array(data, dtype, ()),
            "numpy.numeric._frombuffer": self.array,
            "numpy.dtype": _dtype,
            "_codecs.encode": self.encode,
            "collections.OrderedDict": lambda pairs=(): plain_dict(pairs, collections.OrderedDict),
            "builtins.bytes": lambda: b"",
            "__builtin__.bytes": lambda: b"",
            **builders,
        }
        self.persistent_load = persistent_load or self.refuse

    def find_class(self, module: str, name: str) -> Any:
        # numpy has renamed its modules.
        known = re.sub(r"^numpy\._?core\.", "numpy.", f"{module}.{name}")
        if known not in self.builders:
            raise UnsafePickleError(f"unsupported global {module}.{name}")
        return self.builders[known]

    def array(self, data: Any, dtype: Any, shape: Any, order: str = "C") -> np.ndarray:
        data = self.checked_bytes(data, dtype, shape)
        return np.frombuffer(data, dtype).reshape(shape, order=order).copy(order)

    def checked_bytes(self, data: Any, dtype: Any, shape: Any) -> bytes | bytearray:
        data = data.encode("latin1") if isinstance(data, str) else data
        if not isinstance(data, bytes | bytearray):
            raise UnsafePickleError(f"unsupported array of {type(data).__name__}")
        if not isinstance(dtype, np.dtype) or not isinstance(shape, tuple) or len(shape) > 32:
            raise TypeError("an array without a dtype or a shape")
        if any(type(n) is not int or n < 0 for n in shape):
            raise ValueError(f"an array of shape {shape}")
        if len(data) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{len(data)} bytes for an array of shape {shape}")
        self.budget.spend(len(data))
        return data

    def encode(self, text: str, encoding: str) -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise UnsafePickleError(f"unsupported global encoding {encoding!r:.20}")
        self.budget.spend(len(text))
        return text.encode("latin1")

    def refuse(self, *_) -> None:
        raise UnsafePickleError("unsupported opcode")

    def load_bytearray8(self) -> None:
        (length,) = np.frombuffer(self.read(8), "<u8")
        self.append(bytearray(self.read(int(length))))  # no longer than the file

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self.set_items(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def load_setitems(self) -> None:
        self.set_items(self.pop_mark())

    def set_items(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise TypeError(f"items for {type(self.stack[-1]).__name__}")
        self.stack[-1].update(plain_dict(zip(items[::2], items[1::2], strict=True)))

    def load_build(self) -> None:
        state, item = self.stack.pop(), self.stack[-1]
        if type(item) is np.ndarray:
            _, shape, dtype, is_fortran, data = state
            data = self.checked_bytes(data, dtype, shape)
            item.__setstate__((1, shape, dtype, bool(is_fortran), bytes(data)))
        elif isinstance(item, np.dtype):
            # Other states have fields, or flags that make numpy take numbers for objects.
            if state not in [(3, order, None, None, None, -1, -1, 0) for order in "<>|"]:
                raise UnsafePickleError("unsupported class of arrays: dtype with fields")
            item.__setstate__(state)
        elif type(item) is collections.OrderedDict:
            # torch's state dicts: the versions of their modules.
            item._metadata = state.get("_metadata")
        else:
            raise UnsafePickleError(f"unsupported state of {type(item).__name__}")

    dispatch = dict.fromkeys(pickle._Unpickler.dispatch, refuse)
    dispatch |= {code: pickle._Unpickler.dispatch[code] for code in _HARMLESS}
    dispatch |= {
        pickle.BYTEARRAY8[0]: load_bytearray8,
        pickle.DICT[0]: load_dict,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.BUILD[0]: load_build,
    }


def _dtype(name: Any, align: Any = False, copy: Any = True) -> np.dtype:
    if not isinstance(name, str) or not _NUMERIC.fullmatch(name):
        raise UnsafePickleError(f"unsupported class of arrays: dtype {name!r:.20}")
    return np.dtype(name, copy=True)  # a state with its byte order follows


def plain_dict(pairs: Iterable, kind: type[dict] = dict) -> dict:
    """A dict of keys that are safe to hash: tuples nested deeply enough end the interpreter."""
    built = kind()
    for key, value in pairs:
        if not isinstance(key, _KEYS):
            raise UnsafePickleError(f"unsupported class of keys: {type(key).__name__}")
        built[key] = value
    return built
