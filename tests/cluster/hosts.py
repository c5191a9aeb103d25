"""Hosts that are namespaces: each has its own address, name, processes, /dev/shm and /run.

Everything else of the file system is the machine's, as with the shared file system of a cluster.

Nothing outlives its owner. A host's init and the switch read a pipe that the owner holds, and end
when it closes; with an init all processes of its host end, with the last process the namespaces,
and with those the interfaces and mounts in them. Addresses lie in namespaces only, so clusters
stand side by side, and the machine's own network is not touched.
"""

from __future__ import annotations

import importlib.metadata
import os
import signal
import string
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

NETWORK = "10.77.0"
HOSTS_MAX = len(string.ascii_uppercase)
# A disk of the host alone, and small enough that a test can fill it.
SCRATCH = Path("/run/scratch")
SCRATCH_MIB = 64

# bash, since it reaps the orphans that every init inherits. /etc comes before /run, where its
# resolv.conf may point.
_INIT = """
set -e
hostname "$1"
for file in "$2"/etc/*; do mount --bind "$file" "/etc/${file##*/}"; done
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t tmpfs -o mode=755 run /run
mkdir -p /run/lock /run/sshd /run/munge /run/slurmd "$3"
mount -t tmpfs cgroup /sys/fs/cgroup
mount -t tmpfs -o mode=1777,size="$4"m scratch "$3"
ip link set lo up
ipv6=/proc/sys/net/ipv6/conf/default/disable_ipv6
if [ -e $ipv6 ]; then echo 1 >$ipv6; fi
echo ready
set +e
read
"""
_SWITCH = "ip link add name switch type bridge forward_delay 0 && ip link set switch up && exec cat"


class ClusterError(RuntimeError):
    """The cluster cannot be built, or did not come to a state in time."""


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 30) -> None:
    """Looks until the condition is true; raises ClusterError when it takes too long."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise ClusterError(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.02)  # between two looks


class HostProcess(subprocess.Popen[str]):
    """A process on a host. Signals go to it, and its return code is that of any Popen.

    `pid` is the nsenter that stands for it here; -9 is also what the loss of the host looks like.
    """

    def send_signal(self, number: int) -> None:
        while self.poll() is None:
            if children := _children(self.pid):
                os.kill(children[0], number)
                return
            time.sleep(0.005)  # nsenter has not forked yet


class Switch:
    """The network between the hosts: a bridge in a namespace that has nothing else."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", _SWITCH], stdin=subprocess.PIPE
        )
        wait_for(self._is_up, "the switch comes up")

    def _is_up(self) -> bool:
        if self._process.poll() is not None:
            raise ClusterError("the switch could not be made; see above")
        devices = Path(f"/proc/{self._process.pid}/net/dev").read_text()
        # before unshare() the process shows the machine's network
        own = os.readlink(f"/proc/{self._process.pid}/ns/net") != os.readlink("/proc/self/ns/net")
        return own and "switch:" in devices

    def plug(self, number: int, init: int) -> None:
        """Gives the host of this init an eth0 that is connected."""
        end = f"name eth0 address 02:00:0a:4d:00:{number:02x} netns {init}"
        self._ip(f"link add name host{number} type veth peer {end}").check_returncode()
        self._ip(f"link set host{number} master switch up").check_returncode()

    def unplug(self, number: int) -> None:
        """Removes the host's interface, unless the kernel has done so after its last process."""
        self._ip(f"link delete host{number}")
        if f"host{number}" in self._ip("-brief link").stdout:
            raise ClusterError(f"host{number} is still on the switch")

    def _ip(self, words: str) -> subprocess.CompletedProcess[str]:
        enter = ["nsenter", f"--net=/proc/{self._process.pid}/ns/net"]
        return subprocess.run([*enter, "ip", *words.split()], capture_output=True, text=True)

    def close(self) -> None:
        _close(self._process)


