"""One job at a time trains into a folder."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from convnext_yolo.recipes import run_lock
from convnext_yolo.recipes.run_lock import NAME, RunBusyError, sole_writer

from .conftest import TinyRun
from .forkserver import ForkServer
from .short_runs import TRAIN, wait_for_step

HOLDER = """
import sys
import torch.distributed as dist
from pathlib import Path
from convnext_yolo.recipes.run_lock import sole_writer
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
with sole_writer(Path(sys.argv[1]), lambda: False):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that trains into this folder."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_another_job_is_named(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE_S", 0.2)
    with (
        pytest.raises(RunBusyError, match=rf"trained into by process {holder.pid} on .*--run"),
        sole_writer(tmp_path / "run", lambda: False),
    ):
        pass


def test_a_request_to_stop_ends_the_wait(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(RunBusyError), sole_writer(tmp_path / "run", lambda: True):
        pass


def test_one_that_was_killed_holds_nothing(
    tmp_path: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def kill_it() -> bool:
        holder.send_signal(signal.SIGKILL)
        return False

    with sole_writer(tmp_path / "run", kill_it):
        assert "waiting for its end" in capsys.readouterr().err
    with sole_writer(tmp_path / "run", lambda: False):  # nor one that has ended
        pass
    with sole_writer(tmp_path / "new", lambda: False):
        pass
    assert not (tmp_path / "new").exists()  # nothing was written into it


@pytest.mark.parametrize("name", ["run", "run/below"])
def test_a_folder_that_can_not_be_made(tmp_path: Path, name: str) -> None:
    (tmp_path / "run").write_text("a file")
    with (
        pytest.raises(RunBusyError, match=r"run: .*can't be written to"),
        sole_writer(tmp_path / name, lambda: False),
    ):
        pass


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """What it has refused once it refuses again when the file is closed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # the same to a file as a full disk
    try:
        with (
            pytest.raises(RunBusyError, match=r"can't be written to \(File too large\)"),
            sole_writer(tmp_path, lambda: False),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.process
def test_a_training_holds_its_folder(
    fork_server: ForkServer, tiny_run: Callable[..., TinyRun]
) -> None:
    run = tiny_run("held", schedule={"epochs": 1000, "warmup_epochs": 1})
    job = fork_server.start(1, *TRAIN, str(run.recipe))
    wait_for_step(run, 1, job)
    with (run.folder / NAME).open("r+") as file:
        assert file.read() == f"process {job.processes[0]} on {socket.gethostname()}"
        with pytest.raises(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.kill(job.processes[0], signal.SIGTERM)
    assert job.wait() == [0], job.output
