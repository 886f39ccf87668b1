"""A layer as one operator, opaque to torch.compile and torch.export: the loop over time stays out of the graph.

Padded in, padded out, in the layer's own layout, with a fake kernel and a registered gradient. Where its kernel runs,
the lengths can be read, and are checked. T time, N batch, I input, P the state that is fed back, D directions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ._call import Call, each_layer, same
from ._cells import CELLS, States, Weights
from ._kernels import has_lstm_kernel, suits_kernel
from ._lengths import Plan, check_range, plan_full, plan_rows
from ._loops import Kept, Layer, backward, forward, kept_shapes
from ._padded import run_layer
from ._torch import unsafe_view, with_autograd


def run(call: Call) -> tuple[Tensor, States]:
    whole = call.data.dim() == 3 and call.mask is None
    batch_first = whole and call.batch_first
    x, lengths, back = (call.data, call.lengths, same) if whole else call.padded()
    mode = call.layer.mode
    D = call.directions
    S = len(call.states)

    def run_one(x: Tensor, initial: States, weights: tuple[Weights, ...]) -> tuple[Tensor, States]:
        tensors = [t for w in weights for t in w if t is not None]
        keep = torch.is_grad_enabled()
        results = torch.ops.masked_rnn.layer(x, lengths, list(initial), tensors, mode, D, batch_first, keep)
        return results[0], tuple(results[1 : 1 + S])

    output, last = each_layer(call, x, run_one)
    return back(output), last


def _weights(tensors: Sequence[Tensor], directions: int) -> tuple[Weights, ...]:
    """Two to five tensors a direction: W_ih, W_hh, the biases if there are any, W_hr if there is one."""
    each = len(tensors) // directions
    grouped = []
    for d in range(directions):
        w_ih, w_hh, *rest = tensors[d * each : (d + 1) * each]
        w_hr = rest.pop() if len(rest) % 2 else None
        b_ih, b_hh = rest or (None, None)
        grouped.append(Weights(w_ih, w_hh, b_ih, b_hh, w_hr))
    return tuple(grouped)


def _layer(
    x: Tensor,
    lengths: Tensor | None,
    initial: Sequence[Tensor],
    weights: Sequence[Tensor],
    mode: str,
    directions: int,
    batch_first: bool,
    keep: bool,
) -> list[Tensor]:
    """The output, the last states, and what the gradient needs, as bytes."""
    grouped, states = _weights(weights, directions), tuple(initial)
    reserve = x.new_empty(_reserve_size(x, lengths, initial, weights, mode, directions, keep), dtype=torch.uint8)
    if _runs_kernel(x, lengths, initial, mode, batch_first, keep):
        with torch.no_grad():
            output, last = _kernel(mode, x, lengths, states, grouped, batch_first)
        return [output.contiguous(), *(h.clone() for h in last), reserve]
    plan = _plan(x, lengths, batch_first)
    layer = Layer(mode, directions, plan, gather=True, scatter=True)
    kept = _kept(layer, x, initial, grouped, reserve) if keep else None
    output, last, _ = forward(layer, x.reshape(-1, x.size(-1)), states, grouped, keep, kept)
    # Not a view for autograd: the caller may change it in place.
    return [unsafe_view(output, [*x.shape[:2], output.size(-1)]), *last, reserve]


def _layer_gradient(
    x: Tensor,
    lengths: Tensor | None,
    initial: Sequence[Tensor],
    weights: Sequence[Tensor],
    reserve: Tensor,
    grads: Sequence[Tensor],
    mode: str,
    directions: int,
    batch_first: bool,
    want_x: bool,
    want_weights: bool,
) -> list[Tensor]:
    """The gradients of the initial states, then of x and of the weights where they are wanted."""
    grouped, states = _weights(weights, directions), tuple(initial)
    if _runs_kernel(x, lengths, initial, mode, batch_first, learns=True):
        return _recomputed(x, lengths, initial, weights, grads, mode, directions, batch_first, want_x, want_weights)
    layer = Layer(mode, directions, _plan(x, lengths, batch_first), gather=True, scatter=True)
    flat = x.reshape(-1, x.size(-1))
    kept = _kept(layer, x, initial, grouped, reserve)
    d_output = grads[0].reshape(flat.size(0), -1)
    dx, d_initial, d_weights = backward(
        layer, flat, states, grouped, kept, d_output, list(grads[1:]), want_x, want_weights
    )
    result = list(d_initial)
    if dx is not None:
        result.append(dx.view(x.shape))
    if d_weights is not None:
        # Copies: the operator's results must not share memory.
        result += [g.clone() for w in d_weights for g in w if g is not None]
    return result


def _runs_kernel(
    x: Tensor, lengths: Tensor | None, initial: Sequence[Tensor], mode: str, batch_first: bool, learns: bool
) -> bool:
    """Whether PyTorch's kernel runs, and once more for the gradient: as `auto` would choose."""
    if x.device.type != "cpu":
        return True
    batch, steps = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
    if lengths is not None:
        check_range(lengths, steps, f"batch_first={batch_first}")
    if batch == 0 or steps == 0:
        return False
    return suits_kernel(mode, x, batch, steps, initial[-1].size(-1), initial[0].size(-1), lengths, learns)


