"""The layers: thin subclasses of torch.nn's, and the forward that they share."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, ClassVar, Self, overload

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from ._call import close_call, open_call
from ._choice import BACKENDS, run
from ._torch import forward_pre_hooks

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    Lengths = int | Sequence[int] | Tensor | np.ndarray[Any, Any] | None


def _run(layer: Any, input: Any, hx: Any, lengths: Any, mask: Any) -> Any:
    call = open_call(layer, input, hx, lengths, mask)
    return close_call(call, *run(call))


_run_eagerly: Any = None


def _eager_run() -> Any:
    """`_run`, which Dynamo leaves alone. Made when Dynamo is first there: loading it takes seconds."""
    global _run_eagerly
    if _run_eagerly is None:
        _run_eagerly = torch.compiler.disable(_run)
    return _run_eagerly


def _as_leaf(layer: Any, input: Any, hx: Any, lengths: Any, mask: Any) -> Any:
    """One node in the graph of `torch.fx`, which takes only modules of torch.nn for leaves by itself."""
    path = input.tracer.path_of_module(layer)
    if not path:
        raise torch.fx.proxy.TraceError(
            f"torch.fx can't trace into {type(layer).__name__}, as it can't into torch.nn's layers. "
            "Trace a module that holds it: it becomes one node there."
        )
    return input.tracer.create_proxy("call_module", path, (input, hx, lengths), {"mask": mask})


OPTIONS = {"enforce_sorted": False, "flatten_hidden": True, "backend": "auto"}
"""What is ours in a constructor's arguments, with the defaults."""


