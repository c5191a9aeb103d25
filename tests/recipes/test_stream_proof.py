"""`verify --stream`: anyone can prove the order to themselves."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import yaml

from convnext_yolo.launch.cli import main

LINE = re.compile(r"batch (\d+) ([0-9a-f]{64})")


@pytest.fixture
def prove(tiny_shards: Path, tmp_path: Path, capsys):
    """Runs the command; returns what it printed."""
    recipe = {
        "data": {"image_px": [64, 96], "workers": 0},
        "batch": {"global": 24, "micro": 3},
        "seed": 3,
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))

    def run(*options: str, code: int = 0) -> str:
        words = ["verify", str(tiny_shards / "train"), "--stream"]
        assert main([*words, "--config", str(tmp_path / "r.yaml"), *options]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return run


@pytest.mark.process
def test_ranks_and_workers_change_no_line(prove):
    expected = prove("--batches", "6")
    lines = [LINE.fullmatch(line) for line in expected.splitlines()]
    assert [int(line[1]) for line in lines if line] == list(range(6))
    assert len({line[2] for line in lines if line}) == 6
    for world, workers in itertools.product((1, 4, 8), (0, 3)):
        shape = ["--world-size", str(world), "--workers", str(workers)]
        assert prove("--batches", "6", *shape) == expected
        later = prove("--batches", "2", "--start", "4", *shape)
        assert later.splitlines() == expected.splitlines()[4:]


def test_ten_batches_by_default(prove):
    assert len(prove().splitlines()) == 10


def test_a_world_that_does_not_divide_is_a_sentence(prove):
    error = prove("--world-size", "5", code=2)
    assert "which 5 processes can't share equally" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--stream"], "--stream needs the --config whose batches are wanted"),
        (["--config", "quickstart"], "--config goes with --stream"),
        (["--start", "3"], "--start goes with --stream"),
        (["--stream", "--config", "quickstart", "--start", "-1"], "not a whole number from 0 up"),
        (["--stream", "--config", "nowhere"], "nowhere"),
    ],
)
def test_mistakes(tiny_shards, capsys, options, sentence):
    try:
        code = main(["verify", str(tiny_shards / "train"), *options])
    except SystemExit as end:  # argparse's way
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and sentence in error and "Traceback" not in error
