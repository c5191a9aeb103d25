"""Downloads over bad lines, and from servers that have something else."""

from __future__ import annotations

import hashlib
import socket

import pytest

from convnext_yolo.data_prep.download import ATTEMPTS

VAL = "zips/val2017.zip"
TRAIN = "zips/train2017.zip"


# --- bad lines -----------------------------------------------------------------------------------


def test_a_dropped_connection_is_gone_on_with(run, mirror, zips, complete):
    whole = len(zips[TRAIN])
    mirror.faults[TRAIN] = [dict(drop_after=n) for n in (100_000, 1, 0, 300_000)]
    run()
    assert run.tree() == complete
    starts = (0, 100_000, 100_001, 100_001, 400_001)
    counts = (100_000, 1, 0, 300_000, whole - 400_001)
    assert mirror.asked[2:] == [(TRAIN, *each) for each in zip(starts, counts, strict=True)]
    # the wait doubles only while nothing new comes
    assert run.waits_s == [1, 1, 2, 1]


def test_a_reset_connection(run, mirror, complete):
    mirror.faults[TRAIN] = [dict(drop_after=100_000, reset=True)]
    mirror.faults[VAL] = [dict(drop_after=0, reset=True)]
    run()
    assert run.tree() == complete and run.waits_s == [1, 1]


def test_a_server_that_ignores_ranges_starts_again(run, mirror, zips, complete):
    mirror.faults[TRAIN] = [dict(drop_after=100_000), dict(ignore_range=True)]
    run()
    assert run.tree() == complete
    assert mirror.asked[2:] == [(TRAIN, 0, 100_000), (TRAIN, 0, len(zips[TRAIN]))]


def test_a_busy_server_is_asked_again(run, mirror, complete):
    mirror.faults[VAL] = [dict(status=503), dict(status=429), dict(status=500)]
    run()
    assert run.tree() == complete and run.waits_s == [1, 2, 4]


@pytest.mark.parametrize("ignore_range", [False, True])
def test_a_server_that_never_gets_further(run, mirror, complete, ignore_range):
    first = dict(drop_after=70_000)
    again = dict(drop_after=70_000, ignore_range=True) if ignore_range else dict(drop_after=0)
    mirror.faults[TRAIN] = [first, *[again] * 2 * ATTEMPTS]
    sentence = run.fails()
    assert f"the connection ended after 70,000 of {run.table[2].size_bytes:,} bytes" in sentence
    assert f"{ATTEMPTS} times in a row" in sentence and "run the command again" in sentence
    assert run.waits_s == [1, 2, 4, 8, 16, 32, 60] and len(run.waits_s) == ATTEMPTS - 1
    assert (run.output / "train2017.zip.partial").stat().st_size == 70_000
    mirror.faults.clear()
    run()
    assert run.tree() == complete and mirror.asked[-1][1] == 70_000


def test_a_server_that_is_down(run):
    with socket.socket() as taken:  # bound but not listening: refuses
        taken.bind(("127.0.0.1", 0))
        sentence = run.fails(mirror=f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert "Connection refused" in sentence and len(run.waits_s) == ATTEMPTS - 1


def test_a_stalled_connection_is_given_up(run, monkeypatch):
    from convnext_yolo.data_prep import download as module

    monkeypatch.setattr(module, "TIMEOUT_S", 0.05)
    silent = socket.create_server(("127.0.0.1", 0))  # the kernel accepts, nobody answers
    with silent:
        sentence = run.fails(mirror=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert "timed out" in sentence and len(run.waits_s) == ATTEMPTS - 1


# --- wrong servers -------------------------------------------------------------------------------


def test_what_is_not_there_is_not_asked_for_twice(run, mirror):
    del mirror.files[VAL]
    sentence = run.fails()
    assert sentence == (f"{mirror.url}/{VAL}: the server answers 404 Not Found; check --mirror.")
    assert not run.waits_s and (run.output / "annotations").is_dir()


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ([dict(headers={"Content-Length": "7"})], "the server's file has 7 bytes, not "),
        (
            [dict(drop_after=9), dict(headers={"Content-Range": "bytes 9-99/100"})],
            "the server's file has 100 bytes, not ",
        ),
        (
            [dict(drop_after=9), dict(headers={"Content-Range": "bytes 8-99/100"})],
            "from 9 on, the server answers with Content-Range 'bytes 8-99/100'",
        ),
        ([dict(drop_after=9), dict(status=416)], "has at most 9 bytes, not "),
    ],
)
def test_another_file_is_refused(run, mirror, faults, said):
    mirror.faults[VAL] = faults
    sentence = run.fails()
    assert said in sentence and sentence.endswith("give another --mirror.")


def test_too_long_a_body_is_refused(run, mirror, zips):
    mirror.files[VAL] = zips[VAL] + b"x"
    mirror.faults[VAL] = [dict(headers={"Content-Length": ""})]  # it doesn't say how long
    assert f"has more bytes, not {len(zips[VAL]):,}" in run.fails()


def test_damage_on_the_way_is_found(run, mirror, zips, complete):
    spoilt = bytearray(zips[TRAIN])
    spoilt[250_000] ^= 1
    mirror.files[TRAIN] = bytes(spoilt)
    sentence = run.fails()
    assert hashlib.md5(spoilt).hexdigest() in sentence and run.table[2].md5 in sentence
    assert not (run.output / "train2017.zip.partial").exists()
    assert not (run.output / "train2017").exists()
    mirror.files[TRAIN] = zips[TRAIN]
    run()
    assert run.tree() == complete


@pytest.mark.parametrize("left", ["damaged", "too long", "whole"])
def test_a_partial_file_of_an_earlier_run(run, mirror, zips, complete, left):
    content = {
        "damaged": b"x" * 1000,
        "too long": zips[TRAIN] + b"x",
        "whole": zips[TRAIN],
    }[left]
    run.output.mkdir()
    (run.output / "train2017.zip.partial").write_bytes(content)
    if left == "damaged":
        assert "MD5" in run.fails()
    run()
    assert run.tree() == complete
    asked = [(start, count) for path, start, count in mirror.asked if path == TRAIN]
    whole = len(zips[TRAIN])
    fetched = {"damaged": [(1000, whole - 1000), (0, whole)], "too long": [(0, whole)], "whole": []}
    assert asked == fetched[left]


def test_a_wrong_zip_of_the_final_name_is_the_users_to_remove(run, zips):
    run.output.mkdir()
    (run.output / "val2017.zip").write_bytes(zips[VAL][:-5])
    assert "val2017.zip: is " in run.fails()
    assert (run.output / "val2017.zip").exists()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://127.0.0.1", "is no http, https or file URL"),
        ("images", "is no http, https or file URL"),
        ("http://127.0.0.1:port", "is no proper URL"),
        ("http://a b", "is no proper URL"),
        ("http://[", "is no proper URL"),
        ("http://", "no host given; check --mirror"),
    ],
)
def test_a_mirror_that_is_no_url(run, url, said):
    assert said in run.fails(mirror=url)
    assert not run.waits_s
