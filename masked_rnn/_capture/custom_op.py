"""A layer as one operator, opaque to torch.compile and torch.export: the loop over time stays out of the graph.

Padded in, padded out, in the layer's own layout, with a fake kernel and a registered gradient. Where its kernel runs,
the lengths can be read, and are checked. T time, N batch, I input, P the state that is fed back, D directions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._backends.bptt import choice, library
from .._backends.bptt.cells import CELLS
from .._backends.bptt.layer_run import LayerRun, Saved, buffer_shape, history_shapes
from .._backends.kernels import kernel_is_faster
from .._backends.padded import run_padded
from .._backends.recurrence import scan
from .._call import Call
from .._cells import LayerWeights, States, flatten_weights, group_weights, stack_layers
from .._memory import as_array
from .._plan import Plan, move_to_front, plan_full, plan_padded, real_mask
from .._probe import check_dtype
from .._segments import Segments, resets_at_real_steps
from .._torch import unsafe_view, with_autograd
from .arguments import check_arguments, check_saved

CPU = torch.device("cpu")


def run(call: Call) -> tuple[Tensor, States]:
    if call.data.dim() == 3 and call.mask is None:
        x, lengths, batch_first, restore = call.data, call.lengths, call.batch_first, None
    else:
        x, lengths, restore = call.padded_last()
        batch_first = False
    mode, D, S = call.layer.mode, call.directions, len(call.states)
    resets = call.resets
    if resets is not None and call.mask is not None:
        resets, _ = move_to_front(resets_at_real_steps(resets, call.mask).unsqueeze(-1), call.mask)
        resets = resets.squeeze(-1)

    def run_one(x: Tensor, initial: States, weights: LayerWeights) -> tuple[Tensor, States]:
        tensors = flatten_weights([weights])
        save = torch.is_grad_enabled()
        results = torch.ops.masked_rnn.layer(x, lengths, resets, list(initial), tensors, mode, D, batch_first, save)
        return results[0], tuple(results[1 : 1 + S])

    output, last = stack_layers(x, call.states, call.weights, run_one, call.dropout)
    return output if restore is None else restore(output), last


def _forward(
    x: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    initial: Sequence[Tensor],
    weights: Sequence[Tensor],
    mode: str,
    directions: int,
    batch_first: bool,
    save: bool,
) -> list[Tensor]:
    """The output, the last states, and what the gradient needs, as bytes."""
    check_arguments(x, lengths, resets, initial, weights, mode, directions, batch_first)
    grouped, states = group_weights(weights, 1, directions)[0], tuple(initial)
    check_dtype(mode, x.dtype, x.device, grouped[0].b_ih is not None, grouped[0].w_hr is not None)
    size = _saved_size(x, initial, weights, mode, directions, save, resets)
    saved_bytes = x.new_empty(size, dtype=torch.uint8)
    runs_kernel = _runs_kernel(x, lengths, resets, initial, mode, batch_first, save)
    saved_bytes[-x.element_size() :] = runs_kernel  # a mark for the gradient
    if runs_kernel:
        with torch.no_grad():
            output, last = _kernel(mode, x, lengths, resets, states, grouped, batch_first)
        return [output.contiguous(), *(h.clone() for h in last), saved_bytes]
    plan, segments = _plan(x, lengths, resets, directions, batch_first)
    layer_run = LayerRun(mode, directions, plan, gather=True, scatter=True)
    states = states if segments is None else tuple(map(segments.initial, states))
    saved = _saved(layer_run, x, states, grouped, saved_bytes) if save else None
    flat = x.reshape(-1, x.size(-1))
    output, last, _ = choice.forward(layer_run, flat, states, grouped, save, saved)
    if segments is not None:
        last = tuple(map(segments.last, last, initial))
    # Not a view for autograd: the caller may change it in place.
    return [unsafe_view(output, [*x.shape[:2], output.size(-1)]), *last, saved_bytes]


def _backward(
    x: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    initial: Sequence[Tensor],
    weights: Sequence[Tensor],
    saved_bytes: Tensor,
    grads: Sequence[Tensor],
    mode: str,
    directions: int,
    batch_first: bool,
    want_x: bool,
    want_weights: bool,
) -> list[Tensor]:
    """The gradients of the initial states, then of x and of the weights where they are wanted."""
    check_arguments(x, lengths, resets, initial, weights, mode, directions, batch_first)
    size = _saved_size(x, initial, weights, mode, directions, True, resets)
    check_saved(x, initial, saved_bytes, size, grads, directions)
    grouped, states = group_weights(weights, 1, directions)[0], tuple(initial)
    if x.device.type != "cpu" or bool(saved_bytes[-1]):
        return _recomputed(
            x, lengths, resets, initial, weights, grads, mode, directions, batch_first, want_x, want_weights
        )
    plan, segments = _plan(x, lengths, resets, directions, batch_first)
    layer_run = LayerRun(mode, directions, plan, gather=True, scatter=True)
    states = states if segments is None else tuple(map(segments.initial, states))
    flat = x.reshape(-1, x.size(-1))
    saved = _saved(layer_run, x, states, grouped, saved_bytes)
    d_output, d_last = grads[0].reshape(flat.size(0), -1), list(grads[1:])
    dx, d_initial, d_weights = choice.backward(
        layer_run,
        flat,
        states,
        grouped,
        saved,
        d_output,
        d_last if segments is None else list(map(segments.last_gradient, d_last)),
        want_x,
        want_weights,
    )
    result = list(d_initial if segments is None else map(segments.initial_gradient, d_initial, d_last))
    if dx is not None:
        result.append(dx.view(x.shape))
    if d_weights is not None:
        # Copies: the operator's results must not share memory.
        result += [g.clone() for g in flatten_weights([d_weights])]
    return result


def _runs_kernel(
    x: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    initial: Sequence[Tensor],
    mode: str,
    batch_first: bool,
    learns: bool,
) -> bool:
    """Whether PyTorch's kernel runs: as `auto` would choose. For the gradient it then runs once more."""
    if x.device.type != "cpu":
        return True
    batch, steps = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
    if batch == 0 or steps == 0 or x.is_complex() or resets is not None:
        return x.is_complex() and batch * steps > 0  # the loops' gradients are those of real numbers
    hidden, fed_back = initial[-1].size(-1), initial[0].size(-1)
    return kernel_is_faster(mode, x, batch, steps, hidden, fed_back, lengths, learns, library.runs)


