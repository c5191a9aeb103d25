"""The hosts of a Slurm job, as Slurm's variables tell them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from convnext_yolo.launch.job import LaunchError
from convnext_yolo.launch.slurm_job import job_hosts


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "scontrol"
    program.write_text("#!/bin/sh\n[ $3 = none ] && exit 1\necho n1; echo n2; echo n7\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2,7]")


@pytest.mark.usefixtures("scontrol")
@pytest.mark.parametrize(
    ("tasks", "counts"), [("8(x3)", [8, 8, 8]), ("2(x2),1", [2, 2, 1]), ("1,12,4", [1, 12, 4])]
)
def test_hosts_and_their_tasks(
    tasks: str, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", tasks)
    assert job_hosts() == dict(zip(("n1", "n2", "n7"), counts, strict=True))


@pytest.mark.usefixtures("scontrol")
def test_no_job_and_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_TASKS_PER_NODE", raising=False)
    with pytest.raises(LaunchError, match="SLURM_TASKS_PER_NODE is not set: this is no Slurm job"):
        job_hosts()
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "1")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "none")
    with pytest.raises(LaunchError, match="scontrol does not tell the hosts of none"):
        job_hosts()
