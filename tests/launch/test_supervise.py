"""Supervision: who went first and why, nobody orphaned. The ranks are scripts."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from convnext_yolo.launch.command import Command, Ranks
from convnext_yolo.launch.job import LaunchError
from convnext_yolo.launch.supervision import allocation, output, supervise
from convnext_yolo.launch.supervision import front as front_module
from convnext_yolo.launch.supervision.front import Front
from convnext_yolo.launch.supervision.rank import Rank, first_of, lost_hosts
from convnext_yolo.recipes.config import RecipeError

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

GUARD = (
    "import sys; from convnext_yolo.launch.supervision.guard import guard_command; "
    "sys.exit(guard_command(['bash', '-c', sys.argv[1]]))"
)
# A launcher of two ranks that knows nothing: it does not even pass signals on.
LAUNCHER = """
for RANK in 0 1; do export RANK; "$0" -c "$1" "$2" & ranks="$ranks $!"; done
code=0; for rank in $ranks; do wait $rank || code=$?; done; exit $code
"""
# not a sleep in the foreground, whose end bash would take for the answer to SIGINT
WAITS = "trap 'echo saved; exit 0' TERM INT USR1 HUP; echo up; while :; do sleep .1 & wait; done"


def job(folder: Path, script: str, hosts: tuple[str, ...] = ("host-a", "host-b")) -> Command:
    """Two ranks that run a script, which finds its number in RANK and a mark of its own."""
    words = ["bash", "-c", LAUNCHER, sys.executable, GUARD, f": {folder}; {script}"]
    return Command(words, ranks=Ranks(dict(enumerate(hosts)), folder / "logs", count=2))


def processes_of(folder: Path) -> list[int]:
    """The processes with the mark in their command line, ours and this front's excepted."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
        except OSError:  # it has ended meanwhile
            continue
        if f": {folder};" in words and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


def until(condition: Callable[[], object], limit_s: float = 40.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come about"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def nobody_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    until(lambda: not processes_of(tmp_path))


@pytest.fixture
def fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LaunchError]:
    """Runs a job that must fail; returns how."""
    monkeypatch.setattr(front_module, "COLLECT_S", 1.0)

    def run(script: str) -> LaunchError:
        with pytest.raises(LaunchError) as failure:
            supervise.run(lambda lost: job(tmp_path, script))
        return failure.value

    return run


