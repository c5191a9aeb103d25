"""Two hosts that are this process: real probes, whose answers a test may change."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from convnext_yolo.launch.doctor.examine import examine_all
from convnext_yolo.launch.doctor.facts import PROTOCOL, Meeting
from convnext_yolo.launch.doctor.findings import Finding
from convnext_yolo.launch.doctor.interview import open_session
from convnext_yolo.launch.doctor.meeting import listen
from convnext_yolo.launch.doctor.probe import Probe
from convnext_yolo.launch.doctor.session import ProbeError, Session
from convnext_yolo.launch.doctor.setup import HERE, Examination, Setup

Answer = dict[str, Any]
# Changes the answer of one host to one question.
Change = Callable[[Answer], object]
HOSTS = ("nodeA", "nodeB")


class FakeSession:
    """A probe in this process, which stays in its folder and never joins a process group."""

    def __init__(self, host: str, changes: Mapping[tuple[str, str], Change]):
        self.host, self.changes, self.probe = host, changes, Probe()
        self.answers: list[Answer] = [{"protocol": PROTOCOL}]

    def send(self, question: str, **details: Any) -> None:
        if question == "settle":
            answer: Answer = {"error": ""}
        elif question == "meet":
            answer = Meeting(backend="gloo", size_bytes=2**20, seconds=0.01).model_dump()
        else:
            answer = self.probe.answer({"ask": question, **details})
        if question == "facts":
            answer.update(machine=self.host, address="10.77.0.1", shm_free_bytes=2**40)
        change = self.changes.get((self.host, question))
        if change:
            change(answer)
        self.answers.append(answer)

    def receive(self, timeout_s: float) -> Answer:
        answer = self.answers.pop(0)
        if "dies" in answer:
            raise ProbeError(answer["dies"], 1)
        return answer

    def close(self) -> None:
        self.probe.close()


@dataclass
class Scene:
    """A healthy set-up of two hosts with one rank each, to be broken in one place."""

    folder: Path
    recipe: dict[str, Any]
    setup: Setup
    changes: dict[tuple[str, str], Change] = field(default_factory=dict)
    held: list[socket.socket] = field(default_factory=list)  # ports
    real_ssh: bool = False  # probes are started by the `ssh` that is on the PATH

    @property
    def hostfile(self) -> Path:
        return self.folder / "hostfile"

    def set(self, key: str, value: object) -> None:
        """Sets a key of the recipe."""
        *path, last = key.split(".")
        section = self.recipe
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value

    def alter(self, **changes: Any) -> None:
        """Changes what the doctor is asked about."""
        self.setup = replace(self.setup, **changes)

    def on(self, host: str, question: str = "facts") -> Callable[[Change], None]:
        """Changes a host's answers."""

        def add(change: Change) -> None:
            self.changes[host, question] = change

        return add

    def fact(self, host: str, **facts: Any) -> None:
        """Replaces facts of a host."""
        self.changes[host, "facts"] = lambda answer: answer.update(facts)

    def program(self, name: str, text: str) -> None:
        """Puts a shell script on the PATH."""
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def write(self) -> None:
        """Writes the recipe as it is now."""
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(self.recipe))

    def _start(self, host: str, words: list[str] | None) -> Session:
        if self.real_ssh and host != HERE:
            return open_session(host, words)
        return FakeSession(host, self.changes)

    def examine(self) -> Examination:
        self.write()
        return examine_all(self.setup, lambda line: None, self._start)

    def findings(self) -> list[Finding]:
        return self.examine().findings


@contextmanager
def scene(folder: Path, recipe: Path) -> Iterator[Scene]:
    """The healthy set-up; its home, its programs and its folder are `folder`."""
    (folder / "bin").mkdir()
    before, variables = Path.cwd(), dict(os.environ)
    found = Scene(
        folder,
        yaml.safe_load(recipe.read_text()),
        Setup(
            configs=[str(folder / "recipe.yaml")],
            hostfile=folder / "hostfile",
            master_address="127.0.0.1",
            master_port=port_of_nobody(),
        ),
    )
    found.hostfile.write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    for name in ("ssh", "pdsh"):
        found.program(name, "exit 9")
    found.program("nvidia-smi", "echo No devices were found")
    for name in [n for n in variables if re.match(r"DS_|NCCL|GLOO|TP_|WANDB|COMET|.*proxy$", n)]:
        del os.environ[name]
    os.environ["HOME"] = str(folder)
    os.environ["PATH"] = f"{folder / 'bin'}:/usr/bin:/bin"
    os.chdir(folder)
    try:
        yield found
    finally:
        for port in found.held:
            port.close()
        os.chdir(before)
        os.environ.clear()
        os.environ.update(variables)


def port_of_nobody() -> int:
    """A free port that the kernel gives to nobody."""
    for port in range(20000 + os.getpid() % 5000, 32000):
        listener, _ = listen(port)
        if listener:
            listener.close()
            return port
    raise OSError("no port is free below 32000")
