"""PyTorch's own recurrent kernels (ATen, cuDNN, MIOpen, oneDNN), one way to call them for every cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._cells import States, Weights
from ._plain import scan_layers
from ._torch import KERNELS, has_onednn
from ._twice import Twice


def runs_cudnn(x: Tensor) -> bool:
    """Whether the kernel that will run is cuDNN's (or MIOpen's), whose backward can't be differentiated."""
    return x.is_cuda and torch.backends.cudnn.enabled


def has_lstm_kernel(mode: str, x: Tensor, hidden: int, fed_back: int) -> bool:
    """On the CPU: whether the kernel over a padded batch is oneDNN's LSTM."""
    return mode == "LSTM" and hidden == fed_back and x.dtype == torch.float32 and has_onednn()


def suits_kernel(
    mode: str, x: Tensor, batch: int, steps: int, hidden: int, fed_back: int, lengths: Tensor | None, learns: bool
) -> bool:
    """On the CPU: whether the kernel over a padded batch beats a loop of our own over the real steps alone.

    By measurement; docs/backends.md has the rule in words. Reads the lengths.
    """
    if not has_lstm_kernel(mode, x, hidden, fed_back):
        # A call of few small steps is over before a loop in Python has begun.
        return not learns and batch * hidden < 512 and (lengths is None or steps < 16)
    if lengths is None:
        return True
    # Its vectors are 16 wide: it computes no less for a smaller layer.
    width = max(hidden, 16)
    real = int(lengths.sum()) / max(steps, 1) * width
    return batch * width < (1000 + 0.8 * real if learns else 1400 + 1.6 * real)


def run_kernel(
    mode: str,
    x: Tensor,
    initial: States,
    weights: Sequence[tuple[Weights, ...]],
    *,
    batch_sizes: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = False,
    batch_first: bool = False,
) -> tuple[Tensor, States]:
    """The stack of layers over a padded batch, or over packed rows where `batch_sizes` are given."""
    directions = len(weights[0])
    has_biases = weights[0][0].b_ih is not None
    flat = [t for layer in weights for w in layer for t in w if t is not None]

    def fast(x: Tensor, *tensors: Tensor) -> Sequence[Tensor]:
        states, parameters = tensors[: len(initial)], list(tensors[len(initial) :])
        hx: Any = states if mode == "LSTM" else states[0]
        options = (has_biases, len(weights), dropout, training, directions == 2)
        result: Sequence[Tensor] = (
            KERNELS[mode](x, hx, parameters, *options, batch_first)
            if batch_sizes is None
            else KERNELS[mode](x, batch_sizes, hx, parameters, *options)
        )
        return result

    # Dropout can't be drawn again for a second pass; callers that may need one put it between single layers, whether
    # gradients are wanted or not: a checkpoint runs once without and once with, and must draw the same.
    if runs_cudnn(x) and torch.is_grad_enabled() and not (dropout and training):
        has = [[t is not None for t in w] for layer in weights for w in layer]

        def plain(x: Tensor, *tensors: Tensor) -> Sequence[Tensor]:
            rest = iter(tensors[len(initial) :])
            regrouped = [Weights(*(next(rest) if here else None for here in row)) for row in has]  # type: ignore[arg-type]
            layers = [tuple(regrouped[k : k + directions]) for k in range(0, len(regrouped), directions)]
            output, last = scan_layers(mode, x, tuple(tensors[: len(initial)]), layers, batch_sizes, batch_first)
            return output, *last

        output, *last = Twice.apply(fast, plain, x, *initial, *flat)  # type: ignore[no-untyped-call]
    else:
        output, *last = fast(x, *initial, *flat)
    return output, tuple(last)
