"""Pickles as data: a machine for the opcodes that weights are written with, and no others.

Python's own unpickler calls what a file names, sets what state it likes on the result, and hashes
keys nested so deeply that the interpreter dies. Here a file chooses among the few builders below,
which check what they are given, and what it builds is no larger than the bytes it brings.
"""

import collections
import math
import pickle
import pickletools
import re
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

__all__ = ["Budget", "Builder", "UnsafePickleError", "read_plain_pickle"]

# dtypes as numpy's pickles name them: numbers only, of fixed size.
_NUMERIC = re.compile(r"b1|[iu][1248]|f[248]|c8|c16")
_KEYS = (str, int, float, bytes, type(None))

# Opcodes that push what follows them.
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    # Text of Python 2, which pickletools decodes as latin1.
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}

Builder = Callable[..., Any]


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


class _Unfinished:
    """An object that the file goes on to give a state; references then mean the finished one."""

    def __init__(self, finish: Callable[[Any], Any]) -> None:
        self.finish = finish
        self.finished: Any = self


def read_plain_pickle(
    file: IO[bytes],
    size: int,
    builders: Mapping[str, Any] | None = None,
    persistent_load: Builder | None = None,
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
    names = {**_numpy_builders(Budget(size)), **(builders or {})}
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop_from_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def find(module: str, name: str) -> Any:
        # numpy has renamed its modules.
        known = re.sub(r"^numpy\._?core\.", "numpy.", f"{module}.{name}")
        if known not in names:
            raise UnsafePickleError(f"unsupported global {module}.{name}")
        return names[known]

    for opcode, arg, _ in pickletools.genops(file):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                (result,) = stack
                return result
            case "MARK":
                marks.append(len(stack))
            case "POP":
                stack.pop()
            case "POP_MARK":
                pop_from_mark()
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "LIST":
                stack.append(pop_from_mark())
            case "DICT":
                items = pop_from_mark()
                stack.append({})
                _set_items(stack[-1], items)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(pop_from_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                items = stack[-count:]
                del stack[-count:]
                stack.append(tuple(items))
            case "APPEND":
                item = stack.pop()
                _of_type(list, stack[-1]).append(item)
            case "APPENDS":
                items = pop_from_mark()
                _of_type(list, stack[-1]).extend(items)
            case "SETITEM":
                items = [stack.pop(), stack.pop()][::-1]
                _set_items(stack[-1], items)
            case "SETITEMS":
                items = pop_from_mark()
                _set_items(stack[-1], items)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                item = memo[arg]
                stack.append(item.finished if isinstance(item, _Unfinished) else item)
            case "GLOBAL":
                stack.append(find(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                name = stack.pop()
                stack.append(find(stack.pop(), name))
            case "REDUCE":
                arguments = _of_type(tuple, stack.pop())
                build = stack.pop()
                if not callable(build):
                    raise UnsafePickleError(f"unsupported call of {type(build).__name__}")
                stack.append(build(*arguments))
            case "BUILD":
                state = stack.pop()
                item = stack[-1]
                if isinstance(item, _Unfinished):
                    stack[-1] = item.finished = item.finish(state)
                elif type(item) is collections.OrderedDict:
                    # torch's state dicts: the versions of their modules.
                    item._metadata = state.get("_metadata")
                else:
                    raise UnsafePickleError(f"unsupported state of {type(item).__name__}")
            case "BINPERSID" if persistent_load:
                stack.append(persistent_load(stack.pop()))
            case name if name in _LITERALS:
                stack.append(arg)
            case name:
                raise UnsafePickleError(f"unsupported opcode {name}")
    raise EOFError("no end")


def _numpy_builders(budget: Budget) -> dict[str, Any]:
    """What numpy's pickles call; its own functions would take any dtype and any state."""

    def array(data: Any, dtype: Any, shape: tuple, order: str = "C") -> np.ndarray:
        data = data.encode("latin1") if isinstance(data, str) else data
        if not isinstance(data, bytes | bytearray):
            raise UnsafePickleError(f"unsupported array of {type(data).__name__}")
        size = math.prod(_of_type(tuple, shape)[:65]) * _of_type(np.dtype, dtype).itemsize
        if len(data) != size:
            raise ValueError(f"{len(data)} bytes for an array of {size}")
        budget.spend(len(data))
        return np.frombuffer(data, dtype).reshape(shape, order=order).copy(order)

    def empty_array(kind: Any, shape: Any, typecode: Any) -> _Unfinished:
        def finish(state: tuple) -> np.ndarray:
            _, shape, dtype, is_fortran, data = state
            return array(data, dtype, shape, "F" if is_fortran else "C")

        return _Unfinished(finish)

    def dtype(name: str, align: Any = False, copy: Any = True) -> _Unfinished:
        if not isinstance(name, str) or not _NUMERIC.fullmatch(name):
            raise UnsafePickleError(f"unsupported class of arrays: dtype {name!r:.20}")

        def finish(state: tuple) -> np.dtype:
            if state[2:5] != (None, None, None):
                raise UnsafePickleError("unsupported class of arrays: dtype with fields")
            return np.dtype(name).newbyteorder(state[1])

        return _Unfinished(finish)

    def encode(text: str, encoding: str) -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise UnsafePickleError(f"unsupported global encoding {encoding!r:.20}")
        budget.spend(len(text))
        return text.encode("latin1")

    return {
        "numpy.ndarray": "ndarray",  # an argument of _reconstruct
        "numpy.multiarray._reconstruct": empty_array,
        "numpy.multiarray.scalar": lambda dtype, data: array(data, dtype, ()),
        "numpy.numeric._frombuffer": array,
        "numpy.dtype": dtype,
        "_codecs.encode": encode,
        "collections.OrderedDict": _ordered_dict,
        "builtins.bytes": lambda: b"",
        "__builtin__.bytes": lambda: b"",
    }


def _ordered_dict(pairs: list = ()) -> collections.OrderedDict:
    built = collections.OrderedDict()
    for key, value in pairs:
        _set_items(built, [key, value])
    return built


def _set_items(mapping: Any, items: list[Any]) -> None:
    if not isinstance(mapping, dict):
        raise TypeError(f"items for {type(mapping).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, _KEYS):
            raise UnsafePickleError(f"unsupported class of keys: {type(key).__name__}")
        mapping[key] = value


def _of_type(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} where {kind.__name__} is expected")
    return value
