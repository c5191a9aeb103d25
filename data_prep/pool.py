"""Worker processes of `shard` and `verify`: however the command ends, they end with it, quietly."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from .errors import DataError

_P = ParamSpec("_P")
_T = TypeVar("_T")


@contextmanager
def worker_pool(
    workers: int,
    did: str,
    preload: Sequence[str],
    initializer: Callable[..., object] | None = None,
    initargs: tuple[Any, ...] = (),
) -> Iterator[ProcessPoolExecutor]:
    """Processes for the time of a `with`; an exception that leaves it ends them at once.

    Args:
        workers: how many, at the most.
        did: what they do, in the past tense, for the sentence about one that was killed.
        preload: modules that a clean process imports once for all of them.
        initializer: is called in each, with `initargs`, before its first task.
        initargs: see there.

    Raises:
        DataError: a process was killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    others = set(multiprocessing.active_children())
    pool = _Pool(
        workers, mp_context=context, initializer=_start_worker, initargs=(initializer, initargs)
    )
    try:
        yield pool
    except BrokenProcessPool:
        raise DataError(
            f"A process that {did} was killed (out of memory?); give fewer workers."
        ) from None
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # or each goes on to the end of its task
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Pool(ProcessPoolExecutor):
    """Starts its processes undisturbed: any `submit` may start one."""

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        with held_signals():
            return super().submit(fn, *args, **kwargs)


@contextmanager
def held_signals() -> Iterator[None]:
    """What would end this process waits until another is there: half-started, none could be ended.

    Processes inherit the mask: Ctrl-C is for the parent alone, which stops them.
    """
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    numbers = [number for number in ends if signal.getsignal(number) is not signal.SIG_IGN]
    came: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere nothing interrupts
        # Masked here, a signal still comes through another thread, numpy's for one.
        before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in numbers}
    # The one thing that would clear this mask, the start of the resource tracker, is behind us: the
    # pool's locks needed it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
    for signal_number in came:
        signal.raise_signal(signal_number)


def _start_worker(initializer: Callable[..., object] | None, initargs: tuple[Any, ...]) -> None:
    """Ignore Ctrl-C wherever the process came from; end when killed, and with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process()

    def follow_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
    if initializer is not None:
        initializer(*initargs)
