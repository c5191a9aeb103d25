"""The comparison of designs: a row for each evaluation, means over seeds."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from convnext_yolo.recipes.compare import compare


def written_run(folder: Path, *values: float) -> Path:
    folder.mkdir()
    records = [{"kind": "train", "step": 1, "epoch": 0.1, "box": 1.0, "lr": 0.1}]
    records += [
        {"kind": "val", "step": 10 * i, "epoch": 5.0 * i, "AP": value, "AP50": value + 0.25}
        for i, value in enumerate(values, 1)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    return folder


def test_means_over_seeds(tmp_path: Path) -> None:
    runs = {
        "old": [written_run(tmp_path / "a", 0.1, 0.2), written_run(tmp_path / "b", 0.2, 0.3)],
        "new": [written_run(tmp_path / "c", 0.3, 0.5), written_run(tmp_path / "d", 0.4, 0.6)],
    }
    table = compare(runs, tmp_path).splitlines()
    assert table[0] == "| epoch | old AP | new AP | old AP50 | new AP50 |"
    assert table[3] == (
        "| 10 | **0.250** (0.200 / 0.300) | **0.550** (0.500 / 0.600) "
        "| **0.500** (0.450 / 0.550) | **0.800** (0.750 / 0.850) |"
    )
    assert len(table) == 4 and (tmp_path / "compare.md").read_text().splitlines() == table
    assert Image.open(tmp_path / "compare.png").width > 600
