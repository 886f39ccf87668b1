"""The compiled loops. Each thread takes a block of sequences through all steps, alone; then the next one that is left.

P state that is fed back (H, or proj_size), I input, N gates H.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .equations import (
    add,
    copy,
    run_gru,
    run_gru_back,
    run_lstm,
    run_lstm_back,
    run_rnn_relu,
    run_rnn_relu_back,
    run_rnn_tanh,
    run_rnn_tanh_back,
)
from .products import compiled, multiply_columns, pack, packed_size, times, within
from .records import Backward, Forward, Layer, Packing, Shared
from .simd import itemsize, read, reader, take_number, write
from .tile import TILE_ROWS

GROUP = 4 * TILE_ROWS
"""Rows whose input product runs at once."""
SCRATCH = 4 * GROUP
"""Addresses at the beginning of each thread's scratch memory."""
MOST_PARTS = SCRATCH // 2
DEPTH = 256
"""Rows of the deltas that stay in the first-level cache while a weight's gradient is summed."""
GRU, LSTM, RNN_TANH, RNN_RELU = 0, 1, 2, 3


shared_at, layer_at, forward_at, backward_at, packing_at = map(reader, (Shared, Layer, Forward, Backward, Packing))
LAYER = 8 * len(Shared._fields)
"""Where a `Layer` begins in a thread's argument, which holds a `Shared`, a `Layer` and a pass's own in a row."""
PASS = LAYER + 8 * len(Layer._fields)


@within
def own_scratch(data: int) -> Any:
    shared = shared_at(data)
    return shared.scratch + take_number(data + 8) * shared.scratch_bytes


@within
def state_of(layer: Layer, d: int, place: int) -> int:
    """The row of a sequence's state among all (D, batch), by its sorted place."""
    return d * layer.batch + (read(layer.order, place) if layer.order else place)


