"""PyTorch's kernels on a CPU, made as strict as cuDNN: they refuse what `_cudnn_rnn` and its backward refuse.

The checks follow aten/src/ATen/native/cudnn/RNN.cpp. The error texts are PyTorch's. L layers, D directions, N batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from masked_rnn._backends import kernels


def with_cudnn(monkeypatch: pytest.MonkeyPatch, runs: Callable[[Tensor], bool] = lambda _x: True) -> None:
    """Runs a kernel as strict as cuDNN wherever `runs` returns True."""
    monkeypatch.setattr(kernels, "runs_cudnn", runs)
    for mode, kernel in list(kernels.KERNELS.items()):
        monkeypatch.setitem(kernels.KERNELS, mode, StrictKernel(kernel, runs))


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
