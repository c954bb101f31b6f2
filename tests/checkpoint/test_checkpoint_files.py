"""Checkpoint files are data: every form is read, and none runs code."""

import collections
import os
import pickle

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from bags_d2 import ConfigError, DataError, MissingFileError
from bags_d2.checkpoint.files import (
    TRUST_VARIABLE,
    read_checkpoint,
    read_model_weights,
    read_torch,
)
from bags_d2.engine import LongTailCheckpointer


class _Malicious:
    """Pickles to a call of ``os.mkdir`` on a path that the test then looks for."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def _arrays():
    rng = np.random.default_rng(0)
    return collections.OrderedDict(
        a=rng.normal(size=(3, 4)).astype(np.float32),
        b=np.asfortranarray(rng.normal(size=(2, 3))),
        c=np.arange(5),
        d=np.float32(2.5),
        e=np.array([], dtype=np.float16),
    )


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_zoo_pickles_of_every_protocol_are_read_as_pickle_reads_them(tmp_path, protocol):
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": _arrays(), "__author__": "zoo"}, protocol))
    content = read_checkpoint(path)
    assert content["__author__"] == "zoo"
    for name, expected in _arrays().items():
        assert content["model"][name].dtype == expected.dtype
        assert np.array_equal(content["model"][name], expected)
    weights = read_model_weights(path)
    assert torch.equal(weights["a"], torch.from_numpy(_arrays()["a"]))
    assert weights["d"] == 2.5


def test_numpy_1_names_of_modules_are_known(tmp_path):
    path = tmp_path / "old.pkl"
    # Protocol 0 writes names as text, so another numpy's can be put in.
    data = pickle.dumps({"model": _arrays(), "__author__": "zoo"}, 0)
    path.write_bytes(data.replace(b"numpy._core.", b"numpy.core."))
    assert np.array_equal(read_checkpoint(path)["model"]["a"], _arrays()["a"])


def test_other_pickles_are_caffe2s(tmp_path):
    path = tmp_path / "R-50.pkl"
    for content in ({"w": np.ones(2), "w_momentum": np.ones(2)}, {"blobs": {"w": np.ones(2)}}):
        path.write_bytes(pickle.dumps(content))
        checkpoint = read_checkpoint(path)
        assert list(checkpoint["model"]) == ["w"]
        assert checkpoint["matching_heuristics"] is True
        assert checkpoint["__author__"] == "Caffe2"


@pytest.mark.parametrize("name", ["x.pkl", "x.pth", "x.pyth", "x.bin"])
@pytest.mark.parametrize("depth", ["top", "model", "object array"])
def test_a_malicious_file_is_refused_before_it_runs(tmp_path, name, depth, monkeypatch):
    monkeypatch.delenv(TRUST_VARIABLE, raising=False)
    harm, path = tmp_path / "harm", tmp_path / name
    content = _Malicious(harm)
    if depth == "model":
        content = {"model": {"w": content}, "__author__": "zoo"}
    elif depth == "object array":
        content = {"model": {"w": np.array([content], dtype=object)}, "__author__": "zoo"}
    if name == "x.pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    for read in (
        read_checkpoint,
        read_model_weights,
        LongTailCheckpointer(nn.Linear(1, 1)).load,
    ):
        with pytest.raises(DataError, match=rf"can run any code.*{TRUST_VARIABLE}=1") as info:
            read(str(path))
        assert str(path) in str(info.value)
        assert "\n" not in str(info.value)
    assert not harm.exists()


@pytest.mark.parametrize("name", ["x.pkl", "x.pth"])
def test_who_trusts_a_file_may_say_so(tmp_path, name, monkeypatch):
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    path = tmp_path / name
    content = {
        "model": {"w": torch.ones(1)},
        "__author__": "me",
        "extra": _Malicious(tmp_path / "y"),
    }
    if name == "x.pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    assert read_model_weights(path)["w"] == 1
    assert (tmp_path / "y").is_dir()


def test_bare_state_dicts_and_pycls_files_are_read(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "bare.pth")
    assert list(read_model_weights(tmp_path / "bare.pth")) == ["w"]
    state = {"w": torch.ones(2), "bn.num_batches_tracked": torch.tensor(3)}
    torch.save({"model_state": state}, tmp_path / "pycls.pyth")
    checkpoint = read_checkpoint(tmp_path / "pycls.pyth")
    assert list(checkpoint["model"]) == ["w"]
    assert checkpoint["matching_heuristics"] is True


@pytest.mark.parametrize("name", ["x.pkl", "x.pth"])
@pytest.mark.parametrize("kind", ["empty", "half", "text", "noise"])
def test_damaged_files_are_one_sentence(tmp_path, name, kind):
    path = tmp_path / name
    content = {"model": {"w": torch.ones(100)}}
    if name == "x.pkl":
        path.write_bytes(pickle.dumps({"model": _arrays(), "__author__": "zoo"}))
    else:
        torch.save(content, path)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "half": whole[: len(whole) // 2],
            "text": b"<html>404</html>",
            "noise": np.random.default_rng(1).bytes(500),
        }[kind]
    )
    with pytest.raises(DataError, match=rf"{name}' is truncated or not a checkpoint") as info:
        read_checkpoint(path)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("content", [{}, [1, 2], torch.ones(3)])
def test_what_holds_no_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(DataError, match="holds no dictionary of weights"):
        read_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("model", [3, {"w": "text"}, [torch.ones(1)]])
def test_weights_must_be_tensors(tmp_path, model):
    torch.save({"model": model}, tmp_path / "x.pth")
    with pytest.raises(DataError, match="must map names to tensors"):
        read_model_weights(tmp_path / "x.pth")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"none\.pth' does not exist"):
        read_checkpoint(tmp_path / "none.pth")


@pytest.mark.parametrize("name", ["x.pkl", "x.pth", "x.pyth"])
def test_loading_ends_as_with_detectron2s_checkpointer(tmp_path, name):
    path = tmp_path / name
    weights = nn.Linear(3, 2).state_dict()
    if name == "x.pkl":
        arrays = {k: v.numpy() for k, v in weights.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "zoo"}))
    else:
        torch.save({"model_state" if name == "x.pyth" else "model": weights}, path)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    LongTailCheckpointer(ours).load(str(path))
    DetectionCheckpointer(theirs).load(str(path))
    for key, value in weights.items():
        assert torch.equal(ours.state_dict()[key], value)
        assert torch.equal(theirs.state_dict()[key], value)


def _assert_same(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
        assert ours.requires_grad == theirs.requires_grad
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        assert getattr(ours, "_metadata", None) == getattr(theirs, "_metadata", None)
        for key in ours:
            _assert_same(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs, strict=True):
            _assert_same(*pair)
    else:
        assert ours == theirs


@pytest.mark.parametrize("legacy", [False, True])
def test_torchs_files_are_read_as_torch_reads_them(tmp_path, legacy):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    base = torch.randn(4, 5)
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "views": [base.T, base[1:, 2:], torch.ones(1).expand(1000)],
        "parameter": nn.Parameter(torch.ones(2)),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.0),
        "kinds": [torch.ones(3).to(dtype) for dtype in _KINDS],
        "torch's": (torch.Size([1, 2]), torch.float32, torch.device("cpu")),
        "counter": collections.Counter([1, 1, 2]),
        "plain": (None, True, False, -3, 2**40, 10**30, 2.5, "ü", b"abc", [], {}, ()),
    }
    path = tmp_path / "x.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    ours = read_torch(path)
    _assert_same(ours, torch.load(path, weights_only=True))
    first, second = (view.untyped_storage().data_ptr() for view in ours["views"][:2])
    assert first == second, "what shares its memory goes on to"


_KINDS = [
    *(torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
]


@pytest.mark.parametrize("kind", ["b1", "i1", "u2", "<i4", ">i4", "u8", "f2", ">f8", "c8", "c16"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_numeric_arrays_of_every_kind_are_read(tmp_path, kind, protocol):
    array = np.arange(6).reshape(2, 3).astype(kind)
    content = {"model": {"a": array, "again": array}, "__author__": "x"}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol))
    found = read_checkpoint(tmp_path / "x.pkl")["model"]
    expected = pickle.loads(pickle.dumps(array, protocol))
    assert found["a"].dtype == expected.dtype  # where numpy swaps the bytes, so do we
    assert np.array_equal(found["a"], array)
    assert found["a"] is found["again"]


def test_pickles_of_python_2_are_read(tmp_path):
    dtype = b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR"
    dtype += b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    array += b"(K\x01K\x02\x85" + dtype + b"\x89U\x08\x00\x00\x80?\x00\x00\x00\xc0tb"
    (tmp_path / "R-50.pkl").write_bytes(b"\x80\x02}U\x01w" + array + b"s.")
    found = read_checkpoint(tmp_path / "R-50.pkl")["model"]["w"]
    assert found.tolist() == [1.0, -2.0]
    found += 1  # owns its memory


@pytest.mark.parametrize(
    ("value", "trusted"),
    [(v, True) for v in ("1", "true", "YES", " On ")]
    + [(v, False) for v in ("", "0", "False", "no", "off")],
)
def test_words_for_trust(tmp_path, monkeypatch, value, trusted):
    monkeypatch.setenv(TRUST_VARIABLE, value)
    path = tmp_path / "x.pkl"
    content = {"model": {"w": np.ones(1)}, "__author__": "x", "y": _Malicious(tmp_path / "y")}
    path.write_bytes(pickle.dumps(content))
    if trusted:
        read_checkpoint(path)
    else:
        with pytest.raises(DataError, match="can run any code"):
            read_checkpoint(path)
    assert (tmp_path / "y").is_dir() == trusted


@pytest.mark.parametrize("value", ["n", "00", "2", "trust me"])
def test_another_word_for_trust_is_an_error(tmp_path, monkeypatch, value):
    monkeypatch.setenv(TRUST_VARIABLE, value)
    torch.save({"w": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(ConfigError, match=f"{TRUST_VARIABLE} is '{value}'; set it to 1"):
        read_checkpoint(tmp_path / "x.pth")


def test_trusted_archives_have_their_checksums_looked_at(tmp_path, monkeypatch):
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    torch.save({"w": torch.full((4,), 7.0)}, tmp_path / "x.pth")
    whole = (tmp_path / "x.pth").read_bytes()
    weights = torch.full((4,), 7.0).numpy().tobytes()
    (tmp_path / "x.pth").write_bytes(whole.replace(weights, b"\1" + weights[1:]))
    with pytest.raises(DataError, match="CRC"):
        read_checkpoint(tmp_path / "x.pth")
