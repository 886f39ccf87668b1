"""masked_rnn, the hand-written recipe, and PyTorch's own layer over the padded batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import masked_rnn
from masked_rnn._backends.bptt import choice

from ..problem import Problem, Result

PLAIN: dict[str, type[nn.RNNBase]] = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}
MASKED: dict[str, type[nn.RNNBase]] = {
    "gru": masked_rnn.MaskedGRU,
    "lstm": masked_rnn.MaskedLSTM,
    "rnn": masked_rnn.MaskedRNN,
}


class TorchRunner:
    layers = PLAIN

    def __init__(self, problem: Problem, threads: int, **options: Any) -> None:
        torch.set_num_threads(threads)
        data, shape = problem.data(), problem.shape
        self.layer = self.layers[problem.cell](
            shape.I, shape.H, shape.L, batch_first=True, bidirectional=shape.bidirectional, **options
        )
        self.layer.load_state_dict({name: torch.from_numpy(w) for name, w in data.weights.items()})
        self.input = torch.from_numpy(data.input)
        self.lengths = None if problem.full else torch.from_numpy(data.lengths)
        self.cotangents = [torch.from_numpy(d) for d in (data.d_output, *data.d_states)]

    def forward(self) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def infer(self) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return self.forward()

    def train(self) -> tuple[Tensor, ...]:
        self.layer.zero_grad(set_to_none=True)
        results = self.forward()
        torch.autograd.backward(results, self.cotangents)
        return results

    def result(self, training: bool) -> Result:
        output, *states = self.train() if training else self.infer()
        grads = {name: p.grad.numpy() for name, p in self.layer.named_parameters() if p.grad is not None}
        return Result(output.detach().numpy(), tuple(h.detach().numpy() for h in states), grads if training else None)


class Masked(TorchRunner):
    layers = MASKED

    def __init__(self, problem: Problem, threads: int, **options: Any) -> None:
        super().__init__(problem, threads, flatten_hidden=False, **options)

    def forward(self) -> tuple[Tensor, ...]:
        output, last = self.layer(self.input, lengths=self.lengths)
        return output, *flat(last)


class WithoutExtra(Masked):
    """As without Numba."""

    def infer(self) -> tuple[Tensor, ...]:
        with without_compiled_loops():
            return super().infer()

    def train(self) -> tuple[Tensor, ...]:
        with without_compiled_loops():
            return super().train()


@contextmanager
def without_compiled_loops() -> Iterator[None]:
    found = choice.compiled_loops
    choice.compiled_loops = lambda: "left out of this run"  # type: ignore[assignment]
    try:
        yield
    finally:
        choice.compiled_loops = found


class Padded(TorchRunner):
    def forward(self) -> tuple[Tensor, ...]:
        output, last = self.layer(self.input)
        return output, *flat(last)


class Recipe(TorchRunner):
    """As it is written by hand in many projects."""

    def forward(self) -> tuple[Tensor, ...]:
        N, T, _ = self.input.shape
        lengths = torch.full((N,), T) if self.lengths is None else self.lengths
        lengths, order = lengths.sort(descending=True)
        packed, last = self.layer(pack_padded_sequence(self.input[order], lengths, batch_first=True))
        output, _ = pad_packed_sequence(packed, batch_first=True, total_length=T)
        back = order.argsort()
        return output[back], *(h[:, back] for h in flat(last))


def flat(last: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return last if isinstance(last, tuple) else (last,)
