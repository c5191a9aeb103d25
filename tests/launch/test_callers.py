"""Who calls a front and is no guard of its ranks disturbs nobody."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from convnext_yolo.launch.command import Ranks
from convnext_yolo.launch.supervision.callers import Callers

TOKEN = "the job's"
HELLO = {"type": "hello", "token": TOKEN, "rank": 0, "host": "a", "pid": 1}


@pytest.fixture
def callers(tmp_path: Path) -> Iterator[Callers]:
    made = Callers(Ranks({0: "a"}, tmp_path), TOKEN)
    yield made
    made.close()


def call(callers: Callers) -> socket.socket:
    host, port = callers.address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=10)


def heard(callers: Callers, until_ranks: int) -> None:
    """Hears until so many ranks are known, or two seconds are over without one."""
    for _ in range(20):
        list(callers.hear(0.1))
        if len(callers.ranks) == until_ranks:
            return


@pytest.mark.parametrize(
    "line",
    [
        b"GET / HTTP/1.1",
        b'{"token": "x", "rank": Infinity}',
        b'{"token": "x", "rank": 0, "host": "h"}',
        b'{"token": 1e999}',
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b"\xff\xfe",
        b"[]",
        json.dumps({**HELLO, "rank": "one"}).encode(),
        json.dumps({**HELLO, "rank": float("inf")}).encode(),
        json.dumps({"token": TOKEN}).encode(),
    ],
    ids=lambda line: line[:24].decode(errors="replace"),
)
def test_a_stranger_is_hung_up_on(callers: Callers, line: bytes) -> None:
    with call(callers) as stranger:
        stranger.sendall(line + b"\n")
        for _ in range(3):  # to accept, to read, and to see that nothing more comes
            assert list(callers.hear(0.2)) == []
        with contextlib.suppress(ConnectionResetError):  # of what it said some was not read
            assert stranger.recv(1) == b""
    with call(callers) as guard:
        guard.sendall(json.dumps(HELLO).encode() + b"\n")
        heard(callers, until_ranks=1)
    assert [rank.number for rank in callers.ranks] == [0]


def test_more_callers_than_files_may_be_open_wait(callers: Callers) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with call(callers) as guard:
        guard.sendall(json.dumps(HELLO).encode() + b"\n")
        full = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
        taken = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (full, limits[1]))
            while True:  # what is free below that
                try:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
                except OSError:
                    break
            assert list(callers.hear(0.1)) == [] and not callers.ranks
        finally:
            for file in taken:
                os.close(file)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        heard(callers, until_ranks=1)
    assert [rank.number for rank in callers.ranks] == [0]
