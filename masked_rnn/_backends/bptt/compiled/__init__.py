"""The loops of `..loops`, compiled by Numba: same arguments, same results, same `Saved`."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...._cells import LayerWeights, States, Weights
from ...._memory import as_array
from ...._plan import Chunk
from ...._torch import below_autograd
from .. import loops
from ..cells import Cell
from ..spec import LayerSpec, Saved, last_gradient, new_saved
from . import kernels, records, threads
from .tile import TILE_BYTES, TILE_ROWS

MODES = {"GRU": kernels.GRU, "LSTM": kernels.LSTM, "RNN_TANH": kernels.RNN_TANH, "RNN_RELU": kernels.RNN_RELU}
DELTA_BYTES = 8 << 20
"""Of a chunk's deltas, for each direction."""


@below_autograd
def forward(
    spec: LayerSpec, x: Tensor, initial: States, weights: LayerWeights, save: bool, into: Saved | None = None
) -> tuple[Tensor, States, Saved]:
    plan, cell = spec.plan, spec.cell(weights)
    if not plan.rows:
        return loops.forward(spec, x, initial, weights, save, into)
    chunks = spec.chunks(cell, x.element_size())
    into = new_saved(spec, cell, x, initial, chunks, save) if into is None else into
    layer = _Layer(spec, cell, _rows(x), initial, into, chunks)
    states = tuple(h.clone(memory_format=torch.contiguous_format) for h in initial)
    if spec.output_is_history:
        output = None
    else:
        size = plan.size if spec.scatter else plan.rows
        new = x.new_zeros if size > plan.rows else x.new_empty
        output = new(size, len(weights) * initial[0].size(-1))
    run = records.Forward(
        w_ih=layer.pack([w.w_ih for w in weights], transposed=True),
        w_hh=layer.pack([w.w_hh for w in weights], transposed=True, first=layer.first_gate),
        w_hr=layer.pack([w.w_hr for w in weights], transposed=True),
        b_ih=layer.join([w.b_ih for w in weights]),
        b_hh=layer.join([w.b_hh for w in weights]),
        states=states[0].data_ptr(),
        state_cells=states[-1].data_ptr(),
        output=0 if output is None else output.data_ptr(),
        output_row=0 if output is None else output.stride(0) * output.element_size(),
        saves=bool(into.buffers),
    )
    layer.run("forward", run, layer.blocks * len(weights))
    if output is None:
        output = into.history[0].narrow(-2, plan.sequences, plan.rows)
        output = output.clone() if save else output  # what is saved must not change with what the caller gets
    return output, states, into


