"""What the launchers would run, and that it is what they run."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from convnext_yolo.launch import launchers
from convnext_yolo.launch.cli import main
from convnext_yolo.recipes.config import RecipeError


def test_local_prints_the_exact_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "quickstart", "--processes", "2", "--run", "runs/a b", "--dry-run"]
    assert main(["launch", "local", *words]) == 0
    command = shlex.split(capsys.readouterr().out)
    start = next(i for i, word in enumerate(command) if word.endswith("deepspeed"))
    assert command[start + 1 : start + 3] == ["--num_gpus", "2"]
    module = command.index("--module")
    assert command[module - 1] == "--no_local_rank"
    assert command[module + 1 : module + 4] == ["convnext_yolo.launch", "train", "--config"]
    assert Path(command[module + 4]).is_file()
    assert command[module + 5 :] == ["--resume", "auto", "--run", "runs/a b"]


def test_processes_that_do_not_share_the_batch() -> None:
    with pytest.raises(RecipeError, match=r"--processes 3: .*makes 2 micro-batches of 8.*; 2 can"):
        launchers.local(["quickstart"], "auto", [], 3)


def test_deepspeed_over_a_hostfile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("a slots=8\nb slots=8\n")
    words = ["launch", "deepspeed", "--config", "quickstart", "--hostfile", str(hostfile)]
    assert main([*words, "--dry-run"]) == 0
    assert f"deepspeed --hostfile {hostfile} --no_local_rank --module" in capsys.readouterr().out
    assert main([*words[:-1], str(tmp_path / "none"), "--dry-run"]) == 2


def test_run_passes_the_exit_code_on() -> None:
    with pytest.raises(launchers.LaunchError) as failure:
        launchers.run(launchers.Command(["sh", "-c", "exit 7"]), dry_run=False)
    assert failure.value.exit_code == 7
    launchers.run(launchers.Command(["sh", "-c", 'test "$A" = b'], {"A": "b"}), dry_run=False)