class Host:
    """One host of a cluster; `number` counts from 1."""

    def __init__(self, number: int, folder: Path, environment: Mapping[str, str]):
        self.number = number
        self.name = f"node{string.ascii_uppercase[number - 1]}"
        self.address = f"{NETWORK}.{number}"
        self.environment = environment
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self.init = 0

    @property
    def _pid_file(self) -> Path:
        return self._folder / f"{self.name}.pid"

    @property
    def alive(self) -> bool:
        return self._process is not None

    def boot(self, switch: Switch) -> None:
        """Makes the namespaces and the network; nothing runs on the host yet but its init."""
        words = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--mount-proc"]
        words += ["--fork", "--kill-child", "bash", "-c", _INIT, "init"]
        words += [self.name, str(self._folder), str(SCRATCH), str(SCRATCH_MIB)]
        log = self._folder / f"log/init-{self.name}.log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        assert process.stdout is not None
        with process.stdout as output:  # it says nothing more
            if output.readline() != "ready\n":
                _close(process)
                raise ClusterError(f"{self.name} could not be made: {log.read_text().strip()}")
        self._process, (self.init,) = process, _children(process.pid)
        self._pid_file.write_text(str(self.init))
        switch.plug(self.number, self.init)
        self.run(["ip", "address", "add", f"{self.address}/24", "dev", "eth0"])
        self.set_link("up")

    def kill(self) -> None:
        """kill -9 of the init: every process of the host is gone when this returns."""
        if self._process is not None:
            os.kill(self.init, signal.SIGKILL)
            _close(self._process)
            self._process = None

    def set_link(self, state: str) -> None:
        """Sets eth0 "up" or "down"."""
        words = ["nsenter", f"--net=/proc/{self.init}/ns/net", "ip", "link", "set", "eth0", state]
        subprocess.run(words, check=True)

    def link_is_up(self) -> bool:
        """Whether eth0 is up, as after boot."""
        return " UP " in self.run(["ip", "-brief", "link", "show", "dev", "eth0"])

    def attach(self) -> None:
        """Takes over a host that another process has booted, to enter it; it stays the other's."""
        self.init = int(self._pid_file.read_text())

    def enter(self, words: Sequence[str | Path], cwd: str | Path | None = None) -> list[str]:
        """The command line that runs these words on the host, in the folder (default: ours)."""
        namespaces = ("--mount", "--uts", "--ipc", "--net", "--pid")
        nsenter = ["nsenter", "--target", str(self.init), *namespaces]
        return [*nsenter, "env", "--chdir", str(cwd or os.getcwd()), *map(str, words)]

    def start(
        self,
        words: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        output: Path | None = None,
    ) -> HostProcess:
        """Starts a program, with the cluster's environment and `env` on top of this process's.

        stdout and stderr go together to a pipe, or to the end of the file `output`.
        """
        environment = {**os.environ, **self.environment, **(env or {})}
        with ExitStack() as stack:
            sink = stack.enter_context(output.open("a")) if output else subprocess.PIPE
            return HostProcess(
                self.enter(words, cwd),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                start_new_session=True,
            )

    def run(
        self,
        words: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        timeout_s: float = 60,
    ) -> str:
        """Runs a program to its end; returns what it printed, raises ClusterError if it failed."""
        process = self.start(words, env, cwd)
        try:
            printed, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            process.kill()
            printed, _ = process.communicate()
            said = f"{self.name}: {_line(words)} took more than {timeout_s:g} s and said\n{printed}"
            raise ClusterError(said) from error
        if process.returncode:
            said = (
                f"{self.name}: {_line(words)} ended with {process.returncode} and said\n{printed}"
            )
            raise ClusterError(said)
        return printed

    def processes(self, word: str = "") -> dict[int, str]:
        """Living processes with the word in their command line: pid on this machine → line."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                here = os.readlink(folder / "ns/pid") == os.readlink(f"/proc/{self.init}/ns/pid")
                line = (
                    (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
            except OSError:  # it has ended meanwhile
                continue
            # a zombie has no command line
            if here and line and word in line and int(folder.name) != self.init:
                found[int(folder.name)] = line.strip()
        return found

    def listens(self, port: int) -> bool:
        """Whether a TCP port is open, without a connection that a service would log."""
        rows = Path(f"/proc/{self.init}/net/tcp").read_text().splitlines()[1:]
        rows += Path(f"/proc/{self.init}/net/tcp6").read_text().splitlines()[1:]
        listen = "0A"
        return any(r.split()[1].endswith(f":{port:04X}") and r.split()[3] == listen for r in rows)


def _children(pid: int) -> list[int]:
    try:
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it has ended
        return []


def _close(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Ends what reads this pipe, and waits for it."""
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


def _line(words: Sequence[str | Path]) -> str:
    return " ".join(map(str, words))


@contextmanager
def instead(host: Host, path: Path, text: str, folder: Path) -> Iterator[None]:
    """Another file in the place of one, on one host alone."""
    (folder / "instead").mkdir(exist_ok=True)
    other = folder / "instead" / path.name
    other.write_text(text)
    host.run(["mount", "--bind", other, path])
    try:
        yield
    finally:
        host.run(["umount", path])


def other_deepspeed(host: Host, version: str, folder: Path) -> AbstractContextManager[None]:
    """Another version of DeepSpeed on one host, as far as its metadata says."""
    found = importlib.metadata.distribution("deepspeed")
    metadata = Path(str(found.locate_file(f"deepspeed-{found.version}.dist-info/METADATA")))
    text = f"Metadata-Version: 2.1\nName: deepspeed\nVersion: {version}\n"
    return instead(host, metadata, text, folder)
