"""Hosts that are started one by one: the front of the first judges all ranks. Ranks are scripts."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from convnext_yolo.launch import launchers
from convnext_yolo.launch.addresses import free_port
from convnext_yolo.launch.elastic import Hosts, torchrun

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

# The front of a host with two ranks, as its own process: HOST PORT FOLDER SCRIPT MORE
FRONT = """
import sys
from pathlib import Path
from convnext_yolo.launch.command import Command, FirstHost, Ranks
from convnext_yolo.launch.supervision import front, supervise
front.COLLECT_S = 3.0
host, port, folder, script, more = sys.argv[1:]
guard = (
    "import sys; from convnext_yolo.launch.supervision.guard import guard_command; "
    "sys.exit(guard_command(['bash', '-c', sys.argv[1]]))"
)
first = 2 * int(host)
launcher = (
    f'for RANK in {first} {first + 1}; do export RANK; "$0" -c "$1" "$2" & ranks="$ranks $!"; done;'
    'code=0; for rank in $ranks; do wait $rank || code=$?; done; exit $code'
)
words = ["bash", "-c", launcher, sys.executable, guard, script]
names = {first + k: f"host-{host}" for k in (0, 1)}
job = FirstHost("127.0.0.1", int(port), "the same", host == "0")
command = Command(words, ranks=Ranks(names, Path(folder) / "logs", count=2, first_host=job))
try:
    supervise.run(lambda lost: command, **eval(more))
except Exception as error:
    sys.exit(f"END {error.exit_code} {error}")
