"""The layers: thin subclasses of torch.nn's, and the forward that they share."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypedDict, TypeVar, Unpack, cast, overload

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from ._call import close_call, open_call
from ._choice import BACKENDS, run
from ._torch import forward_pre_hooks

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    import numpy as np

    Lengths = int | Sequence[int] | Tensor | np.ndarray[Any, Any] | None
    Forward = TypeVar("Forward", covariant=True)

    class HasForward(Protocol[Forward]):
        @property
        def forward(self) -> Forward: ...


Device = torch.device | str | int | None
BackendName = Literal["auto", "packed", "padded", "bptt", "scan"]
Init = TypeVar("Init", bound=Callable[..., None])


class Options(TypedDict, total=False):
    """What is ours in a constructor's arguments."""

    enforce_sorted: bool
    flatten_hidden: bool
    backend: BackendName


DEFAULTS: Options = {"enforce_sorted": False, "flatten_hidden": True, "backend": "auto"}


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


def _refusing_as_torch_does(init: Init) -> Init:
    """An argument that `init` does not have goes to torch.nn's constructor, which refuses it in its own words."""
    known = inspect.signature(init).parameters

    @functools.wraps(init)
    def refusing(self: Any, *args: Any, **kwargs: Any) -> None:
        unknown = {name: value for name, value in kwargs.items() if name not in known}
        if unknown:
            self._plain(1, 1, **unknown)
        init(self, *args, **kwargs)

    return cast(Init, refusing)


