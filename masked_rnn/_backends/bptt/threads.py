"""The threads that native loops run on: PyTorch's own where it uses GNU's OpenMP, a pool of as many elsewhere.

GNU's OpenMP keeps its threads spinning for milliseconds after PyTorch's last parallel op: beside them, others would get
half a core each.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache

import torch

from ..._torch import IMPORTED_IN, gnu_openmp_parallel

WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
PARALLEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_here = threading.local()


def count_and_start() -> tuple[int, int]:
    """How many threads a call may use, and the address of what runs a function on them: see native/threads.h."""
    count = torch.get_num_threads()
    if count == 1 or os.getpid() != IMPORTED_IN:
        return 1, 0  # a child that was forked has none of its parent's threads
    return count, _start()


@cache
def _start() -> int:
    start = gnu_openmp_parallel() or _run_on_pool
    return ctypes.cast(start, ctypes.c_void_p).value or 0


@PARALLEL
def _run_on_pool(function: int, data: int, threads: int, _flags: int) -> None:
    work = WORK(function)
    try:
        run_on_pool(lambda: work(data), threads - 1)
    except BaseException as error:  # ctypes would only print it
        _here.error = error


def raise_interrupt() -> None:
    """Raise what came up in this thread while the pool ran its loops."""
    error: BaseException | None = vars(_here).pop("error", None)
    if error is not None:
        raise error


def run_on_pool(work: Callable[[], None], helpers: int) -> None:
    """Run `work` here and in so many helpers at once."""
    global _pool, _pool_size
    pool = _pool
    if pool is None or _pool_size < helpers:
        # Another thread may use the old one just now: it ends when nobody holds it.
        pool, _pool_size = ThreadPoolExecutor(helpers, "masked_rnn"), helpers
        _pool = pool
    futures: list[Future[None]] = []
    try:
        for _ in range(helpers):
            futures.append(pool.submit(work))
        work()
    finally:
        _wait(futures)


def _wait(futures: Sequence[Future[None]]) -> None:
    try:
        wait([future for future in futures if not future.cancel()])  # one that has not begun would find nothing left
    except BaseException:  # an interrupt must not free what the helpers read
        _wait(futures)
        raise
