"""The pace of a run: figures by a clock that the test turns, the line of progress, real records."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from convnext_yolo.recipes import clock, meter
from convnext_yolo.recipes.clock import PHASES
from convnext_yolo.recipes.distributed import World
from convnext_yolo.recipes.meter import Meter

from .conftest import TinyRun
from .forkserver import ForkServer
from .short_runs import FOUR_STEPS, records

SCRIPT = str(Path(__file__).with_name("ranks_uneven.py"))


class Hands:
    """What both clocks read, moved by hand."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.now_s = 1000.0
        hands = SimpleNamespace(perf_counter=lambda: self.now_s, monotonic=lambda: self.now_s)
        patch.setattr(clock, "time", hands)
        patch.setattr(meter, "time", hands)


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    return Hands(monkeypatch)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """This process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, 0, torch.device("cpu"))
    dist.destroy_process_group()


def build(world: World, total_steps: int = 100, log_every: int = 5) -> Meter:
    """A meter of batches of 8 pictures on a device whose peak is 100 pictures a second."""
    utilization: Any = SimpleNamespace(share=lambda images_per_s: images_per_s / 100)
    return Meter(world, 8, total_steps, log_every, utilization)


def take_steps(own: Meter, hands: Hands, first: int, count: int) -> None:
    """Steps of half a second and a quarter, of which one quarter is a wait for data."""
    for number in range(first, first + count):
        with own.step(number) as phases:
            with phases.phase("data"):
                hands.now_s += 0.25
            with phases.phase("forward"):
                hands.now_s += 0.5


@pytest.mark.parametrize(("total_steps", "due"), [(10, [5, 10]), (12, [5, 10, 12]), (3, [3])])
def test_records_are_due_every_so_often_and_at_the_end(
    world: World, total_steps: int, due: list[int]
) -> None:
    own = build(world, total_steps)
    assert [step for step in range(1, total_steps + 1) if own.is_due(step)] == due


def test_figures_are_of_the_time_since_the_last_record(world: World, hands: Hands) -> None:
    own = build(world)
    take_steps(own, hands, 1, 5)
    hands.now_s += 0.25  # between steps
    first = own.read()
    assert first["images_per_s"] == first["images_per_s_per_device"] == 10  # 40 in 4 s
    assert first["data_wait"] == round(1.25 / 4, 4)
    assert first["mfu"] == 0.1
    assert (first["time_data_s"], first["time_forward_s"]) == (0.25, 0.5)  # of the fifth step
    assert first["time_backward_s"] == first["time_optimizer_s"] == 0
    assert first["slowest_rank"] == 0
    assert first["slowest_rank_s"] == first["fastest_rank_s"] == 0.75
    assert 100 < first["memory_mib"] < 100_000

    take_steps(own, hands, 6, 3)
    hands.now_s += 60  # an evaluation
    own.restart()
    take_steps(own, hands, 9, 2)
    second = own.read()
    assert (second["images_per_s"], second["data_wait"]) == (10.67, 0.3333)  # 16 in 1.5 s


def record(step: int, **changes: Any) -> dict[str, Any]:
    phases = dict(zip(PHASES, (0.1, 0.2, 0.4, 0.2, 0.1), strict=True))
    return {
        "step": step,
        "epoch": 1.25,
        "box": 0.05,
        "obj": None,
        "cls": 0.0,
        "images_per_s": 16.0,
        "images_per_s_per_device": 8.0,
        "mfu": None,
        **{f"time_{name}_s": seconds for name, seconds in phases.items()},
        "slowest_rank": 1,
        "slowest_rank_s": 0.9,
        "fastest_rank_s": 0.5,
        **changes,
    }


def test_the_line_of_progress(
    world: World, hands: Hands, capsys: pytest.CaptureFixture[str]
) -> None:
    build(world).say(record(10), ("box", "obj", "cls"))
    assert capsys.readouterr().out == (
        "step 10/100  epoch 1.2  box 0.0500  16.0 img/s  "
        "data 10% forward 20% backward 40% optimizer 20% communication 10%  0:45 left\n"
    )
    two = World(0, 2, 0, torch.device("cpu"))
    build(two, total_steps=1000).say(record(10, mfu=0.414), ("box", "obj", "cls"))
    assert capsys.readouterr().out == (
        "step 10/1000  epoch 1.2  box 0.0500  16.0 img/s (8.0 each)  MFU 41%  "
        "data 10% forward 20% backward 40% optimizer 20% communication 10% "
        "ranks 0.500–0.900 s, slowest 1  8:15 left\n"
    )


def test_the_line_comes_every_few_seconds_and_at_the_end(
    world: World, hands: Hands, capsys: pytest.CaptureFixture[str]
) -> None:
    own = build(world)
    for step in range(1, 101):
        hands.now_s += 0.5
        own.say(record(step), ("box",))
    said = [int(s) for s in re.findall(r"^step (\d+)/100 ", capsys.readouterr().out, re.M)]
    assert said == [*range(1, 100, 10), 100]


def test_a_crawl_can_be_said_as_well(
    world: World, hands: Hands, capsys: pytest.CaptureFixture[str]
) -> None:
    """Speeds are rounded, to nothing in the end; and a step may take no time that is measured."""
    nothing = {f"time_{name}_s": 0.0 for name in PHASES}
    build(world).say(record(99, images_per_s=0.0, **nothing), ("box",))
    assert "0.0 img/s  data 0% " in capsys.readouterr().out


@pytest.mark.process
@pytest.mark.parametrize("stage", [1, 3])
def test_records_of_a_run(
    fork_server: ForkServer, tiny_run: Callable[..., TinyRun], stage: int
) -> None:
    """Rank 1 computes longer: it is named, and the wait for it is communication on rank 0."""
    run = tiny_run(f"uneven-{stage}", deepspeed={"stage": stage}, **FOUR_STEPS)
    output = fork_server.run(2, SCRIPT, "1", "0.5", str(run.recipe))
    found = records(run.folder)
    assert [r["step"] for r in found] == [1, 2, 3, 4]
    for entry in found:
        times = [entry[f"time_{name}_s"] for name in PHASES]
        assert all(seconds >= 0 for seconds in times)
        assert 0 < sum(times) <= 8 / entry["images_per_s"] + 0.01
        assert entry["images_per_s_per_device"] == pytest.approx(
            entry["images_per_s"] / 2, abs=0.01
        )
        assert 0 <= entry["data_wait"] <= 1
        assert entry["mfu"] is None and 100 < entry["memory_mib"] < 100_000
        assert entry["skipped_steps"] == 0 and entry["loss_scale"] == 1
        assert entry["lr_groups"].keys() == {"scale 1", "biases"}
        assert set(entry["lr_groups"].values()) == {entry["lr"]}
        assert entry["gradient_norm"] > 0
    # A step has two micro-batches. (The first ones warm up what they need, on either rank.)
    last = found[-1]
    assert last["slowest_rank"] == 1
    assert last["slowest_rank_s"] > 1 and last["slowest_rank_s"] > last["fastest_rank_s"] + 0.3
    assert last["time_communication_s"] > 0.3
    assert last["time_forward_s"] < last["slowest_rank_s"]
    line = re.search(r"^step 4/4 .*$", output, re.M)
    assert line and re.search(r"ranks 0\.\d{3}–\d+\.\d{3} s, slowest 1  0:00 left", line[0])
