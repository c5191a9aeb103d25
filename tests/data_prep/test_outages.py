"""Which failures of a host end a reading at once, and which are waited for."""

from __future__ import annotations

import errno
import random
import socket
import ssl
import sys
from pathlib import Path

import numpy as np
import pytest

from convnext_yolo.data_prep import remote as remote_module
from convnext_yolo.data_prep.errors import DataError
from convnext_yolo.data_prep.reader import ShardReader
from convnext_yolo.data_prep.remote import RemoteFolder
from convnext_yolo.data_prep.source import RemoteShards, load_manifest

from .fake_host import PATIENCE_S, URL, Host, HTTPError, Time, far_shards


@pytest.fixture
def host(noise_shards: Path) -> Host:
    return Host(noise_shards)


@pytest.fixture
def shards(host: Host, noise_shards: Path, tmp_path: Path) -> RemoteShards:
    return far_shards(host, noise_shards, tmp_path, Time())


OUTAGES = [
    ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
    OSError(errno.EHOSTUNREACH, "no route to host"),
    TimeoutError(),
    HTTPError(500),
    HTTPError(503),
    HTTPError(429),
    socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
]


@pytest.mark.parametrize("error", OUTAGES, ids=repr)
def test_a_host_that_is_away_is_waited_for(host, noise_shards, tmp_path, error, capsys):
    at = Time()
    shards = far_shards(host, noise_shards, tmp_path, at)
    host.faults = [error] * 5
    states = random.getstate(), np.random.get_state()[1].tolist()
    file, _ = shards.open_at(0, 0)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    assert (
        file.read()
        == (noise_shards / shards.entries[0].name).read_bytes()[slice(*shards.entries[0].chunk(0))]
    )
    assert len(at.pauses_s) == 5
    assert all(0.125 * 2**n <= pause <= 0.25 * 2**n for n, pause in enumerate(at.pauses_s))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2, lines
    assert lines[0].startswith("waiting for data.example:8443 up to 60 s (")
    assert lines[1] == "data.example:8443 answers again"


def test_pauses_are_the_same_each_time_and_spread_over_chunks(host, noise_shards, tmp_path):
    pauses = []
    for number, shard in enumerate((0, 0, 1)):
        at = Time()
        host.faults = [HTTPError(503)] * 6
        far_shards(host, noise_shards, tmp_path / str(number), at).open_at(shard, 0)
        pauses.append(at.pauses_s)
    assert pauses[0] == pauses[1]
    assert all(a != b for a, b in zip(pauses[0], pauses[2], strict=True))


def test_a_hiccup_is_not_told(shards, host, capsys):
    host.faults = [HTTPError(503)] * 2
    shards.open_at(0, 0)
    assert capsys.readouterr() == ("", "")


def test_each_outage_is_told_once(shards, host, capsys):
    for shard in range(3):
        host.faults = [HTTPError(503)] * 8
        shards.open_at(shard, 0)
    assert capsys.readouterr().err.count("waiting for") == 3


def test_patience_ends(host, noise_shards, tmp_path, capsys):
    at = Time()
    shards = far_shards(host, noise_shards, tmp_path, at)
    host.always = HTTPError(503)
    with pytest.raises(DataError) as error:
        shards.open_at(0, 0)
    text = str(error.value)
    assert text.startswith("data.example:8443 has not answered for 60 s (HTTPError: 503")
    assert "data.patience_s" in text
    assert len(text) < 400
    assert "secret" not in text + capsys.readouterr().err
    assert sum(at.pauses_s) == pytest.approx(PATIENCE_S)
    assert max(at.pauses_s) <= 10


def test_patience_begins_anew_with_each_outage(host, noise_shards, tmp_path):
    at = Time()
    shards = far_shards(host, noise_shards, tmp_path, at)
    for shard in range(6):
        host.faults = [HTTPError(503)] * 7
        shards.open_at(shard, 0)
    assert at.now_s > PATIENCE_S


