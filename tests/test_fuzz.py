"""Damaged and malicious configs and checkpoints: refused in one sentence, and nothing is run.

The files are read in a process of their own, where a crash of the interpreter, a hang or a great
use of memory shows. ``python tests/test_fuzz.py FOLDER`` is that process.
"""

import argparse
import collections
import io
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bags_d2 import BagsError
from bags_d2.checkpoint.files import read_checkpoint, read_model_weights
from bags_d2.engine import setup_cfg

ROOT = Path(__file__).resolve().parents[1]
MARKER = "MARKER"
MEMORY = 1_500_000  # KB, of a process that has imported torch


# --- the process that reads ------------------------------------------------------------------


def outcome(path):
    try:
        if path.suffix == ".yaml":
            setup_cfg(argparse.Namespace(config_file=str(path), opts=[]))
        else:
            read_checkpoint(path)
            read_model_weights(path)
    except BagsError as error:
        return "refused" if "\n" not in str(error) else f"more than a sentence: {error}"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {error}"
    return "read"


def read_all(folder):
    for path in sorted(Path(folder).iterdir()):
        print(json.dumps([path.name, "begun"]), flush=True)
        print(json.dumps([path.name, outcome(path)]), flush=True)
    # Not getrusage's, which a process takes over from the one that started it.
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]
    print(json.dumps(["memory", int(peak)]), flush=True)


# --- the files ---------------------------------------------------------------------------------


def mutated(rng, data):
    """Some bytes flipped, deleted, inserted, repeated, or the end cut off."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(len(data)) if data else 0
        length = rng.choice([1, 1, 2, 8, 64])
        match rng.randrange(6):
            case 0 | 1:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = rng.randbytes(length)
            case 4:
                data[at:at] = data[rng.randrange(len(data) or 1) :][:length]
            case 5:
                del data[max(at, len(data) // 2) :]
    return bytes(data)


def text(value):
    value = value.encode("latin1")
    return b"X" + struct.pack("<I", len(value)) + value


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def call(function, *arguments):
    return function + b"(" + b"".join(arguments) + b"tR"


def pickled(value):
    """A value's opcodes, to be put into another pickle."""
    return pickle.dumps(value, 2)[2:-1]


DTYPE_STATE = pickled((3, "<", None, None, None, -1, -1, 0)) + b"b"
FLOATS = call(name("numpy", "dtype"), pickled("f4"), b"K\x00K\x01") + DTYPE_STATE
OBJECTS = (
    call(name("numpy", "dtype"), pickled("O8"), b"K\x00K\x01")
    + pickled((3, "|", None, None, None, -1, -1, 0))
    + b"b"
)


def raw(value):
    return b"B" + struct.pack("<I", len(value)) + value


RAW = raw(b"A" * 8)
EMPTY = call(
    name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"), b"K\x00\x85", RAW
)


def array(dtype, data=RAW, shape=b"K\x01\x85"):
    return EMPTY + b"(K\x01" + shape + dtype + b"\x89" + data + b"tb"