def test_both_end_well(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    supervise.run(lambda lost: job(tmp_path, "echo I am $RANK"))
    output = capfd.readouterr().out
    assert "I am 0" in output and "I am 1" in output
    for rank in (0, 1):
        assert f"I am {rank}\n" in (tmp_path / f"logs/rank-{rank}.log").read_text()


@pytest.mark.parametrize(
    ("script", "parts"),
    [
        # the other one would wait for ever
        (
            "if [ $RANK = 0 ]; then sleep 9; fi; echo 'ValueError: no good' >&2; echo bye; exit 3",
            ["rank 1 on host-b", "exit code 3: ValueError: no good", "logs/rank-1.log"],
        ),
        (
            "if [ $RANK = 0 ]; then kill -KILL $$; fi; sleep 999",
            ["rank 0 on host-a", "killed by SIGKILL"],
        ),
        # who tells of another's end did not go first, though it was the first to be gone
        (
            "if [ $RANK = 0 ]; then echo 'RuntimeError: Connection reset by peer' >&2; exit 1; fi; "
            "sleep .3; echo '[rank1]: MemoryError: full' >&2; exit 1",
            ["rank 1 on host-b", "exit code 1: MemoryError: full"],
        ),
        # whom we have ended has not failed, whatever the other's words remind of
        (
            "if [ $RANK = 0 ]; then exec sleep 999; fi; echo 'ReadTimeoutError: timed out'; exit 1",
            ["rank 1 on host-b", "exit code 1: ReadTimeoutError: timed out"],
        ),
        # of a mistake that all find, one tells the sentence
        (
            "if [ $RANK = 0 ]; then sleep .3; echo 'x train: error: a mistake'; else echo hm; fi; "
            "exit 2",
            ["rank 0 on host-a", "error: a mistake"],
        ),
        # a process of a rank does not outlive it
        ("sleep 999 & if [ $RANK = 1 ]; then exit 5; fi; wait", ["rank 1", "exit code 5"]),
    ],
)
def test_who_went_first_and_why(
    fails: Callable[..., LaunchError], script: str, parts: list[str]
) -> None:
    started_s = time.monotonic()
    failure = fails(script)
    assert all(part in str(failure) for part in parts), failure
    assert failure.exit_code != 0 and time.monotonic() - started_s < 30


def test_a_guard_that_is_ended_takes_its_rank_along(
    tmp_path: Path, fails: Callable[..., LaunchError]
) -> None:
    """So does a host: nothing of it answers."""
    failure = fails("if [ $RANK = 1 ]; then kill -KILL $PPID; fi; sleep 999")
    assert "rank 1 on host-b went first: its guard is gone" in str(failure)


def test_a_launcher_that_ends_the_guards_of_a_host_is_no_loss_of_it() -> None:
    """DeepSpeed's does, with SIGKILL, when one of its ranks has failed."""
    failed = Rank(1, "a", None, 0.0, code=1, reason="exit code 1: OutOfMemoryError", ended_s=5.0)
    ended, far = (Rank(n, host, None, 0.0) for n, host in ((0, "a"), (2, "b")))
    ended.lose("its guard is gone", 5.5)
    assert first_of([ended, failed]) is failed and not lost_hosts([ended, failed])
    far.lose("no sign of life", 4.0)
    assert first_of([ended, failed, far]) is far and lost_hosts([ended, failed, far]) == {"b"}


def test_a_guard_may_say_several_things_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first beat follows its first words."""
    run = Front(job(tmp_path, "true"), Ranks({0: "a"}, tmp_path / "logs", count=1), 0)
    host, port = run.callers.address.split(":")
    with run, socket.create_connection((host, int(port))) as silent:
        with socket.create_connection((host, int(port))) as guard_side:
            words = {"type": "hello", "token": run.token, "rank": 0, "host": "a", "pid": 1}
            place = {"count": 3, "step": 2, "doing": "data", "for_s": 0, "state": "R"}
            beat = {"type": "beat", **place, "judged": False}
            guard_side.sendall(b"".join(json.dumps(m).encode() + b"\n" for m in (words, beat)))

            def is_heard() -> bool:  # who calls and says nothing keeps nobody waiting
                run._hear(timeout_s=0.1)
                return bool(run.ranks) and run.ranks[0].place.count == 3

            until(is_heard, 5.0)
        assert silent.getpeername()


def test_a_log_that_can_not_be_written_stops_nobody(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank-0.log").symlink_to("/dev/full")
    supervise.run(lambda lost: job(tmp_path, "head -c 300000 /dev/zero | tr '\\0' x; echo end"))
    said = capfd.readouterr()
    assert said.out.count("end\n") == 2
    assert "no log of rank 0 can be written" in said.err


def test_what_a_scheduler_ends_before_it_has_begun_has_not_failed(tmp_path: Path) -> None:
    """Slurm signals the ranks, while they import: the job goes back into the queue."""
    script = f"touch {tmp_path}/up-$RANK; exec sleep 999"
    process = front(tmp_path, script)
    until(lambda: all((tmp_path / f"up-{n}").exists() for n in (0, 1)))
    guards = [p for p in processes_of(tmp_path) if is_guard(p)]
    for guard_process in guards:
        os.kill(guard_process, signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output


def is_guard(process: int) -> bool:
    words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    return words[2:3] == [GUARD.encode()]


def test_a_failure_before_a_signal_stays_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = front(
        tmp_path, f"if [ $RANK = 1 ]; then echo 'MemoryError: full'; exit 1; fi; {WAITS}"
    )
    until(lambda: (tmp_path / "logs/rank-1.log").exists() and has_ended_one(tmp_path))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert "rank 1 on host-b went first: exit code 1: MemoryError: full" in output


def has_ended_one(folder: Path) -> bool:
    guards = [p for p in processes_of(folder) if is_guard(p)]
    return len(guards) == 1 and "up\n" in (folder / "logs/rank-0.log").read_text()


def front(folder: Path, script: str) -> subprocess.Popen[str]:
    """A front process of its own."""
    code = (
        "from pathlib import Path; from convnext_yolo.launch.supervision import supervise; "
        "from tests_job import job\n"
        "import sys\n"
        f"try: supervise.run(lambda lost: job(Path({str(folder)!r}), {script!r}))\n"
        "except Exception as error: print(error); sys.exit(error.exit_code)"
    )
    (folder / "tests_job.py").write_text(Path(__file__).read_text())
    path = f"{folder}:{os.environ.get('PYTHONPATH', '')}"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def are_up(folder: Path) -> bool:
    logs = [folder / f"logs/rank-{rank}.log" for rank in (0, 1)]
    return all(log.exists() and "up\n" in log.read_text() for log in logs)


@pytest.mark.parametrize("number", front_module.SIGNALS)
def test_a_signal_to_the_front_lets_ranks_save(tmp_path: Path, number: int) -> None:
    process = front(tmp_path, WAITS)
    until(lambda: are_up(tmp_path))
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    for rank in (0, 1):
        assert "saved\n" in (tmp_path / f"logs/rank-{rank}.log").read_text()


def test_after_a_signal_the_ranks_say_the_exit_code(tmp_path: Path) -> None:
    """Grid Engine's 99, say: no failure."""
    process = front(tmp_path, WAITS.replace("exit 0", "exit 99"))
    until(lambda: are_up(tmp_path))
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 99 and "stopped by SIGUSR1" in output


def test_ranks_save_when_somebody_ends_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front_module, "LEAVE_S", 0.5)
    script = f"{WAITS.replace('echo up;', f'echo up; touch {tmp_path}/up-$RANK;')}"
    ends = f"until [ -e {tmp_path}/up-0 -a -e {tmp_path}/up-1 ]; do sleep .1; done; kill -9 $$"
    command = job(tmp_path, script)
    launcher = LAUNCHER.replace("code=0;", f"{ends}; code=0;")
    words = [*command.words[:2], launcher, *command.words[3:]]
    with pytest.raises(LaunchError, match="somebody has ended the launcher"):
        supervise.run(lambda lost: Command(words, ranks=command.ranks))
    assert "saved\n" in (tmp_path / "logs/rank-1.log").read_text()


