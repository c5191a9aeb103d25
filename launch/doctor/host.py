"""Facts of this host, gathered without a judgement and without torch, which takes seconds.

Torch is imported only where there is a GPU or a checkpoint. Nothing here fails: what can't be found
out is a fact too.
"""

import contextlib
import csv
import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...recipes.config import Recipe, RecipeError
from ...recipes.load import load_recipe
from .facts import Gpu, HostFacts, RunFolder
from .folders import existing, free_bytes, unwritable
from .resume import published_in, resume_error

PACKAGES = ("convnext-yolo", "torch", "torchvision", "deepspeed", "timm", "numpy")
ROOMS = ("model", "data_prep", "recipes", "launch")
GPU_FIELDS = ("index", "uuid", "name", "memory.total", "memory.used", "compute_cap", "compute_mode")
DRIVER_S = 20.0  # nvidia-smi without its daemon begins with seconds of initialisation
TOKEN_S = 4.0  # for a file to be seen over a network file system


def host_facts(
    configs: Sequence[str],
    options: Sequence[str],
    token: str = "",
    patience_s: float = 5.0,
    resume: str = "auto",
) -> HostFacts:
    """Everything about this host that a run of these recipe files depends on.

    Args:
        configs: recipe files, by absolute paths.
        options: `--key.sub value` words.
        token: a file that the first host has left in the run's folder.
        patience_s: how long a host of shards may stay away.
        resume: as `train` takes it.
    """
    facts = HostFacts(
        machine=_machine(),
        address=_own_address(),
        interfaces=[name for _, name in socket.if_nameindex()],
        versions=_versions(),
        sources=sources(Path(__file__).parents[2]),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        accelerator=os.environ.get("DS_ACCELERATOR", ""),
        shm_free_bytes=_shm_free_bytes(),
        cores=len(os.sched_getaffinity(0)),
        port_range=_port_range(),
        has_compiler=any(map(shutil.which, ("cc", "gcc", "clang"))),
    )
    facts.gpus, facts.gpu_error = _gpus()
    if facts.gpus:
        facts.torch_gpus = _torch_gpus()
    try:
        recipe = load_recipe([Path(file) for file in configs], options)
    except RecipeError as error:
        facts.recipe_error = str(error)
        return facts
    _add_recipe(facts, recipe, patience_s)
    facts.run = run_folder(Path(recipe.run), token, resume)
    return facts


def _add_recipe(facts: HostFacts, recipe: Recipe, patience_s: float) -> None:
    """What the recipe names, as this host finds it."""
    from .data import cache_folder, shards
    from .trackers import trackers

    facts.recipe = recipe.model_dump(mode="json", by_alias=True)
    cache = {**recipe.data.model_dump(), "patience_s": patience_s}
    facts.train = shards(recipe.data.train, cache)
    facts.val = shards(recipe.data.val, cache)
    backbone = getattr(recipe.model, "backbone", None)
    named = (recipe.model.weights, getattr(backbone, "weights", None))
    facts.missing_files = [file for file in named if file and not Path(file).is_file()]
    facts.cache = cache_folder(cache)
    facts.trackers = trackers(recipe.tracking)


def run_folder(run: Path, token: str = "", resume: str = "auto") -> RunFolder:
    """Whether the run can write, how much, and whether it sees what the first host writes.

    Args:
        run: the run's folder.
        token: a file that the first host has left there.
        resume: as `train` takes it.
    """
    place = existing(run)
    found = RunFolder(place=str(place), free_bytes=free_bytes(place), error=unwritable(place))
    found.checkpoints = len(published_in(run))
    found.resume_error = resume_error(run, resume)
    if token:
        found.has_token = _is_seen(Path(token))
    return found


def _is_seen(token: Path) -> bool:
    deadline_s = time.monotonic() + TOKEN_S
    while time.monotonic() < deadline_s and token.parent.is_dir():
        with contextlib.suppress(OSError):
            return token.read_text(encoding="utf-8") == token.name
        time.sleep(0.1)  # between two looks
    return False


def _machine() -> str:
    """Equal for two names of one machine: one start of one kernel, one network."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/net')}"
    return socket.gethostname()


def _own_address() -> str:
    with contextlib.suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return ""


def _shm_free_bytes() -> int:
    with contextlib.suppress(OSError):
        return free_bytes(Path("/dev/shm"))
    return 0  # a container may have none


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"] or ""
        if name.startswith("nvidia-nccl-cu"):
            found["nccl"] = distribution.version
    return found


def sources(root: Path) -> str:
    """One hash for all modules of the package, since a version stays while a checkout changes.

    Args:
        root: the folder with the rooms.
    """
    digest = hashlib.sha256()
    for room in ROOMS:
        # one level down and no deeper: a checkout's data_prep holds the bundled pictures
        for path in sorted([*root.glob(f"{room}/*.py"), *root.glob(f"{room}/*/*.py")]):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _port_range() -> tuple[int, int]:
    with contextlib.suppress(OSError, ValueError):
        text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii")
        low, high = map(int, text.split())
        return low, high
    return (32768, 60999)


def _gpus() -> tuple[list[Gpu], str]:
    """The machine's GPUs, and what the driver says if it does not answer."""
    if not shutil.which("nvidia-smi"):
        return [], ""
    words = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=DRIVER_S)
    except (OSError, subprocess.TimeoutExpired):
        return [], f"nvidia-smi does not answer within {DRIVER_S:g} s"
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        return [], said[0] if said else f"nvidia-smi ended with {done.returncode}"
    return parse_gpus(done.stdout), ""


def parse_gpus(text: str) -> list[Gpu]:
    """The rows of nvidia-smi. What it does not know, as in `[N/A]`, is 0."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]
    return [
        Gpu(
            index=int(row[0]),
            uuid=row[1],
            name=row[2],
            total_mib=_number(row[3]),
            used_mib=_number(row[4]),
            capability=_number(row[5]),
            mode=row[6],
        )
        for row in rows
        if len(row) == len(GPU_FIELDS) and row[0].isdecimal()
    ]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _torch_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def differing_key(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The first key of two recipes that has two values, as `a.b = 1, not 2`; empty: none."""
    for key in [*mine, *(key for key in theirs if key not in mine)]:
        one, other = mine.get(key), theirs.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            if found := differing_key(one, other):
                return f"{key}.{found}"
        elif one != other:
            return f"{key} = {other!r}, not {one!r}"
    return ""
