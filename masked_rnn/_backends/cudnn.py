"""cuDNN's recurrent kernels, through the operators that PyTorch's layers call, in one autograd.Function.

The operators are described in aten/src/ATen/native/cudnn/RNN.cpp. `_torch.py` finds them.

T time, N batch, R rows of a packed batch, I input, H hidden, P the state that is fed back (H, or proj_size), L layers,
D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._cells import GATES, States
from .._torch import cudnn_backward, cudnn_forward, graph_is_kept, is_autocast_on, is_traced, share_storage
from .double_backward import Recurrence, gradient_of, needs_another_backward

IS_PROVEN = False
"""Whether the package calls these operators itself. It has not done so on a GPU yet: `python -m benchmarks.gpu` and
`tests/test_cuda.py` have to pass on one first. Until then PyTorch's functions call them."""

MODES = {"RNN_RELU": 0, "RNN_TANH": 1, "LSTM": 2, "GRU": 3}
"""cuDNN's numbers, by `nn.RNNBase.mode`"""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def runs_cudnn(x: Tensor) -> bool:
    """Return whether PyTorch's kernel will be cuDNN's or MIOpen's, whose backward can't be differentiated."""
    return x.is_cuda and torch.backends.cudnn.enabled and torch.backends.cudnn.is_available()


def running_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which PyTorch's kernel runs for an input. cuDNN's is float16 whatever dtype autocast has."""
    device = x.device.type
    if not is_autocast_on(device) or x.dtype == torch.float64 or x.is_complex():
        return x.dtype
    return torch.float16 if runs_cudnn(x) else torch.get_autocast_dtype(device)


def calls_operators(x: Tensor) -> bool:
    """Return whether cuDNN runs an input, and its operators are called here."""
    if not IS_PROVEN or not runs_cudnn(x) or torch.version.hip is not None or not x.numel() or is_traced():
        return False
    return cudnn_forward is not None and cudnn_backward is not None and _runs_dtype(x)


def _runs_dtype(x: Tensor) -> bool:
    if x.dtype == torch.bfloat16 and x.is_cuda:
        return torch.cuda.get_device_capability(x.device) >= (8, 0)
    return x.dtype in DTYPES


class Kernel(NamedTuple):
    """The configuration of a stack of layers."""

    mode: str
    hidden: int
    proj: int
    layers: int
    directions: int
    batch_first: bool = False
    batch_sizes: Sequence[int] = ()
    """(T,), of a packed batch. Empty: the batch is padded"""

    def arguments(self, train: bool) -> tuple[Any, ...]:
        """Return the arguments that both operators end with. Dropout is not cuDNN's: see `kernels.run_stack`."""
        numbers = (MODES[self.mode], self.hidden, self.proj, self.layers, self.batch_first, 0.0)
        return (*numbers, train, self.directions == 2, self.batch_sizes, None)


def kernel_of(
    mode: str,
    layers_and_directions: tuple[int, int],
    parameters: Sequence[Tensor],
    batch_first: bool,
    batch_sizes: Sequence[int],
) -> Kernel:
    """Return the configuration of the stack that has these parameters."""
    layers, directions = layers_and_directions
    each = len(parameters) // (layers * directions)
    hidden = parameters[0].size(0) // GATES[mode]
    proj = parameters[each - 1].size(0) if mode == "LSTM" and each % 2 else 0
    return Kernel(mode, hidden, proj, layers, directions, batch_first, batch_sizes)


class Memory(NamedTuple):
    """The tensors that the kernel and its backward read."""

    x: Tensor
    """(T, N, I), (N, T, I) or (R, I)"""
    flat: Tensor
    """All weights as one vector: the matrices, then the biases, or zeros in their place"""
    weights: Sequence[Tensor]
    """Views of `flat` in `torch.nn`'s order"""
    states: States
    """Each (L·D, N, P or H), contiguous"""


def run(kernel: Kernel, memory: Memory, train: bool) -> tuple[Tensor, States, Tensor]:
    """Return the output, the last states, and the reserve, which backward needs and `train` makes."""
    h, c = memory.states if kernel.mode == "LSTM" else (memory.states[0], None)
    each = len(memory.weights) // (kernel.layers * kernel.directions)
    output, h_n, c_n, reserve, _ = cudnn_forward(
        memory.x, memory.weights, each, memory.flat, h, c, *kernel.arguments(train)
    )
    return output, (h_n,) if c is None else (h_n, c_n), reserve


