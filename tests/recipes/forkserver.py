"""Ranks that start at once: a process that has imported everything forks them on demand.

Importing torch, DeepSpeed and timm takes ten seconds; the tests that kill ranks at many moments
would spend their hours on that. The server computes nothing itself, so its children begin as fresh
as a new interpreter. What a launcher does, they get: the variables of the world, and when one of
them fails, the others are killed.

    python forkserver.py        # reads jobs, one JSON object a line; see `ForkServer`
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Job:
    """Some ranks at work."""

    server: ForkServer
    processes: list[int]
    log: Path
    exit_codes: list[int] | None = None

    def wait(self) -> list[int]:
        """Waits for all ranks; the exit code of each, negative for a signal."""
        if self.exit_codes is None:
            self.exit_codes = self.server.read()["exit_codes"]
        return self.exit_codes

    def wait_for_line(self, beginning: str) -> None:
        """Waits until a line that begins so is printed."""
        deadline_s = time.monotonic() + 200
        while f"\n{beginning}" not in f"\n{self.output}":
            assert time.monotonic() < deadline_s, self.output
            time.sleep(0.01)  # between two looks

    @property
    def output(self) -> str:
        """What all ranks have printed."""
        return self.log.read_text(errors="replace")


class ForkServer:
    """Starts ranks; one job at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        )
        assert self.read() == {"ready": True}

    def start(self, ranks: int, *words: str, **environment: str) -> Job:
        """Starts `python WORDS…` as a world of some ranks."""
        assert self.process.stdin is not None
        descriptor, log = tempfile.mkstemp(suffix=".log")
        os.close(descriptor)
        job = {"ranks": ranks, "words": words, "log": log, "environment": environment}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return Job(self, self.read()["processes"], Path(log))

    def run(self, ranks: int, *words: str, **environment: str) -> str:
        """Runs to the end; returns what was printed."""
        job = self.start(ranks, *words, **environment)
        assert job.wait() == [0] * ranks, job.output
        return job.output

    def read(self) -> Any:
        """The server's next answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the fork server has ended"
        return json.loads(line)

    def close(self) -> None:
        """Ends it."""
        self.process.kill()
        self.process.wait()


def _serve() -> None:
    # Answers go to the pipe; what libraries print while they are imported does not.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    import accelerate  # noqa: F401
    import deepspeed.ops.op_builder.all_ops

    # With it comes torch's compiler, which costs each engine a second or two.
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    import pycocotools.cocoeval  # noqa: F401
    import timm  # noqa: F401

    import convnext_yolo.launch.cli
    import convnext_yolo.recipes.train  # noqa: F401

    gc.freeze()  # what is here stays: no child need go through it, page by page
    answer({"ready": True})
    for line in sys.stdin:
        job = json.loads(line)
        port = _free_port()
        processes = [_fork(job, rank, port) for rank in range(job["ranks"])]
        answer({"processes": processes})
        answer({"exit_codes": _collect(processes)})


def _fork(job: dict[str, Any], rank: int, port: int) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(job["ranks"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **job["environment"],
        }
        code = _run(job["words"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Threads of DeepSpeed's and gloo's may not outlive an orderly end.
        os._exit(code)


def _run(words: Sequence[str]) -> int:
    """What `python WORDS…` would do."""
    try:
        if words[0] == "-m":
            sys.argv = list(words[1:])
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _collect(processes: Sequence[int]) -> list[int]:
    codes: dict[int, int] = {}
    while len(codes) < len(processes):
        process, status = os.wait()
        codes[process] = os.waitstatus_to_exitcode(status)
        if codes[process]:
            for other in set(processes) - set(codes):
                os.kill(other, signal.SIGKILL)
    return [codes[process] for process in processes]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    _serve()