def attacks(folder):
    """Opcodes that run something, crash the interpreter, or ask for memory without bound."""
    marker = str(Path(folder).parent / MARKER)
    touch = f"open({marker!r}, 'w').close()"
    shell = f"touch {marker}"
    field_dtype = (
        call(name("numpy", "dtype"), pickled("V8"), b"K\x00K\x01")
        + b"(K\x03U\x01|N"
        + pickled(("a",))
        + b"}U\x01a"
        + OBJECTS
        + b"K\x00\x86s"
        + b"K\x08K\x01K\x10tb"
    )
    nested = b")" + b"\x85" * 300_000
    return {
        "system": call(name("os", "system"), text(shell)),
        "posix": call(name("posix", "system"), text(shell)),
        "eval": call(name("builtins", "eval"), text(f"__import__('os').system({shell!r})")),
        "exec": call(name("__builtin__", "exec"), text(touch)),
        "inst": b"(" + text(shell) + b"ios\nsystem\n",
        "obj": b"(" + name("os", "system") + text(shell) + b"o",
        "newobj": name("subprocess", "Popen") + text(shell) + b"\x85\x81",
        "newobj_ex": name("subprocess", "Popen") + text(shell) + b"\x85}\x92",
        "stack_global": text("os") + text("system") + b"\x93" + text(shell) + b"\x85R",
        "dotted": text("numpy") + text("core.os.system") + b"\x93" + text(shell) + b"\x85R",
        "partial": call(name("functools", "partial"), name("os", "system"), text(shell)),
        "torch_load": call(name("torch", "load"), text(marker)),
        "numpy_load": call(name("numpy", "load"), text(marker)),
        "extension": b"\x82\x01",
        "persistent": b"P" + b"x\n",
        "persistent_binary": text("x") + b"Q",
        "next_buffer": b"\x97",
        "build_function": name("_codecs", "encode") + b"N}U\x0c__defaults__)s\x86b",
        "build_class": name("collections", "OrderedDict") + b"N}U\x08__init__Ns\x86b",
        "objects": array(OBJECTS),
        "objects_by_scalar": call(name("numpy.core.multiarray", "scalar"), OBJECTS, RAW),
        "objects_by_buffer": call(
            name("numpy._core.numeric", "_frombuffer"), RAW, OBJECTS, b"K\x01\x85", text("C")
        ),
        "objects_in_fields": array(field_dtype),
        "state_twice": array(FLOATS, raw(b"AAAA")) + b"(K\x01K\x01\x85" + FLOATS + b"\x89Ntb",
        "state_of_objects": array(FLOATS, raw(b"AAAA")) + b"(K\x01K\x01\x85" + OBJECTS + b"\x89Ntb",
        "array_too_large": array(FLOATS, RAW, pickled((1 << 60,))),
        "array_negative": array(FLOATS, RAW, pickled((-1, -2))),
        "array_of_many_dimensions": array(FLOATS, RAW, pickled((1,) * 100_000)),
        "arrays_of_the_same_bytes": b"]"
        + raw(b"A" * 4_000_000)
        + b"q\xc80"
        + (array(FLOATS, b"h\xc8", pickled((1_000_000,))) + b"a") * 2000,
        "text_encoded_again": b"]"
        + text("A" * 4_000_000)
        + b"q\xc80"
        + (name("_codecs", "encode") + b"h\xc8U\x06latin1\x86Ra") * 2000,
        "nested_key": b"}" + nested + b"Ns",
        "nested_key_of_pairs": call(name("collections", "OrderedDict"), b"](" + nested + b"Nta"),
        "nested_key_of_counter": call(name("collections", "Counter"), b"](" + nested + b"Nta"),
        "nested_list": b"]" * 300_000 + b"a" * 299_999,
        "memo_index": b"Nr\xff\xff\xff\xff",
        "length": b"\x8e" + b"\xff" * 7 + b"\x7f",
        "length_of_bytearray": b"\x96" + b"\xff" * 5 + b"\x00\x00\x00",
        "long": b"\x8b\xff\xff\xff\x7f",
        "digits": b"L" + b"9" * 100_000 + b"L\n",
        "bytearray": call(name("builtins", "bytearray"), b"\x8a\x06" + b"\xff" * 5 + b"\x00"),
        "bytes": call(name("builtins", "bytes"), b"\x8a\x06" + b"\xff" * 5 + b"\x00"),
    }


