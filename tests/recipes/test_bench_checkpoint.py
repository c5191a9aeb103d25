"""`bench checkpoint`: its figures, and the share of a save that an asynchronous one still holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from convnext_yolo.launch.cli import main
from convnext_yolo.recipes.bench_checkpoint import format_checkpoint, report

SMALL = ["--batch.global", "2", "--batch.micro", "1", "--data.image_px", "[64, 64]"]
SMALL += ["--data.workers", "0", "--deepspeed.precision", "fp32"]


def save(copy_s: float, finish_s: float, meanwhile_s: float | None = None) -> dict[str, Any]:
    return {
        **{"copy_s": copy_s, "finish_s": finish_s, "step_s": 0.1},
        "step_while_writing_s": meanwhile_s,
    }


def test_stalls_are_medians_and_ratios() -> None:
    found = {
        **{"device": "cpu", "bytes": 100 * 2**20},
        "synchronous": [save(0.1, 0.5), save(0.1, 0.4), save(9, 9)],
        "asynchronous": [save(0.1, 0.02, 0.2), save(0.05, 0.01, 0.3), save(9, 9, 0.2)],
    }
    made = report(found, 2, 1)
    assert (made.synchronous_s, made.asynchronous_s, made.ratio) == (0.6, 0.12, 0.2)
    assert (made.step_s, made.step_while_writing_s) == (0.1, 0.2)
    assert made.write_mib_per_s == 200
    lines = format_checkpoint(made).splitlines()
    assert lines[0].startswith("checkpoints of 100 MiB, ZeRO-1, 2 cpu process(es), 3 saves")
    assert lines[2].split() == ["synchronous", "600.0", "100.0", "500.0", "1.000", "100.0"]
    assert lines[3].split() == ["asynchronous", "120.0", "100.0", "20.0", "0.200", "200.0"]


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path: Path, capsys: Any) -> None:
    words = ["bench", "checkpoint", "--config", "convnext_nano_coco", *SMALL]
    assert main([*words, "--output", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.process
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("processes", "stage"), [(2, 3), pytest.param(1, 1, marks=pytest.mark.long)]
)
def test_an_asynchronous_save_holds_the_loop_little(
    processes: int, stage: int, tmp_path: Path, capfd: Any
) -> None:
    """Under a fifth of a synchronous one: 17 M parameters, of each kind seven saves by turns.

    What else runs on the machine holds short stalls up more than long ones, so there are three
    attempts; each is a whole comparison.
    """
    words = ["--config", "convnext_nano_coco", *SMALL, "--output", str(tmp_path)]
    words += ["--processes", str(processes), "--stage", str(stage), "--saves", "7"]
    output = tmp_path / "b.json"
    for _ in range(3):
        assert main(["bench", "checkpoint", *words, "--json", str(output)]) == 0
        record = json.loads(output.read_text())
        assert (record["processes"], record["stage"], record["saves"]) == (processes, stage, 7)
        assert record["bytes"] > 4 * 4 * 16_900_000  # weights, two moments, average
        stall = record["asynchronous_s"] / record["synchronous_s"]
        assert record["ratio"] == pytest.approx(stall, abs=0.01)
        assert [path.name for path in tmp_path.iterdir()] == ["b.json"]
        if record["ratio"] < 0.2:
            return
    pytest.fail(capfd.readouterr().out)
