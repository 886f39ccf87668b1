"""What a compiled loop is given: whole numbers alone, so that it can be read from memory by any thread.

A number is an address where the comment gives a shape. T steps, R rows, B sequences, D directions, P state that is fed
back (H, or proj_size), I input.
"""

from __future__ import annotations

from typing import NamedTuple


class Shared(NamedTuple):
    """What the threads of one run share."""

    tasks: int
    """How many tasks have been taken."""
    threads: int
    """How many threads have come."""
    scratch: int
    """The address of the first thread's scratch memory."""
    scratch_bytes: int
    """Of each thread."""


class Layer(NamedTuple):
    """What both passes of a layer read: sizes, and addresses of int64 tables and of tensors; 0 where there is none."""

    mode: int
    hidden: int
    fed_back: int
    inputs: int
    width: int
    """Blocks of H numbers in a buffer's row."""
    gates: int
    batch: int
    """Sequences, those without steps included."""
    sequences: int
    """That have a step."""
    steps: int
    rows: int
    directions: int
    block: int
    """The most sequences that one thread takes at once."""
    sizes: int
    """(T + 1,) sequences at each step, and behind the last"""
    starts: int
    """(T + 1,) the first row of each step, and how many there are"""
    order: int
    """(B,) the sequence at each sorted place"""
    x: int
    x_row: int
    """Bytes from one row to the next."""
    rows_in: int
    """(D, R) the row of x for each row"""
    rows_out: int
    """(D, R) the row of the output for each row"""
    buffers: int
    """(D, T) addresses of each step's activations"""
    history: int
    """(D, B + R, P)"""
    cells: int
    """(D, B + R, H) the LSTM's c"""
    zeros: int


class Packing(NamedTuple):
    """How a weight is laid out for products."""

    weight: int
    """(M, K)"""
    rows: int
    columns: int
    first: int
    """The row that comes first; those before it come last."""
    transposed: int
    target: int
    """(panels of columns, depth, numbers of a tile's row)"""


class Forward(NamedTuple):
    w_ih: int
    """(D, panels of columns, I, numbers of a tile's row), and so are all weights"""
    w_hh: int
    w_hr: int
    b_ih: int
    """(D, gates H)"""
    b_hh: int
    states: int
    """(D, batch, P) the initial states, whose place the last ones take"""
    state_cells: int
    """(D, batch, H)"""
    output: int
    output_row: int
    saves: int


class Backward(NamedTuple):
    w_ih: int
    w_hh: int
    w_hr: int
    d_output: int
    d_output_row: int
    dh: int
    """(D, batch, P) the state's gradient, so far"""
    dc: int
    """(D, batch, H)"""
    deltas: int
    """(D, rows of the chunk, delta_width): the gates' gradients, h, x; with a projection dh and m"""
    delta_width: int
    delta_rows: int
    dx: int
    """(D, P, I)"""
    dx_direction: int
    """Bytes from one direction's to the other's."""
    d_bias: int
    """(D, blocks, width H)"""
    d_w_hh: int
    """(D, gates H, P)"""
    d_w_ih: int
    """(D, gates H, I)"""
    d_w_hr: int
    """(D, P, H)"""
    part: int
    """Rows of a weight's gradient that one thread takes at once."""
    first: int
    """The chunk's first step."""
    stop: int
