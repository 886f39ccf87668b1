"""The threads of the native loops: PyTorch's own if it uses GNU OpenMP, else new ones.

GNU OpenMP lets its threads spin for milliseconds after PyTorch's last parallel op. Other threads would have to share
the cores with them.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

import torch

from ..._torch import IMPORTED_IN, gnu_openmp_parallel


def count_and_start() -> tuple[int, int]:
    """Return the number of threads, and the address of GNU OpenMP's function that starts them. 0: another OpenMP."""
    count = torch.get_num_threads()
    if count == 1 or os.getpid() != IMPORTED_IN:
        return 1, 0  # a forked child does not have its parent's threads
    return count, _start()


@cache
def _start() -> int:
    start = gnu_openmp_parallel()
    return 0 if start is None else ctypes.cast(start, ctypes.c_void_p).value or 0