def credentials_error() -> Exception:
    return type("NoCredentialsError", (Exception,), {"__module__": "botocore.exceptions"})("none")


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (FileNotFoundError("x"), ("has no such file", "upload it again")),
        (HTTPError(410), ("has no such file",)),
        (PermissionError("AccessDenied"), ("denies access", "readable")),
        (HTTPError(403), ("denies access",)),
        (HTTPError(401), ("denies access", "user:password@")),
        (credentials_error(), ("denies access",)),
        (HTTPError(400), ("can't be read",)),
        (OSError(errno.EINVAL, "The specified bucket is not valid"), ("can't be read",)),
        (ValueError("bad URL"), ("can't be read",)),
        (
            type("ClientConnectorCertificateError", (OSError,), {})(ssl.SSLError("self-signed")),
            ("can't be read", "self-signed"),
        ),
    ],
    ids=str,
)
def test_what_waiting_does_not_change_ends_at_once(host, noise_shards, tmp_path, error, parts):
    at = Time()
    shards = far_shards(host, noise_shards, tmp_path, at)
    host.always = error
    with pytest.raises(DataError) as raised:
        shards.open_at(1, 0)
    text = str(raised.value)
    assert text.startswith("https://data.example:8443/sets/noise/shard-000001.tar: ")
    assert "\n" not in text and "secret" not in text
    for part in parts:
        assert part in text
    assert (at.pauses_s, len(host.asked)) == ([], 1)


def test_our_own_mistakes_are_not_hidden(shards, host):
    host.always = TypeError("ours")
    with pytest.raises(TypeError, match="ours"):
        shards.open_at(0, 0)


def test_a_host_that_sends_whole_files_is_refused(shards, host, noise_shards):
    host.always = lambda part: (noise_shards / host.asked[-1][0]).read_bytes()
    with pytest.raises(DataError, match="range requests"):
        shards.open_at(0, 0)


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        (FileNotFoundError(), ("https://data.example:8443/sets/noise/manifest.json", "no such")),
        (PermissionError("no"), ("denies access",)),
        (socket.gaierror(socket.EAI_NONAME, "unknown"), ("host data.example:8443 is not known",)),
        (lambda content: content[:1000], ("manifest.json", "damaged")),
        (HTTPError(503), ("has not answered for 60 s",)),
    ],
)
def test_a_manifest_that_cannot_be_had(host, fault, parts):
    at = Time()
    host.always = fault
    with pytest.raises(DataError) as error:
        load_manifest(URL, 60, connect=host.connect, clock=at.clock, sleep=at.sleep)
    text = str(error.value)
    assert "secret" not in text and "\n" not in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize("url", ["ftp://host/x", "file:///x", "https:///x", "s3://", "x://"])
def test_other_schemes_are_refused(url):
    with pytest.raises(DataError, match="http://, https://, s3:// and gs:// URLs"):
        ShardReader(url)


@pytest.mark.parametrize(("scheme", "package"), list(remote_module.PACKAGES.items()))
def test_a_missing_package_is_named(scheme, package, monkeypatch):
    import fsspec  # noqa: F401

    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    registry = sys.modules["fsspec.registry"]._registry  # of what was imported before
    monkeypatch.delitem(registry, scheme, raising=False)
    with pytest.raises(DataError, match=f"`pip install {package}`"):
        load_manifest(f"{scheme}://127.0.0.1/x")


@pytest.mark.parametrize(
    ("url", "asked", "shown", "host"),
    [
        (
            "http://u:p@h:1/a/b/?q=1",
            "http://u:p@h:1/a/b/m.json?q=1",
            "http://h:1/a/b/m.json",
            "h:1",
        ),
        ("https://h", "https://h/m.json", "https://h/m.json", "h"),
        ("s3://bucket/a b/", "s3://bucket/a b/m.json", "s3://bucket/a b/m.json", "s3://bucket"),
        ("gs://bucket", "gs://bucket/m.json", "gs://bucket/m.json", "gs://bucket"),
    ],
)
def test_urls(url, asked, shown, host):
    folder = RemoteFolder(url, 1)
    assert (folder._path("m.json"), folder.shown("m.json"), folder.host) == (asked, shown, host)
