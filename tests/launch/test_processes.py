"""Processes of a job are started, known by their mark, and ended; also on old systems."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from convnext_yolo.launch.command import Command, File
from convnext_yolo.launch.job import LaunchError
from convnext_yolo.launch.supervision.processes import (
    any_marked,
    kill_marked,
    start,
    write_files,
)
from convnext_yolo.recipes import heartbeat

MARK = f"CONVNEXT_YOLO_TEST=of this very job, {os.getpid()}"


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """One with the mark, one without."""
    name, _, value = MARK.partition("=")
    found = [subprocess.Popen(["sleep", "999"], env={name: v}) for v in (value, "of another")]
    yield found
    for process in found:
        process.kill()
        process.wait()


@pytest.mark.parametrize("lacks", ["nothing", "the function", "the system call"])
def test_marked_processes_alone_are_ended(
    lacks: str, sleepers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With handles, and with numbers alone where Python or the kernel has no handles."""
    if lacks == "the function":
        monkeypatch.delattr(os, "pidfd_open")
    if lacks == "the system call":

        def refuse(process: int) -> int:
            raise PermissionError("a sandbox") if process else OSError

        monkeypatch.setattr(os, "pidfd_open", refuse)
    mine, another = sleepers
    assert any_marked(MARK)
    kill_marked(MARK)
    assert mine.wait(10) == -signal.SIGKILL
    assert not any_marked(MARK) and another.poll() is None


@pytest.mark.parametrize("has_memory_files", [True, False])
def test_a_heartbeat_is_read_by_who_made_its_file(
    has_memory_files: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some Pythons were built for systems without files in memory."""
    if not has_memory_files:
        monkeypatch.delattr(os, "memfd_create")
    file = heartbeat.create()
    try:
        assert heartbeat.read(file) is None
        os.set_inheritable(file, True)
        code = "from convnext_yolo.recipes.heartbeat import heartbeat as h; h().beat('forward')"
        env = {**os.environ, heartbeat.HEARTBEAT: str(file)}
        subprocess.run([sys.executable, "-c", code], env=env, pass_fds=[file], check=True)
        beat = heartbeat.read(file)
        assert beat and (beat.count, beat.doing) == (1, "forward")
        if not has_memory_files:
            assert os.fstat(file).st_nlink == 0  # nobody has to remove it
    finally:
        os.close(file)


def test_a_program_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"no-such-sbatch: can't be started \(No such file"):
        start(Command(["no-such-sbatch", "job"]))


def test_a_folder_that_can_not_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file is in the way")
    below = tmp_path / "file/run"
    says = r"file/run\S*: can't be written \(Not a directory\); .* choose another --run"
    with pytest.raises(LaunchError, match=says):
        write_files(Command(["true"]), below / "logs")
    with pytest.raises(LaunchError, match=says):
        write_files(Command(["true"], files=(File(below / "recipe.yaml", ""),)))
    full = tmp_path / "recipe.yaml"
    full.with_name("recipe.yaml.partial").symlink_to("/dev/full")
    with pytest.raises(LaunchError, match=r"recipe.yaml: can't be written \(No space left"):
        write_files(Command(["true"], files=(File(full, "some text"),)))


def test_a_front_may_have_more_ranks_than_files_are_open_as_a_rule() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    code = (
        "import resource; from convnext_yolo.launch.supervision.processes import allow_many_files; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (50, 2000)); allow_many_files(); "
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    assert hard == resource.RLIM_INFINITY or hard >= 2000
    words = [sys.executable, "-c", code]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == (
        "(2000, 2000)\n"
    )
