"""The processes that make batches for a rank: how they start, whom they heed, how they fail."""

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .errors import AwayError, DataError


def load(data: Dataset[Any], workers: int, **options: Any) -> Iterator[Any]:
    """Iterates a data set with torch's DataLoader; with 0 `workers`, in this process.

    Raises:
        DataError: as the data set does, in the same words wherever it was raised.
    """
    import cv2

    # Before the workers are forked: a child that inherits a pool of threads, and with it perhaps
    # a lock that one of them holds, hangs when it touches the pool.
    cv2.setNumThreads(1)
    loader = DataLoader(data, num_workers=workers, worker_init_fn=_start, **options)
    try:
        yield from loader
        return
    except DataError as error:
        # torch packs a worker's whole traceback into the text; the sentence ends it.
        sentence = str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].strip()
        kind = AwayError if isinstance(error, AwayError) else DataError
        error.__traceback__ = None  # it holds the loader, and that its workers
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        sentence = (
            "a loader process was killed, most likely as memory ran out; take fewer data.workers, "
            "or give the job more memory"
        )
        error.__traceback__ = None
        kind = DataError
    failure = kind(sentence)
    failure.on_one_rank = True
    raise failure


def _start(_: int) -> None:
    """Makes a worker a quiet helper of its rank.

    A launcher's signal goes to all processes. The rank answers it, and needs its workers until it
    has; they end with the rank, or when the rank itself terminates them.
    """
    import cv2

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # it waits until it is asked for
    threading.Thread(target=_heed_only_the_rank, daemon=True).start()
    # Workers are many: a pool of threads in each would only fight over the cores.
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def _heed_only_the_rank() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
