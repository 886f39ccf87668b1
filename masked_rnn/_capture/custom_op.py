"""One layer as a custom operator, so that torch.compile and torch.export do not trace the loop over time.

Input and output are padded, in the layer's own layout. The operator has a fake kernel and a registered gradient. On a
CPU it reads the lengths when it runs: it makes the plan and the choice, and saves the tensors, of an eager call. Of the
backends that a layer can be told to run, it knows `bptt`.

T time, N batch, I input, P the state that is fed back, D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._backends import bptt, padded, scan
from .._backends.bptt import library, passes
from .._backends.bptt.autograd import job_of
from .._backends.bptt.job import Job, saved_size
from .._backends.measured import kernel_is_faster
from .._call import Call
from .._call.context import PLAIN
from .._cells import stack_layers
from .._plan import move_to_front
from .._probe import check_dtype
from .._segments import Segments, resets_at_real_steps
from .._spec import LayerWeights, Spec, States, flatten_weights
from .._torch import with_autograd
from .arguments import Arguments


def why_not(call: Call) -> str | None:
    """Return the reason why the operator can't run a call. None: it can."""
    if call.backend == "bptt":
        return bptt.why_not(call._with(context=PLAIN))  # values are read when the operator runs
    return None


def run(call: Call) -> tuple[Tensor, States]:
    if call.form.is_rows or call.mask is not None:
        x, lengths, restore = call.padded_last()
        batch_first = False
    else:
        x, lengths, batch_first, restore = call.data, call.lengths, call.form.batch_first, None
    S, resets = len(call.states), call.resets
    if resets is not None and call.mask is not None:
        resets, _ = move_to_front(resets_at_real_steps(resets, call.mask).unsqueeze(-1), call.mask)
        resets = resets.squeeze(-1)

    def run_one(spec: Spec, x: Tensor, initial: States, weights: LayerWeights) -> tuple[Tensor, States]:
        tensors, save = flatten_weights([weights]), torch.is_grad_enabled()
        results = torch.ops.masked_rnn.layer(
            x, lengths, resets, list(initial), tensors, spec.mode, batch_first, call.backend, save
        )
        return results[0], tuple(results[1 : 1 + S])

    output, last = stack_layers(call.spec, x, call.states, call.parameters, run_one, call.dropout)
    return output if restore is None else restore(output), last


def _forward(*given: Any) -> list[Tensor]:
    """Return the output, the last states, what backward needs, and whether PyTorch's kernel ran."""
    *common, save = given
    arguments = Arguments(*common)
    call, x, initial = arguments.open(), arguments.x, arguments.initial
    check_dtype(call.spec, x.dtype, x.device)
    reason = why_not(call)
    if reason:
        raise RuntimeError(f"backend={call.backend!r} can't run this layer: {reason}.")
    kernel_ran = _always_runs_kernel(arguments) or _runs_kernel(call, save)
    saved = x.new_empty(_saved_bytes(arguments, save), dtype=torch.uint8)
    if kernel_ran:
        with torch.no_grad():
            output, last = _run_kernel(call)
        output = output.contiguous()
        last = tuple(h.clone(memory_format=torch.contiguous_format) for h in last)
    else:
        job, states, segments = _plan_layer(call)
        into = saved.view(x.dtype) if save else None
        output, last, _ = passes.forward(job, x, states, call.parameters, save, into)
        if segments is not None:
            last = tuple(map(segments.last, last, initial))
    return [output, *last, saved, x.new_full((), kernel_ran, dtype=torch.bool)]


def _backward(*given: Any) -> list[Tensor]:
    """Return the gradients of the initial states, then of x and of the weights if they are wanted."""
    *common, saved, kernel_ran, grads, want_x, want_weights = given
    arguments = Arguments(*common)
    call = arguments.open()
    arguments.check_saved(saved, _saved_bytes(arguments, True), grads)
    if _always_runs_kernel(arguments) or bool(kernel_ran):
        return _run_kernel_again(arguments, grads, want_x, want_weights)
    job, states, segments = _plan_layer(call)
    d_last = list(grads[1:])
    d_results = [grads[0], *(d_last if segments is None else map(segments.last_gradient, d_last))]
    dx, d_initial, d_weights = passes.backward(
        job, call.data, states, call.parameters, saved.view(call.data.dtype), d_results, want_x, want_weights
    )
    result = list(d_initial if segments is None else map(segments.initial_gradient, d_initial, d_last))
    # Copies of the weights' gradients, because an operator's results must not share memory.
    return [*result, *([] if dx is None else [dx]), *[g.clone() for g in d_weights or ()]]


def _always_runs_kernel(arguments: Arguments) -> bool:
    """Return whether `_run_kernel` runs whatever the values are, as on a GPU."""
    return arguments.backend == "auto" and arguments.x.device.type != "cpu"


def _runs_kernel(call: Call, in_training: bool) -> bool:
    """Return whether `_run_kernel` runs a call on a CPU, by the choice of `auto`. For the gradient it runs again."""
    if call.backend == "bptt" or call.is_empty():
        return False
    return call.data.is_complex() or kernel_is_faster(call, in_training, library.runs(call.data.dtype))


def _run_kernel(call: Call) -> tuple[Tensor, States]:
    # `padded` does not take resets, and to cut at them would wait for the device. Complex layers run `scan` too.
    run_backend = padded.run if call.resets is None and not call.data.is_complex() else scan.run
    with torch.autocast(call.data.device.type, enabled=False):
        return run_backend(call)


