"""PyTorch's kernels on a CPU, made as strict as cuDNN: they refuse what `_cudnn_rnn` and its backward refuse.

The checks follow aten/src/ATen/native/cudnn/RNN.cpp. The error texts are PyTorch's. L layers, D directions, N batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from masked_rnn._backends import cudnn, kernels
from masked_rnn._backends.held import operators
from masked_rnn._torch import KERNELS as OURS
from masked_rnn._torch import with_autograd

KERNELS = dict(OURS)
"""PyTorch's own, before tests replace some."""


def with_cudnn(monkeypatch: pytest.MonkeyPatch, runs: Callable[[Tensor], bool] = lambda _x: True) -> list[str]:
    """Makes the package see cuDNN for the inputs for which `runs` is True, with kernels that are as strict.

    Returns a list that gets the name of each of cuDNN's operators that the package calls.
    """
    ran: list[str] = []
    monkeypatch.setattr(cudnn, "runs_cudnn", runs)
    for name, operator in (("cudnn_forward", strict_forward), ("cudnn_backward", strict_backward)):
        monkeypatch.setattr(operators, name, lambda *a, n=name, op=operator: noted(ran, n, op, *a))
    for mode, kernel in list(kernels.KERNELS.items()):
        monkeypatch.setitem(kernels.KERNELS, mode, StrictKernel(kernel, runs))
    return ran


def noted(ran: list[str], name: str, operator: Callable[..., Any], *args: Any) -> Any:
    trains = args[12]
    ran.append(name if name == "cudnn_backward" or trains else f"{name} without reserve")
    return opened_call(operator, *args)


