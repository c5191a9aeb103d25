"""Worker processes of `shard` and `verify`: a Ctrl-C while they start is as quiet as any other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from convnext_yolo.data_prep.pool import held_signals
from convnext_yolo.data_prep.verify import verify


def test_signals_wait_while_workers_start():
    done = False
    with pytest.raises(KeyboardInterrupt), held_signals():
        os.kill(os.getpid(), signal.SIGINT)
        done = True
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


SCRIPT = """
import os, signal, sys
from multiprocessing.util import register_after_fork
from pathlib import Path
from convnext_yolo.data_prep.formats import read_coco
from convnext_yolo.data_prep.shard import shard_dataset
from convnext_yolo.data_prep.verify import verify

def interrupt(_):
    os.kill(os.getpid(), signal.SIGINT)

if __name__ == "__mp_main__" and sys.argv[2] == "worker":
    register_after_fork(interrupt, interrupt)  # before a line of the pool's runs there
if __name__ == "__main__":
    folder = Path(sys.argv[3])
    dataset = read_coco(folder / "instances.json", folder / "images")
    try:
        if sys.argv[1] == "shard":
            shard_dataset(dataset, folder / "new", 1, workers=2, progress=False)
        else:
            print(verify(folder / "shards", workers=2, progress=False))
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.fixture
def run_script(coco_files) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_script("shard", "worker")`: returns when every process has ended, which holds a pipe."""
    folder = coco_files.folder
    coco_files.shard(folder / "shards")
    script = folder / "script.py"
    script.write_text(SCRIPT)

    def run(command: str, interrupted: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(script), command, interrupted, str(folder)],
            env={**os.environ, "PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            start_new_session=True,
            timeout=120,
        )

    return run


# What Python imports first of all; the process that forks the workers plays the user who presses
# Ctrl-C, which signals the whole group, itself included.
CTRL_C_AT_START = """
import os, signal, sys
if "multiprocessing.forkserver" in sys.orig_argv[-1]:
    os.killpg(0, signal.SIGINT)
"""


@pytest.mark.process
@pytest.mark.parametrize("command", ["shard", "verify"])
def test_an_interruption_while_processes_start_is_quiet(coco_files, run_script, command):
    (coco_files.folder / "sitecustomize.py").write_text(CTRL_C_AT_START)
    run = run_script(command, "all")
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "")
    assert not list(coco_files.folder.glob("new*"))


@pytest.mark.process
@pytest.mark.parametrize("command", ["shard", "verify"])
def test_an_interruption_does_not_reach_a_half_started_worker(coco_files, run_script, command):
    run = run_script(command, "worker")
    assert (run.returncode, run.stderr) == (0, "")
    if command == "verify":
        assert run.stdout == "[]\n"
    else:
        assert verify(coco_files.folder / "new", progress=False) == []