def _kernel(
    mode: str, x: Tensor, lengths: Tensor | None, initial: States, weights: tuple[Weights, ...], batch_first: bool
) -> tuple[Tensor, States]:
    output, last = run_layer(mode, x.transpose(0, 1) if batch_first else x, lengths, initial, weights)
    return output.transpose(0, 1) if batch_first else output, last


def _plan(x: Tensor, lengths: Tensor | None, batch_first: bool) -> Plan:
    batch, steps = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
    if lengths is None:
        return plan_full(batch, steps, batch_first, x.device)
    return _plan_of(tuple(lengths.tolist()), steps, batch_first)


@lru_cache(maxsize=2)
def _plan_of(lengths: tuple[int, ...], steps: int, batch_first: bool) -> Plan:
    """A layer's gradient, and the layers above and below, ask for the same plan."""
    batch = len(lengths)
    cpu = torch.device("cpu")
    starts, stride = torch.arange(batch, device=cpu), batch
    if batch_first:
        starts, stride = starts * steps, 1
    return plan_rows(torch.tensor(lengths, dtype=torch.int64, device=cpu), starts, stride, steps * batch, cpu)


def _reserve_size(
    x: Tensor,
    lengths: Tensor | None,
    initial: Sequence[Tensor],
    weights: Sequence[Tensor],
    mode: str,
    directions: int,
    keep: bool,
) -> Any:
    """Enough bytes for a batch without padding; memory that is not touched costs nothing."""
    runs_kernel = lengths is None and has_lstm_kernel(mode, x, initial[-1].size(-1), initial[0].size(-1))
    if not keep or x.device.type != "cpu" or runs_kernel:
        return 0
    cell = CELLS[mode]
    batch = initial[0].shape[1]
    states = sum(h.size(-1) for h in initial)
    blocks = weights[1].size(0) // cell.gates * cell.width if cell.keeps_buffer else 0
    return directions * (x.shape[0] * x.shape[1] * (states + blocks) + batch * states) * x.element_size()


def _kept(layer: Layer, x: Tensor, initial: Sequence[Tensor], weights: tuple[Weights, ...], reserve: Tensor) -> Kept:
    """What `forward` keeps, laid out in the reserve."""
    cell = layer.cell(weights)
    shapes = kept_shapes(layer, cell, initial, layer.chunks(cell, x.element_size()))
    sizes = [math.prod(shape) for group in shapes for shape in group]
    room = reserve.view(x.dtype)
    parts = iter(room.narrow(0, 0, sum(sizes)).split(sizes))
    history, buffers = ([next(parts).view(shape) for shape in group] for group in shapes)
    return Kept(tuple(history), buffers)


