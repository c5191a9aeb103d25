"""Shards on a real HTTP server and on a real S3 server, which are killed and started again."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convnext_yolo.data_prep.cache import CacheOptions
from convnext_yolo.data_prep.errors import DataError
from convnext_yolo.data_prep.reader import ShardReader
from convnext_yolo.data_prep.shard import shard_dataset

from .conftest import noise

pytestmark = pytest.mark.process

BATCHES = 90  # 45 steps of the epoch's 50: each lane comes to a new chunk every few of them
both = pytest.mark.parametrize("kind", ["http", "s3"])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `noise`: 400 pictures in 5 shards of 10 chunks."""
    folder = tmp_path_factory.mktemp("many")
    root = tmp_path_factory.mktemp("served")
    shard_dataset(noise(folder, 400), root / "noise", samples_per_shard=80, progress=False)
    return root


class Reading:
    """A process that prints a line for each batch, and what it has to tell on stderr."""

    def __init__(self, location: object, cache: Path, workers: int):
        script = str(Path(__file__).with_name("read_batches.py"))
        words = [sys.executable, script, str(location), str(cache), str(workers), str(BATCHES)]
        self.process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def batches(self, count: int) -> list[str]:
        assert self.process.stdout is not None
        return [self.process.stdout.readline().strip() for _ in range(count)]

    def told(self) -> str:
        """The next line on stderr."""
        assert self.process.stderr is not None
        return self.process.stderr.readline()

    def end(self) -> str:
        _, errors = self.process.communicate(timeout=100)
        assert self.process.returncode == 0, errors
        return errors


@pytest.fixture(scope="module")
def expected(served: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    reading = Reading(served / "noise", tmp_path_factory.mktemp("unused"), 0)
    batches = reading.batches(BATCHES)
    reading.end()
    assert len(set(batches)) == BATCHES
    return batches


@both
@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_as_from_disk(
    kind: str,
    workers: int,
    served: Path,
    expected: list[str],
    serve_shards: Callable[..., Any],
    tmp_path: Path,
) -> None:
    server = serve_shards(kind, served)
    reading = Reading(server.url("noise"), tmp_path / "cache", workers)
    assert reading.batches(BATCHES) == expected
    assert reading.end() == ""


@both
@pytest.mark.parametrize(
    ("workers", "away_s"),
    [(0, 0), pytest.param(2, 0), pytest.param(2, 10, marks=pytest.mark.long)],
)
def test_an_outage_is_waited_out(
    kind: str,
    workers: int,
    away_s: float,
    served: Path,
    expected: list[str],
    serve_shards: Callable[..., Any],
    tmp_path: Path,
) -> None:
    server = serve_shards(kind, served)
    reading = Reading(server.url("noise"), tmp_path / "cache", workers)
    before = reading.batches(1)
    server.kill()
    host = server.url("").rstrip("/").removeprefix("http://")
    assert reading.told().startswith(f"waiting for {host} up to 60 s (")
    time.sleep(away_s)  # this long is the outage
    server.start()
    assert before + reading.batches(BATCHES - 1) == expected
    told = reading.end()
    assert told.count("waiting for") <= max(1, workers) - 1
    assert f"{host} answers again" in told


@both
def test_what_the_servers_say_of_mistakes(
    kind: str, serve_shards: Callable[..., Any], tmp_path: Path
) -> None:
    root = tmp_path / "served"
    shard_dataset(noise(tmp_path, 20), root / "few", samples_per_shard=10, progress=False)
    shard = root / "few/shard-000001.tar"
    shard.chmod(0o644)
    shard.write_bytes(shard.read_bytes()[:100])
    (root / "few/shard-000000.tar").unlink()
    server = serve_shards(kind, root)
    with pytest.raises(
        DataError, match=r"nowhere/manifest.json: .* has no such file; give the URL"
    ):
        ShardReader(server.url("nowhere"))
    reader = ShardReader(server.url("few"), CacheOptions(str(tmp_path / "cache"), 1, 5))
    with pytest.raises(DataError, match=r"shard-000000.tar: .* has no such file; .* upload"):
        reader.decode(0)
    for position in (10, 18):  # partly, and wholly behind the end of the cut shard
        with pytest.raises(DataError, match=r"shard-000001.tar: .* not those of the manifest"):
            reader.decode(position)


def test_s3_without_access(
    served: Path, serve_shards: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = serve_shards("s3", served)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(DataError, match=r"denies access .* FSSPEC_S3_ANON=true"):
        ShardReader(server.url("noise"))


def test_a_plain_web_server_without_ranges_is_refused(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    words = [sys.executable, "-u", "-m", "http.server", "--bind", "127.0.0.1", "0"]
    server = subprocess.Popen(
        words, cwd=served, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().partition("(")[2].partition("/)")[0]
        reader = ShardReader(f"{url}/noise", CacheOptions(str(tmp_path / "cache"), 1, 5))
        with pytest.raises(DataError, match="range requests"):
            reader.decode(0)
    finally:
        server.kill()
        server.communicate()


def test_a_forked_process_has_its_own_connection(
    served: Path, serve_shards: Callable[..., Any], tmp_path: Path
) -> None:
    """The parent reads on after its children have ended with what they inherited."""
    server = serve_shards("http", served)
    reader = ShardReader(server.url("noise"), CacheOptions(str(tmp_path / "cache"), 1, 5))
    local = ShardReader(served / "noise")
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    for first in (0, 80, 160):
        assert reader.read(first) == local.read(first)
        process = context.Process(
            target=lambda position: queue.put(reader.read(position)), args=(first + 40,)
        )
        process.start()
        assert queue.get() == local.read(first + 40)
        process.join()
        assert process.exitcode == 0


@both
def test_the_command_line_ends_when_the_host_stays_away(
    kind: str, served: Path, serve_shards: Callable[..., Any], tmp_path: Path
) -> None:
    server = serve_shards(kind, served)
    server.kill()
    program = str(Path(sys.executable).with_name("convnext-yolo"))
    words = [program, "eval", "--weights", str(tmp_path / "any"), "--data", server.url("noise")]
    done = subprocess.run(
        [*words, "--patience-s", "2"], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    waiting, sentence = done.stderr.splitlines()
    host = server.url("").rstrip("/").removeprefix("http://")
    assert waiting.startswith(f"waiting for {host} up to 2 s (")
    assert sentence.startswith(f"convnext-yolo eval: error: {host} has not answered for 2 s (")
