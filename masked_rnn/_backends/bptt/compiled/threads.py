"""The threads that run compiled loops: PyTorch's own where it uses GNU's OpenMP, a pool of as many elsewhere.

GNU's OpenMP keeps its threads spinning for milliseconds after PyTorch's last parallel op: beside them, others would get
half a core each.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache

from ...._torch import IMPORTED_IN, gnu_openmp_parallel
from . import kernels, products

_pool: ThreadPoolExecutor | None = None
_pool_size = 0


@cache
def entry(name: str) -> tuple[int, Callable[[int], None]]:
    """The address of a kernel that takes one address, and the kernel itself."""
    found = products.compiled_entry(getattr(kernels, name))
    return found.address, ctypes.CFUNCTYPE(None, ctypes.c_int64)(found.address)


def run(name: str, data: int, threads: int, tasks: int) -> None:
    """Run a kernel on so many threads; each does what tasks it finds left, so that fewer may do them all."""
    address, call = entry(name)
    if min(threads, tasks) == 1 or os.getpid() != IMPORTED_IN:
        call(data)  # a child that was forked has none of its parent's threads
        return
    on_all = gnu_openmp_parallel()
    if on_all is not None:
        on_all(ctypes.c_void_p(address), ctypes.c_void_p(data), threads, 0)
    else:
        _run_on_pool(call, data, min(threads, tasks) - 1)


def _run_on_pool(call: Callable[[int], None], data: int, helpers: int) -> None:
    global _pool, _pool_size
    pool = _pool
    if pool is None or _pool_size < helpers:
        # Another thread may use the old one just now: it ends when nobody holds it.
        pool, _pool_size = ThreadPoolExecutor(helpers, "masked_rnn"), helpers
        _pool = pool
    futures = [pool.submit(call, data) for _ in range(helpers)]
    try:
        call(data)
    finally:  # an interrupt must not free what the helpers read
        wait([future for future in futures if not future.cancel()])  # one that has not begun would find nothing left
