"""The threads that native loops run on: PyTorch's own where it uses GNU's OpenMP, as many of their own elsewhere.

GNU's OpenMP keeps its threads spinning for milliseconds after PyTorch's last parallel op: beside them, others would get
half a core each.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

import torch

from ..._torch import IMPORTED_IN, gnu_openmp_parallel


def count_and_start() -> tuple[int, int]:
    """Return how many threads a call may use, and the address of what runs a function on PyTorch's; 0 if not GNU's."""
    count = torch.get_num_threads()
    if count == 1 or os.getpid() != IMPORTED_IN:
        return 1, 0  # a child that was forked has none of its parent's threads
    return count, _start()


@cache
def _start() -> int:
    start = gnu_openmp_parallel()
    return 0 if start is None else ctypes.cast(start, ctypes.c_void_p).value or 0
