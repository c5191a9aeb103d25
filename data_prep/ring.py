"""The memory through which a rank's workers hand over pixels.

New shared memory for every batch, as torch's loader takes it, costs the kernel half as long to
clear as the pictures took to decode. This is mapped once, before the workers are started, and
used in turn.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from .errors import DataError

PREFETCH = 2  # parts that a worker makes ahead; torch's loader asks for no more


class FrameRing:
    """Slots of frames for each worker.

    A worker is asked for the next part when its rank takes one, so while the rank reads a slot at
    most `PREFETCH` more are being written: one slot more than that, and none is written too early.

    Args:
        workers: processes that write.
        frames: of a slot.
        frame_px: height and width of a frame.

    Raises:
        DataError: there is not enough shared memory.
    """

    def __init__(self, workers: int, frames: int, frame_px: tuple[int, int]):
        shape = (workers, PREFETCH + 1, frames, *frame_px, 3)
        try:
            self._pixels = torch.empty(shape, dtype=torch.uint8).share_memory_()
        except RuntimeError as error:
            if "shared memory" not in str(error):
                raise
            raise DataError(
                f"the loader's {workers} processes need {math.prod(shape) / 2**20:.0f} MiB of "
                "shared memory for each rank, and there is less; give more (of Docker: "
                "--shm-size), or set data.workers to 0"
            ) from None
        self._written = 0  # parts, by this worker
        self._read = [0] * workers

    def next_slot(self, frames: int) -> np.ndarray | None:
        """In a worker: the frames `[frames, H, W, 3]` of its next part; None if a slot has fewer.

        A part that does not fit travels by itself, and takes no slot.
        """
        worker = get_worker_info()
        assert worker is not None
        if frames > self._pixels.shape[2]:
            return None
        slot = self._written % (PREFETCH + 1)
        self._written += 1
        return self._pixels[worker.id, slot, :frames].numpy()

    def take(self, worker: int, frames: int) -> Tensor:
        """In the rank: the frames of the worker's next part, to be copied before the one after."""
        slot = self._read[worker] % (PREFETCH + 1)
        self._read[worker] += 1
        return self._pixels[worker, slot, :frames]