@within
def forward(like: Any, layer: Layer, run: Forward, counter: int, scratch: int) -> None:
    blocks = (layer.sequences + layer.block - 1) // layer.block
    while True:
        k = take_number(counter)
        if k >= blocks * layer.directions:
            return
        forward_block(like, layer, run, k % layer.directions, k // layer.directions * layer.block, scratch)


@compiled
def forward_block(like: Any, layer: Layer, run: Forward, d: int, low: int, scratch: int) -> None:
    """A block of sequences, from `low`, through all steps of one direction."""
    size, H, P, inputs = itemsize(like), layer.hidden, layer.fed_back, layer.inputs
    N, free = layer.gates * H, (layer.width - layer.gates) * H
    row_bytes, most = layer.width * H * size, min(layer.sequences - low, layer.block)
    w_ih = run.w_ih + d * packed_size(size, inputs, N)
    w_hh = run.w_hh + d * packed_size(size, P, N)
    w_hr = run.w_hr + d * packed_size(size, H, P)
    history = layer.history + d * (layer.sequences + layer.rows) * P * size
    cells = layer.cells + d * (layer.sequences + layer.rows) * H * size
    table_a, table_b, table_c, table_d = scratch, scratch + 8 * GROUP, scratch + 16 * GROUP, scratch + 24 * GROUP
    buffer = scratch + 8 * SCRATCH
    begin = buffer + GROUP * row_bytes  # how each row of the buffer begins: with its biases
    bias, projected = begin + free * size, begin + row_bytes
    if run.b_ih:
        # The recurrent bias of the gates before which nothing stands adds to the input's.
        b_ih, b_hh, joined = run.b_ih + d * N * size, run.b_hh + d * N * size, N - free
        copy(like, free, (b_hh + joined * size, begin))
        add(like, joined, (b_ih, b_hh, bias))
        copy(like, free, (b_ih + joined * size, bias + joined * size))
    else:
        copy(like, N, (layer.zeros, bias))
        copy(like, free, (layer.zeros, begin))
    for i in range(most):
        at = state_of(layer, d, low + i)
        copy(like, P, (run.states + at * P * size, history + (low + i) * P * size))
        if layer.mode == LSTM:
            copy(like, H, (run.state_cells + at * H * size, cells + (low + i) * H * size))
    t = 0
    while t < layer.steps and read(layer.sizes, t) > low:
        # The input product of some steps, then those steps.
        first, count = t, 0
        while t < layer.steps and read(layer.sizes, t) > low:
            m = min(most, read(layer.sizes, t) - low)
            if count and count + m > GROUP:
                break
            row = read(layer.starts, t) + low
            for i in range(m):
                if run.saves:
                    own = read(layer.buffers, d * layer.steps + t) + (low + i) * row_bytes
                else:
                    own = buffer + (count + i) * row_bytes
                at = read(layer.rows_in, d * layer.rows + row + i) if layer.rows_in else row + i
                write(table_a, count + i, layer.x + at * layer.x_row)
                write(table_b, count + i, own)
                write(table_c, count + i, own + free * size)
                copy(like, free, (begin, own))
            count += m
            t += 1
        times(like, table_a, w_ih, bias, table_c, count, N, inputs)
        done = 0
        for s in range(first, t):
            m = min(most, read(layer.sizes, s) - low)
            before = low + (layer.sequences + read(layer.starts, s - 1) if s else 0)
            row = read(layer.starts, s) + low
            after = layer.sequences + row
            for i in range(m):
                write(table_a, i, history + (before + i) * P * size)
                write(table_c, i, projected + i * H * size)
                write(table_d, i, history + (after + i) * P * size)
            times(like, table_a, w_hh, 0, table_b + 8 * done, m, N, P)
            for i in range(m):
                own, h, h_after = read(table_b, done + i), read(table_a, i), read(table_d, i)
                b1, b2, b3 = own + H * size, own + 2 * H * size, own + 3 * H * size
                if layer.mode == GRU:
                    run_gru(like, H, (own, b1, b2, b3, h, b1, b2, b3, h_after))
                elif layer.mode == LSTM:
                    c, c_after = cells + (before + i) * H * size, cells + (after + i) * H * size
                    m_after = projected + i * H * size if run.w_hr else h_after
                    run_lstm(like, H, (own, b1, b2, b3, c, own, b1, b2, b3, c_after, m_after))
                elif layer.mode == RNN_TANH:
                    run_rnn_tanh(like, H, (own, h_after))
                else:
                    run_rnn_relu(like, H, (own, h_after))
            if run.w_hr:
                times(like, table_c, w_hr, layer.zeros, table_d, m, P, H)
            if run.output:
                for i in range(m):
                    at = read(layer.rows_out, d * layer.rows + row + i) if layer.rows_out else row + i
                    copy(like, P, (read(table_d, i), run.output + at * run.output_row + d * P * size))
            for i in range(max(0, read(layer.sizes, s + 1) - low), m):  # here these end
                at = state_of(layer, d, low + i)
                copy(like, P, (read(table_d, i), run.states + at * P * size))
                if layer.mode == LSTM:
                    copy(like, H, (cells + (after + i) * H * size, run.state_cells + at * H * size))
            done += m


@within
def backward(like: Any, layer: Layer, run: Backward, counter: int, scratch: int) -> None:
    """The steps of a chunk, last first: the states' gradients, the deltas, the input's gradient."""
    blocks = (layer.sequences + layer.block - 1) // layer.block
    while True:
        k = take_number(counter)
        if k >= blocks * layer.directions:
            return
        backward_block(like, layer, run, k % layer.directions, k // layer.directions, scratch)


@compiled
def backward_block(like: Any, layer: Layer, run: Backward, d: int, block: int, scratch: int) -> None:
    size, H, P, inputs = itemsize(like), layer.hidden, layer.fed_back, layer.inputs
    low, N = block * layer.block, layer.gates * H
    row_bytes, most = layer.width * H * size, min(layer.sequences - low, layer.block)
    w_ih = run.w_ih + d * packed_size(size, N, inputs)
    w_hh = run.w_hh + d * packed_size(size, N, P)
    w_hr = run.w_hr + d * packed_size(size, P, H)
    history = layer.history + d * (layer.sequences + layer.rows) * P * size
    cells = layer.cells + d * (layer.sequences + layer.rows) * H * size
    blocks = (layer.sequences + layer.block - 1) // layer.block
    d_bias = run.d_bias + (d * blocks + block) * layer.width * H * size
    deltas = run.deltas + d * run.delta_rows * run.delta_width * size
    dx = run.dx + d * run.dx_direction
    table_a, table_b, table_c, table_d = scratch, scratch + 8 * GROUP, scratch + 16 * GROUP, scratch + 24 * GROUP
    projected, origin = scratch + 8 * SCRATCH, read(layer.starts, run.first)
    t, waiting = run.stop - 1, 0
    for i in range(most):
        write(table_a, i, run.dh + state_of(layer, d, low + i) * P * size)
        write(table_c, i, projected + i * H * size)
    while t >= run.first:
        m = min(most, read(layer.sizes, t) - low)
        if m <= 0:
            t -= 1
            continue
        row = read(layer.starts, t) + low
        before = low + (layer.sequences + read(layer.starts, t - 1) if t else 0)
        if run.d_output:
            for i in range(m):
                at = read(layer.rows_out, d * layer.rows + row + i) if layer.rows_out else row + i
                own = read(table_a, i)
                add(like, P, (own, run.d_output + at * run.d_output_row + d * P * size, own))
        if run.w_hr:
            times(like, table_a, w_hr, layer.zeros, table_c, m, H, P)
        for i in range(m):
            own = read(table_a, i)
            delta = deltas + (row + i - origin) * run.delta_width * size
            d1, d2, d3 = delta + H * size, delta + 2 * H * size, delta + 3 * H * size
            a = read(layer.buffers, d * layer.steps + t) + (low + i) * row_bytes if layer.buffers else 0
            a1, a2, a3 = a + H * size, a + 2 * H * size, a + 3 * H * size
            h, h_after = history + (before + i) * P * size, history + (layer.sequences + row + i) * P * size
            tail = delta + layer.width * H * size
            if layer.mode == GRU:
                run_gru_back(like, H, (a, a1, a2, a3, h, own, delta, d1, d2, d3, own))
            elif layer.mode == LSTM:
                c, c_after = cells + (before + i) * H * size, cells + (layer.sequences + row + i) * H * size
                own_c = run.dc + state_of(layer, d, low + i) * H * size
                dm, m_again = own, projected + i * H * size
                if run.w_hr:
                    dm, m_again = m_again, projected + (layer.block + i) * H * size
                if run.d_w_hr:
                    m_again = tail + (P + inputs + P) * size
                    copy(like, P, (own, tail + (P + inputs) * size))
                run_lstm_back(like, H, (a, a1, a2, a3, c, c_after, dm, own_c, delta, d1, d2, d3, own_c, m_again))
            elif layer.mode == RNN_TANH:
                run_rnn_tanh_back(like, H, (h_after, own, delta))
            else:
                run_rnn_relu_back(like, H, (h_after, own, delta))
            if run.d_bias:
                add(like, layer.width * H, (d_bias, delta, d_bias))
            write(table_b, waiting + i, delta)
            if run.d_w_hh:
                at = read(layer.rows_in, d * layer.rows + row + i) if layer.rows_in else row + i
                copy(like, P, (h, tail))
                copy(like, inputs, (layer.x + at * layer.x_row, tail + P * size))
        # The GRU's h has a share of its gradient already; the others' has none.
        times(like, table_b + 8 * waiting, w_hh, 0 if layer.mode == GRU else layer.zeros, table_a, m, P, N)
        waiting += m
        t -= 1
        if t < run.first or waiting + min(most, read(layer.sizes, t) - low) > GROUP:
            if run.dx:
                input_gradient(like, layer, run, d, deltas, origin, dx, w_ih, table_b, table_d, waiting)
            waiting = 0


@within
def input_gradient(
    like: Any,
    layer: Layer,
    run: Backward,
    d: int,
    deltas: int,
    origin: int,
    dx: int,
    w_ih: int,
    table: int,
    targets: int,
    count: int,
) -> None:
    """dx at the rows whose deltas are in the table."""
    size, N, free = itemsize(like), layer.gates * layer.hidden, (layer.width - layer.gates) * layer.hidden
    for i in range(count):
        delta = read(table, i)
        row = origin + (delta - deltas) // (run.delta_width * size)
        at = read(layer.rows_in, d * layer.rows + row) if layer.rows_in else row
        write(targets, i, dx + at * layer.inputs * size)
        write(table, i, delta + free * size)
    times(like, table, w_ih, layer.zeros, targets, count, layer.inputs, N)


@compiled
def weight_gradients(like: Any, layer: Layer, run: Backward, counter: int, scratch: int) -> None:
    """A chunk's share of the weights' gradients: products of the deltas' columns."""
    size, H, P, inputs = itemsize(like), layer.hidden, layer.fed_back, layer.inputs
    N, free, tail = layer.gates * H, (layer.width - layer.gates) * H, layer.width * H
    parts = (N + run.part - 1) // run.part
    projections = (P + run.part - 1) // run.part if run.d_w_hr else 0
    rows = (read(layer.starts, run.stop - 1) + read(layer.sizes, run.stop - 1)) - read(layer.starts, run.first)
    while True:
        k = take_number(counter)
        if k >= (parts + projections) * layer.directions:
            return
        d, k = k % layer.directions, k // layer.directions
        deltas = run.deltas + d * run.delta_rows * run.delta_width * size
        if k < parts:
            low, high = k * run.part, min(N, (k + 1) * run.part)
        else:
            low, high = (k - parts) * run.part, min(P, (k - parts + 1) * run.part)
        step = run.delta_width * size
        for start in range(0, rows, DEPTH):
            row, depth = deltas + start * step, min(DEPTH, rows - start)
            if k < parts:
                c_hh, c_ih = run.d_w_hh + d * N * P * size, run.d_w_ih + d * N * inputs * size
                multiply_columns(like, row, low, tail, c_hh, P, low, high, N - free, N, depth, step, scratch)
                multiply_columns(like, row, low + free, tail + P, c_ih, inputs, low, high, 0, N, depth, step, scratch)
            else:
                dh, c_hr = tail + P + inputs, run.d_w_hr + d * P * H * size
                multiply_columns(like, row, dh + low, dh + P, c_hr, H, low, high, 0, P, depth, step, scratch)


def pack32(data: int) -> None:
    pack(np.float32(0), packing_at(data))


def pack64(data: int) -> None:
    pack(np.float64(0), packing_at(data))


def forward32(data: int) -> None:
    forward(np.float32(0), layer_at(data + LAYER), forward_at(data + PASS), data, own_scratch(data))


def forward64(data: int) -> None:
    forward(np.float64(0), layer_at(data + LAYER), forward_at(data + PASS), data, own_scratch(data))


def backward32(data: int) -> None:
    backward(np.float32(0), layer_at(data + LAYER), backward_at(data + PASS), data, own_scratch(data))


def backward64(data: int) -> None:
    backward(np.float64(0), layer_at(data + LAYER), backward_at(data + PASS), data, own_scratch(data))


def weight_gradients32(data: int) -> None:
    weight_gradients(np.float32(0), layer_at(data + LAYER), backward_at(data + PASS), data, own_scratch(data))


def weight_gradients64(data: int) -> None:
    weight_gradients(np.float64(0), layer_at(data + LAYER), backward_at(data + PASS), data, own_scratch(data))