def test_a_signal_before_any_rank_is_there(tmp_path: Path) -> None:
    process = front(tmp_path, WAITS)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("$ ")
    until(lambda: processes_of(tmp_path))
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode in (0, 1, 143)


def test_a_signal_while_a_rank_has_not_come_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its host hangs, say: nobody waits for it, nor is it to blame."""
    monkeypatch.setattr(front_module, "LEAVE_S", 1.0)
    command = job(tmp_path, WAITS)
    hangs = LAUNCHER.replace("0 1", "0") + f"; bash -c ': {tmp_path}; while :; do sleep 1; done'"
    words = [*command.words[:2], hangs, *command.words[3:]]

    def ask_when_it_is_up() -> None:
        log = tmp_path / "logs/rank-0.log"
        until(lambda: log.exists() and "up\n" in log.read_text())
        os.kill(os.getpid(), signal.SIGTERM)

    asks = threading.Thread(target=ask_when_it_is_up)
    asks.start()
    outcome = supervise.run_once(Command(words, ranks=command.ranks), 0)
    asks.join()
    assert (outcome.code, outcome.stopped) == (0, True)
    assert outcome.sentence == "stopped by SIGTERM" and not outcome.lost_hosts
    assert "saved\n" in (tmp_path / "logs/rank-0.log").read_text()


def test_ranks_save_when_the_front_is_killed(tmp_path: Path) -> None:
    process = front(tmp_path, WAITS)
    until(lambda: are_up(tmp_path))
    process.kill()
    process.wait()
    until(lambda: not processes_of(tmp_path))
    for rank in (0, 1):
        assert "saved\n" in (tmp_path / f"logs/rank-{rank}.log").read_text()


def test_ranks_that_do_not_stop_are_ended(tmp_path: Path) -> None:
    """A second Ctrl-C is meant by force."""
    process = front(tmp_path, "trap '' TERM INT; echo up; while :; do sleep .1; done")
    until(lambda: are_up(tmp_path))

    def has_ended_by_signal() -> bool:  # two at once may be one to the kernel
        process.send_signal(signal.SIGINT)
        return process.poll() is not None

    until(has_ended_by_signal)
    process.communicate()
    assert process.returncode != 0


def test_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """After a failure without the hosts that were lost; not after the recipe's own mistake."""
    monkeypatch.setattr(front_module, "COLLECT_S", 1.0)
    once = f"if [ $RANK = 1 -a ! -e {tmp_path}/once ]; then touch {tmp_path}/once; "
    # a loader process, say, that does not notice: it is ended with the job as well
    stays = f"bash -c ': {tmp_path}; while :; do sleep .1; done'"
    left_out: list[frozenset[str]] = []

    def render(lost: frozenset[str]) -> Command:
        left_out.append(lost)
        return job(tmp_path, once + f"kill -KILL $PPID; {stays}; fi; sleep 1")

    supervise.run(render, max_restarts=1)
    assert left_out == [frozenset(), {"host-b"}]
    assert "rank 1 on host-b went first" in capfd.readouterr().err
    assert (tmp_path / "logs/rank-0.log").read_text().count("--- ") == 2
    left_out.clear()
    with pytest.raises(LaunchError) as failure:
        supervise.run(lambda lost: job(tmp_path, "echo 'x: error: wrong'; exit 2"), max_restarts=5)
    assert failure.value.exit_code == 2 and "wrong" in str(failure.value)


