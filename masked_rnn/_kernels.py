"""PyTorch's own recurrent kernels (ATen, cuDNN, MIOpen, oneDNN), one way to call them for every cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import _VF, Tensor

from ._cells import States, Weights
from ._plain import scan_layers
from ._twice import Twice

KERNELS: dict[str, Any] = {
    "GRU": _VF.gru,
    "LSTM": _VF.lstm,
    "RNN_TANH": _VF.rnn_tanh,
    "RNN_RELU": _VF.rnn_relu,
}


def differentiates_once(x: Tensor) -> bool:
    """Whether the kernel that will run has a backward that can't be differentiated."""
    return x.is_cuda and torch.backends.cudnn.enabled and torch.is_grad_enabled()


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

    # Dropout can't be drawn again for a second pass; callers that may need one put it between single layers.
    if differentiates_once(x) and not (dropout and training):
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
