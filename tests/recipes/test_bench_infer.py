"""`bench infer`: exact sizes, speeds relative to the first recipe, complete rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from convnext_yolo.launch.cli import main
from convnext_yolo.recipes.bench_infer import Speed, fastest, format_speeds

ROW = {
    *("recipe", "parameters", "fused_parameters", "gflops", "batch", "compiled"),
    *("channels_last", "latency_ms", "images_per_s", "relative"),
}


@pytest.fixture
def recipes(tmp_path: Path) -> list[str]:
    """The smallest of both kinds, at 64 px."""
    models = {
        "n": {"name": "yolov5", "depth": 0.33, "width": 0.25},
        "ours": {"backbone": {"name": "test_convnext"}, "neck_channels": [8, 16, 24]},
    }
    for name, model in models.items():
        recipe = {"model": model, "data": {"image_px": [64, 64]}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return [str(tmp_path / f"{name}.yaml") for name in models]


@pytest.mark.process  # compiles with a C++ compiler, half a minute each of four
@pytest.mark.timeout(900)
def test_rows_of_two_recipes(recipes, tmp_path, capsys):
    files = ["--json", str(tmp_path / "b.json"), "--figure", str(tmp_path / "b.png")]
    words = ["bench", "infer", *recipes, "--warmup", "1", "--runs", "3", "--batch", "2"]
    assert main([*words, *files]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())
    assert len(rows) == 2 * 2 * 2 and all(set(row) == ROW for row in rows)
    ways = {(r["recipe"], r["batch"], r["compiled"], r["channels_last"]) for r in rows}
    assert len(ways) == len(rows)
    for row in rows:
        assert row["images_per_s"] == pytest.approx(
            1e3 * row["batch"] / row["latency_ms"], rel=0.01
        )
        assert row["latency_ms"] > 0 and row["gflops"] > 0
        if row["recipe"] == recipes[0]:
            assert (row["parameters"], row["fused_parameters"]) == (1_872_157, 1_867_405)
            assert row["relative"] <= 1
    table = capsys.readouterr().out
    assert table.count("\n") == len(rows) + 2 and table.count(" *\n") == 2
    assert (tmp_path / "b.png").stat().st_size > 5000


def test_the_fastest_way_of_each_is_marked() -> None:
    def speed(recipe: str, batch: int, images_per_s: float) -> Speed:
        return Speed(recipe, 1, 1, 1.0, batch, False, False, 1.0, images_per_s, 1.0)

    speeds = [speed("a", 1, 2), speed("a", 1, 3), speed("b", 1, 1), speed("a", 8, 1)]
    assert fastest(speeds) == [speeds[1], speeds[2], speeds[3]]
    marked = [line.endswith("*") for line in format_speeds(speeds).splitlines()[1:-1]]
    assert marked == [False, True, True, True]


def test_mistakes_are_one_sentence(capsys) -> None:
    assert main(["bench", "infer", "no_such_recipe"]) == 2
    assert "no such file" in capsys.readouterr().err
