"""`bench loader`: its figures agree with each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from convnext_yolo.launch.cli import main


@pytest.mark.process
def test_figures_of_a_small_set(tiny_shards: Path, tmp_path: Path, capsys):
    words = ["bench", "loader", "--data", str(tiny_shards / "train"), "--batches", "2"]
    assert main([*words, "--json", str(tmp_path / "b.json")]) == 0
    report = json.loads((tmp_path / "b.json").read_text())
    rows = {(row["workers"], row["composed_on"]): row for row in report["speeds"]}
    assert set(rows) == {(n, where) for n in (1, 2) for where in ("cpu", "device")}
    assert report["ratio_to_decode_cpu"] == rows[1, "cpu"]["ratio_to_decode"]
    assert report["ratio_to_decode_device"] == rows[1, "device"]["ratio_to_decode"]
    for row in rows.values():
        assert row["ratio_to_decode"] > 0 and 0 < row["worker_mib"] < 2000
        share = row["images_per_s_per_core"] / row["decode_per_s_per_core"]
        assert row["ratio_to_decode"] == pytest.approx(share, rel=0.02)
    assert report["samples"] == 72
    assert 1 <= report["decodes_per_sample"] <= 1.2
    assert set(report["stage_ms"]) == {"read", "decode", "draw and lay out", "boxes", "pixels"}
    table = capsys.readouterr().out
    assert "decoding" in table and table.count("device") == 2


def test_missing_shards_are_a_sentence(tmp_path, capsys):
    assert main(["bench", "loader", "--data", str(tmp_path / "none")]) == 2
    assert "no such shard folder" in capsys.readouterr().err
