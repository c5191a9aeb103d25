from __future__ import annotations

import json

import pytest

from convnext_yolo.data_prep.batch import Corrupt
from convnext_yolo.data_prep.errors import DataError
from convnext_yolo.data_prep.quarantine import Quarantine

A, B, C = (Corrupt("shards/train/s-0.tar", f"{i:012d}", "is cut short") for i in range(3))
VAL = Corrupt("shards/val/s-0.tar", "000000000000", "is cut short")


def ledger(folder, limit=0.5, writes=True, samples=4):
    return Quarantine(folder, "shards/train/s-9.tar", samples, limit, writes)


def test_each_sample_is_written_once(tmp_path):
    quarantine = ledger(tmp_path / "run")
    assert quarantine.add([A, A]) == [A]
    assert quarantine.add([A, B]) == [B]
    quarantine.note([VAL, VAL])
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"shard": c.shard, "key": c.key, "reason": "is cut short"} for c in (A, B, VAL)
    ]


def test_too_many_end_the_run_wherever_it_began(tmp_path):
    quarantine = ledger(tmp_path)
    quarantine.add([A, B])
    quarantine.note([VAL])  # has no limit
    resumed = ledger(tmp_path)
    assert resumed.add([B]) == []
    with pytest.raises(DataError, match=r"3 of 4 samples are .*corrupt_limit = 0\.5 allow"):
        resumed.add([C])
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 4


def test_ranks_that_do_not_write_count_as_well(tmp_path):
    silent = ledger(tmp_path, writes=False)
    assert silent.add([A, B]) == [A, B]
    assert not (tmp_path / "quarantine.jsonl").exists()
    with pytest.raises(DataError):
        silent.add([C])


def test_a_run_that_is_started_again_ends_again_unless_its_data_are_mended(tmp_path):
    with pytest.raises(DataError):
        ledger(tmp_path).add([A, B, C])
    again = ledger(tmp_path)
    with pytest.raises(DataError):
        again.add([B])
    assert ledger(tmp_path).add([]) == []


def test_a_line_that_was_torn_off_is_forgotten(tmp_path):
    ledger(tmp_path).add([A])
    with (tmp_path / "quarantine.jsonl").open("a") as file:
        file.write('{"shard": "s/a')
    quarantine = ledger(tmp_path)
    assert quarantine.add([A, B]) == [B]
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == [A.key, B.key]


@pytest.mark.parametrize("content", ["no json\n", '{"shard": 1}\n', "[3]\n", "\xff\n"])
def test_a_damaged_ledger_is_named(tmp_path, content):
    (tmp_path / "quarantine.jsonl").write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=r"quarantine\.jsonl: the quarantine ledger can't be read"):
        ledger(tmp_path)


def test_a_full_disk_ends_nothing(tmp_path, capsys):
    """Other ranks would wait for the one that writes; the lines come when there is space."""
    path, quarantine = tmp_path / "quarantine.jsonl", ledger(tmp_path)
    path.symlink_to("/dev/full")
    quarantine.note([A])
    assert f"{path}: can't be written (No space left on device; " in capsys.readouterr().err
    path.unlink()
    quarantine.note([VAL])
    written = [json.loads(line)["shard"] for line in path.read_text().splitlines()]
    assert written == [A.shard, VAL.shard]