print("END 0")
"""
WAITS = (
    "trap 'echo saved; exit ${CODE:-0}' TERM INT USR1 HUP; echo up; "
    "while :; do sleep .1 & wait; done"
)


HERE = socket.gethostname()  # what host 1 calls itself to host 0


class Pair:
    """Two hosts, and the ends of their fronts."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.fronts: dict[int, subprocess.Popen[str]] = {}

    def start(self, host: int, script: str, more: str = "{}") -> None:
        words = [sys.executable, "-c", FRONT, str(host), str(self.port), str(self.folder)]
        self.fronts[host] = subprocess.Popen(
            [*words, f": {self.folder}; {script}", more],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def both(self, script: str, more: str = "{}") -> None:
        for host in (0, 1):
            self.start(host, script, more)

    def end(self, host: int) -> tuple[int, str]:
        """Its exit code, as its command would give it, and its last sentence."""
        output, _ = self.fronts[host].communicate(timeout=60)
        found = re.search(r"END (\d+) ?(.*)", output)
        assert found, output
        return int(found[1]), found[2]

    def log(self, rank: int) -> str:
        path = self.folder / f"logs/rank-{rank}.log"
        return path.read_text() if path.exists() else ""

    def are_up(self) -> bool:
        return all("up\n" in self.log(rank) for rank in range(4))

    def are_judged(self) -> bool:
        """Whether each guard of host 1 has been heard by host 0."""
        wanted = f"{self.port:04X}"
        rows = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
        connected = [row.split() for row in rows.splitlines()[1:] if " 01 " in row]
        return sum(row[1].endswith(f":{wanted}") for row in connected) == 2

    def processes(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if f": {self.folder};" in path.read_bytes().decode(errors="replace"):
                    found.append(int(path.parent.name))
        return found


def until(condition: Callable[[], object], limit_s: float = 40.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come about"
        time.sleep(0.02)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """Two hosts, of which nothing is left."""
    hosts = Pair(tmp_path)
    try:
        yield hosts
        until(lambda: not hosts.processes())
    finally:
        for process in hosts.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def up_then(what: str, *ranks: int, folder: Path) -> str:
    """Ranks that wait until all are up, then some do something; the others know nothing of it."""
    marks = f"touch {folder}/up-$RANK; until [ `ls {folder}/up-? | wc -l` = 4 ]; do sleep .1; done"
    cases = "|".join(map(str, ranks))
    return f"{marks}; case $RANK in {cases}) sleep 2; {what};; esac; exec sleep 999"


def test_a_failure_ends_every_host_with_the_same_sentence(pair: Pair, tmp_path: Path) -> None:
    """Also those whose own ranks have noticed nothing, as NCCL's may for ten minutes."""
    pair.both(up_then("echo 'ValueError: no good'; exit 3", 2, folder=tmp_path))
    wanted = f"rank 2 on {HERE} went first: exit code 3: ValueError: no good"
    for host in (0, 1):
        code, sentence = pair.end(host)
        assert code == 3 and wanted in sentence


def test_a_failure_of_the_first_host(pair: Pair, tmp_path: Path) -> None:
    """The other host's consequence, though it is said there first, is none of the reason."""
    script = (
        f"if [ $RANK = 2 ]; then until [ -e {tmp_path}/gone ]; do sleep .1; done; "
        "echo 'RuntimeError: Connection reset by peer'; exit 1; fi; "
    )
    end = f"echo 'x train: error: a mistake'; touch {tmp_path}/gone; exit 2"
    pair.both(script + up_then(end, 1, folder=tmp_path).replace("= 4", "= 3"))
    for host in (0, 1):
        code, sentence = pair.end(host)
        assert code == 2 and "rank 1 on host-0 went first: exit code 2: x train: error" in sentence


def test_a_host_that_is_gone_ends_the_others(pair: Pair) -> None:
    pair.both(WAITS)
    until(lambda: pair.are_up() and pair.are_judged())
    front = pair.fronts[1]
    os.killpg(front.pid, signal.SIGKILL)
    for process in pair.processes():
        environ = Path(f"/proc/{process}/environ")
        with contextlib.suppress(OSError):
            if b"RANK=2" in environ.read_bytes() or b"RANK=3" in environ.read_bytes():
                os.kill(process, signal.SIGKILL)
    code, sentence = pair.end(0)
    assert code and re.search(f"rank [23] on {HERE} went first: its guard is gone", sentence)


def test_a_first_host_that_is_gone_ends_the_others(pair: Pair) -> None:
    pair.both(WAITS)
    until(lambda: pair.are_up() and pair.are_judged())
    pair.fronts[0].kill()
    pair.fronts[0].communicate()
    code, sentence = pair.end(1)
    assert code == 1 and f"the command on host 0 (127.0.0.1:{pair.port}) is gone" in sentence
    assert "saved\n" in pair.log(2)


@pytest.mark.parametrize("host", [0, 1])
def test_a_signal_to_one_is_one_to_all(pair: Pair, host: int) -> None:
    pair.both(f"CODE=99; {WAITS}")
    until(lambda: pair.are_up() and pair.are_judged())
    pair.fronts[host].send_signal(signal.SIGTERM)
    for one in (0, 1):
        code, sentence = pair.end(one)
        assert code == 99 and "stopped by SIGTERM" in sentence
    assert all("saved\n" in pair.log(rank) for rank in range(4))


def test_restarts_meet_again(pair: Pair, tmp_path: Path) -> None:
    """A host that is quicker to start again than the first waits for it."""
    fails = (
        f"if [ ! -e {tmp_path}/once ]; then touch {tmp_path}/once; exit 3; fi; echo good; exit 0"
    )
    again = f"if [ -e {tmp_path}/once ]; then sleep 2; echo good; exit 0; fi; "
    pair.both(again + up_then(fails, 1, folder=tmp_path), "{'max_restarts': 1}")
    assert [pair.end(host) for host in (0, 1)] == [(0, ""), (0, "")]
    assert all("good\n" in pair.log(rank) for rank in range(4))


def test_a_late_first_host(pair: Pair, tmp_path: Path) -> None:
    """Launchers that do not meet start their ranks at once."""
    pair.start(1, WAITS)
    until(lambda: "up\n" in pair.log(2) and "up\n" in pair.log(3))
    pair.start(0, "echo 'ValueError: no good'; sleep 4; exit 3")
    for host in (0, 1):
        code, sentence = pair.end(host)
        assert code == 3 and "on host-0 went first: exit code 3: ValueError" in sentence


def test_a_hang_is_that_of_the_host_behind(pair: Pair) -> None:
    """Each host by itself could not tell: its own ranks are all alike."""
    beats = (
        "import os, time; from convnext_yolo.recipes.heartbeat import heartbeat; h = heartbeat(); "
        "h.step = 4; h.beat('data'); "
        "os.environ['RANK'] == '3' or h.beat('forward'); time.sleep(999)"
    )
    pair.both(f'exec {sys.executable} -c "{beats}"', "{'stall_s': 8}")
    for host in (0, 1):
        code, sentence = pair.end(host)
        assert code and f"rank 3 on {HERE} went first: no rank got on for" in sentence


def test_a_port_that_is_taken_leaves_each_host_alone(pair: Pair) -> None:
    with socket.create_server(("", pair.port)):
        pair.start(0, "exit 0")
        output, _ = pair.fronts[0].communicate(timeout=60)
    assert "END 0" in output and f"port {pair.port}: Address already in use" in output


def test_launchers_by_hand_say_where_the_first_is(tmp_path: Path) -> None:
    """The same port and token for each host, whatever host 0 is called there."""
    options = ["--run", str(tmp_path / "run"), "--batch.global", "32"]
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("a slots=1\nb slots=1\n")
    made = []
    for host, name in ((0, "localhost"), (1, "127.0.0.1")):
        hosts = Hosts(2, host, 1, f"{name}:29500", "127.0.0.1")
        made.append(torchrun(["quickstart"], "auto", options, hosts, "id").ranks)
        by_hand = launchers.deepspeed(["quickstart"], "auto", options, hostfile, node_rank=host)
        made.append(by_hand.ranks)
    firsts = [ranks.first_host for ranks in made if ranks and ranks.first_host]
    assert [first.is_this for first in firsts] == [True, True, False, False]
    assert {first.port for first in firsts} == {29600}
    assert len({first.token for first in firsts}) == 1
    alone = torchrun(["quickstart"], "auto", options, Hosts(processes=1), "id").ranks
    assert alone and alone.first_host is None