def _kernel(
    mode: str,
    x: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    initial: States,
    weights: LayerWeights,
    batch_first: bool,
) -> tuple[Tensor, States]:
    x = x.transpose(0, 1) if batch_first else x
    with torch.autocast(x.device.type, enabled=False):
        if resets is None and not x.is_complex():
            output, last = run_padded(mode, x, lengths, initial, weights)
        else:
            # Where the segments lie can't be read without waiting for the device; and `padded` has no complex LSTM.
            real = None if lengths is None else real_mask(lengths, x.size(0))
            output, last = scan(mode, x, real, initial, weights, None if resets is None else resets.unsqueeze(-1))
    return output.transpose(0, 1) if batch_first else output, last


def _plan(
    x: Tensor, lengths: Tensor | None, resets: Tensor | None, directions: int, batch_first: bool
) -> tuple[Plan, Segments | None]:
    batch, steps = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
    if resets is not None:
        counts = None if lengths is None else tuple(lengths.tolist())
        segments = _segments_of(as_array(resets).tobytes(), counts, batch, steps, directions, batch_first)
        return segments.plan, segments
    if lengths is None:
        return plan_full(batch, steps, batch_first, x.device), None
    return _plan_of(tuple(lengths.tolist()), steps, batch_first), None


@lru_cache(maxsize=2)
def _plan_of(lengths: tuple[int, ...], steps: int, batch_first: bool) -> Plan:
    """A layer's gradient, and the layers above and below, ask for the same plan."""
    return plan_padded(torch.tensor(lengths, dtype=torch.int64, device=CPU), steps, batch_first, CPU)


@lru_cache(maxsize=2)
def _segments_of(
    resets: bytes, lengths: tuple[int, ...] | None, batch: int, steps: int, directions: int, batch_first: bool
) -> Segments:
    marks = torch.from_numpy(np.frombuffer(resets, np.bool_).reshape(steps, batch).copy())
    counts = None if lengths is None else torch.tensor(lengths, dtype=torch.int64, device=CPU)
    return Segments(marks, counts, None, directions, batch_first, CPU)


