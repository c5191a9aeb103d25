"""Trackers that fail, hang and fall behind stop nothing; a resume gives them what they lack."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from convnext_yolo.recipes import trackers, tracking
from convnext_yolo.recipes.load import load_recipe
from convnext_yolo.recipes.trackers import Key, Record, Start, numbers, start_lanes
from convnext_yolo.recipes.tracking import Tracker, pictures_path, read_metrics


class Fake:
    """Notes its calls; does what it is told to do in one of them."""

    def __init__(self, held: set[Key] = frozenset(), **doing: Callable[[], None]):  # type: ignore[assignment]
        self.calls: list[tuple[Any, ...]] = []
        self.has, self.doing, self.abandoned = held, doing, 0
        self._call("make")

    def _call(self, *words: Any) -> None:
        self.calls.append(words)
        self.doing.get(str(words[0]), lambda: None)()

    def held(self, records: Sequence[Record]) -> set[Key]:
        return set(self.has)

    def log(self, record: Record) -> None:
        self._call("log", record["kind"], record["step"])

    def table(self, name: str, rows: Sequence[Record], step: int) -> None:
        self._call("table", name, len(rows), step)

    def picture(self, name: str, path: Path, step: int) -> None:
        self._call("picture", name, path.name, step)

    def artifact(self, path: Path) -> None:
        self._call("artifact", path.name)

    def close(self) -> None:
        self._call("close")


@pytest.fixture
def start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Tracker, list[int]]]:
    """Starts a tracker with backends of ours; the list counts what was abandoned."""

    def begin(step: int = 0, **makes: Callable[[], Fake]) -> tuple[Tracker, list[int]]:
        abandoned: list[int] = []

        def backends(
            recipe: Any, folder: Path, step: int, run_ids: dict[str, str], records: Any
        ) -> Any:
            starts = {
                name: Start(lambda _: None, make, lambda: abandoned.append(1))
                for name, make in makes.items()
            }
            return start_lanes(recipe, folder, records, starts)

        monkeypatch.setattr(tracking, "start_backends", backends)
        return Tracker(load_recipe([], []), tmp_path, step, {}), abandoned

    return begin


def train(tracker: Tracker, steps: range, folder: Path) -> None:
    """An evaluation at each multiple of four."""
    for step in steps:
        tracker.log({"kind": "train", "step": step, "box": 0.5})
        if step % 4 == 0:
            tracker.log({"kind": "val", "step": step, "AP": 0.5})
            path = pictures_path(folder, step)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"a picture")
            tracker.log_evaluation(step, {"RBC": {"AP": 0.5}}, [path])


def test_every_tracker_is_told_everything_in_order(
    tmp_path: Path, start: Callable[..., Any]
) -> None:
    one, two = Fake(), Fake()
    tracker, _ = start(one=lambda: one, two=lambda: two)
    train(tracker, range(3, 6), tmp_path)
    tracker.log_weights(tmp_path / "w.safetensors")
    tracker.close()
    assert one.calls == two.calls
    assert one.calls == [
        ("make",),
        ("log", "train", 3),
        ("log", "train", 4),
        ("log", "val", 4),
        ("table", "val/per_class", 1, 4),
        ("picture", "val/predictions", "step-00000004.jpg", 4),
        ("log", "train", 5),
        ("artifact", "w.safetensors"),
        ("close",),
    ]


def test_a_resume_gives_what_is_missing_and_repeats_nothing(
    tmp_path: Path, start: Callable[..., Any]
) -> None:
    tracker, _ = start()
    train(tracker, range(1, 9), tmp_path)
    tracker.close()
    # Of steps 1 to 8 this one has 1, 2 and 7; the run goes on from 6.
    some = Fake(held={("train", 1), ("train", 2), ("train", 7)})
    tracker, _ = start(6, some=lambda: some)
    train(tracker, range(7, 9), tmp_path)
    tracker.close()
    logged = [call[1:] for call in some.calls if call[0] == "log"]
    assert logged == [
        *(("train", 3), ("train", 4), ("val", 4), ("train", 5), ("train", 6)),
        *(("train", 8), ("val", 8)),
    ]
    assert [call[-1] for call in some.calls if call[0] in ("table", "picture")] == [4, 4, 8, 8]


def fail() -> None:
    raise RuntimeError("no space")


@pytest.mark.parametrize("where", ["make", "log", "table", "picture", "artifact", "close"])
def test_one_that_fails_stops_neither_training_nor_others(
    tmp_path: Path, start: Callable[..., Any], capsys: pytest.CaptureFixture[str], where: str
) -> None:
    good = Fake()
    tracker, _ = start(bad=lambda: Fake(**{where: fail}), good=lambda: good)
    train(tracker, range(1, 9), tmp_path)
    tracker.log_weights(tmp_path / "w")
    tracker.close()
    doing = "does not start" if where == "make" else "stopped"
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"bad {doing}: no space; metrics.jsonl has everything"]
    assert len(read_metrics(tmp_path)) == 10
    assert good.calls[-1] == ("close",)


@pytest.mark.parametrize("where", ["make", "log", "close"])
def test_one_that_hangs_is_left_within_the_limit(
    tmp_path: Path,
    start: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    monkeypatch.setattr(trackers, "START_LIMIT_S", 0.2)
    monkeypatch.setattr(trackers, "STOP_LIMIT_S", 0.2)
    end, good = threading.Event(), Fake()
    began_s = time.monotonic()
    tracker, abandoned = start(
        good=lambda: good, bad=lambda: Fake(**{where: lambda: assert_set(end)})
    )
    train(tracker, range(1, 9), tmp_path)
    tracker.close(stop_asked=lambda: True)
    assert time.monotonic() - began_s < 30  # and not FINISH_LIMIT_S
    end.set()
    assert "bad has not finished in time" in capsys.readouterr().err
    assert abandoned == [1]
    assert good.calls[-1] == ("close",)
    assert len(read_metrics(tmp_path)) == 10


def assert_set(event: threading.Event) -> None:
    assert event.wait(60)


def test_one_that_falls_behind_is_given_up(
    tmp_path: Path,
    start: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers, "QUEUE_LENGTH", 3)
    end = threading.Event()
    slow = Fake(log=lambda: assert_set(end))
    tracker, _ = start(slow=lambda: slow)
    train(tracker, range(1, 9), tmp_path)
    end.set()
    tracker.close()
    assert "slow does not keep up" in capsys.readouterr().err
    assert slow.calls[-1] == ("close",)  # what it has it may keep
    assert len(read_metrics(tmp_path)) == 10


def test_one_that_is_not_installed_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(_: Any) -> None:
        raise ModuleNotFoundError("No module named 'comet_ml'")

    assert start_lanes(load_recipe([], []), tmp_path, [], {"comet": Start(load, Fake)}) == []
    assert "pip install 'convnext-yolo[comet]'" in capsys.readouterr().err


def test_numbers_have_names_by_kind_and_group() -> None:
    record = {
        "kind": "train",
        "step": 3,
        "box": 0.5,
        "gradient_norm": None,
        "lr_groups": {"head": 0.1, "stem": 0.01},
    }
    assert numbers(record) == {
        "train/box": 0.5,
        "train/lr_groups/head": 0.1,
        "train/lr_groups/stem": 0.01,
    }