def opened_call(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function of CPU tensors with those within the simulated device's tensors, and returns such again."""
    wrap = next((type(a) for a in args if hasattr(a, "held")), Tensor.detach)

    def each(change: Callable[[Tensor], Tensor], value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(each(change, v) for v in value)
        return change(value) if isinstance(value, Tensor) else value

    with torch.no_grad():
        return each(wrap, tuple(function(*each(lambda t: opened(t).detach(), args))))


NAMES = ("RNN_RELU", "RNN_TANH", "LSTM", "GRU")
"""By cuDNN's numbers"""
RESERVE = 24
"""A size that is not a multiple of a float's"""


class Asked(NamedTuple):
    """The arguments that both operators end with, of one layer over a padded batch, time first."""

    mode: int
    hidden: int
    proj: int
    layers: int
    batch_first: bool
    dropout: float
    train: bool
    bidirectional: bool
    batch_sizes: Sequence[int]
    dropout_state: Tensor | None

    def run(self, x: Tensor, flat: Tensor, shapes: Sequence[torch.Size], states: Sequence[Tensor]) -> list[Tensor]:
        """Runs the CPU's kernel with the weights that lie in the chunk."""
        given: Any = tuple(states) if NAMES[self.mode] == "LSTM" else states[0]
        parameters = placed(flat, shapes)
        has_biases = any(len(shape) == 1 for shape in shapes)
        kernel = KERNELS[NAMES[self.mode]]
        return list(kernel(x, given, parameters, has_biases, 1, 0.0, True, self.bidirectional, False))


def placed(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Returns the views of the chunk that cuDNN reads as weights: all matrices, then all biases."""
    order = sorted(range(len(shapes)), key=lambda k: -len(shapes[k]))
    parts = flat[: sum(shape.numel() for shape in shapes)].split([shapes[k].numel() for k in order])
    views = {k: part.view(shapes[k]) for k, part in zip(order, parts, strict=True)}
    return [views[k] for k in range(len(shapes))]


def check_operands(
    x: Tensor, weights: Sequence[Tensor], each: int, flat: Tensor, states: Sequence[Tensor], asked: Asked
) -> None:
    check_kinds(x, (*states, *weights, flat))
    assert (asked.layers, asked.batch_first, tuple(asked.batch_sizes)) == (1, False, ())
    assert (asked.dropout, asked.dropout_state) == (0.0, None)
    directions = 2 if asked.bidirectional else 1
    assert len(weights) == each * directions
    check_states(x, states, directions, None, batch_first=False)
    widths = (asked.proj or asked.hidden, asked.hidden)
    assert [h.size(2) for h in states] == list(widths[: len(states)])
    rows = {0: 1, 1: 1, 2: 4, 3: 3}[asked.mode] * asked.hidden
    for k in range(directions):
        own = weights[k * each : (k + 1) * each]
        expected = [
            (rows, x.size(-1)),
            (rows, widths[0]),
            *([(rows,)] * 2 if each > 3 else []),
            *([(asked.proj, asked.hidden)] if asked.proj else []),
        ]
        assert [tuple(w.shape) for w in own] == expected
    assert flat.dim() == 1
    assert flat.is_contiguous()
    for weight, there in zip(weights, placed(flat, [w.shape for w in weights]), strict=True):
        if weight.data_ptr() != there.data_ptr() or not weight.is_contiguous():
            raise RuntimeError("RNN module weights are not part of single contiguous chunk of memory.")
    if each < 4:
        room = flat[sum(w.numel() for w in weights) :]
        assert room.numel() >= 2 * rows * directions, "cuDNN reads biases"
        assert not room[: 2 * rows * directions].any(), "something else is taken for biases"


def strict_forward(
    x: Tensor, weights: Sequence[Tensor], each: int, flat: Tensor, h: Tensor, c: Tensor | None, *rest: Any
) -> list[Any]:
    """`aten::_cudnn_rnn` over CPU tensors."""
    asked, states = Asked(*rest), [h] if c is None else [h, c]
    check_operands(x, weights, each, flat, states, asked)
    assert x.numel(), "PyTorch does not give cuDNN an empty input"
    output, *last = asked.run(x, flat, [w.shape for w in weights], states)
    reserve = torch.ones(RESERVE if asked.train else 0, dtype=torch.uint8)
    return [output, last[0], last[1] if c is not None else torch.empty(0), reserve, flat]


def strict_backward(
    x: Tensor,
    weights: Sequence[Tensor],
    each: int,
    flat: Tensor,
    h: Tensor,
    c: Tensor | None,
    output: Tensor,
    d_output: Tensor | None,
    d_h: Tensor | None,
    d_c: Tensor | None,
    *rest: Any,
) -> list[Any]:
    """`aten::_cudnn_rnn_backward` over CPU tensors."""
    *options, reserve, wanted = rest
    asked, states = Asked(*options), [h] if c is None else [h, c]
    if not asked.train:
        raise RuntimeError("cudnn RNN backward can only be called in training mode")
    check_operands(x, weights, each, flat, states, asked)
    assert output.is_contiguous(), "cuDNN reads its memory as it lies"
    assert reserve.dtype == torch.uint8
    assert reserve.numel() == RESERVE
    assert bool(reserve.all()), "the reserve was changed by another backward"
    reserve.zero_()
    shapes = [w.shape for w in weights]

    def gradients() -> Sequence[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, flat, *states)]
        with torch.enable_grad():
            results = asked.run(leaves[0], leaves[1], shapes, leaves[2:])
        torch.testing.assert_close(results[0].detach(), output)  # nobody has changed it since
        pairs = [(r, d) for r, d in zip(results, (d_output, d_h, d_c), strict=False) if d is not None]
        assert pairs, "cuDNN returns no gradients for none"
        for result, d in pairs:
            assert (d.shape, d.dtype) == (result.shape, result.dtype)
        outputs, grads = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, leaves, grads, allow_unused=True, materialize_grads=True)

    dx, d_flat, dh, *dc = with_autograd(gradients)
    return [dx, dh, dc[0] if dc else None, placed(d_flat, shapes) if wanted[3] else []]


class StrictKernel:
    def __init__(self, kernel: Any, runs: Callable[[Tensor], bool]) -> None:
        self.kernel, self.runs = kernel, runs

    def __call__(self, x: Tensor, *args: Any) -> Any:
        if not self.runs(x) or not x.numel():  # PyTorch does not give cuDNN an empty input
            return self.kernel(x, *args)
        is_packed = not isinstance(args[2], bool)
        batch_sizes, hx, weights, *options = args if is_packed else (None, *args)
        states = tuple(hx) if isinstance(hx, tuple) else (hx,)
        has_biases, layers, dropout, train, bidirectional, *_ = options
        stacked = layers * (2 if bidirectional else 1)
        check_kinds(x, (*states, *weights))
        check_states(x, states, stacked, batch_sizes, batch_first=not is_packed and options[5])
        check_chunk(weights, has_biases)
        assert not dropout, "cuDNN's own draw can't be made again"
        return Run.apply(self.kernel, train, batch_sizes, options, len(states), x, *states, *weights)


def check_kinds(x: Tensor, others: Sequence[Tensor]) -> None:
    """Checks what `check_attributes` checks. Autocast makes the dtypes equal beforehand."""
    for t in others:
        assert t.device == x.device, "Input and parameter tensors are not at the same device"
        if not torch.is_autocast_enabled(x.device.type):
            assert t.dtype == x.dtype, "Input and parameter tensors are not the same dtype"


def check_states(
    x: Tensor, states: Sequence[Tensor], stacked: int, batch_sizes: Tensor | None, batch_first: bool
) -> None:
    if batch_sizes is None:
        assert x.dim() == 3
        batch = x.size(0 if batch_first else 1)
    else:
        assert x.dim() == 2
        assert batch_sizes.is_cpu
        assert batch_sizes.dtype == torch.int64
        sizes = batch_sizes.tolist()
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] > 0
        assert sum(sizes) == x.size(0)
        batch = sizes[0]
    for h, name in zip(states, ("hx", "cx"), strict=False):
        assert tuple(h.shape[:2]) == (stacked, batch), f"Expected hidden size {(stacked, batch)}, got {tuple(h.shape)}"
        if not h.is_contiguous():
            raise RuntimeError(f"rnn: {name} is not contiguous")


def check_chunk(weights: Sequence[Tensor], has_biases: bool) -> None:
    """Checks that matrices, then biases, lie from the start of their memory on, and zeros if there are no biases."""
    inner = [opened(w).detach() for w in weights]
    memory = torch.empty(0, dtype=inner[0].dtype).set_(inner[0].untyped_storage())
    at = 0
    for w in (*(w for w in inner if w.dim() == 2), *(w for w in inner if w.dim() == 1)):
        lies_there = w.data_ptr() == memory.data_ptr() + at * w.element_size() and w.is_contiguous()
        if not lies_there or memory.numel() < at + w.numel():
            raise RuntimeError("RNN module weights are not part of single contiguous chunk of memory.")
        at += w.numel()
    if not has_biases:
        gates = max(w.size(0) for w in inner)
        projects = len(inner) % 3 == 0 and inner[2].size(0) != gates
        room = 2 * gates * (len(inner) // (3 if projects else 2))
        if memory.numel() < at + room:
            raise RuntimeError("RNN module weights are not part of single contiguous chunk of memory.")
        assert not memory[at : at + room].any(), "something else is taken for biases"


def opened(t: Tensor) -> Tensor:
    """Returns the CPU tensor inside one of the simulated device."""
    inner: Tensor = getattr(t, "held", t)
    return inner


def graph_is_kept() -> bool:
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return kept is None or kept()


class Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Any, train: bool, batch_sizes: Any, options: Any, n: int, *tensors: Tensor) -> Any:
        def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            hx: Any = rest[:n] if n == 2 else rest[0]
            where = () if batch_sizes is None else (batch_sizes,)
            output, *last = kernel(x, *where, hx, list(rest[n:]), *options)
            if batch_sizes is None and options[5]:  # cuDNN's output lies time first in memory
                output = output.transpose(0, 1).contiguous().transpose(0, 1)
            return output, *last

        ctx.run, ctx.train = run, train
        ctx.reserve = torch.ones(4)
        wrap = type(tensors[0]) if hasattr(tensors[0], "held") else Tensor.clone
        results = tuple(wrap(t) for t in run(*(opened(t).detach() for t in tensors)))
        ctx.save_for_backward(*tensors, results[0])
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.train:
            raise RuntimeError("cudnn RNN backward can only be called in training mode")
        assert bool(ctx.reserve.all()), "the reserve was changed by another backward"
        if not graph_is_kept():
            ctx.reserve.zero_()
        *tensors, _ = ctx.saved_tensors
        leaves = [opened(t).detach().requires_grad_() for t in tensors]
        with torch.enable_grad():
            results = ctx.run(*leaves)
        found = torch.autograd.grad(results, leaves, [opened(g) for g in grads])
        wrap = type(tensors[0]) if hasattr(tensors[0], "held") else Tensor.clone
        return *[None] * 5, *(wrap(g) for g in found)
