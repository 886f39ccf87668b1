"""Finds, checks and calls the library that was built from native/*.cpp when the package was installed."""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from .digest import sources_digest

INTERFACE = 1
"""Must be that of native/interface.h."""
LEVELS = ("default", "avx2", "avx512")
"""The kinds of CPU, in ATen's words. The library knows them by their index here."""
VARIABLE = "MASKED_RNN_CPU_CAPABILITY"
"""The environment variable that asks for the loops of a lesser CPU, or, by "none", for those of PyTorch's ops."""
FOLDER = Path(__file__).parent
FAULTS = {
    1: "sizes",
    2: "numbers of sequences at each step",
    3: "index",
    4: "order",
    5: "input",
    6: "weights",
    7: "states",
    8: "saved tensors",
    9: "output",
    10: "gradients",
}
"""The part of a record that does not fit, by the fault's number in native/interface.h."""
OUT_OF_MEMORY = 11


class Library(NamedTuple):
    functions: dict[str, Callable[[int, int], int]]
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
        return f"{VARIABLE}=none asks for the loops of PyTorch's ops"
    if wanted not in ("", *LEVELS):
        raise ValueError(f"{VARIABLE}={wanted!r}: expected one of {', '.join(LEVELS)} and none")
    paths = [path for pattern in ("_native*.so", "_native*.pyd") for path in sorted(FOLDER.glob(pattern))]
    if not paths:
        if os.name == "nt":
            return "the native loops can't be built on Windows: MSVC lacks the vector types that they need"
        return (
            "the native loops were not built when masked_rnn was installed: "
            f"install a C++17 compiler (GCC or Clang), then run {_install_again()}"
        )
    try:
        library = ctypes.CDLL(str(paths[0]))
        library.masked_rnn_digest.restype = ctypes.c_char_p
        if library.masked_rnn_interface() != INTERFACE:
            return f"the native loops are of another version of masked_rnn: run {_install_again()}"
        digest = library.masked_rnn_digest().decode()
        functions = {name: getattr(library, f"masked_rnn_{name}") for name in ("forward", "backward")}
    except (OSError, AttributeError) as error:
        return f"the native loops can't be loaded: run {_install_again()} ({error})"
    sources = FOLDER / "native"
    if sources.is_dir() and sources_digest(sources) != digest:
        return f"the sources of the native loops have changed since they were built: run {_install_again()}"
    for function in functions.values():
        function.argtypes = (ctypes.c_void_p, ctypes.c_int64)
        function.restype = ctypes.c_int64
    most = LEVELS.index(wanted) if wanted else len(LEVELS) - 1
    level = max(level for level in range(most + 1) if library.masked_rnn_supports(ctypes.c_int64(level)))
    return Library(functions, level)


def _install_again() -> str:
    """Return the command that builds the library. It avoids pip's cache, which may hold a wheel without it."""
    root = FOLDER.parents[2]
    if (root / "setup.py").is_file():
        return f"`python -m pip install -e {root}`"
    return "`python -m pip install --force-reinstall --no-deps --no-cache-dir --no-binary masked_rnn masked_rnn`"


def call(name: str, numbers: Sequence[int]) -> None:
    """Run a pass of the library. `numbers` are a record of native/interface.h."""
    library = find()
    assert isinstance(library, Library), library
    record = array("q", numbers)
    fault = library.functions[name](record.buffer_info()[0], library.level)
    if not fault:
        return
    if fault == OUT_OF_MEMORY:
        raise MemoryError("the native loops got no memory")
    raise RuntimeError(f"internal error: the native loops were given wrong sizes ({FAULTS[fault]}). Please report it.")


def runs(dtype: torch.dtype) -> bool:
    """Return whether the native loops run for a dtype."""
    return dtype in (torch.float32, torch.float64) and isinstance(find(), Library)
