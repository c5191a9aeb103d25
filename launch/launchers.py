"""The commands that start `convnext-yolo train` in many processes, and their supervision."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..recipes.config import Recipe, RecipeError
from ..recipes.load import load_recipe, recipe_path


class LaunchError(Exception):
    """A launch that can't be or that failed. The text is one sentence."""

    def __init__(self, text: str, exit_code: int = 2):
        super().__init__(text)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Command:
    """What is run, word by word, and the environment that it needs beside ours."""

    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = [f"{key}={shlex.quote(value)}" for key, value in self.environment.items()]
        return " ".join(settings + [shlex.quote(word) for word in self.words])


def local(
    configs: Sequence[str], resume: str, options: Sequence[str], processes: int | None
) -> Command:
    """The deepspeed launcher on this machine.

    Without a number of processes: the GPUs, as many as share the batch equally, or one process
    on the CPU.
    """
    recipe = load_recipe([recipe_path(name) for name in configs], options)
    gpus = _gpus()
    if processes is None:
        processes = _fitting(recipe, gpus) if gpus else 1
    elif gpus and processes > gpus:
        raise LaunchError(f"--processes {processes}: this machine has {gpus} GPU(s)")
    parts = recipe.batch.global_size // recipe.batch.micro
    if parts % processes:
        raise RecipeError(
            f"--processes {processes}: batch.global = {recipe.batch.global_size} makes {parts} "
            f"micro-batches of {recipe.batch.micro}, which {processes} processes can't share "
            f"equally; {_fitting(recipe, processes)} can"
        )
    environment = {}
    if not gpus:
        threads = max(1, (os.cpu_count() or 1) // processes)
        environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    words = [_script("deepspeed"), "--num_gpus", str(processes), "--master_port", _free_port()]
    quiet = ["--log_level", "error"]  # on one machine its news of hosts and ranks is noise
    return Command([*words, *quiet, *_train_words(configs, resume, options)], environment)


def deepspeed(
    configs: Sequence[str], resume: str, options: Sequence[str], hostfile: Path
) -> Command:
    """The deepspeed launcher over the hosts of a hostfile, by its default transport (pdsh)."""
    load_recipe([recipe_path(name) for name in configs], options)  # mistakes before any ssh
    if not hostfile.is_file():
        raise LaunchError(f"hostfile {hostfile}: no such file; it holds lines of `host slots=N`")
    words = [_script("deepspeed"), "--hostfile", str(hostfile)]
    return Command([*words, *_train_words(configs, resume, options)])


def run(command: Command, dry_run: bool) -> None:
    """Runs a command to its end, or only prints it.

    Signals to this process go to every process that the command has started: the launchers
    between us and the ranks do not all pass them on. We return when all of them are gone.

    Raises:
        LaunchError: the command failed; carries its exit code.
    """
    print(command if dry_run else f"$ {command}", flush=True)
    if dry_run:
        return
    child = subprocess.Popen(
        command.words, env={**os.environ, **command.environment}, start_new_session=True
    )

    def forward(number: int, _: Any) -> None:
        _signal_group(child.pid, number)

    before = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        code = child.wait()
        _wait_for_group(child.pid)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code:
        code = 128 - code if code < 0 else code
        raise LaunchError(f"the launcher ended with exit code {code}; see its output above", code)


def _wait_for_group(group: int, limit_s: float = 60.0) -> None:
    """Waits until no process of the group is left; after the limit, ends what is."""
    deadline = time.monotonic() + limit_s
    while _signal_group(group, 0):
        if time.monotonic() > deadline:
            _signal_group(group, signal.SIGKILL)
        time.sleep(0.05)


def _signal_group(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _train_words(configs: Sequence[str], resume: str, options: Sequence[str]) -> list[str]:
    # Ranks learn their number from the environment, not from --local_rank.
    words = ["--no_local_rank", "--module", "convnext_yolo.launch", "train"]
    for config in configs:
        words += ["--config", str(recipe_path(config))]
    return [*words, "--resume", resume, *options]


def _fitting(recipe: Recipe, limit: int) -> int:
    """The most processes up to a limit that share the global batch equally."""
    parts = recipe.batch.global_size // recipe.batch.micro
    return max(n for n in range(1, limit + 1) if parts % n == 0)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _script(name: str) -> str:
    """A program that was installed beside this Python, or of that name on the PATH."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
