"""Files of torch.save, honest, broken and malicious: read, or refused, and nothing executed."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convnext_yolo.model.errors import WeightsError
from convnext_yolo.model.unpickle import Inert, StoredTensor, TorchArchive


def archive(path: Path, program: bytes, **members: bytes) -> Path:
    """A zip as torch writes it, with a pickle of our own making."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", program)
        for name, content in members.items():
            file.writestr(f"archive/{name}", content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        TorchArchive(path)
    sentence = str(caught.value)
    assert sentence.startswith(f"weights {path}: ") and "\n" not in sentence
    return sentence


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_tensors_and_plain_values_come_back(tmp_path: Path, protocol: int) -> None:
    base = torch.arange(24.0)
    saved = {
        "view": base.view(4, 6)[1:, ::2].t(),
        "half": base.half(),
        "long": torch.tensor(7),
        "bf16": base.bfloat16()[3:5],
        "bool": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(base.double()),
        "plain": [1, 2.5, "ü", None, (True, {"a": 3})],
        "ordered": OrderedDict(b=1, a=2),
        "size": torch.Size((2, 3)),
    }
    torch.save(saved, tmp_path / "w.pt", pickle_protocol=protocol)
    read = TorchArchive(tmp_path / "w.pt")
    for name, value in saved.items():
        if isinstance(value, torch.Tensor):
            assert isinstance(read.root[name], StoredTensor)
            tensor = read.tensor(read.root[name])
            assert tensor.dtype == value.dtype and torch.equal(tensor, value.detach()), name
        elif name != "size":
            assert read.root[name] == value
    assert read.root["size"] == (2, 3)
    assert list(read.root["ordered"]) == ["b", "a"]


def test_objects_become_stand_ins_that_keep_their_attributes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("models.yolo")

    class Model:
        def __setstate__(self, state: Any) -> None:
            raise AssertionError("the real class is not to be touched")

    Model.__module__, Model.__qualname__ = "models.yolo", "Model"
    module.Model = Model  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "models", types.ModuleType("models"))
        patch.setitem(sys.modules, "models.yolo", module)
        model = Model()
        model.names, model.part = ["a", "b"], Model()  # type: ignore[attr-defined]
        rest = {
            "path": Path("runs/exp"),
            "options": argparse.Namespace(lr=0.1),
            "best": np.float64(0.5),
            "array": np.arange(3),
            "set": {1, 2},
            "device": torch.device("cpu"),
            "dtype": torch.float16,
        }
        torch.save({"model": model, **rest}, tmp_path / "w.pt")
    read = TorchArchive(tmp_path / "w.pt").root
    assert read.keys() == {"model", *rest}
    assert isinstance(read["model"], Inert)
    assert read["model"].state["names"] == ["a", "b"]
    assert isinstance(read["model"].state["part"], Inert)
    assert read["options"].state == {"lr": 0.1}
    assert "models.yolo" not in sys.modules


class _Calls:
    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _write(path: str) -> None:
    Path(path).write_text("executed")


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("nested", [False, True])
def test_nothing_is_executed(tmp_path: Path, protocol: int, nested: bool) -> None:
    mark = tmp_path / "executed"
    code = f"open({str(mark)!r}, 'w').close()"
    attacks = (
        _Calls(os.system, f"touch {mark}"),
        _Calls(eval, code),
        _Calls(exec, code),
        _Calls(_write, str(mark)),
        _Calls(os.mkdir, str(mark)),
        _Calls(torch.load, str(tmp_path / "other.pt")),
        _Calls(__import__, "antigravity"),
    )
    for attack in attacks:
        value = {"model": {"deep": [attack]}} if nested else attack
        path = archive(tmp_path / "evil.pt", pickle.dumps(value, protocol))
        read = TorchArchive(path).root  # a stand-in, which nobody looks at
        assert isinstance(read["model"]["deep"][0] if nested else read, Inert)
        assert not mark.exists() and "antigravity" not in sys.modules
    # the test would see it: the same pickle in ordinary hands
    pickle.loads(pickle.dumps(attacks[3]))
    assert mark.exists()