def archive(data, storage=b"\0" * 16, compression=zipfile.ZIP_STORED):
    """What torch.save writes, of this pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as content:
        content.writestr("archive/data.pkl", data)
        content.writestr("archive/version", "3\n")
        content.writestr("archive/byteorder", sys.byteorder)
        content.writestr("archive/data/0", storage)
    return file.getvalue()


def tensor(offset=0, shape=(4,), stride=(1,), length=4):
    identifier = b"(" + text("storage") + name("torch", "FloatStorage")
    identifier += text("0") + text("cpu") + pickled(length) + b"tQ"
    arguments = pickled(offset), pickled(shape), pickled(stride), b"\x89", b"N"
    return call(name("torch._utils", "_rebuild_tensor_v2"), identifier, *arguments)


def weights(value):
    """A checkpoint whose one weight is these opcodes."""
    return b"\x80\x02}(" + text("model") + b"}" + text("w") + value + b"s"


def wrapped(value):
    return weights(value) + text("__author__") + text("x") + b"u."


def good_pickles():
    rng = np.random.default_rng(0)
    content = collections.OrderedDict(
        a=rng.normal(size=(3, 4)).astype(np.float32), b=np.arange(5), c=np.float32(2.5)
    )
    return [pickle.dumps({"model": content, "__author__": "zoo"}, p) for p in (0, 2, 4, 5)]


def good_archives():
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    content = {"model": layer.state_dict(), "optimizer": optimizer.state_dict(), "iteration": 3}
    for new in (True, False):
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=new)
        yield file.getvalue()


def random_opcodes(rng, pool):
    """A pickle of opcodes drawn at random, with whole calls among them."""
    body = b"".join(rng.choice(pool) for _ in range(rng.randrange(1, 40)))
    return b"\x80\x04" + body + b"."


def checkpoints(folder, count):
    rng = random.Random(0)
    attack = attacks(folder)
    for key, value in attack.items():
        yield f"attack_{key}.pkl", wrapped(value)
        yield f"attack_{key}.pth", archive(wrapped(value))
        yield (
            f"attack_{key}.pyth",
            (
                pickle.dumps(0x1950A86A20F9469CFC6C, 2)
                + pickle.dumps(1001, 2)
                + pickle.dumps({}, 2)
                + wrapped(value)
                + pickle.dumps([], 2)
            ),
        )
    yield "tensor_good.pth", archive(wrapped(tensor()))
    for key, arguments in {
        "beyond": {"offset": 1},
        "before": {"offset": -1},
        "huge": {"shape": (1 << 40,), "stride": (0,)},
        "backwards": {"stride": (-1,)},
        "overflow": {"shape": (1 << 62, 1 << 62), "stride": (1, 1)},
        "words": {"shape": ("4",)},
    }.items():
        yield f"tensor_{key}.pth", archive(wrapped(tensor(**arguments)))
    bomb = archive(wrapped(tensor()), b"\0" * 200_000_000, zipfile.ZIP_DEFLATED)
    yield "tensor_compressed.pth", bomb
    pool = [*(v for v in attack.values() if len(v) < 500), *(pickled(v) for v in (1, "a", b"b"))]
    pool += [bytes([code]) for code in b"(0123NQRbtds]})al\x85\x86\x87\x88\x89\x94u.e"]
    pool += [EMPTY, FLOATS, array(FLOATS, pickled(b"AAAA")), b"h\x00", b"q\x00"]
    pickles, archives = good_pickles(), list(good_archives())
    for i in range(count):
        yield f"mutated_{i}.pkl", mutated(rng, rng.choice(pickles))
        yield f"mutated_{i}.pth", mutated(rng, rng.choice(archives))
        yield f"opcodes_{i}.pkl", random_opcodes(rng, pool)
        yield f"opcodes_{i}.pth", archive(random_opcodes(rng, pool))
        # Valid archives of damaged pickles, which no checksum gives away.
        yield f"inner_{i}.pth", archive(mutated(rng, wrapped(tensor())))


def configs(folder, count):
    rng = random.Random(0)
    marker = str(Path(folder).parent / MARKER)
    tags = {
        "apply": f"!!python/object/apply:os.mkdir ['{marker}']",
        "apply_system": f"!!python/object/apply:os.system ['touch {marker}']",
        "new": f"!!python/object/new:subprocess.Popen [['touch', '{marker}']]",
        "module": "!!python/module:antigravity",
        "name": "!!python/name:os.system",
        "object": "!!python/object:collections.OrderedDict {}",
        "tuple": "!!python/tuple [1, 2]",
        "unknown": "!own x",
        "int": "!!int ''",
        "bool": "!!bool x",
        "float": "!!float ''",
        "timestamp": "!!timestamp x",
        "date": "2000-99-99",
        "binary": "!!binary é",
        "omap": "!!omap [x]",
        "set": "!!set {a: 1}",
        "digits": "9" * 5000,
    }
    for key, tag in tags.items():
        yield f"tag_{key}.yaml", f"SEED: {tag}\n".encode()
        yield f"tag_in_base_{key}.yaml", f"_BASE_: tag_{key}.yaml\n".encode()
        yield f"tag_as_key_{key}.yaml", f"? {tag}\n: 1\n".encode()
    aliases = "a0: &a0 [x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    mappings = "a0: &a0 {x: 1}\n" + "".join(
        f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}\n" for i in range(1, 12)
    )
    merges = "a0: &a0 {x: 1}\n" + "".join(
        f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
    )
    yield from {
        "bomb_aliases.yaml": aliases.encode(),
        "bomb_mappings.yaml": mappings.encode(),
        "bomb_merges.yaml": merges.encode(),
        "bomb_itself.yaml": b"SEED: &a [*a]\n",
        "deep_lists.yaml": b"SEED: " + b"[" * 100_000,
        "deep_mappings.yaml": b"SEED: " + b"{a: " * 100_000,
        "deep_lines.yaml": b"".join(b" " * i + b"a:\n" for i in range(2000)),
        "not_utf8.yaml": b"OUTPUT_DIR: \xff\xfe\n",
        "null.yaml": b"OUTPUT_DIR: \0\n",
        "empty.yaml": b"",
        "list.yaml": b"- 1\n",
        "word.yaml": b"word\n",
        "base_itself.yaml": b"_BASE_: base_itself.yaml\n",
        "base_in_a_circle.yaml": b"_BASE_: base_in_a_circle_2.yaml\n",
        "base_in_a_circle_2.yaml": b"_BASE_: base_in_a_circle.yaml\n",
        "base_number.yaml": b"_BASE_: 3\n",
        "base_mapping.yaml": b"_BASE_: {a: 1}\n",
        "base_none.yaml": b"_BASE_:\n",
        "base_folder.yaml": b"_BASE_: .\n",
        "base_missing.yaml": b"_BASE_: missing.yaml\n",
        "base_pipe.yaml": b"_BASE_: pipe.yaml\n",
        "version.yaml": b"VERSION: 99\n",
        "version_word.yaml": b"VERSION: x\n",
        "version_old.yaml": b"VERSION: 0\n",
        "node_for_value.yaml": b"SEED: {a: 1}\n",
        "value_for_node.yaml": b"MODEL: 1\n",
        "numbers_as_keys.yaml": b"1: 2\n",
    }.items()
    good = [
        (ROOT / "configs" / f"{x}.yaml").read_bytes() for x in ("methods/bags", "lvis_baseline_R50")
    ]
    for i in range(count):
        yield f"mutated_{i}.yaml", mutated(rng, rng.choice(good))


# --- the tests ---------------------------------------------------------------------------------


def outcomes(folder, timeout=120):
    """What came of each file; one that ended the process is marked so, and reading goes on."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("BAGS_D2_TRUST_CHECKPOINTS", None)
    ended = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    lines = dict(map(json.loads, ended.stdout.splitlines()))
    crashed = [name for name, what in lines.items() if what == "begun"]
    assert ended.returncode == 0, f"{crashed}: {ended.stderr[-2000:]}"
    assert lines.pop("memory") < MEMORY
    return lines


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "files").mkdir()
    return tmp_path / "files"


