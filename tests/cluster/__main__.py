"""`python -m tests.cluster up|shell|down`, from the root of the repository.

A background process holds the cluster and takes it down when it is told to. Should it be killed,
the hosts end with it, and `down` removes the files.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from .cluster import Cluster, environment
from .hosts import ClusterError, Host, wait_for

PROGRAM = "python -m tests.cluster"
_UP = "up\n"


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="A cluster on this machine.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="up|shell|down")
    up = commands.add_parser("up", help="build the cluster, in the background")
    hold = commands.add_parser("hold")  # what `up` starts
    for command in (up, hold):
        command.add_argument("--hosts", type=int, default=2, help="how many (default: 2)")
        command.add_argument("--no-slurm", action="store_true", help="ssh and pdsh only")
    shell = commands.add_parser("shell", help="a shell on a host, or a command that runs there")
    shell.add_argument("host", nargs="?", default="nodeA", help="default: nodeA")
    shell.add_argument("words", nargs=argparse.REMAINDER, metavar="command", help="default: bash")
    commands.add_parser("down", help="take the cluster down")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.gettempdir()) / "convnext-yolo-cluster"
    try:
        if options.command == "up":
            _up(folder, options.hosts, not options.no_slurm)
        elif options.command == "hold":
            _hold(folder, options.hosts, not options.no_slurm)
        elif options.command == "shell":
            _shell(folder, options.host, options.words)
        else:
            _down(folder)
    except ClusterError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    return 0


def _up(folder: Path, hosts: int, slurm: bool) -> None:
    words = [sys.executable, "-m", "tests.cluster", "hold", "--hosts", str(hosts)]
    words += [] if slurm else ["--no-slurm"]
    with subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as holder:
        assert holder.stdout is not None
        said = holder.stdout.readline()
        if said != _UP:
            said += holder.stdout.read()
            holder.wait()
            raise ClusterError(said.strip().removeprefix(f"{PROGRAM}: "))
        holder.stdout.close()
        holder.returncode = 0  # it lives on: `with` must not wait for it
    print(
        "\n".join(line for line in (folder / "etc/hosts").read_text().split("\n") if "node" in line)
    )
    print(f"hostfile {folder}/hostfile, logs {folder}/log")
    print(f"go on with `{PROGRAM} shell nodeA`, end with `{PROGRAM} down`")


def _hold(folder: Path, hosts: int, slurm: bool) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit())
    try:
        folder.mkdir(mode=0o755)
    except FileExistsError as error:
        raise ClusterError(f"{folder} is there: take that cluster down first") from error
    try:
        with Cluster(hosts, slurm, folder):
            (folder / "holder.pid").write_text(str(os.getpid()))
            print(_UP, end="", flush=True)
            signal.pause()
    finally:
        shutil.rmtree(folder)


def _shell(folder: Path, name: str, words: list[str]) -> None:
    for path in sorted(folder.glob("node?.pid")):
        host = Host(ord(path.stem[-1]) - ord("A") + 1, folder, environment())
        if name in (host.name, host.address):
            host.attach()
            command = host.enter(words or ["bash"])
            if not Path(f"/proc/{host.init}").exists():
                raise ClusterError(f"{name} is dead: take the cluster down")
            os.execvpe(command[0], command, {**os.environ, **environment()})
    raise ClusterError(f"there is no host {name}: `{PROGRAM} up` builds nodeA, nodeB and so on")


def _down(folder: Path) -> None:
    if not folder.exists():
        raise ClusterError("no cluster is up")
    holder = folder / "holder.pid"
    pid = int(holder.read_text()) if holder.exists() else 0
    if pid and b"tests.cluster" in _command_line(pid):
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not _command_line(pid), "the cluster goes down")
    elif folder.exists():
        shutil.rmtree(folder)  # its holder was killed


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return b""


if __name__ == "__main__":
    sys.exit(main())
