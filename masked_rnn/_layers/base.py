"""What the layers share: their options, the forward, and making one over an existing layer's parameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypedDict, TypeVar, Unpack, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._at_once import run_at_once
from .._call import close_call, open_call
from .._cells import BackendName, Layer
from .._choice import check_name, run
from .._torch import dynamo_refuses, dynamo_watches, forward_pre_hooks, left_to_run
from .keras import read_keras

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
Init = TypeVar("Init", bound=Callable[..., None])


class Options(TypedDict, total=False):
    """What is ours in a constructor's arguments."""

    enforce_sorted: bool
    flatten_hidden: bool
    backend: BackendName


DEFAULTS: Options = {"enforce_sorted": False, "flatten_hidden": True, "backend": "auto"}


def _run(layer: Layer, input: Any, hx: Any, lengths: Any, mask: Any, resets: Any) -> Any:
    if not torch.compiler.is_compiling():
        result = run_at_once(layer, input, hx, lengths, mask, resets)
        if result is not None:
            return result
    call = open_call(layer, input, hx, lengths, mask, resets)
    return close_call(call, *run(call))


_run_eagerly: Any = None


def _eager_run() -> Any:
    """`_run`, which Dynamo leaves alone. Made when Dynamo is first there: loading it takes seconds."""
    global _run_eagerly
    if _run_eagerly is None:
        _run_eagerly = left_to_run(_run)
    return _run_eagerly


def _as_leaf(layer: Any, input: Any, hx: Any, lengths: Any, mask: Any, resets: Any) -> Any:
    """One node in the graph of `torch.fx`, which takes only modules of torch.nn for leaves by itself."""
    path = input.tracer.path_of_module(layer)
    if not path:
        raise torch.fx.proxy.TraceError(
            f"torch.fx can't trace into {type(layer).__name__}, as it can't into torch.nn's layers. "
            "Trace a module that holds it: it becomes one node there."
        )
    # A subclass's own forward need not know resets.
    more = {"mask": mask} if resets is None else {"mask": mask, "resets": resets}
    return input.tracer.create_proxy("call_module", path, (input, hx, lengths), more)


def refusing_as_torch_does(init: Init) -> Init:
    """An argument that `init` does not have goes to torch.nn's constructor, which refuses it in its own words."""
    known = inspect.signature(init).parameters

    @functools.wraps(init)
    def refusing(self: Any, *args: Any, **kwargs: Any) -> None:
        unknown = {name: value for name, value in kwargs.items() if name not in known}
        if unknown:
            self._torch_layer(1, 1, **unknown)
        init(self, *args, **kwargs)

    return cast(Init, refusing)