def write(folder, files):
    for file, content in files:
        (folder / file).write_bytes(content)


def verdicts(folder):
    found = outcomes(folder)
    assert len(found) == len(list(folder.iterdir()))
    other = {name: what for name, what in found.items() if what not in ("read", "refused")}
    assert not other
    assert not (folder.parent / MARKER).exists()
    return found


def test_checkpoints(folder):
    write(folder, checkpoints(folder, 120))
    found = verdicts(folder)
    assert found["tensor_good.pth"] == "read"
    harmless = {"attack_nested_list"}  # deep, but data: it is no weight
    for file, what in found.items():
        if file.startswith(("attack_", "tensor_")) and Path(file).stem not in {
            *harmless,
            "tensor_good",
        }:
            assert what == "refused", file
    # Flipped bits of weights in a pickle without checksums are read; most damage is not.
    kinds = collections.Counter((Path(f).suffix, what) for f, what in found.items())
    assert kinds[".pkl", "read"] > 5
    assert kinds[".pkl", "refused"] > 100


def test_configs(folder):
    write(folder, configs(folder, 150))
    os.mkfifo(folder / "pipe.yaml")
    found = verdicts(folder)
    for file, what in found.items():
        if not file.startswith(("mutated_", "version_old")):
            assert what == "refused", file
    assert "read" in found.values()


@pytest.mark.parametrize("legacy", [False, True])
def test_every_flipped_bit_of_the_weights_of_an_archive_is_refused(tmp_path, legacy):
    content = {"model": {"w": torch.arange(6.0)}}
    path = tmp_path / "x.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    assert torch.equal(read_model_weights(path)["w"], content["model"]["w"])
    start = whole.index(content["model"]["w"].numpy().tobytes())
    for position in range(start * 8, (start + 24) * 8):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        if legacy:  # has no checksums
            read_model_weights(path)
            continue
        with pytest.raises(BagsError, match="CRC"):
            read_model_weights(path)


if __name__ == "__main__":
    read_all(sys.argv[1])
