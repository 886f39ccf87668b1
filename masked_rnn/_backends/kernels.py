"""PyTorch's own recurrent kernels (ATen, cuDNN, MIOpen, oneDNN), one way to call them for every cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._call import Call
from .._cells import LayerWeights, States, flatten_weights, group_weights, stack_layers
from .._torch import KERNELS, has_onednn, is_autocast_on, is_fake, share_storage
from .double_backward import DoubleBackward
from .recurrence import scan_layers

FEW_STEPS = 4
"""A call of so few, without lengths, is over before a loop of our own has begun."""


def runs_cudnn(x: Tensor) -> bool:
    """Whether the kernel that will run is cuDNN's (or MIOpen's), whose backward can't be differentiated."""
    return x.is_cuda and torch.backends.cudnn.enabled


def runs_all_steps_at_once(mode: str, x: Tensor, hidden: int, proj: int, learns: bool) -> bool:
    """On a GPU: whether the kernel over a padded batch is one of cuDNN's that go through all steps; over packed rows it
    starts several for each. PyTorch's own rule (`use_rnn_persist_small_h` in aten/src/ATen/native/cudnn/RNN.cpp)."""
    if not runs_cudnn(x) or torch.version.hip is not None or proj or x.dtype == torch.float64:
        return False
    if mode in ("GRU", "LSTM"):
        return hidden <= (128 if learns else 192)
    return hidden <= (256 if learns else 384)


def has_lstm_kernel(mode: str, x: Tensor, hidden: int, fed_back: int) -> bool:
    """On the CPU: whether the kernel over a padded batch is oneDNN's LSTM."""
    return mode == "LSTM" and hidden == fed_back and x.dtype == torch.float32 and has_onednn()


def kernel_is_faster(
    mode: str,
    x: Tensor,
    batch: int,
    steps: int,
    hidden: int,
    fed_back: int,
    lengths: Tensor | None,
    learns: bool,
    loops_are_native: Callable[[torch.dtype], bool],
) -> bool:
    """On the CPU: whether the kernel over a padded batch beats a loop of our own over the real steps alone.

    By measurement: `python -m benchmarks.choice`; docs/backends.md has the rule in words. Reads the lengths.
    """
    if steps == 1:
        return True
    if not has_lstm_kernel(mode, x, hidden, fed_back):
        if lengths is None and steps <= FEW_STEPS:
            return True
        return not learns and batch * hidden < 512 and (steps < 8 or (steps < 16 and not loops_are_native(x.dtype)))
    # Its vectors are 16 wide: it computes no less for a smaller layer.
    width = max(hidden, 16)
    if lengths is None:
        # Autocast asks for a precision that only the kernel has.
        return batch * width * steps < 10_000 or is_autocast_on("cpu") or not loops_are_native(x.dtype)
    if loops_are_native(x.dtype):
        return False
    real = int(lengths.sum()) / max(steps, 1) * width
    return batch * width < 1400 + (0.8 if learns else 1.6) * real


def run_stack(call: Call, x: Tensor, initial: States, batch_sizes: Tensor | None = None) -> tuple[Tensor, States]:
    """A call's layers over a padded batch in its layout, or over packed rows where `batch_sizes` are given."""
    layers, dropout, batch_first = call.layer.num_layers, call.dropout, call.batch_first and batch_sizes is None
    if dropout and runs_cudnn(x):
        # cuDNN's own draw can't be made again for a second pass. Between single layers it can; and it stands there
        # whether gradients are wanted or not, since a checkpoint runs once without and once with.
        def run_one(x: Tensor, states: States, weights: LayerWeights) -> tuple[Tensor, States]:
            return run_layer(call.layer.mode, x, states, weights, batch_sizes)

        x = x.transpose(0, 1) if batch_first else x
        x, states = stack_layers(x, initial, call.weights, run_one, dropout)
        return x.transpose(0, 1) if batch_first else x, states
    return run_kernel(
        call.layer.mode, x, initial, call.parameters, layers, call.directions, batch_sizes, dropout, batch_first
    )


