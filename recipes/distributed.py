"""Processes: who am I among how many, and on which device."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..model.memory import keep_freed_memory

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_described: list[str] = []  # the variables that we set ourselves, not a launcher


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0


def start_world() -> World:
    """Joins the processes that a launcher started, or makes a world of one.

    Every launcher (deepspeed, torchrun, accelerate) describes the world in the same environment
    variables; without any, this process is alone.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" not in os.environ:
        port = str(_free_port())
        os.environ.update(zip(VARIABLES, ("0", "1", "0", "127.0.0.1", port), strict=True))
        _described.extend(VARIABLES)
    import deepspeed  # after DS_ACCELERATOR, which it reads when imported

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        keep_freed_memory(device)
        # DeepSpeed would compile a shared-memory all-reduce (a minute, a compiler, and segments in
        # /dev/shm that outlive a killed rank); gloo needs none of it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device)


@contextmanager
def joined_world() -> Iterator[World]:
    """The world, until the work in it is done.

    Of several ranks, one with a user's mistake stays in the group to its end, so that it may tell
    it: if it left, the others would fail for that at once, and launchers end all at the first
    failure.
    """
    world = start_world()
    try:
        yield world
    except BaseException as error:
        if world.size == 1 or not hasattr(error, "exit_code"):
            stop_world()
        raise
    stop_world()


def stop_world() -> None:
    """Leaves the process group, so that no launcher waits for us."""
    if dist.is_initialized():
        dist.destroy_process_group()
    while _described:  # what this process starts later is not a rank of a world that is gone
        os.environ.pop(_described.pop(), None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