def _run_kernel_again(arguments: Arguments, grads: Sequence[Tensor], want_x: bool, want_weights: bool) -> list[Tensor]:
    S = len(arguments.initial)

    def run() -> list[Tensor]:
        inputs = [t.detach().requires_grad_() for t in (*arguments.initial, arguments.x, *arguments.weights)]
        with torch.enable_grad():
            again = arguments._replace(initial=inputs[:S], x=inputs[S], weights=inputs[S + 1 :])
            output, last = _run_kernel(again.open())
        wanted = inputs[:S] + (inputs[S : S + 1] if want_x else []) + (inputs[S + 1 :] if want_weights else [])
        found = torch.autograd.grad((output, *last), wanted, list(grads), allow_unused=True, materialize_grads=True)
        return [g.clone(memory_format=torch.contiguous_format) for g in found]

    return with_autograd(run)


class Planned(NamedTuple):
    """A call's resets, and the segments between them."""

    layout: tuple[int, int, int, bool, torch.device]
    """Batch, steps, directions, batch_first, device"""
    lengths: Tensor | None
    resets: Tensor
    segments: Segments


_latest: Planned | None = None
"""The latest segments. A layer's gradient and the other layers of a stack need the same ones again."""


def _plan_layer(call: Call) -> tuple[Job, States, Segments | None]:
    """Return the job, the initial states, and the segments between resets. None: there are no resets."""
    global _latest
    form, planned = call.form, _latest
    if call.resets is None:
        return job_of(call), call.states, None
    layout = (form.batch, form.steps, call.spec.directions, form.batch_first, call.data.device)
    if (
        planned is None
        or planned.layout != layout
        or not _equal(planned.lengths, call.lengths)
        or not _equal(planned.resets, call.resets)
    ):
        _, segments = call.cut(call.resets)
        # Copies, because the caller may change the originals in place.
        lengths = None if call.lengths is None else call.lengths.clone()
        planned = _latest = Planned(layout, lengths, call.resets.clone(), segments)
    segments = planned.segments
    job = Job(call.spec, segments.plan.batch, form.steps, False, plan=segments.plan)
    return job, tuple(map(segments.initial, call.states)), segments


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.device == b.device and torch.equal(a, b))


def _saved_bytes(arguments: Arguments, save: bool) -> Any:
    """Return a size of the loops' `saved` that is enough if there is no padding. Unwritten memory costs nothing.

    It depends on shapes and dtypes only, because the fake kernel knows no values.
    """
    x, resets, initial = arguments.x, arguments.resets, arguments.initial
    if not save or _always_runs_kernel(arguments):
        return 0
    rows = x.shape[0] * x.shape[1]
    sequences = initial[0].shape[1] if resets is None else rows  # at most one segment for each row
    return saved_size(arguments.spec(), sequences, rows) * x.element_size()


def _fake_forward(*given: Any) -> list[Tensor]:
    *common, save = given
    arguments = Arguments(*common)
    x, initial = arguments.x, arguments.initial
    output = x.new_empty(x.shape[0], x.shape[1], initial[0].shape[0] * initial[0].shape[-1])
    last = [torch.empty_like(h, memory_format=torch.contiguous_format) for h in initial]
    saved = x.new_empty(_saved_bytes(arguments, save), dtype=torch.uint8)
    return [output, *last, saved, x.new_empty((), dtype=torch.bool)]


def _fake_backward(*given: Any) -> list[Tensor]:
    *common, _saved, _kernel_ran, _grads, want_x, want_weights = given
    arguments = Arguments(*common)
    like = [*arguments.initial, *([arguments.x] if want_x else []), *(arguments.weights if want_weights else [])]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in like]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, lengths, resets, initial, weights, *ctx.options, _ = inputs
    ctx.n_states, ctx.n_weights = len(initial), len(weights)
    ctx.save_for_backward(x, lengths, resets, *output[-2:], *initial, *weights)


def _gradient(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, lengths, resets, saved, kernel_ran, *rest = ctx.saved_tensors
    S = ctx.n_states
    arguments = Arguments(x, lengths, resets, rest[:S], rest[S:], *ctx.options)
    want_x, want_weights = ctx.needs_input_grad[0], any(t.requires_grad for t in rest[S:])
    results = list(
        torch.ops.masked_rnn.layer_gradient(*arguments, saved, kernel_ran, grads[: 1 + S], want_x, want_weights)
    )
    d_initial, results = results[:S], results[S:]
    dx = results.pop(0) if want_x else None
    return dx, None, None, d_initial, results if want_weights else [None] * ctx.n_weights, *[None] * 4


ARGUMENTS = "Tensor x, Tensor? lengths, Tensor? resets, Tensor[] initial, Tensor[] weights, str mode, bool batch_first"
ARGUMENTS += ", str backend"
forward_operator = torch.library.custom_op(
    "masked_rnn::layer", _forward, mutates_args=(), schema=f"({ARGUMENTS}, bool save) -> Tensor[]"
)
forward_operator.register_fake(_fake_forward)
forward_operator.register_autograd(_gradient, setup_context=_setup_context)
backward_operator = torch.library.custom_op(
    "masked_rnn::layer_gradient",
    _backward,
    mutates_args=(),
    schema=f"({ARGUMENTS}, Tensor saved, Tensor kernel_ran, Tensor[] grads, bool want_x,"
    " bool want_weights) -> Tensor[]",
)
backward_operator.register_fake(_fake_backward)
