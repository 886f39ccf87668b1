"""Finds, checks and calls the library that was built from engine/*.cpp when the package was installed."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from array import array
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .artifact import LIBRARY, sources_digest
from .record import Run

INTERFACE = 2
"""Must be that of engine/interface.h."""
LEVELS = ("default", "avx2", "avx512")
"""The kinds of CPU, in ATen's words. The library knows them by their index here."""
VARIABLE = "MASKED_RNN_CPU_CAPABILITY"
"""The environment variable that asks for the loops of a lesser CPU, or, by "none", for those of PyTorch's ops."""
FOLDER = Path(__file__).parent
OUT_OF_MEMORY = b"no memory"
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
"""The dtypes that our loops compute in another one, whose results they then round"""
Pass = Callable[[Any, int], bytes | None]
"""Takes a record and the level. Returns the part of the record that does not fit, in words. None: all is well."""


class SlowLoopsWarning(UserWarning):
    """On the CPU, layers run in PyTorch's ops, which is slower, because the C++ code can't be used.

    It is given once a process, at the first call that the C++ code could run, with the reason and the cure. The
    environment variable `MASKED_RNN_CPU_CAPABILITY=none` asks for PyTorch's ops, and silences it.
    """

    __module__ = "masked_rnn"


class Library(NamedTuple):
    forward: Pass
    backward: Pass
    count_lengths: Callable[[int, int, int, int], None]
    level: int
    """The index in LEVELS of the loops that run"""


@cache
def find() -> Library | str:
    """Load the library. If it can't be used, return the reason and the cure in words.

    Raises:
        ValueError: The environment variable has an unknown value.
    """
    wanted = os.environ.get(VARIABLE, "").lower()
    if wanted == "none":
        return f"{VARIABLE}=none asks for PyTorch's ops"
    if wanted not in ("", *LEVELS):
        raise ValueError(f"{VARIABLE}={wanted!r}: expected one of {', '.join(LEVELS)} and none")
    path = FOLDER / LIBRARY
    if not path.is_file():
        return _why_not_built()
    try:
        library = ctypes.CDLL(str(path))
        library.masked_rnn_digest.restype = ctypes.c_char_p
        if library.masked_rnn_interface() != INTERFACE or library.masked_rnn_record_bytes() != ctypes.sizeof(Run):
            return f"the C++ code is of another version of masked_rnn: run {_install_again()}"
        digest = library.masked_rnn_digest().decode()
        bound = bind(library, level=0)
    except (OSError, AttributeError) as error:
        return f"the C++ code can't be loaded: run {_install_again()} ({error})"
    sources = FOLDER / "engine"
    if sources.is_dir() and sources_digest(sources) != digest:
        return f"the C++ sources have changed since they were built: run {_install_again()}"
    most = LEVELS.index(wanted) if wanted else len(LEVELS) - 1
    level = max(level for level in range(most + 1) if library.masked_rnn_supports(ctypes.c_int64(level)))
    return bound._replace(level=level)


def bind(library: ctypes.CDLL, level: int) -> Library:
    """Declare the types of the library's functions."""
    forward, backward, count = library.masked_rnn_forward, library.masked_rnn_backward, library.masked_rnn_count
    for function in (forward, backward):
        function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_char_p
    count.argtypes, count.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p), None
    return Library(forward, backward, count, level)


def _why_not_built() -> str:
    """Return why there is no library, and the cure. A source tree may hide an installed package that has one."""
    root = FOLDER.parents[2]
    for folder in map(Path, sys.path):
        if folder != root and (folder / FOLDER.relative_to(root) / LIBRARY).is_file():
            return (
                f"Python imports {root}, where the C++ code was not built, and not the package installed in "
                f"{folder}, which has it: start Python in another folder, or run {_install_again()}"
            )
    compiler = "Clang" if os.name == "nt" else "a C++17 compiler (GCC or Clang)"
    return f"the C++ code was not built when masked_rnn was installed: install {compiler}, then run {_install_again()}"


def _install_again() -> str:
    """Return the command that builds the library. It avoids pip's cache, which may hold a wheel without it."""
    root = FOLDER.parents[2]
    if (root / "setup.py").is_file():
        return f"`python -m pip install -e {root}`"
    return (
        "`python -m pip install --force-reinstall --no-deps --no-cache-dir SOURCE`, "
        "where SOURCE is the folder, the archive or the address of masked_rnn's source"
    )


def call(name: str, record: Run) -> None:
    """Run a pass of the library, forward or backward."""
    library = find()
    assert isinstance(library, Library), library
    fault = getattr(library, name)(ctypes.byref(record), library.level)
    if fault is None:
        return
    if fault == OUT_OF_MEMORY:
        raise MemoryError("the C++ code got no memory")
    raise RuntimeError(f"internal error: the C++ code was given wrong sizes ({fault.decode()}). Please report it.")


class Counts(NamedTuple):
    """What a batch's lengths add up to."""

    sequences: int
    """The number of sequences that have a step"""
    rows: int
    """The number of real steps"""
    fault: int
    """The first sequence whose length is not from 0 to T. -1: none"""
    unsorted: int
    """The first sequence that is longer than the one before. -1: none"""


def count(place: int, batch: int, steps: int) -> Counts:
    """Count the lengths, int64, at an address."""
    library = find()
    assert isinstance(library, Library), library
    counts = array("q", (0, 0, 0, 0))
    library.count_lengths(place, batch, steps, counts.buffer_info()[0])
    return Counts(*counts)


def runs(dtype: torch.dtype) -> bool:
    """Return whether the native loops run for a dtype. Warn once a process if they would, but can't be used."""
    if dtype not in (torch.float32, torch.float64):
        return False
    found = find()
    if isinstance(found, Library):
        return True
    _warn_of_slow_loops(found)
    return False


@cache
def _warn_of_slow_loops(reason: str) -> None:
    if os.environ.get(VARIABLE, "").lower() != "none" and os.name != "nt":  # Windows may have no compiler for them
        warnings.warn(
            f"On the CPU, layers run in PyTorch's ops, which is slower: {reason}. "
            f"{VARIABLE}=none in the environment silences this warning.",
            SlowLoopsWarning,
            stacklevel=2,
        )
