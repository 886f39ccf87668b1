"""The layers: thin subclasses of torch.nn's, and the forward that they share."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ._backends import BACKENDS, run
from ._call import close_call, open_call


def _run(layer: nn.RNNBase, input: Any, hx: Any, lengths: Any, mask: Any) -> Any:
    call = open_call(layer, input, hx, lengths, mask)
    return close_call(call, *run(call))


@cache
def _out_of_dynamos_sight() -> Any:
    """Dynamo leaves every `nn.RNNBase` to run as it is, but would then compile, in pieces, the functions it calls."""
    return torch.compiler.disable(_run)


class MaskedRNNBase(nn.RNNBase):
    """What the masked layers share; built from `nn.RNNBase` and one of its subclasses."""

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
            raise ValueError(f"backend={backend!r} does not exist. Expected 'auto' or one of {', '.join(map(repr, BACKENDS))}.")
        super().__init__(*args, **kwargs)
        self.enforce_sorted = enforce_sorted
        self.flatten_hidden = flatten_hidden
        self.backend = backend

    def forward(self, input: Any, hx: Any = None, lengths: Any = None, *, mask: Tensor | None = None) -> Any:
        if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
            return _out_of_dynamos_sight()(self, input, hx, lengths, mask)
        return _run(self, input, hx, lengths, mask)

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        defaults = {"enforce_sorted": False, "flatten_hidden": True, "backend": "auto"}
        parts += [f"{k}={getattr(self, k)!r}" for k, default in defaults.items() if getattr(self, k) != default]
        return ", ".join(parts)

    @classmethod
    def _sharing(cls, plain: Any, options: dict[str, Any], *extra: str) -> Self:
        """A layer over the parameters of `plain`, with its configuration and the `extra` arguments of its kind."""
        if not isinstance(plain, cls._plain):
            raise TypeError(f"expected an nn.{cls._plain.__name__}, got {type(plain).__name__}")
        weight = getattr(plain, "weight_ih_l0")  # noqa: B009
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
            **options,
        )
        for name, _ in list(layer.named_parameters()):
            setattr(layer, name, getattr(plain, name))
        return layer.train(plain.training)


class MaskedGRU(MaskedRNNBase, nn.GRU):
    _plain = nn.GRU

    @classmethod
    def from_gru(cls, gru: nn.GRU, **options: Any) -> Self:
        return cls._sharing(gru, options)


class MaskedLSTM(MaskedRNNBase, nn.LSTM):
    _plain = nn.LSTM

    @classmethod
    def from_lstm(cls, lstm: nn.LSTM, **options: Any) -> Self:
        return cls._sharing(lstm, options, "proj_size")


class MaskedRNN(MaskedRNNBase, nn.RNN):
    _plain = nn.RNN

    @classmethod
    def from_rnn(cls, rnn: nn.RNN, **options: Any) -> Self:
        return cls._sharing(rnn, options, "nonlinearity")
