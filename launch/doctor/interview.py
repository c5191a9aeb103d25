"""Asking hosts: the probes' sessions from the first word to the last.

Each question goes to all hosts before the first answer is waited for. A host that falls silent is
a finding, and is asked nothing more.
"""

from __future__ import annotations

import os
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...recipes.config import Recipe
from ..slurm_job import srun_words
from ..supervision.processes import allow_many_files
from .facts import HostFacts, Meeting, RecipeFacts
from .findings import Finding
from .machine import check_skew
from .meeting import bandwidth_gbit
from .network import check_address, check_meeting, check_name, check_port, check_start
from .session import MODULE, ProbeError, ProbeSession, Session, greet, ssh_words
from .setup import HERE, Examination, Say, Setup

# Host, and the command that starts a probe there (None: on this machine), to a session.
Open = Callable[[str, list[str] | None], Session]
CLOCK_S, FACTS_S, PORT_S, MEET_S, RECIPE_S = 10.0, 90.0, 20.0, 60.0, 120.0


def open_session(host: str, words: list[str] | None) -> Session:
    """A probe in a process of its own."""
    return ProbeSession(words)


class Interview:
    """The probes on all hosts; all of them end with the `with`.

    Args:
        hosts: their slots, the first host's ranks first.
        setup: what is to be run.
        environment: what ranks are given.
        configs: recipe files, by absolute paths.
        say: is told what takes longer.
        start: starts a probe.
    """

    def __init__(
        self,
        hosts: Mapping[str, int],
        setup: Setup,
        environment: Mapping[str, str],
        configs: Sequence[str],
        say: Say,
        start: Open,
    ):
        self.hosts, self.setup, self.environment = hosts, setup, environment
        self.configs, self.say, self.start = configs, say, start
        self.sessions: dict[str, Session] = {}
        self.recipe_session: Session | None = None

    def __enter__(self) -> Interview:
        allow_many_files()  # some for each host
        return self

    def __exit__(self, *_: Any) -> None:
        for session in self.sessions.values():
            session.close()
        if self.recipe_session:
            self.recipe_session.close()

    def ask_about_recipe(self, configs: Sequence[str], world_size: int) -> None:
        """Lets a process here find out what takes torch, beside all that follows."""
        self.recipe_session = self.start(HERE, None)
        request = {"configs": list(configs), "options": list(self.setup.options)}
        self.recipe_session.send("recipe", **request, world_size=max(1, world_size))

    def recipe_facts(self, found: Examination) -> RecipeFacts | None:
        """What came of it."""
        assert self.recipe_session is not None
        self.say("building the model out of shapes")
        try:
            greet(self.recipe_session)
            return RecipeFacts.model_validate(self.recipe_session.receive(RECIPE_S))
        except ProbeError as silence:
            found.notes.append(f"the recipe's model could not be built here: {silence}")
            return None

    def ask_for_facts(self, found: Examination, recipe: Recipe | None) -> None:
        """Starts the probes, and gathers the facts of all hosts that answer."""
        is_far = self.setup.is_far
        if is_far:
            self.say(f"calling {len(self.hosts)} host(s)")
        for host in self.hosts:
            self.sessions[host] = self.start(host, self._words(host) if is_far else None)
        for host, session in list(self.sessions.items()):
            try:
                greet(session)
            except ProbeError as silence:
                by_srun = self.setup.slurm
                finding = check_start(host, silence, sys.executable, by_srun)
                self._drop(host, finding, found)
        settled = self._ask_all(
            "settle", CLOCK_S, found, folder=os.getcwd(), environment=dict(self.environment)
        )
        for host, answer in settled.items():
            if answer["error"]:
                found.findings.append(_no_folder(host, answer["error"]))
        if is_far:
            self._ask_for_clocks(found)
        self.say("reading shards, disks and devices")
        request: dict[str, Any] = {"configs": list(self.configs)}
        request |= {"options": list(self.setup.options), "resume": self.setup.resume}
        if len(self.sessions) > 1 and recipe:
            request["token"] = self._leave_token(recipe)
        for host, answer in self._ask_all("facts", FACTS_S, found, **request).items():
            found.facts[host] = HostFacts.model_validate(answer)

    def _words(self, host: str) -> list[str]:
        # What the interpreter needs before the probe can be asked to set anything.
        if self.setup.slurm:  # which hands on the whole environment
            return srun_words(host, [sys.executable, "-m", MODULE])
        early = {name: os.environ[name] for name in ("PYTHONPATH",) if os.environ.get(name)}
        return ssh_words(host, sys.executable, self.setup.ssh_port, early)

    def _leave_token(self, recipe: Recipe) -> str:
        session = next(iter(self.sessions.values()))
        session.send("leave_token", run=recipe.run, name=f".doctor-{secrets.token_hex(8)}")
        try:
            return str(session.receive(CLOCK_S).get("token", ""))
        except ProbeError:  # `facts` will tell
            return ""

    def _ask_for_clocks(self, found: Examination) -> None:
        for host, session in self.sessions.items():
            asked_s = time.time()
            session.send("time")
            try:
                answer = session.receive(CLOCK_S)
            except ProbeError:  # the next question will tell
                continue
            took_s = time.time() - asked_s
            skew_s = float(answer["time_s"]) - asked_s - took_s / 2
            found.findings += check_skew(host, skew_s, took_s / 2)

    def _ask_all(
        self, question: str, timeout_s: float, found: Examination, **details: Any
    ) -> dict[str, dict[str, Any]]:
        """The answers of all hosts; one that gives none is a finding."""
        for session in self.sessions.values():
            session.send(question, **details)
        return self._answers(question, timeout_s, found)

    def _answers(
        self, question: str, timeout_s: float, found: Examination
    ) -> dict[str, dict[str, Any]]:
        deadline_s = time.monotonic() + timeout_s
        answers = {}
        for host, session in list(self.sessions.items()):
            try:
                answers[host] = session.receive(max(0.1, deadline_s - time.monotonic()))
            except ProbeError as silence:
                self._drop(host, _silent(host, question, silence), found)
        return answers

    def _drop(self, host: str, finding: Finding, found: Examination) -> None:
        found.findings.append(finding)
        self.sessions.pop(host).close()

    def look_at_master(self, found: Examination) -> None:
        """Where ranks meet that are started by hand: the port on host 0, its name on all."""
        session, setup = self.sessions.get(HERE), self.setup
        if setup.node_rank is None or session is None:
            return
        address, port = setup.master_address or "localhost", setup.master_port
        is_first = setup.node_rank == 0
        session.send("master", address=address, port=port, is_first=is_first)
        try:
            answer = session.receive(PORT_S)
        except ProbeError as silence:
            self._drop(HERE, _silent(HERE, "master", silence), found)
            return
        found.findings += check_name(HERE, address, str(answer["unknown"]))
        if is_first:
            range_ = found.facts[HERE].port_range
            found.findings += check_port(
                HERE, port, str(answer["busy"]), range_, setup.master_option
            )

    def try_to_meet(self, found: Examination, master: str, is_worth_it: bool) -> None:
        """The port of the first host, then, if it is worth it, an all-reduce over all hosts."""
        if not self.setup.is_far:
            return
        port, hosts = self.setup.master_port, list(self.sessions)
        first = hosts[0]
        self.sessions[first].send("listen", port=port)
        try:
            busy = str(self.sessions[first].receive(PORT_S)["error"])
        except ProbeError as silence:
            self._drop(first, _silent(first, "listen", silence), found)
            return
        ports = check_port(first, port, busy, found.facts[first].port_range)
        found.findings += ports
        if busy or len(hosts) == 1:
            return
        answers = self._ask_all("connect", PORT_S, found, address=master, port=port)
        blocked = check_address(first, master, port, {h: a["error"] for h, a in answers.items()})
        found.findings += blocked
        if is_worth_it and not blocked and len(answers) == len(hosts):
            self._all_reduce(found, master, port)

    def _all_reduce(self, found: Examination, master: str, port: int) -> None:
        hosts = list(self.sessions)
        self.say(f"an all-reduce over {len(hosts)} hosts")
        use_gpu = all(found.facts[host].torch_gpus for host in hosts)
        request = {"address": master, "port": port, "hosts": len(hosts), "use_gpu": use_gpu}
        for rank, session in enumerate(self.sessions.values()):
            session.send("meet", rank=rank, **request)
        answers = self._answers("meet", MEET_S, found)
        meetings = {h: Meeting.model_validate(answer) for h, answer in answers.items()}
        found.findings += check_meeting(meetings, use_gpu)
        found.meeting = next(iter(meetings.values()), None)
        if found.meeting and not found.meeting.error and len(meetings) == len(hosts):
            found.bandwidth_gbit = bandwidth_gbit(found.meeting, len(hosts))
            found.notes.append(
                f"all-reduce over {len(hosts)} hosts ({found.meeting.backend}): "
                f"{found.bandwidth_gbit:.2f} Gbit/s, {found.meeting.latency_s * 1e3:.2f} ms"
            )


def _no_folder(host: str, reason: str) -> Finding:
    what = f"{Path.cwd()} is not there ({reason})"
    why = "ranks are started in this folder, and paths of the recipe may begin in it"
    mend = "start from a folder on a file system that all hosts share"
    return Finding("error", host, what, why, mend)


def _silent(host: str, question: str, silence: ProbeError) -> Finding:
    doing = {
        "facts": "reading shards, disks and devices",
        "meet": "the all-reduce",
        "connect": "calling the first host",
        "listen": "taking the master port",
        "master": "looking for the place to meet",
    }.get(question, question)
    what = f"no answer while {doing}: {silence.said}"
    why = "a rank would hang or end there as well"
    words = shlex.join([Path(sys.executable).name, "-m", "convnext_yolo.launch.doctor.probe"])
    return Finding("error", host, what, why, f"look at the host; `{words}` there is what was asked")