def test_hosts_that_are_left_may_not_share_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last sentence still says who went first, and the exit code is of no mistake."""
    monkeypatch.setattr(front_module, "COLLECT_S", 1.0)

    def render(lost: frozenset[str]) -> Command:
        if lost:
            raise RecipeError("2 processes can't share the batch")
        return job(tmp_path, "if [ $RANK = 1 ]; then kill -KILL $PPID; fi; sleep 1")

    says = r"rank 1 on host-b went first.*2 processes can't"
    with pytest.raises(LaunchError, match=says) as failure:
        supervise.run(render, max_restarts=1)
    assert failure.value.exit_code not in (0, 2)


@pytest.mark.parametrize(
    ("fate", "code", "says"),
    [
        ("exit 3", 3, "exit code 3"),
        ("kill -KILL $PPID", allocation.LOST_HOST, "its guard is gone"),
        ("exit 0", 0, ""),
    ],
)
def test_within_a_slurm_job(
    fate: str,
    code: int,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A lost host is no failure: Slurm replaces it."""
    monkeypatch.setattr(front_module, "COLLECT_S", 1.0)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho 127.0.0.1\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "host")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "2")
    job_words = job(tmp_path, f"if [ $RANK = 1 ]; then {fate}; fi; sleep .2").words
    recipe = ["--config", "quickstart", "--run", str(tmp_path), "--stall-s", "0"]
    assert allocation.main([*recipe, "--", *job_words]) == code
    assert says in capfd.readouterr().err
    assert (tmp_path / "logs/rank-1.log").exists()
    # once more without a checkpoint, and a lost host is a failure; with one it is not
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    if code == allocation.LOST_HOST:
        assert allocation.main([*recipe, "--", *job_words]) not in (0, code)
    if code == 0:
        assert allocation.main([*recipe, "--", *job_words]) == 1
        assert "stopped twice before anything new was published" in capfd.readouterr().err
    publishes = f"mkdir -p {tmp_path}/checkpoints/step-00000004; {fate}"
    job_words = job(tmp_path, f"if [ $RANK = 1 ]; then {publishes}; fi; sleep .2").words
    assert allocation.main([*recipe, "--", *job_words]) == code


def test_a_stranger_gets_no_answer(tmp_path: Path) -> None:
    """Whoever else calls the front's port is no rank."""
    process = front(tmp_path, WAITS)
    until(lambda: are_up(tmp_path))
    environ = Path(f"/proc/{processes_of(tmp_path)[0]}/environ").read_bytes().decode()
    found = re.search(r"CONVNEXT_YOLO_FRONT=127.0.0.1:(\d+):", environ)
    assert found
    with socket.create_connection(("127.0.0.1", int(found[1])), timeout=30) as stranger:
        stranger.sendall(b'{"type": "hello", "token": "x", "rank": 0, "host": "h", "pid": 1}\n')
        assert stranger.recv(1) == b""
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_reasons() -> None:
    lines = ["Traceback:", "[rank3]: torch.OutOfMemoryError: CUDA out of memory", "  bye"]
    assert output.reason(1, lines) == "exit code 1: torch.OutOfMemoryError: CUDA out of memory"
    at_exit = ["Exception ignored in: <function Loader.__del__>", "Traceback:", "TypeError: None"]
    in_thread = ["Exception in thread Thread-3 (_pin_memory):", "Traceback:", "EOFError"]
    for noise in (at_exit, in_thread):
        assert output.reason(1, [*lines, *noise]) == output.reason(1, lines)
        assert output.reason(1, [*noise, *lines]) == output.reason(1, lines)
    assert output.reason(1, in_thread) == "exit code 1: EOFError"
    assert output.reason(7, []) == "exit code 7: it said nothing"
    assert output.reason(-6, ["x"]) == "killed by SIGABRT"
