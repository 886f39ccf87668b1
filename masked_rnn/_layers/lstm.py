"""nn.LSTM with lengths."""

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


class MaskedLSTM(MaskedRNNBase, nn.LSTM):
    r"""A multi-layer long short-term memory (LSTM) over sequences of different lengths.

    It is :class:`torch.nn.LSTM` with two differences. The call takes ``lengths`` (or ``mask``): each sequence of a
    padded batch then gives what it would give alone, in outputs, last states and every gradient. The last states come
    flattened, unless ``flatten_hidden=False``. The ``state_dict`` is the same, and so are the initial weights from the
    same seed.

    For each step of a sequence, each layer computes

    .. math::
        \begin{array}{ll}
            i_t = \sigma(W_{ii} x_t + b_{ii} + W_{hi} h_{t-1} + b_{hi}) \\
            f_t = \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
            g_t = \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
            o_t = \sigma(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho}) \\
            c_t = f_t \odot c_{t-1} + i_t \odot g_t \\
            h_t = o_t \odot \tanh(c_t)
        \end{array}

    Here :math:`x_t` is the layer's input at time `t`, :math:`h_t` its hidden state and :math:`c_t` its cell state.
    :math:`i_t`, :math:`f_t`, :math:`g_t` and :math:`o_t` are the input, forget, cell and output gates. :math:`\sigma`
    is the sigmoid function, :math:`\odot` the Hadamard product. With ``proj_size``,
    :math:`h_t = W_{hr} (o_t \odot \tanh(c_t))`. The cell is that of Hochreiter & Schmidhuber, Long short-term memory,
    1997, with a forget gate; the projection that of `Sak et al. 2014 <https://arxiv.org/abs/1402.1128>`_.

    Args:
        input_size: Number of features of the input, I.
        hidden_size: Number of features of the hidden state, H.
        num_layers: Number of layers, L. Each reads the outputs of the layer below. Default: ``1``
        bias: ``False`` leaves out the biases ``bias_ih`` and ``bias_hh``. Default: ``True``
        batch_first: ``True`` puts the batch before time in input and output. It has no effect on states, nor on
            unbatched, packed or nested input. Default: ``False``
        dropout: Probability of zeroing an element of a layer's output before the next layer reads it. It is drawn
            between layers only, in training only: never on the input or on the last layer's output. Default: ``0.0``
        bidirectional: ``True`` adds a direction that runs from a sequence's last real step to its first. Default:
            ``False``
        proj_size: If above 0, the size to which the hidden state is projected, below ``hidden_size``. Default: ``0``
        device: Where the parameters are made. Default: torch's
        dtype: The parameters' dtype. Default: torch's
        enforce_sorted: ``True`` promises that lengths decrease. Nothing is sorted then, and lengths that break the
            promise raise. Default: ``False``
        flatten_hidden: ``True`` returns the last states as :math:`(N, L \cdot D \cdot P)` and
            :math:`(N, L \cdot D \cdot H)`, ``False`` as :class:`torch.nn.LSTM` does. Default: ``True``
        backend: How the layer runs (docs/backends.md). ``"auto"`` chooses, by rules that were measured. ``"packed"``,
            ``"padded"``, ``"bptt"`` and ``"scan"`` each force one way; so does ``"held"``, which needs an NVIDIA GPU,
            has not run on one yet, and is never chosen by ``"auto"``. Default: ``"auto"``

    T is the number of steps in time, N of sequences, I is ``input_size``, H ``hidden_size``, L ``num_layers``, D 2 if
    ``bidirectional`` else 1, P ``proj_size`` if it is above 0 else H. Unbatched input leaves N out of every shape.

    Inputs: input, hx, lengths, mask, resets
        * **input**: :math:`(T, N, I)`, or :math:`(N, T, I)` with ``batch_first=True``; unbatched :math:`(T, I)`; a
          :class:`~torch.nn.utils.rnn.PackedSequence`; or a jagged nested tensor :math:`(N, j, I)`.
        * **hx**: the initial states, a pair: h :math:`(L \cdot D, N, P)` and c :math:`(L \cdot D, N, H)`. Each may be
          flattened, as the layer returns it. Zeros if None.
        * **lengths**: how many steps of each sequence are real, :math:`(N)`: a list, a tuple, an array or a tensor of
          any integer dtype, in any order, each from 0 to T. An int for unbatched input. None for packed or nested
          input, which has its own.
        * **mask**: in the place of lengths, a bool tensor shaped as the input without its last dimension, True at real
          steps. Padding may stand anywhere: the state is held across it.
        * **resets**: a bool tensor shaped as a mask, True at an episode's first step, where the state starts anew, from
          zeros, before the step. One row may hold several episodes, and each gives what it would give alone. The
          ``done`` of an environment belongs to the step before (docs/resets.md). None for packed or nested input.

        Without lengths and mask, every step is real. Padding is never read, NaN included; its gradient is exactly zero.

    Outputs: output, (h_n, c_n)
        * **output**: the top layer's :math:`h_t`, forward then backward, :math:`D \cdot P` wide. It is laid out as the
          input and keeps all T steps; padding is exactly zero. Packed or nested input gives packed or nested output.
        * **h_n**, **c_n**: the states after each sequence's last real step (backward: after its first). Flattened, they
          are ``[layer 0 forward | layer 0 backward | layer 1 forward | ...]``, each part P (h) or H (c) wide. The top
          layer's are the last :math:`D \cdot P` and :math:`D \cdot H` columns.

        A sequence of length zero has only zeros in output, and ``hx`` for its last states.

    .. warning::
        Code that reads ``h_n[-1]`` gets the last *layer's* state from :class:`torch.nn.LSTM`, and the last *sequence's*
        from a flattened state. Give it ``flatten_hidden=False``, or use :meth:`from_lstm`, which does.

    Attributes:
        weight_ih_l[k]: input-hidden weights of layer k, ``(W_ii|W_if|W_ig|W_io)``, :math:`(4H, I)` for k = 0, else
            :math:`(4H, D \cdot P)`
        weight_hh_l[k]: hidden-hidden weights of layer k, ``(W_hi|W_hf|W_hg|W_ho)``, :math:`(4H, P)`
        bias_ih_l[k]: input-hidden bias of layer k, ``(b_ii|b_if|b_ig|b_io)``, :math:`(4H)`
        bias_hh_l[k]: hidden-hidden bias of layer k, ``(b_hi|b_hf|b_hg|b_ho)``, :math:`(4H)`
        weight_hr_l[k]: projection weights of layer k, :math:`(P, H)`, only with ``proj_size``
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

        What :class:`torch.nn.LSTM` refuses in its constructor raises as it does there.

    Example::

        >>> import torch
        >>> from masked_rnn import MaskedLSTM
        >>> lstm = MaskedLSTM(4, 3, num_layers=2, batch_first=True)
        >>> output, (h, c) = lstm(torch.randn(2, 5, 4), lengths=[5, 0])
        >>> h.shape, c[1].eq(0).all()
        (torch.Size([2, 6]), tensor(True))
        >>> torch.equal(h[0, -3:], output[0, -1])  # the top layer's
        True
        >>> output, (h, c) = lstm(torch.randn(2, 5, 4), (h, c), lengths=[1, 3])
    """

    _torch_layer = nn.LSTM

    @unknown_arguments_to_torch
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        enforce_sorted: bool = False,
        flatten_hidden: bool = True,
        backend: BackendName = "auto",
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype
        )
        self._set_options(enforce_sorted, flatten_hidden, backend)

    @overload
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: Lengths = None,
        *,
        mask: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...
    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: None = None,
        *,
        mask: None = None,
        resets: None = None,
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: SupportsIndex | Sequence[SupportsIndex] | Tensor | np.ndarray[Any, Any] | None = None,
        *,
        mask: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Run the layer. Without lengths and mask, every step is real.

        Args:
            input: ``(N, T, I)`` with ``batch_first``, else ``(T, N, I)``; unbatched ``(T, I)``; packed; or nested
                ``(N, j, I)``
            hx: The initial states (h, c), each ``(N, L·D·H)`` or ``(L·D, N, H)``. In h, ``proj_size`` stands for H if
                it is not 0. Zeros if None
            lengths: How many steps of each sequence are real, ``(N,)``, each from 0 to T
            mask: In place of lengths, a bool tensor, ``(N, T)`` or ``(T, N)`` as the input is: True at real steps
            resets: A bool tensor shaped as a mask: True at an episode's first step, where the state starts anew

        Returns:
            output: The top layer's h of each step, zero at padding, laid out as the input, as wide as h: ``D·H`` or
                ``D·proj_size``
            last_states: Each sequence's last states (h, c), shaped as ``hx``: ``(N, L·D·H)``; ``(L·D, N, H)`` if
                ``flatten_hidden=False``
        """
        result: tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]] = self._forward(input, hx, lengths, mask, resets)
        return result

    @classmethod
    def from_lstm(cls, lstm: nn.LSTM, **options: Unpack[Options]) -> Self:
        """Make a layer that shares the parameters of `lstm`, with its configuration and its mode (training or not).

        It returns what `lstm` returned: ``flatten_hidden`` is ``False`` unless given here, so that a model that reads
        ``h_n[-1]`` goes on reading the last layer. A masked layer's own options are kept. The weights may be
        parametrized, weight-normed or pruned. Anything but an ``nn.LSTM`` raises a TypeError.

        Example::

            >>> lstm = torch.nn.LSTM(4, 3)
            >>> MaskedLSTM.from_lstm(lstm).weight_hh_l0 is lstm.weight_hh_l0
            True
        """
        return cls._from_torch(lstm, options, "proj_size")
