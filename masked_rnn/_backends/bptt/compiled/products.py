"""The compiled loops' matrix products, and how their functions are compiled. Arguments are as `multiply_tile`'s."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba import cfunc, njit, types

from .equations import copy
from .records import Packing
from .simd import itemsize, move, write
from .tile import TILE_BYTES, TILE_ROWS, multiply_tile

within = njit(inline="always", error_model="numpy")
"""For small functions: each that is compiled apart brings all that it calls once more."""


SOURCES = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
DIGEST = hashlib.sha256(SOURCES).hexdigest()[:16]


def named_by_sources(function: Any) -> Any:
    """Numba's cache goes by a function's name and its own file's time; what it compiles is made of all files here."""
    function.__qualname__ = f"{function.__qualname__}_{DIGEST}"
    return function


def compiled(function: Any) -> Any:
    named_by_sources(function)
    dispatcher = njit(nogil=True, error_model="numpy")(function)
    with suppress(RuntimeError):  # no folder can be written: it is compiled in each process
        dispatcher.enable_caching()
    return dispatcher


def compiled_entry(function: Any) -> Any:
    """A C function of one address."""
    signature = types.void(types.int64)
    named_by_sources(function)
    try:
        return cfunc(signature, cache=True)(function)
    except RuntimeError:  # as above
        return cfunc(signature)(function)


@compiled
def multiply(
    like: Any,
    a: int,
    a_step: int,
    b: int,
    b_step: int,
    b_panel: int,
    start: int,
    c: int,
    rows: int,
    columns: int,
    depth: int,
) -> None:
    """C = start + A B; B's columns in panels of a tile's width, `b_panel` bytes apart."""
    wide = TILE_BYTES // itemsize(like)
    for p in range((columns + wide - 1) // wide):
        left, panel, at = columns - p * wide, b + p * b_panel, p * TILE_BYTES
        for i in range(0, rows, TILE_ROWS):
            m, ai, ci = rows - i, a + 8 * i, c + 8 * i
            if left < wide and m >= TILE_ROWS:
                multiply_tile(like, TILE_ROWS, 1, ai, a_step, panel, b_step, start, ci, at, depth, left)
            elif left < wide:
                for k in range(m):
                    multiply_tile(like, 1, 1, ai + 8 * k, a_step, panel, b_step, start, ci + 8 * k, at, depth, left)
            elif m >= 8 and TILE_ROWS >= 8:
                multiply_tile(like, 8, 0, ai, a_step, panel, b_step, start, ci, at, depth, left)
            elif m >= 7 and TILE_ROWS >= 8:
                multiply_tile(like, 7, 0, ai, a_step, panel, b_step, start, ci, at, depth, left)
            elif m >= 6:
                multiply_tile(like, 6, 0, ai, a_step, panel, b_step, start, ci, at, depth, left)
            elif m == 5:
                multiply_tile(like, 5, 0, ai, a_step, panel, b_step, start, ci, at, depth, left)
            elif m == 4:
                multiply_tile(like, 4, 0, ai, a_step, panel, b_step, start, ci, at, depth, left)
            elif m == 3:
                multiply_tile(like, 3, 0, ai, a_step, panel, b_step, start, ci, at, depth, left)
            elif m == 2:
                multiply_tile(like, 2, 0, ai, a_step, panel, b_step, start, ci, at, depth, left)
            else:
                multiply_tile(like, 1, 0, ai, a_step, panel, b_step, start, ci, at, depth, left)


@within
def packed_size(size: int, depth: int, columns: int) -> int:
    """Bytes of a packed weight."""
    wide = TILE_BYTES // size
    return (columns + wide - 1) // wide * depth * TILE_BYTES


@within
def times(like: Any, a: int, weight: int, start: int, c: int, rows: int, columns: int, depth: int) -> None:
    """C = start + A times a packed weight."""
    multiply(like, a, itemsize(like), weight, TILE_BYTES, depth * TILE_BYTES, start, c, rows, columns, depth)


@within
def pack(like: Any, run: Packing) -> None:
    """A weight (M, K) into panels (p, K, tile's width) of its transpose's columns; or (p, M, width) of its own."""
    size, M, K = itemsize(like), run.rows, run.columns
    wide, columns, depth = TILE_BYTES // size, M if run.transposed else K, K if run.transposed else M
    for p in range((columns + wide - 1) // wide):
        panel, here = run.target + p * depth * TILE_BYTES, min(wide, columns - p * wide)
        if run.transposed:
            for j in range(here):
                row = run.weight + (p * wide + j + run.first) % M * K * size
                for k in range(K):
                    move(like, row + k * size, panel + k * TILE_BYTES + j * size)
        else:
            for k in range(M):
                row = run.weight + (k + run.first) % M * K * size
                copy(like, here, (row + p * TILE_BYTES, panel + k * TILE_BYTES))


@within
def multiply_columns(
    like: Any,
    row: int,
    left: int,
    right: int,
    c: int,
    columns: int,
    low: int,
    high: int,
    first: int,
    height: int,
    depth: int,
    step: int,
    scratch: int,
) -> None:
    """Adds to C's rows from `low` to `high` the product of a matrix's columns from `left` on and from `right` on.

    C's row `first`, of `height`, counts as 0; those before it come last.
    """
    size = itemsize(like)
    for i in range(high - low):
        write(scratch, i, row + (left + i) * size)
        write(scratch + 8 * (high - low), i, c + (low + i + first) % height * columns * size)
    multiply(
        like,
        scratch,
        step,
        row + right * size,
        step,
        TILE_BYTES,
        0,
        scratch + 8 * (high - low),
        high - low,
        columns,
        depth,
    )
