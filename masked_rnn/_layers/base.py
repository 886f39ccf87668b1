"""The base of the masked layers: their options and their forward."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypedDict, TypeVar, Unpack, cast

import torch
from torch import Tensor, nn

from .._cells import BackendName
from .._dispatch import call_layer, check_name
from .._torch import disable_dynamo, dynamo_refuses, dynamo_watches
from .convert import copy_keras, share_torch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol, SupportsIndex

    import numpy as np

    Lengths = SupportsIndex | Sequence[SupportsIndex] | Tensor | np.ndarray[Any, Any] | None
    Forward = TypeVar("Forward", covariant=True)

    class HasForward(Protocol[Forward]):
        @property
        def forward(self) -> Forward: ...


Device = torch.device | str | int | None
Init = TypeVar("Init", bound=Callable[..., None])


class Options(TypedDict, total=False):
    """The constructor's arguments that torch.nn's layers do not have."""

    enforce_sorted: bool
    flatten_hidden: bool
    backend: BackendName


DEFAULTS: Options = {"enforce_sorted": False, "flatten_hidden": True, "backend": "auto"}


_call_eagerly: Any = None


def _eager_call() -> Any:
    """Return `call_layer`, disabled for Dynamo. Made at the first use, because it loads Dynamo, which takes seconds."""
    global _call_eagerly
    if _call_eagerly is None:
        _call_eagerly = disable_dynamo(call_layer)
    return _call_eagerly


def _as_leaf(layer: Any, input: Any, hx: Any, lengths: Any, mask: Any, resets: Any) -> Any:
    """Record a layer as one node in a graph of `torch.fx`. By itself torch.fx does so for modules of torch.nn only."""
    path = input.tracer.path_of_module(layer)
    if not path:
        raise torch.fx.proxy.TraceError(
            f"torch.fx can't trace into {type(layer).__name__}, as it can't into torch.nn's layers. "
            "Trace a module that holds it: it becomes one node there."
        )
    # The forward of a subclass may have no argument `resets`.
    more = {"mask": mask} if resets is None else {"mask": mask, "resets": resets}
    return input.tracer.create_proxy("call_module", path, (input, hx, lengths), more)


def unknown_arguments_to_torch(init: Init) -> Init:
    """Make `init` pass unknown arguments to torch.nn's constructor, which refuses them in its own words."""
    known = inspect.signature(init).parameters

    @functools.wraps(init)
    def refusing(self: Any, *args: Any, **kwargs: Any) -> None:
        unknown = {name: value for name, value in kwargs.items() if name not in known}
        if unknown:
            self._torch_layer(1, 1, **unknown)
        init(self, *args, **kwargs)

    return cast(Init, refusing)


class MaskedRNNBase(nn.RNNBase):
    """The base of the masked layers. Each inherits from this and from a layer of torch.nn."""

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
            # Dynamo skips RNN modules, but would still compile the functions that they call.
            if dynamo_watches():
                return _eager_call()(self, input, hx, lengths, mask, resets)
        elif dynamo_refuses():
            return _eager_call()(self, input, hx, lengths, mask, resets)
        return call_layer(self, input, hx, lengths, mask, resets)

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        for name, default in DEFAULTS.items():
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(parts)

    def __prepare_scriptable__(self) -> Any:
        """Refuse `torch.jit.script`, which calls this for each module, in words that help."""
        raise NotImplementedError(
            f"torch.jit.script can't compile {type(self).__name__}, whose forward takes arguments of several types. "
            "Use torch.compile or torch.export, or torch.jit.trace, which works for any batch, length and lengths."
        )

    @classmethod
    def _from_torch(cls, source: Any, options: Any, *extra: str) -> Self:
        """Make a layer that shares the parameters of `source`. `extra` names the arguments that only its kind has."""
        kept = {name: getattr(source, name) for name in DEFAULTS if isinstance(source, MaskedRNNBase)}
        made: Self = share_torch(cls, source, {"flatten_hidden": False, **kept, **options}, extra)
        return made

    @classmethod
    def from_keras(cls, layer: Any, *, device: Device = None, **options: Unpack[Options]) -> Self:
        """Make a layer with the weights of a built Keras layer of the same kind, or of a Bidirectional of one.

        It reads layers of Keras 3, on any backend, and of tf_keras, and imports neither. It reorders the gates and
        transposes the kernels. The new layer is ``batch_first``, as Keras is, unless tf_keras has ``time_major=True``.
        It always returns output and last state, whatever the Keras layer's ``return_sequences`` and ``return_state``.
        Masked steps hold the state in both; their output is zero here, as with Keras's ``zero_output_for_mask=True``.
        docs/from_tensorflow.md has the two side by side.

        Args:
            layer: ``GRU`` (:class:`MaskedGRU`), ``LSTM`` (:class:`MaskedLSTM`), ``SimpleRNN`` (:class:`MaskedRNN`),
                or a ``Bidirectional`` of one with ``merge_mode="concat"``
            device: Where the parameters are made. Default: torch's
            options: ``enforce_sorted``, ``flatten_hidden``, ``backend``

        Raises:
            TypeError: The argument is no Keras layer of this kind.
            ValueError: The Keras layer has no weights yet, or does not compute torch.nn's equations:
                ``reset_after=False``, another activation, ``go_backwards`` outside a Bidirectional, unequal halves,
                another ``merge_mode``, ``stateful``.

        Warns:
            UserWarning: The Keras layer has ``dropout`` or ``recurrent_dropout``, which is left out.

        Example::

            >>> keras_layer = keras.layers.Bidirectional(keras.layers.GRU(3))  # doctest: +SKIP
            >>> keras_layer.build((None, None, 4))  # doctest: +SKIP
            >>> gru = MaskedGRU.from_keras(keras_layer)  # doctest: +SKIP
        """
        made: Self = copy_keras(cls, layer, device, options)
        return made