def run_back(
    kernel: Kernel,
    memory: Memory,
    output_and_reserve: tuple[Tensor, Tensor],
    d_output: Tensor | None,  # as the output
    d_last: Sequence[Tensor | None],  # each (L·D, N, P or H)
    want_weights: bool,
) -> tuple[Tensor, States, Sequence[Tensor]]:
    """Return the gradients of x, of the initial states and, if they are wanted, of the weights.

    At least one of the given gradients must not be None.
    """
    h, c = memory.states if kernel.mode == "LSTM" else (memory.states[0], None)
    d_h, d_c = d_last if kernel.mode == "LSTM" else (d_last[0], None)
    each = len(memory.weights) // (kernel.layers * kernel.directions)
    output, reserve = output_and_reserve
    if graph_is_kept():
        reserve = reserve.clone()  # cuDNN writes to it, and another backward will need it
    dx, dh, dc, d_weights = cudnn_backward(
        memory.x,
        memory.weights,
        each,
        memory.flat,
        h,
        c,
        output,
        d_output,
        d_h,
        d_c,
        *kernel.arguments(True),
        reserve,
        [True, True, c is not None, want_weights],
    )
    return dx, (dh,) if c is None else (dh, dc), d_weights


def flatten_weights(parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return a stack's weights in one chunk of memory, as cuDNN needs them: matrices, then biases, or else zeros.

    PyTorch copies other weights one by one, with a warning. If we run one layer of several, users can't avoid it.
    Without biases, cuDNN would read whatever follows the matrices as biases: hence the zeros.
    """
    order = sorted(range(len(parameters)), key=lambda k: -parameters[k].dim())
    inside = [parameters[k] for k in order]
    has_biases = inside[-1].dim() == 1
    zeros = 0 if has_biases else sum(p.size(0) for p in inside)
    begins = [p.storage_offset() * p.element_size() for p in inside]
    ends = [begin + p.nbytes for begin, p in zip(begins, inside, strict=True)]
    # A storage that ends there is one that this function made.
    has_zeros = has_biases or ends[-1] + zeros * inside[0].element_size() == inside[0].untyped_storage().nbytes()
    is_row = begins == [0, *ends[:-1]] and all(p.is_contiguous() and share_storage(p, inside[0]) for p in inside)
    if has_zeros and is_row:
        return parameters
    flat = torch.cat([*(p.reshape(-1) for p in inside), inside[0].new_zeros(zeros)])
    return views_of(flat, [p.shape for p in parameters])


def views_of(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Return the weights of these shapes that lie in a chunk: first the matrices, then the biases."""
    order = sorted(range(len(shapes)), key=lambda k: -len(shapes[k]))
    sizes = [shapes[k].numel() for k in order]
    parts = dict(zip(order, flat[: sum(sizes)].split(sizes), strict=True))
    return [parts[k].view(shape) for k, shape in enumerate(shapes)]


def chunk(weights: Sequence[Tensor]) -> Tensor:
    """Return the memory that flattened weights are views of, with the zeros behind them, as one dimension."""
    first, has_biases = weights[0].detach(), any(w.dim() == 1 for w in weights)
    zeros = 0 if has_biases else sum(w.size(0) for w in weights)
    return first.as_strided((sum(w.numel() for w in weights) + zeros,), (1,), 0)


class CudnnStack(torch.autograd.Function):
    """A stack of layers over a padded or packed batch in one call of cuDNN. Every step is real.

    First derivatives are cuDNN's. With `create_graph=True` they go through `recurrence(x, *initial, *parameters)`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Kernel,
        recurrence: Recurrence,
        n_states: int,
        x: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        states, weights = tensors[:n_states], flatten_weights(tensors[n_states:])
        flat = chunk(weights)
        output, last, reserve = run(kernel, Memory(x, flat, weights, states), train=True)
        ctx.kernel, ctx.recurrence, ctx.n_states = kernel, recurrence, n_states
        ctx.save_for_backward(x, *tensors, output, reserve)
        ctx.set_materialize_grads(False)
        return output, *last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *tensors, output, reserve = ctx.saved_tensors
        needs, S = ctx.needs_input_grad[3:], ctx.n_states
        if needs_another_backward(grads):
            return *[None] * 3, *gradient_of(ctx.recurrence, (x, *tensors), needs, grads)
        if all(g is None for g in grads):
            return (None,) * (3 + len(needs))
        weights = flatten_weights(tensors[S:])
        if ctx.kernel.batch_first:  # cuDNN reads its memory, time first. A hook may have laid it out anew
            output = output.transpose(0, 1).contiguous().transpose(0, 1)
        memory = Memory(x, chunk(weights), weights, tuple(tensors[:S]))
        want_weights = any(needs[1 + S :])
        dx, d_states, d_weights = run_back(ctx.kernel, memory, (output, reserve), grads[0], grads[1:], want_weights)
        return *[None] * 3, dx, *d_states, *(d_weights if want_weights else [None] * len(weights))
