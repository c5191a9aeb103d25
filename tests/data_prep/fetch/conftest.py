"""A small COCO, a mirror for it on this machine that does everything a bad line or server does."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import random
import re
import socket
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from convnext_yolo.data_prep import fetch
from convnext_yolo.data_prep.errors import DataError
from convnext_yolo.data_prep.fetch import COCO_2017, Archive, fetch_coco
from convnext_yolo.launch.cli import main

# --- a small COCO --------------------------------------------------------------------------------


def _zipped(files: dict[str, bytes]) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in files.items():
            bundle.writestr(zipfile.ZipInfo(name), content)
    return memory.getvalue()


@pytest.fixture
def zipped() -> Callable[[dict[str, bytes]], bytes]:
    """Makes a zip archive of files by their names in it."""
    return _zipped


@pytest.fixture(scope="session")
def contents(datasets: Path) -> dict[str, dict[str, bytes]]:
    """What is in the zips. Those of val are real, so that they can be sharded; train is noise."""
    mini = datasets / "coco_mini"
    names = [
        i["file_name"] for i in json.loads((mini / "instances_val.json").read_text())["images"]
    ]
    instances = (mini / "instances_val.json").read_bytes()
    return {
        "annotations/annotations_trainval2017.zip": {
            "annotations/captions_val2017.json": b"{}",
            "annotations/instances_train2017.json": instances + b"\n",
            "annotations/instances_val2017.json": instances,
        },
        "zips/val2017.zip": {
            "val2017/": b"",
            **{f"val2017/{name}": (mini / "images" / "val" / name).read_bytes() for name in names},
        },
        "zips/train2017.zip": {
            "train2017/": b"",
            **{
                f"train2017/{seed:012}.jpg": random.Random(seed).randbytes(100_000)
                for seed in range(5)
            },
        },
    }


@pytest.fixture(scope="session")
def zips(contents: dict[str, dict[str, bytes]]) -> dict[str, bytes]:
    return {path: _zipped(files) for path, files in contents.items()}


@pytest.fixture
def table(contents: dict[str, dict[str, bytes]], zips: dict[str, bytes]) -> list[Archive]:
    """The official table with the sizes and MD5s of the small zips."""
    small = []
    for official in COCO_2017:
        files = {n.rpartition("/")[2]: c for n, c in contents[official.path].items() if c}
        wanted = {n: c for n, c in files.items() if not official.members or n in official.members}
        small.append(
            replace(
                official,
                size_bytes=len(zips[official.path]),
                md5=hashlib.md5(zips[official.path]).hexdigest(),
                files=len(wanted),
                unpacked_bytes=sum(map(len, wanted.values())),
                members={n: len(c) for n, c in wanted.items()} if official.members else {},
            )
        )
    return small


# --- the server ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request; tests give it as a dictionary."""

    drop_after: int | None = None  # bytes of the body, then the connection is closed
    reset: bool = False  # closed the hard way, as by a router that lost its table
    status: int | None = None
    ignore_range: bool = False
    headers: dict[str, str] = field(default_factory=dict)


class Mirror(http.server.ThreadingHTTPServer):
    """Serves `files`; each request for a path takes the path's next fault.

    `asked` has each request's path, first byte and number of bytes that are sent.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = dict(files)
        self.faults: dict[str, list[dict[str, Any]]] = {}
        self.asked: list[tuple[str, int, int]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up, or are killed, are what is tested


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        faults = self.server.faults.get(path)
        fault = Fault(**faults.pop(0)) if faults else Fault()
        body = self.server.files.get(path)
        if body is None or fault.status:
            self.server.asked.append((path, 0, 0))
            self.send_error(fault.status or 404)
            return
        given = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(given[1]) if given and not fault.ignore_range else 0
        headers = {"Content-Length": str(len(body) - start)}
        if given and not fault.ignore_range:
            if start >= len(body):
                self.server.asked.append((path, start, 0))
                self.send_error(416)
                return
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        sent = body[start:][: fault.drop_after]
        self.server.asked.append((path, start, len(sent)))
        self.send_response(206 if "Content-Range" in headers else 200)
        for name, value in (headers | fault.headers).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(sent)
        if fault.reset:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def mirror(zips: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    monkeypatch.setenv("no_proxy", "*")
    # os.sync() would wait for whatever else the machine is writing.
    monkeypatch.setattr(os, "sync", lambda: None)
    with Mirror(zips) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@dataclass
class Fetcher:
    """Calls `fetch_coco` with the mirror and the small table, and notes the waits."""

    output: Path
    mirror: Mirror
    table: list[Archive]
    waits_s: list[float] = field(default_factory=list)

    def __call__(self, **options: Any) -> None:
        given = {"mirror": self.mirror.url, "table": self.table, "progress": False}
        fetch_coco(self.output, **(given | {"sleep": self.waits_s.append} | options))

    def fails(self, **options: Any) -> str:
        with pytest.raises(DataError) as caught:
            self(**options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def tree(self, folder: Path | None = None) -> dict[str, bytes]:
        """All files of the output, or of another folder."""
        folder = folder or self.output
        files = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def run(tmp_path: Path, mirror: Mirror, table: list[Archive]) -> Fetcher:
    return Fetcher(tmp_path / "coco", mirror, table)


@pytest.fixture
def complete(contents: dict[str, dict[str, bytes]]) -> dict[str, bytes]:
    """What a finished output holds, and nothing else."""
    files = {name: content for zip_ in contents.values() for name, content in zip_.items()}
    return {name: c for name, c in files.items() if c and "captions" not in name}


@pytest.fixture
def command(run: Fetcher, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`convnext-yolo fetch-coco` for the mirror and the small archives."""
    monkeypatch.setattr(fetch, "COCO_2017", tuple(run.table))

    def call(*options: str) -> int:
        source = [] if "--archives" in options else ["--mirror", run.mirror.url]
        return main(["fetch-coco", "--output", str(run.output), *source, *options])

    return call