def test_no_module_is_imported(tmp_path: Path) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit")
    sys.path.insert(0, str(tmp_path))
    try:
        read = TorchArchive(archive(tmp_path / "w.pt", b"cevil_module\nThing\n)R.")).root
    finally:
        sys.path.remove(str(tmp_path))
    assert isinstance(read, Inert) and type(read).__name__ == "Thing"
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize(
    "program",
    [
        # os.system put into our own functions, by BUILD with attributes for slots
        b"ctorch._utils\n_rebuild_tensor_v2\n(N}(X\x08\x00\x00\x00__call__cos\nsystem\nutb.",
        b"ccollections\nOrderedDict\n(N}(X\x08\x00\x00\x00__init__cos\nsystem\nutb.",
        b"ctorch\nFloatStorage\n}X\x01\x00\x00\x00aNsb.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(X\x01\x00\x00\x00aK\x00))tR.",  # no storage
        b"(X\x01\x00\x00\x00atQ.",  # a storage of one word
        b"\x82\x01.",  # an extension of copyreg
        b"Nr\x00\x00\x00\x7f.",  # a memo of 16 GiB
        b"Np2000000000\n.",
        b"cos\nsystem\n)R)R.",  # calls what was returned
        b"",
        b"K\x01",
        b"\x80\x63.",
        b"garbage",
        b"]" + b"K\x01a" * 5,
    ],
)
def test_spoilt_pickles_are_refused(tmp_path: Path, program: bytes) -> None:
    assert "data.pkl can't be read" in refusal(archive(tmp_path / "w.pt", program))


def stored(storage: bytes, count: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """The pickle of one tensor, of any numbers."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if isinstance(value, Storage):
                return "storage", torch.FloatStorage, storage.decode(), "cpu", count
            return None

    held = io.BytesIO()
    call = _Calls(torch._utils._rebuild_tensor_v2, Storage(), 0, shape, stride, False, None)
    Pickler(held, 2).dump(call)
    return held.getvalue()


@pytest.mark.parametrize(
    ("count", "shape", "stride"),
    [
        (4, (5,), (1,)),
        (4, (2, 2), (3, 1)),
        (4, (2**40,), (0,)),
        (4, (2,), (1, 1)),
        (4, (-1,), (1,)),
        (4, (2,), (-1,)),
        (4, (0, 2**60), (1, 1)),
        (-1, (1,), (1,)),
    ],
)
def test_tensors_stay_inside_their_storage(
    tmp_path: Path, count: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    program = stored(b"0", count, shape, stride)
    assert "can't be read (it has a" in refusal(archive(tmp_path / "w.pt", program))


def test_storages_must_be_there_whole_and_as_they_are(tmp_path: Path) -> None:
    program = stored(b"0", 4, (2, 2), (2, 1))
    numbers = struct.pack("<4f", 1, 2, 3, 4)
    good = TorchArchive(archive(tmp_path / "w.pt", program, **{"data/0": numbers}))
    assert good.tensor(good.root).tolist() == [[1, 2], [3, 4]]

    for members, part in (
        ({}, "data/0 can't be read"),
        ({"data/0": numbers[:-1]}, "data/0 is cut off"),
        ({"data/0": numbers, "byteorder": b"big"}, "byte order is b'big'"),
    ):
        path = archive(tmp_path / "w.pt", program, **members)
        with pytest.raises(WeightsError, match=part):
            read = TorchArchive(path)
            read.tensor(read.root)
    empty = TorchArchive(archive(tmp_path / "w.pt", stored(b"0", 4, (0,), (1,))))
    with pytest.raises(WeightsError, match="without elements"):
        empty.tensor(empty.root)
    outside = TorchArchive(archive(tmp_path / "w.pt", stored(b"../../etc/passwd", 1, (1,), (1,))))
    with pytest.raises(WeightsError, match="can't be read"):
        outside.tensor(outside.root)


def test_files_that_are_no_archives(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    assert "no such file" in refusal(path)
    assert "directory" in refusal(tmp_path)
    for content in (b"", b"PK", b"\x80\x02}.", os.urandom(1000)):
        path.write_bytes(content)
        assert "not a whole zip" in refusal(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "x")
    assert "without torch's data.pkl" in refusal(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 10_000 + b"N.")
    assert "compressed" in refusal(path)


def test_a_truncated_or_flipped_file_is_refused_or_read_right(tmp_path: Path) -> None:
    tensor = torch.arange(1000.0)
    torch.save({"model": tensor}, tmp_path / "w.pt")
    content = (tmp_path / "w.pt").read_bytes()
    rng = np.random.default_rng(0)
    spoilt = [content[:n] for n in rng.integers(0, len(content), 40)]
    for at in rng.integers(0, len(content), 150):
        changed = bytearray(content)
        changed[at] ^= 0xFF
        spoilt.append(bytes(changed))
    refused = 0
    for part in spoilt:
        (tmp_path / "w.pt").write_bytes(part)
        try:
            read = TorchArchive(tmp_path / "w.pt")
            assert torch.equal(read.tensor(read.root["model"]), tensor)
        except WeightsError:
            refused += 1
    assert refused > 150