@below_autograd
def backward(
    spec: LayerSpec,
    x: Tensor,
    initial: States,
    weights: LayerWeights,
    saved: Saved,
    d_output: Tensor | None,
    d_last: Sequence[Tensor | None],
    want_x: bool,
    want_weights: bool,
) -> tuple[Tensor | None, States, LayerWeights | None]:
    plan, cell, D = spec.plan, spec.cell(weights), len(weights)
    if not plan.rows:
        return loops.backward(spec, x, initial, weights, saved, d_output, d_last, want_x, want_weights)
    H, P, inputs, gates = cell.hidden, initial[0].size(-1), x.size(-1), cell.gates * cell.hidden
    d_output = None if d_output is None else _rows(d_output.resolve_neg())
    # What hooks on saved tensors gave back may lie in any way.
    saved = Saved(tuple(h.contiguous() for h in saved.history), [b.contiguous() for b in saved.buffers])
    layer = _Layer(spec, cell, _rows(x), initial, saved, spec.chunks(cell, x.element_size()))
    grads = tuple(last_gradient(h, d) for h, d in zip(initial, d_last, strict=True))  # carried back in place
    projects = want_weights and cell.w_hr is not None
    width = cell.width * H + (P + inputs) * want_weights + (P + H) * projects
    chunks = plan.chunks(max(1, DELTA_BYTES // (width * x.element_size())))
    most = max(chunk.rows for chunk in chunks)
    deltas = x.new_empty(D, most, width)
    dx = (x.new_zeros if x.size(0) > plan.rows else x.new_empty)(D, *x.shape) if want_x else None
    biased = want_weights and weights[0].b_ih is not None
    d_bias = x.new_zeros(D, layer.blocks if biased else 0, cell.width * H)
    d_w_hh, d_w_ih = x.new_zeros(D, gates, P * want_weights), x.new_zeros(D, gates, inputs * want_weights)
    d_w_hr = x.new_zeros(D, P * projects, H)
    part = layer.part(gates)
    run = records.Backward(
        w_ih=layer.pack([w.w_ih for w in weights], transposed=False) if want_x else 0,
        w_hh=layer.pack([w.w_hh for w in weights], transposed=False, first=layer.first_gate),
        w_hr=layer.pack([w.w_hr for w in weights], transposed=False),
        d_output=0 if d_output is None else d_output.data_ptr(),
        d_output_row=0 if d_output is None else d_output.stride(0) * x.element_size(),
        dh=grads[0].data_ptr(),
        dc=grads[-1].data_ptr(),
        deltas=deltas.data_ptr(),
        delta_width=width,
        delta_rows=most,
        dx=0 if dx is None else dx.data_ptr(),
        dx_direction=0 if dx is None else dx.stride(0) * x.element_size(),
        d_bias=d_bias.data_ptr() if biased else 0,
        d_w_hh=d_w_hh.data_ptr() if want_weights else 0,
        d_w_ih=d_w_ih.data_ptr(),
        d_w_hr=d_w_hr.data_ptr() if projects else 0,
        part=part,
        first=0,
        stop=0,
    )
    parts = -(-gates // part) + (-(-P // part) if run.d_w_hr else 0)
    for chunk in reversed(chunks):
        run = run._replace(first=chunk.first, stop=chunk.first + len(chunk.sizes))
        layer.run("backward", run, layer.blocks * D)
        if want_weights:
            layer.run("weight_gradients", run, parts * D)
    d_weights = None
    if want_weights:
        bias = d_bias.sum(1)
        d_weights = tuple(
            Weights(
                d_w_ih[d],
                d_w_hh[d],
                None if w.b_ih is None else bias[d, -gates:],
                None if w.b_hh is None else cell.restore_gates(bias[d, :gates]).clone(),
                None if w.w_hr is None else d_w_hr[d],
            )
            for d, w in enumerate(weights)
        )
    if dx is None:
        return None, grads, d_weights
    return dx[0] if D == 1 else dx[0].add_(dx[1]), grads, d_weights


def prepare(dtype: torch.dtype) -> None:
    """Compile all for a dtype, or read it from Numba's cache."""
    bits = torch.finfo(dtype).bits
    for name in ("pack", "forward", "backward", "weight_gradients"):
        threads.entry(f"{name}{bits}")


def _rows(x: Tensor) -> Tensor:
    """A matrix whose rows' numbers lie side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


class _Layer:
    """The addresses that both passes read, and what lies there for as long as this does."""

    def __init__(
        self, spec: LayerSpec, cell: Cell, x: Tensor, initial: States, saved: Saved, chunks: list[Chunk]
    ) -> None:
        plan, D, history = spec.plan, spec.directions, saved.history
        zeros = x.new_zeros(max(x.size(1), cell.gates * cell.hidden))
        self.threads = torch.get_num_threads()
        sides = -(-self.threads // D)
        blocks = -(-plan.sequences // TILE_ROWS)
        block = -(-plan.sequences // (-(-blocks // sides) * sides))
        self.blocks = -(-plan.sequences // block)
        self.alive: list[Any] = [x, saved, plan.step_tables, zeros]
        self.itemsize = history[0].element_size()
        width = cell.width * cell.hidden
        self.first_gate = (2 * cell.gates - cell.width) * cell.hidden
        rows = (kernels.GROUP + 1) * width + block * cell.hidden
        self.scratch_bytes = kernels.SCRATCH * 8 + rows * self.itemsize
        self.D = D
        sizes, starts = plan.step_tables
        buffers = 0
        if saved.buffers:
            row = width * self.itemsize
            first = np.array([b.data_ptr() - c.start * row for b, c in zip(saved.buffers, chunks, strict=True)])
            counts = [len(c.sizes) for c in chunks]
            each = np.repeat(first, counts) + as_array(starts)[:-1] * row
            both = [each, each + np.repeat([c.rows * row for c in chunks], counts)]
            buffers = self.join([torch.from_numpy(each) for each in both[:D]])
        self.values = records.Layer(
            mode=MODES[spec.mode],
            hidden=cell.hidden,
            fed_back=history[0].size(-1),
            inputs=x.size(1),
            width=cell.width,
            gates=cell.gates,
            batch=plan.batch,
            sequences=plan.sequences,
            steps=len(plan.batch_sizes),
            rows=plan.rows,
            directions=D,
            block=block,
            sizes=sizes.data_ptr(),
            starts=starts.data_ptr(),
            order=self.join([plan.order]),
            x=x.data_ptr(),
            x_row=x.stride(0) * self.itemsize,
            rows_in=self.table(spec.rows_at(spec.gather)),
            rows_out=self.table(spec.rows_at(spec.scatter)),
            buffers=buffers,
            history=history[0].data_ptr(),
            cells=history[-1].data_ptr(),
            zeros=zeros.data_ptr(),
        )

    def table(self, rows: list[Tensor | None]) -> int:
        if all(index is None for index in rows):
            return 0
        count = next(index.size(0) for index in rows if index is not None)
        return self.join([torch.arange(count, device="cpu") if index is None else index for index in rows])

    def join(self, tensors: Sequence[Tensor | None]) -> int:
        """The address of a tensor for each direction, side by side; 0 where there are none."""
        found = [t for t in tensors if t is not None]
        if not found:
            return 0
        joined = found[0].contiguous() if len(found) == 1 else torch.stack(found)
        self.alive.append(joined)
        return joined.data_ptr()

    def pack(self, weights: Sequence[Tensor | None], transposed: bool, first: int = 0) -> int:
        """The address of weights in panels, or of those of their transposes; `first` counts as row 0."""
        found = [w.contiguous() for w in weights if w is not None]
        if not found:
            return 0
        M, K = found[0].shape
        columns, depth = (M, K) if transposed else (K, M)
        wide = TILE_BYTES // self.itemsize
        packed = found[0].new_empty(len(found), -(-columns // wide), depth, wide)
        self.alive.append(packed)
        target, size = packed.data_ptr(), packed.stride(0) * self.itemsize
        for weight in found:
            self.call("pack", records.Packing(weight.data_ptr(), M, K, first, transposed, target))
            target += size
        return packed.data_ptr()

    def part(self, gates: int) -> int:
        """How many rows of a weight's gradient a thread takes at once."""
        even = -(-gates * self.D // (4 * self.threads))
        return min(kernels.MOST_PARTS, -(-even // TILE_ROWS) * TILE_ROWS)

    def run(self, kernel: str, run: Any, tasks: int) -> None:
        scratch = torch.empty(self.threads * self.scratch_bytes, dtype=torch.uint8, device="cpu")
        shared = records.Shared(0, 0, scratch.data_ptr(), self.scratch_bytes)
        self.call(kernel, (*shared, *self.values, *run), tasks)

    def call(self, kernel: str, numbers: Sequence[int], tasks: int = 1) -> None:
        data = array("q", numbers)
        threads.run(f"{kernel}{8 * self.itemsize}", data.buffer_info()[0], self.threads, tasks)
