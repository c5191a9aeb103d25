"""The job: one recipe and the processes that run it. Every launcher renders this very thing.

What a launcher may decide is who starts which process. The command of a rank, the number of ranks
and so the accumulation are the job's, and are checked here, before anything starts.
"""

import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..recipes.config import Recipe, RecipeError
from ..recipes.load import load_recipe, recipe_path
from .command import File, FirstHost, Ranks

MODULE = "convnext_yolo.launch"
# Of the starting process's environment, what ranks elsewhere need as well. Nothing secret: what is
# handed on stands in files and command lines.
HANDED_ON = re.compile(
    r"(NCCL|GLOO|TORCH_NCCL|UCX|FI)_[A-Z0-9_]+|TP_SOCKET_IFNAME|DS_ACCELERATOR|OMP_NUM_THREADS"
    r"|DEEPSPEED_TIMEOUT|TORCH_DISTRIBUTED_DEBUG|TORCH_SHOW_CPP_STACKTRACES|TORCH_CPP_LOG_LEVEL"
    r"|CUDA_DEVICE_MAX_CONNECTIONS"
    r"|PATH|LD_LIBRARY_PATH|TMPDIR|TZ|HF_HOME|HF_HUB_OFFLINE|TORCH_HOME|WANDB_MODE|WANDB_DIR"
)


# From the master port to that of host 0's front: far enough from those of other jobs.
FRONT_PORT_OFFSET = 100


class LaunchError(Exception):
    """A launch that can't be or that failed. The text is one sentence."""

    def __init__(self, text: str, exit_code: int = 2):
        super().__init__(text)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Job:
    """What is run, by how many, and where they meet."""

    recipe: Recipe
    configs: tuple[str, ...]  # files, by absolute paths
    resume: str
    options: tuple[str, ...]  # keys of the recipe, as `train` takes them
    slots: tuple[int, ...]  # the processes of each host
    master_address: str = "127.0.0.1"  # of the host of rank 0
    master_port: int = 29500
    environment: Mapping[str, str] = field(default_factory=dict)  # of every rank

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return sum(self.slots)

    @property
    def folder(self) -> Path:
        """Where a launcher writes what it uses."""
        return Path(self.recipe.run).absolute() / "launch"

    @property
    def train_words(self) -> list[str]:
        """What each rank runs, after `python -m`."""
        words = [MODULE, "train"]
        for config in self.configs:
            words += ["--config", config]
        return [*words, "--resume", self.resume, *self.options]

    def ranks(
        self, hosts: Mapping[int, str] | None = None, callers: Sequence[str] = ("127.0.0.1",)
    ) -> Ranks:
        """Those that are supervised from here, by default all: each one's number and host."""
        found = dict.fromkeys(range(self.world_size), "localhost") if hosts is None else hosts
        return Ranks(dict(found), logs_folder(self.recipe), tuple(callers), len(found))

    def ranks_of_host(self, host: int, hosts: Mapping[int, str]) -> Ranks:
        """Those of one host, from 0, where each is started by itself: all report to the first."""
        mine = replace(self.ranks(hosts), count=self.slots[host])
        if len(self.slots) == 1:
            return mine
        offset = FRONT_PORT_OFFSET if self.master_port < 65000 else -FRONT_PORT_OFFSET
        what = f"{self.master_port} {self.recipe.run}"
        token = hashlib.sha256(what.encode()).hexdigest()[:32]
        first = FirstHost(self.master_address, self.master_port + offset, token, host == 0)
        return replace(mine, first_host=first)

    def frozen(self) -> tuple["Job", File]:
        """The same with its recipe in one file beside the run: edits after this don't reach it."""
        file = File(self.folder / "recipe.yaml", self.recipe.to_yaml())
        return replace(self, configs=(str(file.path),), options=()), file


def logs_folder(recipe: Recipe) -> Path:
    """Where the logs of a run's ranks lie."""
    return Path(recipe.run).absolute() / "logs"


def describe_job(
    configs: Sequence[str],
    resume: str,
    options: Sequence[str],
    slots: Sequence[int],
    what: str,
    **more: object,
) -> Job:
    """Reads the recipe and checks that the ranks can share its batch.

    Args:
        configs: recipe files, or names of those that come with the package.
        resume: as `train` takes it.
        options: `--key.sub value` words.
        slots: the processes of each host.
        what: where the number of processes comes from, for the sentence.
        more: further fields of the job.

    Raises:
        RecipeError: a mistake in the recipe, or a batch that can't be shared.
    """
    files = [recipe_path(name) for name in configs]
    recipe = load_recipe(files, options)
    check_shares(recipe, sum(slots), what)
    paths = tuple(str(file.absolute()) for file in files)
    return Job(recipe, paths, resume, tuple(options), tuple(slots), **more)  # type: ignore[arg-type]


def check_shares(recipe: Recipe, processes: int, what: str) -> None:
    """Raises RecipeError where so many processes can't share the global batch equally."""
    parts = recipe.batch.global_size // recipe.batch.micro
    if parts % processes:
        raise RecipeError(
            f"{what}: batch.global = {recipe.batch.global_size} makes {parts} micro-batches of "
            f"{recipe.batch.micro}, which {processes} processes can't share equally; "
            f"{fitting(recipe, processes)} can"
        )


def fitting(recipe: Recipe, limit: int) -> int:
    """The most processes up to a limit that share the global batch equally."""
    parts = recipe.batch.global_size // recipe.batch.micro
    return max(n for n in range(1, limit + 1) if parts % n == 0)


def rank_environment(given: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of ranks on other hosts: what they need of this one, and what is given."""
    found = {k: v for k, v in environment.items() if HANDED_ON.fullmatch(k)}
    # Programs beside this Python (ninja, which DeepSpeed calls) are found there too.
    found["PATH"] = f"{Path(sys.executable).parent}:{found.get('PATH', '/usr/bin:/bin')}"
    # Else every rank would take all cores of its host.
    found.setdefault("OMP_NUM_THREADS", "1")
    return dict(sorted({**found, **given_environment(given, environment)}.items()))


def given_environment(given: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """`NAME=VALUE` words, or `NAME` for its value here, as an environment.

    Raises:
        LaunchError: a name that is none, or that is not set here.
    """
    found = {}
    for word in given:
        name, equals, value = word.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise LaunchError(f"--env {word}: {name!r} is no variable's name; give NAME=VALUE")
        if not equals and name not in environment:
            raise LaunchError(f"--env {name}: it is not set here; give {name}=VALUE")
        found[name] = value if equals else environment[name]
    return found


def gpus_here() -> int:
    """The GPUs of this host."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