class MaskedRNNBase(nn.RNNBase):
    """What the masked layers share. Each is built from this and a layer of torch.nn."""

    _plain: ClassVar[type[nn.RNNBase]]

    if TYPE_CHECKING:

        @property  # A call has the type of `forward`, also where a subclass has a forward of its own.
        def __call__(self: HasForward[Forward]) -> Forward: ...  # type: ignore[override]

    def _set_options(self, enforce_sorted: bool, flatten_hidden: bool, backend: BackendName) -> None:
        for name, value in (("enforce_sorted", enforce_sorted), ("flatten_hidden", flatten_hidden)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
        if backend != "auto" and backend not in BACKENDS:
            names = ", ".join(map(repr, BACKENDS))
            raise ValueError(f"backend={backend!r} does not exist. Expected 'auto' or one of {names}.")
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
        for name, default in DEFAULTS.items():
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(parts)

    @classmethod
    def _sharing(cls, plain: Any, options: Any, *extra: str) -> Self:
        """A layer over the parameters of `plain`, with its configuration and the `extra` arguments of its kind."""
        if not isinstance(plain, cls._plain):
            raise TypeError(f"expected an nn.{cls._plain.__name__}, got {type(plain).__name__}")
        kept = {name: getattr(plain, name) for name in DEFAULTS if isinstance(plain, MaskedRNNBase)}
        weight: Any = plain.weight_ih_l0
        make: Any = cls
        layer: Self = make(
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
    r"""A multi-layer gated recurrent unit (GRU) over sequences of different lengths.

    It is :class:`torch.nn.GRU` with two differences. The call takes ``lengths`` (or ``mask``): each sequence of a
    padded batch then gives what it would give alone, in outputs, last state and every gradient. The last state comes
    flattened, unless ``flatten_hidden=False``. The ``state_dict`` is the same, and so are the initial weights from the
    same seed.

    For each step of a sequence, each layer computes

    .. math::
        \begin{array}{ll}
            r_t = \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{(t-1)} + b_{hr}) \\
            z_t = \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{(t-1)} + b_{hz}) \\
            n_t = \tanh(W_{in} x_t + b_{in} + r_t \odot (W_{hn} h_{(t-1)} + b_{hn})) \\
            h_t = (1 - z_t) \odot n_t + z_t \odot h_{(t-1)}
        \end{array}

    Here :math:`x_t` is the layer's input at time `t` and :math:`h_t` its hidden state. :math:`r_t`, :math:`z_t` and
    :math:`n_t` are the reset, update and new gates. :math:`\sigma` is the sigmoid function, :math:`\odot` the Hadamard
    product. The reset gate comes after the product with :math:`W_{hn}`, as in :class:`torch.nn.GRU`; in the paper
    (`Cho et al. 2014 <https://arxiv.org/abs/1406.1078>`_) it comes before. For TensorFlow users: the layer is what
    ``tf.nn.dynamic_rnn(sequence_length=...)`` was
    (`TF 1 docs <https://www.tensorflow.org/versions/r1.15/api_docs/python/tf/nn/dynamic_rnn>`_), with PyTorch's reset
    gate.

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
        device: Where the parameters are made. Default: torch's
        dtype: The parameters' dtype. Default: torch's
        enforce_sorted: ``True`` promises that lengths decrease. Nothing is sorted then, and lengths that break the
            promise raise. Default: ``False``
        flatten_hidden: ``True`` returns the last state as :math:`(N, L \cdot D \cdot H)`, ``False`` as
            :class:`torch.nn.GRU` does, :math:`(L \cdot D, N, H)`. Default: ``True``
        backend: ``"packed"``, ``"padded"``, ``"bptt"`` or ``"scan"`` forces one (docs/backends.md); ``"auto"`` takes
            the fastest that can run the call. Default: ``"auto"``

    T is the number of steps in time, N of sequences, I is ``input_size``, H ``hidden_size``, L ``num_layers``, D 2 if
    ``bidirectional`` else 1. Unbatched input leaves N out of every shape.

    Inputs: input, hx, lengths, mask
        * **input**: :math:`(T, N, I)`, or :math:`(N, T, I)` with ``batch_first=True``; unbatched :math:`(T, I)`; a
          :class:`~torch.nn.utils.rnn.PackedSequence`; or a jagged nested tensor :math:`(N, j, I)`.
        * **hx**: the initial state, :math:`(L \cdot D, N, H)` or flattened :math:`(N, L \cdot D \cdot H)` as the layer
          returns it. Zeros if None.
        * **lengths**: how many steps of each sequence are real, :math:`(N)`: a list, a tuple, an array or a tensor of
          any integer dtype, in any order, each from 0 to T. An int for unbatched input. None for packed or nested
          input, which has its own.
        * **mask**: in the place of lengths, a bool tensor shaped as the input without its last dimension, True at real
          steps. Padding may stand anywhere: the state is held across it.

        Without lengths and mask, every step is real. Padding is never read, NaN included; its gradient is exactly zero.

    Outputs: output, last_hidden
        * **output**: the top layer's :math:`h_t`, forward then backward, :math:`D \cdot H` wide. It is laid out as the
          input and keeps all T steps; padding is exactly zero. Packed or nested input gives packed or nested output.
        * **last_hidden**: the state after each sequence's last real step (backward: after its first). Flattened, it is
          ``[layer 0 forward | layer 0 backward | layer 1 forward | ...]``, each part H wide. The top layer's is the
          last :math:`D \cdot H` columns.

        A sequence of length zero has only zeros in output, and ``hx`` for its last state.

    .. warning::
        Code that reads ``h_n[-1]`` gets the last *layer's* state from :class:`torch.nn.GRU`, and the last *sequence's*
        from a flattened state. Give it ``flatten_hidden=False``, or use :meth:`from_gru`, which does.

    Attributes:
        weight_ih_l[k]: input-hidden weights of layer k, ``(W_ir|W_iz|W_in)``, :math:`(3H, I)` for k = 0, else
            :math:`(3H, D \cdot H)`
        weight_hh_l[k]: hidden-hidden weights of layer k, ``(W_hr|W_hz|W_hn)``, :math:`(3H, H)`
        bias_ih_l[k]: input-hidden bias of layer k, ``(b_ir|b_iz|b_in)``, :math:`(3H)`
        bias_hh_l[k]: hidden-hidden bias of layer k, ``(b_hr|b_hz|b_hn)``, :math:`(3H)`
        [name]_reverse: each of these for the backward direction, only if ``bidirectional``

        All are drawn from :math:`\mathcal{U}(-1/\sqrt{H}, 1/\sqrt{H})`.

    Raises:
        ValueError: A length is below 0 or above T. There are too few lengths, too many, or unsorted ones under
            ``enforce_sorted``. Lengths come with a mask, or either with packed or nested input. The mask has another
            shape. The input has another rank or dtype. A forced backend can't run the call.
        TypeError: Lengths are not integers, the mask is not a bool tensor, or either stands in the place of hx. The
            input is no tensor.
        RuntimeError: The input is not I wide, or has no steps and no lengths. hx has another shape or dtype. A length
            is out of range, where lengths and input are on a GPU: they are checked there, without waiting.

        What :class:`torch.nn.GRU` refuses in its constructor raises as it does there.

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

    @_refusing_as_torch_does
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
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
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device=device, dtype=dtype
        )
        self._set_options(enforce_sorted, flatten_hidden, backend)

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, lengths: Lengths = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None, lengths: None = None, *, mask: None = None
    ) -> tuple[PackedSequence, Tensor]: ...
    def forward(self, input: Any, hx: Any = None, lengths: Any = None, *, mask: Any = None) -> Any:
        """The output, zero at padding, and each sequence's last state. Without lengths or mask all is real."""
        return self._forward(input, hx, lengths, mask)

    @classmethod
    def from_gru(cls, gru: nn.GRU, **options: Unpack[Options]) -> Self:
        """A layer that shares the parameters of `gru`, its configuration and its mode (training or not).

        It returns what `gru` returned: ``flatten_hidden`` is ``False`` unless given here, so that a model that reads
        ``h_n[-1]`` goes on reading the last layer. A masked layer's own options are kept. The weights may be
        parametrized, weight-normed or pruned. Anything but an ``nn.GRU`` raises a TypeError.

        Example::

            >>> gru = torch.nn.GRU(4, 3)
            >>> MaskedGRU.from_gru(gru).weight_hh_l0 is gru.weight_hh_l0
            True
        """
        return cls._sharing(gru, options)


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
        backend: ``"packed"``, ``"padded"``, ``"bptt"`` or ``"scan"`` forces one (docs/backends.md); ``"auto"`` takes
            the fastest that can run the call. Default: ``"auto"``

    T is the number of steps in time, N of sequences, I is ``input_size``, H ``hidden_size``, L ``num_layers``, D 2 if
    ``bidirectional`` else 1, P ``proj_size`` if it is above 0 else H. Unbatched input leaves N out of every shape.

    Inputs: input, hx, lengths, mask
        * **input**: :math:`(T, N, I)`, or :math:`(N, T, I)` with ``batch_first=True``; unbatched :math:`(T, I)`; a
          :class:`~torch.nn.utils.rnn.PackedSequence`; or a jagged nested tensor :math:`(N, j, I)`.
        * **hx**: the initial states, a pair: h :math:`(L \cdot D, N, P)` and c :math:`(L \cdot D, N, H)`. Each may be
          flattened, as the layer returns it. Zeros if None.
        * **lengths**: how many steps of each sequence are real, :math:`(N)`: a list, a tuple, an array or a tensor of
          any integer dtype, in any order, each from 0 to T. An int for unbatched input. None for packed or nested
          input, which has its own.
        * **mask**: in the place of lengths, a bool tensor shaped as the input without its last dimension, True at real
          steps. Padding may stand anywhere: the state is held across it.

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
            ``enforce_sorted``. Lengths come with a mask, or either with packed or nested input. The mask has another
            shape. The input has another rank or dtype. A forced backend can't run the call.
        TypeError: Lengths are not integers, the mask is not a bool tensor, or either stands in the place of hx. The
            input is no tensor.
        RuntimeError: The input is not I wide, or has no steps and no lengths. hx has another shape or dtype. A length
            is out of range, where lengths and input are on a GPU: they are checked there, without waiting.

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

    _plain = nn.LSTM

    @_refusing_as_torch_does
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
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...
    @overload
    def forward(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None = None, lengths: None = None, *, mask: None = None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...
    def forward(self, input: Any, hx: Any = None, lengths: Any = None, *, mask: Any = None) -> Any:
        """The output, zero at padding, and each sequence's last states (h, c). Without lengths or mask all is real."""
        return self._forward(input, hx, lengths, mask)

    @classmethod
    def from_lstm(cls, lstm: nn.LSTM, **options: Unpack[Options]) -> Self:
        """A layer that shares the parameters of `lstm`, its configuration and its mode (training or not).

        It returns what `lstm` returned: ``flatten_hidden`` is ``False`` unless given here, so that a model that reads
        ``h_n[-1]`` goes on reading the last layer. A masked layer's own options are kept. The weights may be
        parametrized, weight-normed or pruned. Anything but an ``nn.LSTM`` raises a TypeError.

        Example::

            >>> lstm = torch.nn.LSTM(4, 3)
            >>> MaskedLSTM.from_lstm(lstm).weight_hh_l0 is lstm.weight_hh_l0
            True
        """
        return cls._sharing(lstm, options, "proj_size")


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
        backend: ``"packed"``, ``"padded"``, ``"bptt"`` or ``"scan"`` forces one (docs/backends.md); ``"auto"`` takes
            the fastest that can run the call. Default: ``"auto"``

    T is the number of steps in time, N of sequences, I is ``input_size``, H ``hidden_size``, L ``num_layers``, D 2 if
    ``bidirectional`` else 1. Unbatched input leaves N out of every shape.

    Inputs: input, hx, lengths, mask
        * **input**: :math:`(T, N, I)`, or :math:`(N, T, I)` with ``batch_first=True``; unbatched :math:`(T, I)`; a
          :class:`~torch.nn.utils.rnn.PackedSequence`; or a jagged nested tensor :math:`(N, j, I)`.
        * **hx**: the initial state, :math:`(L \cdot D, N, H)` or flattened :math:`(N, L \cdot D \cdot H)` as the layer
          returns it. Zeros if None.
        * **lengths**: how many steps of each sequence are real, :math:`(N)`: a list, a tuple, an array or a tensor of
          any integer dtype, in any order, each from 0 to T. An int for unbatched input. None for packed or nested
          input, which has its own.
        * **mask**: in the place of lengths, a bool tensor shaped as the input without its last dimension, True at real
          steps. Padding may stand anywhere: the state is held across it.

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
            ``enforce_sorted``. Lengths come with a mask, or either with packed or nested input. The mask has another
            shape. The input has another rank or dtype. A forced backend can't run the call.
        TypeError: Lengths are not integers, the mask is not a bool tensor, or either stands in the place of hx. The
            input is no tensor.
        RuntimeError: The input is not I wide, or has no steps and no lengths. hx has another shape or dtype. A length
            is out of range, where lengths and input are on a GPU: they are checked there, without waiting.

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

    _plain = nn.RNN

    @_refusing_as_torch_does
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
        self, input: Tensor, hx: Tensor | None = None, lengths: Lengths = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None, lengths: None = None, *, mask: None = None
    ) -> tuple[PackedSequence, Tensor]: ...
    def forward(self, input: Any, hx: Any = None, lengths: Any = None, *, mask: Any = None) -> Any:
        """The output, zero at padding, and each sequence's last state. Without lengths or mask all is real."""
        return self._forward(input, hx, lengths, mask)

    @classmethod
    def from_rnn(cls, rnn: nn.RNN, **options: Unpack[Options]) -> Self:
        """A layer that shares the parameters of `rnn`, its configuration and its mode (training or not).

        It returns what `rnn` returned: ``flatten_hidden`` is ``False`` unless given here, so that a model that reads
        ``h_n[-1]`` goes on reading the last layer. A masked layer's own options are kept. The weights may be
        parametrized, weight-normed or pruned. Anything but an ``nn.RNN`` raises a TypeError.

        Example::

            >>> rnn = torch.nn.RNN(4, 3)
            >>> MaskedRNN.from_rnn(rnn).weight_hh_l0 is rnn.weight_hh_l0
            True
        """
        return cls._sharing(rnn, options, "nonlinearity")