class MaskedRNNBase(nn.RNNBase):
    """What the masked layers share. Each is built from this and a layer of torch.nn."""

    _plain: ClassVar[type[nn.RNNBase]]

    def __init__(
        self,
        *args: Any,
        enforce_sorted: bool = False,
        flatten_hidden: bool = True,
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        for name, value in (("enforce_sorted", enforce_sorted), ("flatten_hidden", flatten_hidden)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
        if backend != "auto" and backend not in BACKENDS:
            names = ", ".join(map(repr, BACKENDS))
            raise ValueError(f"backend={backend!r} does not exist. Expected 'auto' or one of {names}.")
        super().__init__(*args, **kwargs)
        self.enforce_sorted = enforce_sorted
        self.flatten_hidden = flatten_hidden
        self.backend = backend

    def _forward(self, input: Any, hx: Any, lengths: Any, mask: Any) -> Any:
        if not torch.compiler.is_compiling():
            if isinstance(input, torch.fx.Proxy):
                return _as_leaf(self, input, hx, lengths, mask)
            # Dynamo leaves every nn.RNNBase to run as it is, but would compile, in pieces, the functions that it calls.
            if "torch._dynamo" in sys.modules:
                return _eager_run()(self, input, hx, lengths, mask)
        elif torch.compiler.is_dynamo_compiling() and not torch._dynamo.config.allow_rnn:
            return _eager_run()(self, input, hx, lengths, mask)
        return _run(self, input, hx, lengths, mask)

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        for name, default in OPTIONS.items():
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(parts)

    @classmethod
    def _sharing(cls, plain: Any, options: dict[str, Any], *extra: str) -> Self:
        """A layer over the parameters of `plain`, with its configuration and the `extra` arguments of its kind."""
        if not isinstance(plain, cls._plain):
            raise TypeError(f"expected an nn.{cls._plain.__name__}, got {type(plain).__name__}")
        kept = {name: getattr(plain, name) for name in OPTIONS if isinstance(plain, MaskedRNNBase)}
        weight: Any = plain.weight_ih_l0
        layer = cls(
            plain.input_size,
            plain.hidden_size,
            plain.num_layers,
            bias=plain.bias,
            batch_first=plain.batch_first,
            dropout=plain.dropout,
            bidirectional=plain.bidirectional,
            device="meta",
            dtype=weight.dtype,
            **{name: getattr(plain, name) for name in extra},
            **{"flatten_hidden": False, **kept, **options},
        )
        _share_weights(layer, plain)
        return layer.train(plain.training)


def _share_weights(layer: Any, plain: Any) -> None:
    """Put the parameters of `plain` in the place of the layer's, or what they are computed from."""
    computed = False
    for name, _ in list(layer.named_parameters()):
        if parametrize.is_parametrized(plain, name):
            parametrize.register_parametrization(layer, name, nn.Identity(), unsafe=True)
            layer.parametrizations[name] = plain.parametrizations[name]
        elif isinstance(getattr(plain, name), nn.Parameter):
            setattr(layer, name, getattr(plain, name))
        else:  # a plain tensor that a hook computes before each call, as pruning does
            computed = True
            delattr(layer, name)
            setattr(layer, name, getattr(plain, name))
    if computed:
        for name, parameter in plain.named_parameters(recurse=False):
            layer.register_parameter(name, parameter)
        for name, buffer in plain.named_buffers(recurse=False):
            layer.register_buffer(name, buffer)
        for hook, with_kwargs in forward_pre_hooks(plain):
            layer.register_forward_pre_hook(hook, with_kwargs=with_kwargs)


class MaskedGRU(MaskedRNNBase, nn.GRU):
    r"""As :class:`torch.nn.GRU`, with one more argument to the call: ``lengths``.

    With it, a padded batch gives what each sequence alone would give: outputs, last state and every gradient. It is
    what ``tf.nn.dynamic_rnn(sequence_length=...)`` and ``tf.nn.bidirectional_dynamic_rnn`` were to TensorFlow (`TF 1
    docs <https://www.tensorflow.org/versions/r1.15/api_docs/python/tf/nn/dynamic_rnn>`_); the equations are those of
    :class:`torch.nn.GRU`, with the reset gate after the product.

    Args:
        *args, **kwargs: those of :class:`torch.nn.GRU`, in the same order, with the same defaults. From the same seed
            the initial weights are the same.
        enforce_sorted: ``True`` promises that lengths decrease. Nothing is sorted then, and lengths that break the
            promise raise. Default: ``False``.
        flatten_hidden: ``True`` returns the last state as :math:`(N, L \cdot D \cdot H)`; ``False`` as
            :class:`torch.nn.GRU` does, :math:`(L \cdot D, N, H)`. Default: ``True``. Code that reads ``h_n[-1]`` wants
            ``False``: it is the last layer's state there, and the last *sequence's* here.
        backend: ``"packed"``, ``"padded"``, ``"bptt"`` or ``"scan"`` forces one (docs/backends.md); ``"auto"`` takes
            the fastest that can run the call. Default: ``"auto"``.

    Inputs: input, hx, lengths, mask
        * **input**: :math:`(T, N, I)`, or :math:`(N, T, I)` with ``batch_first=True``; unbatched :math:`(T, I)`; a
          :class:`~torch.nn.utils.rnn.PackedSequence`; or a jagged nested tensor :math:`(N, j, I)`.
        * **hx**: the initial state, :math:`(L \cdot D, N, H)` or flattened :math:`(N, L \cdot D \cdot H)` as the layer
          returns it; zeros if None.
        * **lengths**: how many steps of each sequence are real, :math:`(N,)`: a list, a tuple, an array or a tensor
          of any integer dtype, in any order, each from 0 to T. An int for an unbatched input.
        * **mask**: in the place of lengths, a bool tensor shaped like the input's first two dimensions, True at real
          steps. They need not come first: padding before and between them is skipped, the state held across it.

        T steps in time, N sequences, I ``input_size``, H ``hidden_size``, L ``num_layers``, D 2 if ``bidirectional``
        else 1.

    Outputs: output, last_hidden
        * **output**: laid out as the input, all T steps kept, :math:`D \cdot H` wide, exactly zero at padding.
        * **last_hidden**: ``[layer 0 forward | layer 0 backward | layer 1 forward | ...]``, each H wide: the state
          after each sequence's last real step (backward: after its first). Of a sequence without steps it is ``hx``.

        What stands at padding, NaN included, is never read, and gets a gradient of exactly zero. Without lengths and
        mask, everything is real.

    Raises:
        ValueError: a length below 0 or above T, too few or too many of them, lengths that are not sorted under
            ``enforce_sorted``, lengths together with a mask, a PackedSequence or a nested tensor, a mask of another
            shape, or a forced backend that can't run the call.
        TypeError: lengths that are not integers, or a mask that is not a bool tensor.
        RuntimeError, ValueError: what :class:`torch.nn.GRU` refuses, as it does.

    Example::

        >>> import torch
        >>> from masked_rnn import MaskedGRU
        >>> gru = MaskedGRU(input_size=4, hidden_size=3, batch_first=True, bidirectional=True)
        >>> x = torch.randn(2, 5, 4)
        >>> output, last_hidden = gru(x, lengths=[5, 2])
        >>> output.shape, last_hidden.shape
        (torch.Size([2, 5, 6]), torch.Size([2, 6]))
        >>> alone, last_alone = gru(x[1:, :2])
        >>> torch.allclose(output[1, :2], alone[0], atol=1e-6), torch.allclose(last_hidden[1], last_alone[0], atol=1e-6)
        (True, True)
        >>> output[1, 2:].eq(0).all()
        tensor(True)
    """

    _plain = nn.GRU

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, lengths: Lengths = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None, lengths: None = None, *, mask: None = None
    ) -> tuple[PackedSequence, Tensor]: ...
    def forward(self, input: Any, hx: Any = None, lengths: Any = None, *, mask: Any = None) -> Any:
        return self._forward(input, hx, lengths, mask)

    @classmethod
    def from_gru(cls, gru: nn.GRU, **options: Any) -> Self:
        """A layer that shares the parameters of `gru`, its configuration and its mode (training or not).

        It returns what `gru` returned: ``flatten_hidden`` is ``False`` unless given here, so that a model that reads
        ``h_n[-1]`` goes on reading the last layer. A masked layer's own options are kept.

        Args:
            gru: the layer to share with; its weights may be parametrized, weight-normed or pruned.
            **options: ``enforce_sorted``, ``flatten_hidden``, ``backend``.

        Raises:
            TypeError: `gru` is not an ``nn.GRU``.

        Example::

            >>> gru = torch.nn.GRU(4, 3)
            >>> MaskedGRU.from_gru(gru).weight_hh_l0 is gru.weight_hh_l0
            True
        """
        return cls._sharing(gru, options)


class MaskedLSTM(MaskedRNNBase, nn.LSTM):
    r"""As :class:`torch.nn.LSTM` (``proj_size`` included), with ``lengths``; see :class:`MaskedGRU`.

    The last state is the pair :math:`(h, c)`, each in the layout of :class:`MaskedGRU`'s: flattened
    :math:`(N, L \cdot D \cdot P)` and :math:`(N, L \cdot D \cdot H)`, P being ``proj_size`` if there is one, else H;
    ``hx`` is a pair in that form or in :class:`torch.nn.LSTM`'s. Arguments, errors and all else are as there.

    Example::

        >>> import torch
        >>> from masked_rnn import MaskedLSTM
        >>> lstm = MaskedLSTM(4, 3, num_layers=2, batch_first=True)
        >>> output, (h, c) = lstm(torch.randn(2, 5, 4), lengths=[5, 0])
        >>> h.shape, c[1].eq(0).all()
        (torch.Size([2, 6]), tensor(True))
        >>> output, (h, c) = lstm(torch.randn(2, 5, 4), (h, c), lengths=[1, 3])
    """

    _plain = nn.LSTM

    @overload
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: Lengths = None,
        *,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...
    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: None = None,
        *,
        mask: None = None,
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...
    def forward(self, input: Any, hx: Any = None, lengths: Any = None, *, mask: Any = None) -> Any:
        return self._forward(input, hx, lengths, mask)

    @classmethod
    def from_lstm(cls, lstm: nn.LSTM, **options: Any) -> Self:
        """A layer that shares the parameters of `lstm`; see :meth:`MaskedGRU.from_gru`."""
        return cls._sharing(lstm, options, "proj_size")


class MaskedRNN(MaskedRNNBase, nn.RNN):
    """As :class:`torch.nn.RNN` (tanh or relu), with ``lengths``; see :class:`MaskedGRU`.

    Example::

        >>> import torch
        >>> from masked_rnn import MaskedRNN
        >>> rnn = MaskedRNN(4, 3, nonlinearity="relu", batch_first=True)
        >>> mask = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 0, 0]], dtype=torch.bool)
        >>> output, last_hidden = rnn(torch.randn(2, 5, 4), mask=mask)
        >>> torch.equal(last_hidden[1], output[1, 2])
        True
    """

    _plain = nn.RNN

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, lengths: Lengths = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None, lengths: None = None, *, mask: None = None
    ) -> tuple[PackedSequence, Tensor]: ...
    def forward(self, input: Any, hx: Any = None, lengths: Any = None, *, mask: Any = None) -> Any:
        return self._forward(input, hx, lengths, mask)

    @classmethod
    def from_rnn(cls, rnn: nn.RNN, **options: Any) -> Self:
        """A layer that shares the parameters of `rnn`; see :meth:`MaskedGRU.from_gru`."""
        return cls._sharing(rnn, options, "nonlinearity")