class MaskedRNNBase(nn.RNNBase):
    """What the masked layers share. Each is built from this and a layer of torch.nn."""

    _torch_layer: ClassVar[type[nn.RNNBase]]

    if TYPE_CHECKING:

        @property  # A call has the type of `forward`, also where a subclass has a forward of its own.
        def __call__(self: HasForward[Forward]) -> Forward: ...  # type: ignore[override]

    def _set_options(self, enforce_sorted: bool, flatten_hidden: bool, backend: BackendName) -> None:
        for name, value in (("enforce_sorted", enforce_sorted), ("flatten_hidden", flatten_hidden)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
        check_name(backend)
        self.enforce_sorted = enforce_sorted
        self.flatten_hidden = flatten_hidden
        self.backend = backend

    def _forward(self, input: Any, hx: Any, lengths: Any, mask: Any, resets: Any) -> Any:
        if not torch.compiler.is_compiling():
            if isinstance(input, torch.fx.Proxy):
                return _as_leaf(self, input, hx, lengths, mask, resets)
            # Dynamo leaves every nn.RNNBase to run as it is, but would compile, in pieces, the functions that it calls.
            if dynamo_watches():
                return _eager_run()(self, input, hx, lengths, mask, resets)
        elif dynamo_refuses():
            return _eager_run()(self, input, hx, lengths, mask, resets)
        return _run(self, input, hx, lengths, mask, resets)

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        for name, default in DEFAULTS.items():
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(parts)

    @classmethod
    def _sharing(cls, source: Any, options: Any, *extra: str) -> Self:
        """A layer over the parameters of `source`, with its configuration and the `extra` arguments of its kind."""
        if not isinstance(source, cls._torch_layer):
            raise TypeError(f"expected an nn.{cls._torch_layer.__name__}, got {type(source).__name__}")
        kept = {name: getattr(source, name) for name in DEFAULTS if isinstance(source, MaskedRNNBase)}
        weight: Any = source.weight_ih_l0
        make: Any = cls
        layer: Self = make(
            source.input_size,
            source.hidden_size,
            source.num_layers,
            bias=source.bias,
            batch_first=source.batch_first,
            dropout=source.dropout,
            bidirectional=source.bidirectional,
            device="meta",
            dtype=weight.dtype,
            **{name: getattr(source, name) for name in extra},
            **{"flatten_hidden": False, **kept, **options},
        )
        _share_weights(layer, source)
        return layer.train(source.training)

    @classmethod
    def from_keras(cls, layer: Any, *, device: Device = None, **options: Unpack[Options]) -> Self:
        """A layer with the weights of a built Keras layer of the same kind, or of a Bidirectional of one.

        Keras 3 on any backend and tf_keras are read, and neither is imported. Gates are brought into PyTorch's order,
        kernels transposed. The layer is ``batch_first``, as Keras is (``time_major=True`` in tf_keras: it is not).
        What a Keras layer returns is chosen by its ``return_sequences`` and ``return_state``; this one returns output
        and last state always. Masked steps hold the state in both; their output is zero here, as with Keras's
        ``zero_output_for_mask=True``. docs/from_tensorflow.md has the two side by side.

        Args:
            layer: ``GRU`` (:class:`MaskedGRU`), ``LSTM`` (:class:`MaskedLSTM`), ``SimpleRNN`` (:class:`MaskedRNN`),
                or a ``Bidirectional`` of one with ``merge_mode="concat"``
            device: Where the parameters are made. Default: torch's
            options: ``enforce_sorted``, ``flatten_hidden``, ``backend``

        Raises:
            TypeError: It is no Keras layer of this kind.
            ValueError: It has no weights yet, or computes what torch.nn's equations can't: ``reset_after=False``,
                another activation, ``go_backwards`` outside a Bidirectional, unequal halves, another ``merge_mode``,
                ``stateful``.

        Warns:
            UserWarning: Its ``dropout`` or ``recurrent_dropout`` is left out.

        Example::

            >>> keras_layer = keras.layers.Bidirectional(keras.layers.GRU(3))  # doctest: +SKIP
            >>> keras_layer.build((None, None, 4))  # doctest: +SKIP
            >>> gru = MaskedGRU.from_keras(keras_layer)  # doctest: +SKIP
        """
        kind = "SimpleRNN" if cls._torch_layer is nn.RNN else cls._torch_layer.__name__
        found = read_keras(layer, kind)
        make: Any = cls
        made: Self = make(
            found.input_size,
            found.hidden_size,
            bias=found.bias,
            batch_first=found.batch_first,
            bidirectional=found.bidirectional,
            device=device,
            dtype=found.dtype,
            **({"nonlinearity": found.nonlinearity} if kind == "SimpleRNN" else {}),
            **options,
        )
        _copy_weights(made, found.weights)
        return made


@torch.no_grad()
def _copy_weights(layer: MaskedRNNBase, weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        getattr(layer, name).copy_(weight)


def _share_weights(layer: Any, source: Any) -> None:
    """Make the layer use the parameters of `source`, or the tensors from which a hook computes them."""
    computed = False
    for name, _ in list(layer.named_parameters()):
        if parametrize.is_parametrized(source, name):
            parametrize.register_parametrization(layer, name, nn.Identity(), unsafe=True)
            layer.parametrizations[name] = source.parametrizations[name]
        elif isinstance(getattr(source, name), nn.Parameter):
            setattr(layer, name, getattr(source, name))
        else:  # a plain tensor that a hook computes before each call, as pruning does
            computed = True
            delattr(layer, name)
            setattr(layer, name, getattr(source, name))
    if computed:
        for name, parameter in source.named_parameters(recurse=False):
            layer.register_parameter(name, parameter)
        for name, buffer in source.named_buffers(recurse=False):
            layer.register_buffer(name, buffer)
        for hook, with_kwargs in forward_pre_hooks(source):
            layer.register_forward_pre_hook(hook, with_kwargs=with_kwargs)