def _recomputed(
    x: Tensor,
    lengths: Tensor | None,
    initial: Sequence[Tensor],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    mode: str,
    directions: int,
    batch_first: bool,
    want_x: bool,
    want_weights: bool,
) -> list[Tensor]:
    S = len(initial)

    def run() -> list[Tensor]:
        inputs = [t.detach().requires_grad_() for t in (*initial, x, *weights)]
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            grouped = _weights(inputs[S + 1 :], directions)
            output, last = _kernel(mode, inputs[S], lengths, tuple(inputs[:S]), grouped, batch_first)
        wanted = inputs[:S] + (inputs[S : S + 1] if want_x else []) + (inputs[S + 1 :] if want_weights else [])
        found = torch.autograd.grad((output, *last), wanted, list(grads), allow_unused=True, materialize_grads=True)
        return [g.clone(memory_format=torch.contiguous_format) for g in found]

    return with_autograd(run)


def _fake_layer(
    x: Tensor,
    lengths: Tensor | None,
    initial: Sequence[Tensor],
    weights: Sequence[Tensor],
    mode: str,
    directions: int,
    batch_first: bool,
    keep: bool,
) -> list[Tensor]:
    output = x.new_empty(x.shape[0], x.shape[1], directions * initial[0].shape[-1])
    reserve = x.new_empty(_reserve_size(x, lengths, initial, weights, mode, directions, keep), dtype=torch.uint8)
    return [output, *(torch.empty_like(h, memory_format=torch.contiguous_format) for h in initial), reserve]


def _fake_gradient(
    x: Tensor,
    lengths: Tensor | None,
    initial: Sequence[Tensor],
    weights: Sequence[Tensor],
    reserve: Tensor,
    grads: Sequence[Tensor],
    mode: str,
    directions: int,
    batch_first: bool,
    want_x: bool,
    want_weights: bool,
) -> list[Tensor]:
    like = [*initial, *([x] if want_x else []), *(weights if want_weights else [])]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in like]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, lengths, initial, weights, ctx.mode, ctx.directions, ctx.batch_first, _ = inputs
    ctx.n_states, ctx.n_weights = len(initial), len(weights)
    ctx.save_for_backward(x, lengths, output[-1], *initial, *weights)


def _gradient(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, lengths, reserve, *rest = ctx.saved_tensors
    S = ctx.n_states
    want_x, want_weights = ctx.needs_input_grad[0], any(t.requires_grad for t in rest[S:])
    results = list(
        torch.ops.masked_rnn.layer_gradient(
            x,
            lengths,
            rest[:S],
            rest[S:],
            reserve,
            grads[: 1 + S],
            ctx.mode,
            ctx.directions,
            ctx.batch_first,
            want_x,
            want_weights,
        )
    )
    d_initial, results = results[:S], results[S:]
    dx = results.pop(0) if want_x else None
    return dx, None, d_initial, results if want_weights else [None] * ctx.n_weights, None, None, None, None


layer = torch.library.custom_op(
    "masked_rnn::layer",
    _layer,
    mutates_args=(),
    schema="(Tensor x, Tensor? lengths, Tensor[] initial, Tensor[] weights, str mode, int directions, "
    "bool batch_first, bool keep) -> Tensor[]",
)
layer.register_fake(_fake_layer)
layer.register_autograd(_gradient, setup_context=_setup_context)
layer_gradient = torch.library.custom_op(
    "masked_rnn::layer_gradient",
    _layer_gradient,
    mutates_args=(),
    schema="(Tensor x, Tensor? lengths, Tensor[] initial, Tensor[] weights, Tensor reserve, Tensor[] grads, "
    "str mode, int directions, bool batch_first, bool want_x, bool want_weights) -> Tensor[]",
)
layer_gradient.register_fake(_fake_gradient)
