"""The stall detector: what it tells of a rank that the others wait for."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convnext_yolo.launch.command import Command, Ranks
from convnext_yolo.launch.job import LaunchError
from convnext_yolo.launch.supervision import stall, supervise
from convnext_yolo.launch.supervision.rank import Place, Rank
from convnext_yolo.launch.supervision.stall import TELL_S, StallDetector, behind
from convnext_yolo.recipes import heartbeat
from convnext_yolo.recipes.clock import PHASES

LOGS = Path("logs")


def rank(number: int, count: int, since_s: float, doing: str = "data", state: str = "S") -> Rank:
    place = Place(count, 12, doing, since_s, state)
    return Rank(number, f"host-{number}", None, since_s, place=place)


def test_it_tells_once_of_a_stall_and_of_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    detector = StallDetector(600, LOGS)
    ranks = [rank(0, 40, 2.0, "communication"), rank(1, 37, 1.0), rank(2, 40, 2.5, "communication")]
    assert detector.look(ranks, TELL_S) == (None, "")  # some have begun something since
    assert detector.look(ranks, TELL_S + 3) == (ranks[1], "")
    told = capsys.readouterr().err
    assert (
        "no rank gets on for 120 s: behind is rank 1 on host-1, in step 12 (data) for 122 s" in told
    )
    assert "others in step 12 (communication)" in told and "logs/rank-1.log" in told
    assert detector.look(ranks, TELL_S + 9) == (None, "")
    assert capsys.readouterr().err == ""
    ranks[1].place = Place(38, 12, "forward", TELL_S + 10, "R")
    assert detector.look(ranks, TELL_S + 11) == (None, "")
    assert "the ranks get on again, after 128 s" in capsys.readouterr().err
    _, reason = detector.look(ranks, TELL_S + 610)
    assert "no rank got on for 600 s, and this one was behind, in step 12 (forward)" in reason


def test_without_a_limit_it_only_tells() -> None:
    detector = StallDetector(0, LOGS)
    ranks = [rank(0, 40, 0.0), rank(1, 39, 0.0)]
    assert detector.look(ranks, 1e6) == (ranks[1], "")
    assert detector.look(ranks, 1e9) == (None, "")
    assert StallDetector(5, LOGS).look([], 1e9) == (None, "")  # nobody runs


def test_of_ranks_in_one_phase_one_that_can_not_run_is_behind_or_who_came_last() -> None:
    early, late = rank(0, 5, 1.0, "backward"), rank(1, 5, 3.0, "backward")
    assert behind([early, late]) is late
    early.place.state = "T"
    assert behind([early, late]) is early


@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=8), hung=st.integers(0, 7))
def test_whoever_hangs_is_found(counts: list[int], hung: int) -> None:
    """All go on until they wait for the one that hangs: it has begun less than they."""
    hung %= len(counts)
    places = [rank(n, 20 + c, 5.0) for n, c in enumerate(counts)]
    places[hung].place.count = 19
    assert behind(places) is places[hung]


def test_a_beat_keeps_its_time_however_late_it_is_told() -> None:
    one = rank(0, 0, 0.0)
    beat = {"type": "beat", "step": 3, "doing": "forward", "state": "R", "judged": False}
    one.take({**beat, "count": 7, "for_s": 1.0}, 10.0)
    one.take({**beat, "count": 7, "for_s": 3.0}, 12.5)  # half a second on the way
    assert (one.place.since_s, one.heard_s, one.place.step) == (9.0, 12.5, 3)
    with pytest.raises(KeyError):
        one.take({"type": "beat"}, 13.0)


def test_beats_are_read_as_they_were_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    file = heartbeat.create()
    try:
        assert heartbeat.read(file) is None
        monkeypatch.setenv(heartbeat.HEARTBEAT, str(file))
        heart = heartbeat.Heartbeat()
        for count, doing in enumerate((*PHASES, "evaluation", "x"), start=1):
            heart.step = 10**count
            heart.beat(doing)
            found = heartbeat.read(file)
            assert found and (found.count, found.step, found.doing) == (count, 10**count, doing)
    finally:
        os.close(file)
        import faulthandler

        faulthandler.unregister(heartbeat.SHOW_STACKS)
    monkeypatch.delenv(heartbeat.HEARTBEAT)
    heartbeat.Heartbeat().beat("data")  # nobody watches


# Two ranks: rank 1 hangs in its second phase, rank 0 waits for it in the third.
SCRIPT = """
import os, signal, time
from convnext_yolo.recipes.heartbeat import heartbeat
heart = heartbeat()
heart.step = 4
for phase in ("data", "forward", "backward"):
    heart.beat(phase)
    if phase == "forward" and os.environ["RANK"] == "1":
        def reads_for_ever():
            {hang}
        reads_for_ever()
time.sleep(999)
"""
LAUNCHER = """
for RANK in 0 1; do export RANK; "$0" -c "$1" "$2" & done; wait
"""
GUARD = (
    "import sys; from convnext_yolo.launch.supervision.guard import guard_command; "
    "sys.exit(guard_command([sys.executable, '-c', sys.argv[1]]))"
)


@pytest.mark.process
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("hang", "says"),
    [
        ("time.sleep(999)", "in step 4 (forward) for"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "its process is stopped"),
    ],
)
def test_a_rank_that_hangs_is_named_and_ends_the_job(
    tmp_path: Path, hang: str, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["bash", "-c", LAUNCHER, sys.executable, GUARD, SCRIPT.format(hang=hang)]
    ranks = Ranks({0: "host-a", 1: "host-b"}, tmp_path / "logs", count=2)
    with pytest.raises(LaunchError) as failure:
        supervise.run(lambda lost: Command(words, ranks=ranks), stall_s=6)
    assert "rank 1 on host-b went first: no rank got on for" in str(failure.value)
    assert says in str(failure.value)
    told = capfd.readouterr().err
    assert "behind is rank 1 on host-b" in told
    assert "get on again" not in told  # their end is no progress
    stacks = (tmp_path / "logs/rank-1.log").read_text()
    assert ("reads_for_ever" in stacks) == (hang == "time.sleep(999)")
    assert "reads_for_ever" not in (tmp_path / "logs/rank-0.log").read_text()
    assert stall.LIMIT_S > TELL_S
