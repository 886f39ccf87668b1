"""Gradients of gradients: first derivatives use the fast kernel, higher ones use plain PyTorch ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import is_batched, is_fake

Recurrence = Callable[..., Sequence[Tensor]]


def needs_another_backward(grads: Sequence[Tensor | None]) -> bool:
    """Return whether a backward must run in plain ops: it will be differentiated, or a gradient is no plain tensor.

    A gradient may be batched (`is_grads_batched=True`), or a subclass of Tensor with ops of its own.
    """
    return torch.is_grad_enabled() or any(g is not None and (is_batched(g) or _is_subclass(g)) for g in grads)


def _is_subclass(grad: Tensor) -> bool:
    # A device written in Python and FakeTensorMode make all tensors subclasses: these do not count.
    return type(grad) is not Tensor and type(grad) is not torch.nn.Parameter and grad.is_cpu and not is_fake(grad)


def gradient_of(
    recurrence: Recurrence, inputs: Sequence[Tensor | None], needs: Sequence[bool], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return the inputs' gradients from those of `recurrence(*inputs)`, differentiable if grad mode is on."""
    create = torch.is_grad_enabled()
    device = next(t.device.type for t in inputs if t is not None)
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        # Aliases: if one input was computed from another, the gradient must not flow from one to the other.
        aliases = [None if t is None else t.view_as(t) for t in inputs]
        results = zip(recurrence(*aliases), grads, strict=True)
        pairs = [(o, g.to(o.dtype)) for o, g in results if g is not None and o.requires_grad]
        wanted = [t for t, need in zip(aliases, needs, strict=True) if need and t is not None]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs and wanted:
            outputs, cotangents = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, wanted, cotangents, create_graph=create, allow_unused=True)
    rest = iter(found)
    return [next(rest) if need and t is not None else None for t, need in zip(aliases, needs, strict=True)]


class DoubleBackward(torch.autograd.Function):
    """Returns the outputs of a kernel whose own backward can't be differentiated (cuDNN's).

    Normally gradients flow into the kernel. With `create_graph=True` they skip it and use `recurrence(*inputs)`.
    """

    @staticmethod
    def forward(ctx: Any, recurrence: Recurrence, n_outputs: int, *outputs_and_inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.recurrence, ctx.n_outputs = recurrence, n_outputs
        ctx.save_for_backward(*outputs_and_inputs[n_outputs:])
        ctx.set_materialize_grads(False)
        return tuple(o.detach() for o in outputs_and_inputs[:n_outputs])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[2 + ctx.n_outputs :]
        if not needs_another_backward(grads):
            return None, None, *grads, *[None] * len(needs)
        nothing = [None] * ctx.n_outputs
        return None, None, *nothing, *gradient_of(ctx.recurrence, ctx.saved_tensors, needs, grads)
