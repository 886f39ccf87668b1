"""Gradients of gradients: a fast form differentiated once by its own means, and any further through plain ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import is_batched

Recurrence = Callable[..., Sequence[Tensor]]


def needs_another_backward(grads: Sequence[Tensor | None]) -> bool:
    """In a backward: whether it will itself be differentiated, or runs for a batch of gradients at once."""
    return torch.is_grad_enabled() or any(g is not None and is_batched(g) for g in grads)


def gradient_of(
    recurrence: Recurrence, inputs: Sequence[Tensor | None], needs: Sequence[bool], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The inputs' gradients, from those of `recurrence(*inputs)`; differentiable where the backward is."""
    create = torch.is_grad_enabled()
    device = next(t.device.type for t in inputs if t is not None)
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        # Aliases, so that the gradient by one input does not run on into another that it was made from.
        aliases = [None if t is None else t.view_as(t) for t in inputs]
        pairs = [(o, g) for o, g in zip(recurrence(*aliases), grads, strict=True) if g is not None and o.requires_grad]
        wanted = [t for t, need in zip(aliases, needs, strict=True) if need and t is not None]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs and wanted:
            outputs, cotangents = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, wanted, cotangents, create_graph=create, allow_unused=True)
    rest = iter(found)
    return [next(rest) if need and t is not None else None for t, need in zip(aliases, needs, strict=True)]


class DoubleBackward(torch.autograd.Function):
    """`kernel(*inputs)`, for a kernel whose own backward can't be differentiated (cuDNN's)."""

    @staticmethod
    def forward(ctx: Any, kernel: Recurrence, recurrence: Recurrence, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            ctx.inner = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
            ctx.outputs = kernel(*ctx.inner)
        ctx.recurrence = recurrence
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return tuple(o.detach() for o in ctx.outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        if needs_another_backward(grads):
            return None, None, *gradient_of(ctx.recurrence, inputs, needs, grads)
        pairs = [(o, g) for o, g in zip(ctx.outputs, grads, strict=True) if g is not None]
        outputs, cotangents = zip(*pairs, strict=True)
        wanted = [t for t, need in zip(ctx.inner, needs, strict=True) if need]
        found = iter(torch.autograd.grad(outputs, wanted, cotangents, retain_graph=True, allow_unused=True))
        return None, None, *(next(found) if need else None for need in needs)
