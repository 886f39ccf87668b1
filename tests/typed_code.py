"""Code that a user would write. mypy and pyright check it; nothing runs it.

A line with an ignore must be an error, because both checkers report an ignore that is not needed.
"""
# pyright: strict

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, assert_type

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from masked_rnn import MaskedGRU, MaskedLSTM, MaskedRNN

x = torch.randn(3, 6, 4)
mask = torch.ones(3, 6, dtype=torch.bool)
packed: PackedSequence = pack_sequence([x[0], x[1, :2]])


def constructing() -> tuple[nn.GRU, nn.LSTM, nn.RNN, nn.Module]:
    """Checks that each layer is also an instance of torch.nn's."""
    gru = MaskedGRU(4, 3, 2, True, True, 0.5, True, "cpu", torch.float32, enforce_sorted=True, flatten_hidden=False)
    lstm = MaskedLSTM(4, 3, 2, True, True, 0.5, True, 2, torch.device("cpu"), torch.float32, backend="bptt")
    rnn = MaskedRNN(4, 3, 2, "relu", True, True, 0.5, True, "cpu", torch.float32, backend="packed")
    assert_type(gru.batch_first, bool)
    assert_type(gru.flatten_hidden, bool)
    return gru, lstm, rnn, nn.Sequential(MaskedGRU(input_size=4, hidden_size=3, device=None, dtype=None))


def constructing_wrongly(options: dict[str, Any]) -> None:
    MaskedGRU(4, **options)
    MaskedGRU(4)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    MaskedGRU(4, 3.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    MaskedGRU(4, 3, proj_size=2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    MaskedGRU(4, 3, bidirektional=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    MaskedGRU(4, 3, backend="cudnn")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    MaskedRNN(4, 3, 2, True)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    MaskedLSTM(4, 3, flatten_hiden=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def calling(gru: MaskedGRU, lstm: MaskedLSTM, rnn: MaskedRNN, nested: Tensor) -> None:
    assert_type(gru(x), tuple[Tensor, Tensor])
    assert_type(gru(x, lengths=[6, 2, 0]), tuple[Tensor, Tensor])
    assert_type(gru(x, None, torch.tensor([6, 2, 0])), tuple[Tensor, Tensor])
    assert_type(gru(x, torch.zeros(1, 3, 3), lengths=(6, 2, 0)), tuple[Tensor, Tensor])
    assert_type(gru(x, hx=None, lengths=np.array([6, 2, 0]), mask=None), tuple[Tensor, Tensor])
    assert_type(gru(x, lengths=(torch.tensor(3), torch.tensor(2), 0)), tuple[Tensor, Tensor])
    assert_type(gru(x, lengths=[np.int64(3), np.uint8(2), 0]), tuple[Tensor, Tensor])
    assert_type(gru(x[0], lengths=np.int64(4)), tuple[Tensor, Tensor])
    assert_type(gru(x, mask=mask), tuple[Tensor, Tensor])
    assert_type(gru(x, lengths=[6, 2, 0], resets=mask), tuple[Tensor, Tensor])
    assert_type(gru(x[0], lengths=4), tuple[Tensor, Tensor])
    assert_type(gru(nested), tuple[Tensor, Tensor])
    assert_type(gru(packed), tuple[PackedSequence, Tensor])
    assert_type(rnn(x, lengths=range(3)), tuple[Tensor, Tensor])
    assert_type(rnn(packed, torch.zeros(1, 2, 3)), tuple[PackedSequence, Tensor])
    output, (h, c) = lstm(x, lengths=[6, 2, 0])
    assert_type(output, Tensor)
    assert_type(h, Tensor)
    assert_type(lstm(x, (h, c), mask=mask), tuple[Tensor, tuple[Tensor, Tensor]])
    assert_type(lstm(x, (h, c), resets=mask), tuple[Tensor, tuple[Tensor, Tensor]])
    assert_type(lstm(packed, (h, c)), tuple[PackedSequence, tuple[Tensor, Tensor]])
    assert_type(lstm.forward(x, lengths=[6, 2, 0]), tuple[Tensor, tuple[Tensor, Tensor]])


def calling_wrongly(gru: MaskedGRU, lstm: MaskedLSTM) -> None:
    gru(x, length=[6, 2, 0])  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    gru(x, [6, 2, 0])  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    gru(x, lengths=[6.0, 2.0])  # type: ignore[list-item]  # pyright: ignore[reportCallIssue, reportArgumentType]
    gru(x, lengths="622")  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]
    gru(x, None, None, mask)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    gru(packed, lengths=[6, 2])  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    lstm(x, torch.zeros(1, 3, 3))  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]


def sharing(gru: nn.GRU, lstm: nn.LSTM, rnn: nn.RNN) -> None:
    assert_type(MaskedGRU.from_gru(gru), MaskedGRU)
    assert_type(MaskedLSTM.from_lstm(lstm, flatten_hidden=True), MaskedLSTM)
    assert_type(MaskedRNN.from_rnn(rnn, backend="scan", enforce_sorted=True)(x), tuple[Tensor, Tensor])
    assert_type(Tagger.from_gru(gru), Tagger)
    MaskedGRU.from_gru(lstm)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    MaskedGRU.from_gru(gru, flatten_hiden=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


class Named(MaskedLSTM):
    """A subclass that keeps the layer's forward keeps its types."""

    def __init__(self, name: str, hidden_size: int) -> None:
        super().__init__(4, hidden_size, batch_first=True)
        self.name = name


class Tagger(MaskedGRU):
    """A subclass with its own forward takes that forward's arguments, here with lengths in second place."""

    def forward(self, input: Tensor, lengths: Sequence[int]) -> Tensor:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        _, last = super().forward(input, lengths=lengths)
        return assert_type(last, Tensor)


class Classifier(nn.Module):
    """A model that holds the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = MaskedGRU(4, 3, bidirectional=True)
        self.head = nn.Linear(6, 5)

    def forward(self, input: Tensor, lengths: Tensor) -> Tensor:
        _, last = self.gru(input, lengths=lengths)
        scores: Tensor = self.head(assert_type(last, Tensor))
        return scores


def subclasses(tagger: Tagger) -> None:
    assert_type(Named("a", 3)(x, lengths=[6, 2, 0]), tuple[Tensor, tuple[Tensor, Tensor]])
    assert_type(tagger(x, [6, 2, 0]), Tensor)
    tagger(x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
