"""Reads what `torch.save` wrote, a zip with a pickle in it, and executes nothing.

A pickle is a program: it names functions and calls them. Here every name that it gives becomes an
inert stand-in, whatever it is: no module is imported, nothing is looked up. A stand-in can be
called, and keeps what it is given. Only the few names by which torch rebuilds a tensor have a
meaning, and that is ours: a record of where the tensor lies in the zip, read on demand.
"""

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import WeightsError

DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}


class Inert:
    """Stands for an object of any class: it keeps the state that the pickle gives, and no more."""

    state: dict[Any, Any]

    def __new__(cls, *arguments: Any, **named: Any) -> "Inert":
        """Takes any arguments: pickle makes objects by calling the class, or by this alone."""
        self = super().__new__(cls)
        self.state = {}
        return self

    def __setstate__(self, state: Any) -> None:
        """What pickle calls with the attributes of an object."""
        if isinstance(state, tuple):  # attributes, and those in slots
            state = state[0] if state else None
        self.state = state if isinstance(state, dict) else {}

    def __setitem__(self, key: Any, value: Any) -> None:
        """What pickle calls for the items of a kind of dict; they are of no use here."""

    def append(self, item: Any) -> None:
        """What pickle calls for the items of a kind of list; they are of no use here."""

    def extend(self, items: Any) -> None:
        """As `append`."""


class _Fixed:
    """Something of ours that a pickle may hold, and may not change."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a tensor or one of torch's functions")


@dataclass(frozen=True)
class _Storage(_Fixed):
    """One file in the zip. `count` elements."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class StoredTensor(_Fixed):
    """Where a tensor lies: a view of a storage, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _RebuildTensor(_Fixed):
    def __call__(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
        numbers = (offset, *shape, *stride)
        if not isinstance(storage, _Storage) or len(shape) != len(stride):
            raise pickle.UnpicklingError("it has a tensor without a storage")
        if not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
            raise pickle.UnpicklingError("it has a tensor of an impossible shape")
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        size = math.prod(shape)
        if size > storage.count or (size and last >= storage.count):
            raise pickle.UnpicklingError("it has a tensor that is larger than its storage")
        return StoredTensor(storage, offset, tuple(shape), tuple(stride))


class _RebuildParameter(_Fixed):
    def __call__(self, data: Any, *_: Any) -> Any:
        return data


class _Unpickler(pickle.Unpickler):
    """Knows no names but these."""

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content))
        self.stand_ins: dict[tuple[str, str], type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the pickle means."""
        if module in ("torch", "torch.storage") and name in DTYPES:
            return DTYPES[name]
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
            ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
            ("torch._utils", "_rebuild_parameter_with_state"): _RebuildParameter(),
        }
        if (module, name) in known:
            return known[module, name]
        # A class of its own for each name, and for each file: a pickle may spoil it.
        return self.stand_ins.setdefault((module, name), type(name, (Inert,), {}))

    def persistent_load(self, pid: Any) -> _Storage:
        """How torch refers to a file in the zip."""
        kind, dtype, key, _, count = pid
        known = kind == "storage" and isinstance(dtype, torch.dtype) and isinstance(key, str)
        if not known or type(count) is not int or count < 0:
            raise pickle.UnpicklingError("it has a storage of an unknown kind")
        return _Storage(key, dtype, count)


class TorchArchive:
    """A file of `torch.save`, read into memory.

    Attributes:
        root: what was saved, of plain containers, numbers, strings, `StoredTensor` and `Inert`.

    Raises:
        WeightsError: no such file, not such a zip, or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
        except FileNotFoundError as error:
            raise WeightsError(f"weights {path}: no such file; give one of YOLOv5's") from error
        except OSError as error:
            raise WeightsError(f"weights {path}: {error.strerror}; make it readable") from error
        except Exception as error:  # a zip can be damaged in any way
            raise self._damaged("it is not a whole zip, as torch has written since 1.6") from error
        names = [n for n in self._zip.namelist() if n.endswith("/data.pkl") and n.count("/") == 1]
        if len(names) != 1:
            raise self._damaged("it is a zip without torch's data.pkl")
        self._folder = names[0].removesuffix("data.pkl")
        if self._folder + "byteorder" in self._zip.namelist():
            order = self._member("byteorder")
            if order != b"little":
                raise self._damaged(f"its byte order is {order[:10]!r}, not 'little'")
        content = self._member("data.pkl")
        try:
            _refuse_traps(content)
            self.root = _Unpickler(content).load()
        except Exception as error:  # a spoilt pickle fails in any way it likes
            raise self._damaged(f"its data.pkl can't be read ({error})") from error

    def tensor(self, stored: StoredTensor) -> Tensor:
        """The tensor of a record, in memory of its own."""
        storage = stored.storage
        if math.prod(stored.shape) == 0:
            raise self._damaged("it has a tensor without elements")
        content = bytearray(self._member(f"data/{storage.key}"))
        if len(content) < storage.count * storage.dtype.itemsize:
            raise self._damaged(f"data/{storage.key} is cut off")
        flat = torch.frombuffer(content, dtype=storage.dtype, count=storage.count)
        return flat.as_strided(stored.shape, stored.stride, stored.offset).clone()

    def _member(self, name: str) -> bytes:
        """The bytes of a file in the zip."""
        try:
            member = self._zip.getinfo(self._folder + name)
            # Stored as it is, a file can't be larger than the zip: torch never compresses.
            if member.compress_type != zipfile.ZIP_STORED:
                raise self._damaged(f"{name} is compressed, and torch compresses nothing")
            return self._zip.read(member)
        except WeightsError:
            raise
        except Exception as error:
            raise self._damaged(f"{name} can't be read ({error})") from error

    def _damaged(self, what: str) -> WeightsError:
        return WeightsError(
            f"weights {self.path}: {what}; give a .pt file as YOLOv5 writes it, or fetch it again"
        )


def _refuse_traps(content: bytes) -> None:
    """Refuses what a pickle of torch never has, and what costs memory before it is looked at."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name.startswith("EXT"):
            raise pickle.UnpicklingError("it refers to copyreg's extensions")
        # The memo is an array up to the largest number in use.
        if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(content):
            raise pickle.UnpicklingError("it numbers its objects beyond their number")