def _saved_size(
    x: Tensor,
    initial: Sequence[Tensor],
    weights: Sequence[Tensor],
    mode: str,
    directions: int,
    save: bool,
    resets: Tensor | None,
) -> Any:
    """Enough bytes for a batch without padding, and one element for the mark; memory that is not touched costs nothing.

    It must hang on nothing but shapes and dtypes: which kernel runs is known when it does.
    """
    if not save or x.device.type != "cpu":
        return 0
    cell = CELLS[mode]
    sequences = initial[0].shape[1] if resets is None else x.shape[0] * x.shape[1]  # at most
    states = sum(h.size(-1) for h in initial)
    blocks = weights[1].size(0) // cell.gates * cell.width if cell.saves_buffer else 0
    return (directions * (x.shape[0] * x.shape[1] * (states + blocks) + sequences * states) + 1) * x.element_size()


def _saved(layer_run: LayerRun, x: Tensor, initial: Sequence[Tensor], weights: LayerWeights, room: Tensor) -> Saved:
    """What `forward` saves, laid out in the bytes of `room`."""
    history, buffer = history_shapes(layer_run, initial), buffer_shape(layer_run, weights)
    shapes = history if buffer is None else [*history, buffer]
    sizes = [math.prod(shape) for shape in shapes]
    parts = room.view(x.dtype).narrow(0, 0, sum(sizes)).split(sizes)
    *states, last = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
    return Saved((*states, last), None) if buffer is None else Saved(tuple(states), last)


def _recomputed(
    x: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
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
        with torch.enable_grad():
            (grouped,) = group_weights(inputs[S + 1 :], 1, directions)
            output, last = _kernel(mode, inputs[S], lengths, resets, tuple(inputs[:S]), grouped, batch_first)
        wanted = inputs[:S] + (inputs[S : S + 1] if want_x else []) + (inputs[S + 1 :] if want_weights else [])
        found = torch.autograd.grad((output, *last), wanted, list(grads), allow_unused=True, materialize_grads=True)
        return [g.clone(memory_format=torch.contiguous_format) for g in found]

    return with_autograd(run)


def _fake_forward(
    x: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    initial: Sequence[Tensor],
    weights: Sequence[Tensor],
    mode: str,
    directions: int,
    batch_first: bool,
    save: bool,
) -> list[Tensor]:
    output = x.new_empty(x.shape[0], x.shape[1], directions * initial[0].shape[-1])
    size = _saved_size(x, initial, weights, mode, directions, save, resets)
    saved_bytes = x.new_empty(size, dtype=torch.uint8)
    return [output, *(torch.empty_like(h, memory_format=torch.contiguous_format) for h in initial), saved_bytes]


def _fake_backward(
    x: Tensor,
    lengths: Tensor | None,
    resets: Tensor | None,
    initial: Sequence[Tensor],
    weights: Sequence[Tensor],
    saved_bytes: Tensor,
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
    x, lengths, resets, initial, weights, ctx.mode, ctx.directions, ctx.batch_first, _ = inputs
    ctx.n_states, ctx.n_weights = len(initial), len(weights)
    ctx.save_for_backward(x, lengths, resets, output[-1], *initial, *weights)


def _gradient(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, lengths, resets, saved_bytes, *rest = ctx.saved_tensors
    S = ctx.n_states
    want_x, want_weights = ctx.needs_input_grad[0], any(t.requires_grad for t in rest[S:])
    results = list(
        torch.ops.masked_rnn.layer_gradient(
            x,
            lengths,
            resets,
            rest[:S],
            rest[S:],
            saved_bytes,
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
    return dx, None, None, d_initial, results if want_weights else [None] * ctx.n_weights, *[None] * 4


forward_operator = torch.library.custom_op(
    "masked_rnn::layer",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor? lengths, Tensor? resets, Tensor[] initial, Tensor[] weights, str mode, int directions, "
    "bool batch_first, bool keep) -> Tensor[]",
)
forward_operator.register_fake(_fake_forward)
forward_operator.register_autograd(_gradient, setup_context=_setup_context)
backward_operator = torch.library.custom_op(
    "masked_rnn::layer_gradient",
    _backward,
    mutates_args=(),
    schema="(Tensor x, Tensor? lengths, Tensor? resets, Tensor[] initial, Tensor[] weights, Tensor reserve, "
    "Tensor[] grads, str mode, int directions, bool batch_first, bool want_x, bool want_weights) -> Tensor[]",
)
backward_operator.register_fake(_fake_backward)
