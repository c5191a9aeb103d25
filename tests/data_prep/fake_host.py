"""A host and a clock that do what a test tells them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from convnext_yolo.data_prep.cache import CacheOptions
from convnext_yolo.data_prep.manifest import Manifest
from convnext_yolo.data_prep.source import RemoteShards

URL = "https://user:secret@data.example:8443/sets/noise/?key=secret"
PATIENCE_S = 60.0


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now_s, self.pauses_s = 0.0, list[float]()

    def clock(self) -> float:
        return self.now_s

    def sleep(self, pause_s: float) -> None:
        self.pauses_s.append(pause_s)
        self.now_s += pause_s


class Host:
    """A fsspec file system over a folder, which first does what it is told to."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.faults: list[Exception | Callable[[bytes], bytes]] = []  # one a request
        self.always: Exception | Callable[[bytes], bytes] | None = None
        self.asked: list[tuple[str, int | None, int | None]] = []

    def connect(self, scheme: str, request_s: float) -> Host:
        return self

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        name = re.sub(r"\?.*", "", path).rpartition("/")[2]
        self.asked.append((name, start, end))
        fault = self.faults.pop(0) if self.faults else self.always
        if isinstance(fault, Exception):
            raise fault
        content = (self.folder / name).read_bytes()
        return fault(content[start:end]) if fault else content[start:end]


class HTTPError(Exception):
    """As aiohttp's and gcsfs's: a status and no more."""

    def __init__(self, status: int):
        super().__init__(f"{status}, message='no', url='{URL}'")
        self.status = status


HTTPError.__module__ = "aiohttp.client_exceptions"


def far_shards(host: Host, folder: Path, tmp_path: Path, at: Time, gib: float = 1) -> RemoteShards:
    """The shards of a folder as the host has them, cached below `tmp_path`."""
    cache = CacheOptions(str(tmp_path / "cache"), gib, PATIENCE_S)
    options = {"connect": host.connect, "clock": at.clock, "sleep": at.sleep}
    return RemoteShards(URL, Manifest.load(folder), cache, **options)