def run_layer(
    mode: str, x: Tensor, initial: States, weights: LayerWeights, batch_sizes: Tensor | None = None
) -> tuple[Tensor, States]:
    """One layer over a padded batch, time first, or over packed rows."""
    return run_kernel(mode, x, initial, flatten_weights([weights]), 1, len(weights), batch_sizes)


def run_kernel(
    mode: str,
    x: Tensor,
    initial: States,
    parameters: Sequence[Tensor],
    layers: int,
    directions: int,
    batch_sizes: Tensor | None,
    dropout: float = 0.0,
    batch_first: bool = False,
) -> tuple[Tensor, States]:
    """A stack of layers over a padded batch, or over packed rows where `batch_sizes` are given."""
    has_biases = len(parameters) >= 4 * layers * directions
    on_cudnn = runs_cudnn(x)
    learns = on_cudnn and torch.is_grad_enabled()
    if on_cudnn:
        initial = tuple(h.contiguous() for h in initial)  # cuDNN refuses others, such as a flattened hx
        if not is_fake(x):
            parameters = flatten_for_cudnn(parameters)
    if learns and batch_sizes is not None:
        batch_sizes = batch_sizes.clone()  # `recurrence` reads it later; the caller may have changed theirs by then
    # What a module calls training draws dropout, and is when cuDNN saves what its gradient needs.
    options = (has_biases, layers, dropout, dropout > 0 or learns, directions == 2)

    def kernel(x: Tensor, *tensors: Tensor) -> Sequence[Tensor]:
        states, parameters = tensors[: len(initial)], tensors[len(initial) :]
        hx: Any = states if mode == "LSTM" else states[0]
        result: Sequence[Tensor] = (
            KERNELS[mode](x, hx, parameters, *options, batch_first)
            if batch_sizes is None
            else KERNELS[mode](x, batch_sizes, hx, parameters, *options)
        )
        return result

    def recurrence(x: Tensor, *tensors: Tensor) -> Sequence[Tensor]:
        grouped = group_weights(tensors[len(initial) :], layers, directions)
        dtype = grouped[0][0].w_ih.dtype  # under autocast the kernel takes any
        x, *states = (t.to(dtype) for t in (x, *tensors[: len(initial)]))
        output, last = scan_layers(mode, x, tuple(states), grouped, batch_sizes, batch_first)
        return output, *last

    results = kernel(x, *initial, *parameters)
    if learns:
        results = DoubleBackward.apply(recurrence, len(results), *results, x, *initial, *parameters)
    output, *last = results
    return output, tuple(last)


def flatten_for_cudnn(parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """A stack's weights as cuDNN has them in memory: one after the other, matrices, then biases, zeros where there are
    none. Where they lie otherwise, PyTorch copies them one by one, and warns of what no user of one layer of several
    can change; where no biases follow, it has cuDNN take what does for them."""
    order = sorted(range(len(parameters)), key=lambda k: -parameters[k].dim())
    inside = [parameters[k] for k in order]
    has_biases = inside[-1].dim() == 1
    room = 0 if has_biases else sum(p.size(0) for p in inside)
    begins = [p.storage_offset() * p.element_size() for p in inside]
    ends = [begin + p.nbytes for begin, p in zip(begins, inside, strict=True)]
    has_room = has_biases or ends[-1] + room * inside[0].element_size() >= inside[0].untyped_storage().nbytes()
    is_row = begins == [0, *ends[:-1]] and all(p.is_contiguous() and share_storage(p, inside[0]) for p in inside)
    if has_room and is_row:
        return parameters
    zeros = inside[0].new_zeros(room)
    parts = torch.cat([*(p.reshape(-1) for p in inside), zeros]).split([*(p.numel() for p in inside), room])
    placed = {k: part.view(p.shape) for k, part, p in zip(order, parts, inside, strict=False)}
    return [placed[k] for k in range(len(parameters))]
