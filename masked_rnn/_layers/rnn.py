"""nn.RNN with lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self, SupportsIndex, Unpack, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .._cells import BackendName
from .base import Device, MaskedRNNBase, Options, unknown_arguments_to_torch

if TYPE_CHECKING:
    from .base import Lengths


class MaskedRNN(MaskedRNNBase, nn.RNN):
    r"""A multi-layer Elman RNN (tanh or relu) over sequences of different lengths.

    It is :class:`torch.nn.RNN` with two differences. The call takes ``lengths`` (or ``mask``): each sequence of a
    padded batch then gives what it would give alone, in outputs, last state and every gradient. The last state comes
    flattened, unless ``flatten_hidden=False``. The ``state_dict`` is the same, and so are the initial weights from the
    same seed.

    For each step of a sequence, each layer computes

    .. math::
        h_t = \tanh(x_t W_{ih}^T + b_{ih} + h_{t-1} W_{hh}^T + b_{hh})

    Here :math:`x_t` is the layer's input at time `t` and :math:`h_t` its hidden state. With ``nonlinearity="relu"``,
    ReLU stands in the place of tanh. The network is that of Elman, Finding structure in time, 1990.

    Args:
        input_size: Number of features of the input, I.
        hidden_size: Number of features of the hidden state, H.
        num_layers: Number of layers, L. Each reads the outputs of the layer below. Default: ``1``
        nonlinearity: ``"tanh"`` or ``"relu"``. Default: ``"tanh"``
        bias: ``False`` leaves out the biases ``bias_ih`` and ``bias_hh``. Default: ``True``
        batch_first: ``True`` puts the batch before time in input and output. It has no effect on states, nor on
            unbatched, packed or nested input. Default: ``False``
        dropout: Probability of zeroing an element of a layer's output before the next layer reads it. It is drawn
            between layers only, in training only: never on the input or on the last layer's output. Default: ``0.0``
        bidirectional: ``True`` adds a direction that runs from a sequence's last real step to its first. Default:
            ``False``
        device: Where the parameters are made. Default: torch's
        dtype: The parameters' dtype. Default: torch's
        enforce_sorted: ``True`` promises that lengths decrease. Nothing is sorted then, and lengths that break the
            promise raise. Default: ``False``
        flatten_hidden: ``True`` returns the last state as :math:`(N, L \cdot D \cdot H)`, ``False`` as
            :class:`torch.nn.RNN` does, :math:`(L \cdot D, N, H)`. Default: ``True``
        backend: How the layer runs (docs/backends.md). ``"auto"`` chooses, by rules that were measured. ``"packed"``,
            ``"padded"``, ``"bptt"`` and ``"scan"`` each force one way; so does ``"held"``, which needs an NVIDIA GPU,
            has not run on one yet, and is never chosen by ``"auto"``. Default: ``"auto"``

    T is the number of steps in time, N of sequences, I is ``input_size``, H ``hidden_size``, L ``num_layers``, D 2 if
    ``bidirectional`` else 1. Unbatched input leaves N out of every shape.

    Inputs: input, hx, lengths, mask, resets
        * **input**: :math:`(T, N, I)`, or :math:`(N, T, I)` with ``batch_first=True``; unbatched :math:`(T, I)`; a
          :class:`~torch.nn.utils.rnn.PackedSequence`; or a jagged nested tensor :math:`(N, j, I)`.
        * **hx**: the initial state, :math:`(L \cdot D, N, H)` or flattened :math:`(N, L \cdot D \cdot H)` as the layer
          returns it. Zeros if None.
        * **lengths**: how many steps of each sequence are real, :math:`(N)`: a list, a tuple, an array or a tensor of
          any integer dtype, in any order, each from 0 to T. An int for unbatched input. None for packed or nested
          input, which has its own.
        * **mask**: in the place of lengths, a bool tensor shaped as the input without its last dimension, True at real
          steps. Padding may stand anywhere: the state is held across it.
        * **resets**: a bool tensor shaped as a mask, True at an episode's first step, where the state starts anew, from
          zeros, before the step. One row may hold several episodes, and each gives what it would give alone. The
          ``done`` of an environment belongs to the step before (docs/resets.md). None for packed or nested input.

        Without lengths and mask, every step is real. Padding is never read, NaN included; its gradient is exactly zero.

    Outputs: output, last_hidden
        * **output**: the top layer's :math:`h_t`, forward then backward, :math:`D \cdot H` wide. It is laid out as the
          input and keeps all T steps; padding is exactly zero. Packed or nested input gives packed or nested output.
        * **last_hidden**: the state after each sequence's last real step (backward: after its first). Flattened, it is
          ``[layer 0 forward | layer 0 backward | layer 1 forward | ...]``, each part H wide. The top layer's is the
          last :math:`D \cdot H` columns.

        A sequence of length zero has only zeros in output, and ``hx`` for its last state.

    .. warning::
        Code that reads ``h_n[-1]`` gets the last *layer's* state from :class:`torch.nn.RNN`, and the last *sequence's*
        from a flattened state. Give it ``flatten_hidden=False``, or use :meth:`from_rnn`, which does.

    Attributes:
        weight_ih_l[k]: input-hidden weights of layer k, :math:`(H, I)` for k = 0, else :math:`(H, D \cdot H)`
        weight_hh_l[k]: hidden-hidden weights of layer k, :math:`(H, H)`
        bias_ih_l[k]: input-hidden bias of layer k, :math:`(H)`
        bias_hh_l[k]: hidden-hidden bias of layer k, :math:`(H)`
        [name]_reverse: each of these for the backward direction, only if ``bidirectional``

        All are drawn from :math:`\mathcal{U}(-1/\sqrt{H}, 1/\sqrt{H})`.

    Raises:
        ValueError: A length is below 0 or above T. There are too few lengths, too many, or unsorted ones under
            ``enforce_sorted``. Lengths come with a mask, or any of these with packed or nested input. The mask or the
            resets have another shape. The input has another rank or dtype. A forced backend can't run the call.
        TypeError: Lengths are not integers, mask or resets are not a bool tensor, or one stands in the place of hx. The
            input is no tensor.
        RuntimeError: The input is not I wide, or has no steps and no lengths. hx has another shape or dtype. PyTorch's
            kernel does not know the dtype (as there, mostly a :class:`NotImplementedError`). A length is out of range,
            where lengths and input are on a GPU: they are checked there, without waiting.

        What :class:`torch.nn.RNN` refuses in its constructor raises as it does there.

    Example::

        >>> import torch
        >>> from masked_rnn import MaskedRNN
        >>> rnn = MaskedRNN(4, 3, nonlinearity="relu", batch_first=True)
        >>> mask = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 0, 0]], dtype=torch.bool)
        >>> output, last_hidden = rnn(torch.randn(2, 5, 4), mask=mask)
        >>> torch.equal(last_hidden[1], output[1, 2])
        True
    """

    _torch_layer = nn.RNN

    @unknown_arguments_to_torch
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        enforce_sorted: bool = False,
        flatten_hidden: bool = True,
        backend: BackendName = "auto",
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            nonlinearity,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self._set_options(enforce_sorted, flatten_hidden, backend)

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        lengths: Lengths = None,
        *,
        mask: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        lengths: None = None,
        *,
        mask: None = None,
        resets: None = None,
    ) -> tuple[PackedSequence, Tensor]: ...
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        lengths: SupportsIndex | Sequence[SupportsIndex] | Tensor | np.ndarray[Any, Any] | None = None,
        *,
        mask: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run the layer. Without lengths and mask, every step is real.

        Args:
            input: ``(N, T, I)`` with ``batch_first``, else ``(T, N, I)``; unbatched ``(T, I)``; packed; or nested
                ``(N, j, I)``
            hx: The initial state, ``(N, L·D·H)`` or ``(L·D, N, H)``. Zeros if None
            lengths: How many steps of each sequence are real, ``(N,)``, each from 0 to T
            mask: In place of lengths, a bool tensor, ``(N, T)`` or ``(T, N)`` as the input is: True at real steps
            resets: A bool tensor shaped as a mask: True at an episode's first step, where the state starts anew

        Returns:
            output: The top layer's h of each step, zero at padding, laid out as the input, ``D·H`` wide
            last_hidden: Each sequence's last state, ``(N, L·D·H)``; ``(L·D, N, H)`` if ``flatten_hidden=False``
        """
        result: tuple[Tensor | PackedSequence, Tensor] = self._forward(input, hx, lengths, mask, resets)
        return result

    def extra_repr(self) -> str:
        return super().extra_repr() + (", nonlinearity='relu'" if self.mode == "RNN_RELU" else "")

    @classmethod
    def from_rnn(cls, rnn: nn.RNN, **options: Unpack[Options]) -> Self:
        """Make a layer that shares the parameters of `rnn`, with its configuration and its mode (training or not).

        It returns what `rnn` returned: ``flatten_hidden`` is ``False`` unless given here, so that a model that reads
        ``h_n[-1]`` goes on reading the last layer. A masked layer's own options are kept. The weights may be
        parametrized, weight-normed or pruned. Anything but an ``nn.RNN`` raises a TypeError.

        Example::

            >>> rnn = torch.nn.RNN(4, 3)
            >>> MaskedRNN.from_rnn(rnn).weight_hh_l0 is rnn.weight_hh_l0
            True
        """
        return cls._from_torch(rnn, options, "nonlinearity")
