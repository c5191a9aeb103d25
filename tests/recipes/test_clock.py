"""Where the time of a step goes, by a clock that the test turns, and with real collectives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convnext_yolo.recipes import clock
from convnext_yolo.recipes.clock import PHASES, StepClock

from .forkserver import ForkServer

SCRIPT = str(Path(__file__).with_name("ranks_timed.py"))
NAMES = st.sampled_from(PHASES)
SECONDS = st.integers(0, 1000).map(lambda n: n / 64)  # sums of these are exact


class Hands:
    """What `time.perf_counter` reads, moved by hand."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.now_s = 100.0
        patch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: self.now_s))


@settings(deadline=None)
@given(parts=st.lists(st.tuples(NAMES, SECONDS, st.floats(0, 1), SECONDS), max_size=12))
def test_phases_add_up(parts: list[tuple[str, float, float, float]]) -> None:
    """Each takes its own time less its collectives', which are communication; gaps are nobody's."""
    with pytest.MonkeyPatch.context() as patch:
        hands, steps = Hands(patch), StepClock(torch.device("cpu"))
        want = dict.fromkeys(PHASES, 0.0)
        with steps.step(measure=True):
            for name, taken_s, share, gap_s in parts:
                inside_s = round(taken_s * share * 64) / 64
                with steps.phase(name):
                    hands.now_s += taken_s
                    steps._collectives.seconds += inside_s
                hands.now_s += gap_s
                want[name] += taken_s - inside_s
                want["communication"] += inside_s
        assert steps.seconds == want
        assert sum(steps.seconds.values()) == sum(taken_s for _, taken_s, _, _ in parts)
        assert steps.working_s == sum(s for n, s in want.items() if n != "communication")
        assert steps.waited_s == sum(taken_s for name, taken_s, _, _ in parts if name == "data")


def test_a_measured_step_begins_anew_and_one_that_is_not_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hands, steps = Hands(monkeypatch), StepClock(torch.device("cpu"))
    for measure, seconds in ((True, 1.0), (True, 2.0), (False, 4.0)):
        with steps.step(measure):
            for name in ("data", "backward"):
                with steps.phase(name):
                    hands.now_s += seconds
    assert steps.seconds == dict.fromkeys(PHASES, 0.0) | {"data": 2.0, "backward": 2.0}
    assert steps.waited_s == 7.0  # the wait for data is that of all steps


def test_the_device_is_waited_for_in_measured_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """All other steps must run free."""
    calls: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", calls.append)
    gpu = torch.device("cuda", 0)
    steps = StepClock(gpu)
    with steps.step(measure=False), steps.phase("forward"):
        pass
    with steps.step(measure=False), steps.phase("data"):
        pass
    assert calls == []
    with steps.step(measure=True), steps.phase("forward"):
        assert calls == [gpu]
    assert calls == [gpu, gpu]


@pytest.mark.process
def test_collectives_are_taken_out_of_their_phase(fork_server: ForkServer, tmp_path: Path) -> None:
    """Rank 0 waits inside of collectives for rank 1, which computes for a second."""
    fork_server.run(2, SCRIPT, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    waiting, quick, free = first["steps"]
    assert waiting["communication"] > 0.5
    assert waiting["backward"] < waiting["communication"] / 2
    # Timers that were never set back would give the first step's wait once more.
    assert quick["communication"] < waiting["communication"] / 2
    assert free == quick  # was not measured
    assert second["steps"][0]["backward"] > 0.99
    assert second["steps"][0]["communication"] < waiting["communication"]
    for rank in (first, second):
        assert rank["kinds"] and set(rank["left_in_timers"].values()) == {0}
        assert not rank["enabled_after"] and rank["logger_is_back"]


@pytest.mark.parametrize("fails", [False, True])
def test_deepspeeds_logger_comes_back(fails: bool) -> None:
    """Also when a step breaks off."""
    from deepspeed.comm import comm

    theirs, steps = comm.comms_logger, StepClock(torch.device("cpu"))

    def step() -> None:
        with steps.step(measure=True):
            assert comm.comms_logger is not theirs
            if fails:
                raise RuntimeError("on purpose")

    check: Callable[[], None] = step
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            check()
    else:
        check()
    assert comm.comms_logger is theirs
