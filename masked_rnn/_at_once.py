"""A call of few steps on a CPU, at once: to open it and to choose for it takes as long as PyTorch's kernel does."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._backends.kernels import FEW_STEPS, run_kernel
from ._backends.padded import run_one_step
from ._call import open_arguments
from ._cells import Layer, States, drawn_dropout, read_listed_weights
from ._forms import open_padded
from ._states import close_states
from ._torch import forward_gradients_run, is_autocast_on, is_traced, is_transformed


def run_at_once(layer: Layer, input: Any, hx: Any, lengths: Any, mask: Any, resets: Any) -> tuple[Tensor, Any] | None:
    """What `auto` would come to: the kernel over the padded batch. None where there is more to decide."""
    if type(input) is not Tensor or not input.is_cpu or input.is_nested or input.dim() != 3 or layer.backend != "auto":
        return None
    if is_traced() or is_transformed() or is_autocast_on("cpu"):
        return None
    steps_at_most = FEW_STEPS if lengths is None and mask is None and resets is None else 1
    if input.size(1 if layer.batch_first else 0) > steps_at_most:
        return None
    weights, opened = read_listed_weights(layer), open_padded(layer, input)
    if weights is None or not opened.steps or not opened.batch:
        return None
    lengths, _, _, states = open_arguments(layer, opened, weights[0].dtype, hx, lengths, mask, resets)
    if forward_gradients_run(input, *states):
        return None

    def run(x: Tensor, states: States) -> tuple[Tensor, States]:
        stack = (layer.num_layers, 2 if layer.bidirectional else 1)
        return run_kernel(layer.mode, x, states, weights, *stack, None, drawn_dropout(layer), layer.batch_first)

    if lengths is None:
        output, last = run(input, states)
    else:
        output, last = run_one_step(run, input, lengths == 0, states, layer.batch_first)
    return output, close_states(layer, last, "padded")
