"""Memory of CPU runs: keep what was freed instead of giving it back to the system."""

import ctypes

import torch

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory(device: torch.device) -> None:
    """Lets glibc reuse the pages of large tensors, where these are the CPU's.

    By default every tensor of more than some megabytes is mapped anew and unmapped after use, and
    the system clears each of its pages each time (docs/benchmarks.md says what that costs).
    """
    if device.type != "cpu":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 64 * 2**20)
