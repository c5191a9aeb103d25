"""Whether hosts can meet: the port of the first one, and an all-reduce over all of them.

One rank a host takes part, over NCCL where there are GPUs and over gloo where there are none, as
the training does. The bandwidth is that of a ring: 2 (n - 1) / n of the bytes pass each host.
"""

import contextlib
import datetime
import os
import socket
import time
from pathlib import Path
from typing import Any

from .facts import Meeting

CONNECT_S = 4.0
MEET_S = 15.0  # for all to be there
SMALL, LARGE, REPEATS = 2**18, 2**24, 3  # numbers of 4 bytes
ENOUGH_S = 0.5  # of one all-reduce: then no larger one is tried


def listen(port: int) -> tuple[socket.socket | None, str]:
    """Takes a port of all addresses; the second is why it can't be had."""
    listener = _socket()
    try:
        listener.bind(("", port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        return None, _why_busy(port, error)
    return listener, ""


def find_busy(port: int) -> str:
    """Why a port of all addresses can't be had; empty if it can.

    Calls are not answered meanwhile: ranks on other hosts may be trying already, and would take
    us for the first host.
    """
    with _socket() as found:
        try:
            found.bind(("", port))
        except OSError as error:
            return _why_busy(port, error)
    return ""


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return made


def _why_busy(port: int, error: OSError) -> str:
    user = _user_of(port)
    return (error.strerror or str(error)) + (f" by {user}" if user else "")


def find_unknown(address: str) -> str:
    """Why a host's name or address leads nowhere from here; empty if it leads somewhere."""
    try:
        socket.getaddrinfo(address.strip("[]"), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return str(getattr(error, "strerror", None) or error)
    return ""


def connect(address: str, port: int) -> str:
    """Why a port can't be reached from here; empty if it can."""
    try:
        socket.create_connection((address, port), CONNECT_S).close()
    except TimeoutError:
        return f"no answer within {CONNECT_S:g} s"
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _user_of(port: int) -> str:
    """The process that listens on a port, as far as we may look."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                row = line.split()
                if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{row[9]}]")
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(os.readlink(file) in inodes for file in (folder / "fd").iterdir()):
                return f"{(folder / 'comm').read_text().strip()}, process {folder.name}"
    return ""


def meet(address: str, port: int, rank: int, hosts: int, use_gpu: bool) -> Meeting:
    """An all-reduce over all hosts, measured.

    Args:
        address: of the first host.
        port: there.
        rank: the number of this host.
        hosts: how many there are.
        use_gpu: NCCL over the first GPU, not gloo.
    """
    import torch.distributed as dist

    meeting = Meeting(backend="nccl" if use_gpu else "gloo")
    try:
        dist.init_process_group(
            meeting.backend,
            init_method=f"tcp://{address}:{port}",
            rank=rank,
            world_size=hosts,
            timeout=datetime.timedelta(seconds=MEET_S),
        )
        _measure(meeting, rank, hosts, use_gpu)
    except Exception as error:  # whatever the libraries call it
        lines = [line for line in str(error).splitlines() if line.strip()]
        meeting.error = lines[0][:200] if lines else type(error).__name__
    finally:
        if dist.is_initialized():
            with contextlib.suppress(Exception):
                dist.destroy_process_group()
    return meeting


def _measure(meeting: Meeting, rank: int, hosts: int, use_gpu: bool) -> None:
    import torch

    device = torch.device("cuda", 0) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
        meeting.nccl = ".".join(map(str, torch.cuda.nccl.version()))
    probe = torch.full((1,), float(rank + 1), device=device)
    _reduce(probe, device)
    meeting.wrong = float(probe) != hosts * (hosts + 1) / 2
    meeting.latency_s = min(_reduce(probe, device) for _ in range(REPEATS))
    for numel in (SMALL, LARGE):
        tensor = torch.zeros(numel, device=device)
        _reduce(tensor, device)
        # All hosts must decide alike whether to go on: by the slowest one's time.
        slowest = torch.tensor([min(_reduce(tensor, device) for _ in range(REPEATS))])
        slowest = slowest.to(device)
        torch.distributed.all_reduce(slowest, op=torch.distributed.ReduceOp.MAX)
        meeting.size_bytes, meeting.seconds = numel * 4, float(slowest)
        if meeting.seconds * LARGE / SMALL > ENOUGH_S:
            break


def _reduce(tensor: Any, device: Any) -> float:
    """Seconds of an all-reduce."""
    import torch

    started_s = time.perf_counter()
    torch.distributed.all_reduce(tensor)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started_s


def bandwidth_gbit(meeting: Meeting, hosts: int) -> float:
    """Gbit/s that each host sent and received."""
    return 2 * (hosts - 1) / hosts * meeting.size_bytes * 8 / meeting.seconds / 1e9
