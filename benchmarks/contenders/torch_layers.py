"""masked_rnn, packing written by hand, and PyTorch's own layer over the padded batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import masked_rnn

from ..problem import Array, Problem, Result

PLAIN: dict[str, Callable[..., nn.RNNBase]] = {
    "gru": nn.GRU,
    "lstm": nn.LSTM,
    "rnn": nn.RNN,
    "rnn-relu": partial(nn.RNN, nonlinearity="relu"),
}
MASKED: dict[str, Callable[..., nn.RNNBase]] = {
    "gru": masked_rnn.MaskedGRU,
    "lstm": masked_rnn.MaskedLSTM,
    "rnn": masked_rnn.MaskedRNN,
    "rnn-relu": partial(masked_rnn.MaskedRNN, nonlinearity="relu"),
}


class TorchRunner:
    layers = PLAIN

    def __init__(
        self, problem: Problem, threads: int, device: str = "cpu", lengths_there: bool = False, **options: Any
    ) -> None:
        torch.set_num_threads(threads)
        self.device = device
        data, shape, dtype = problem.data(), problem.shape, getattr(torch, problem.dtype)
        self.layer = self.layers[problem.cell](
            shape.I, shape.H, shape.L, batch_first=True, bidirectional=shape.bidirectional, **options
        )
        self.layer.load_state_dict({name: torch.from_numpy(w) for name, w in data.weights.items()})
        self.layer.to(device, dtype)
        self.parameters = list(self.layer.parameters())

        def there(array: Array) -> Tensor:
            return torch.from_numpy(array).to(device, dtype)

        self.input = there(data.input)
        self.lengths: Any = None
        if not problem.full:
            self.lengths = torch.from_numpy(data.lengths).to(device if lengths_there else "cpu")
            self.lengths = self.lengths.tolist() if problem.listed else self.lengths
        self.states = tuple(map(there, data.states)) if problem.acting else ()
        self.resets = torch.from_numpy(data.starts[:, None]).to(device)
        self.done = there(data.starts)
        self.cotangents = [there(d) for d in (data.d_output, *data.d_states)]

    def forward(self) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def infer(self) -> tuple[Tensor, ...]:
        with torch.no_grad():
            results = self.forward()
        self.wait()
        return results

    def train(self) -> tuple[Tensor, ...]:
        for parameter in self.parameters:
            parameter.grad = None
        results = self.forward()
        torch.autograd.backward(results, self.cotangents)
        self.wait()
        return results

    def result(self, training: bool) -> Result:
        output, *states = (t.detach().cpu().float().numpy() for t in (self.train() if training else self.infer()))
        grads = {name: p.grad.cpu().float().numpy() for name, p in self.layer.named_parameters() if p.grad is not None}
        return Result(output, tuple(states), grads if training else None)


class Masked(TorchRunner):
    layers = MASKED

    def __init__(self, problem: Problem, threads: int, **options: Any) -> None:
        super().__init__(problem, threads, flatten_hidden=False, **options)

    def forward(self) -> tuple[Tensor, ...]:
        if self.states:
            output, last = self.layer(self.input, given(self.states), resets=self.resets)
        else:
            output, last = self.layer(self.input, lengths=self.lengths)
        return output, *flat(last)


class Graph(Masked):
    """Captures masked_rnn once in a CUDA graph, with its gradients, and replays it."""

    def __init__(self, problem: Problem, threads: int, **options: Any) -> None:
        super().__init__(problem, threads, **options)
        self.inference, self.training = self.captured(super().infer), self.captured(super().train)

    def wait(self) -> None:
        if not torch.cuda.is_current_stream_capturing():
            super().wait()

    def captured(self, step: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            self.wait()
            return results

        return replay

    def infer(self) -> tuple[Tensor, ...]:
        return self.inference()

    def train(self) -> tuple[Tensor, ...]:
        return self.training()


class InOps(Masked):
    """masked_rnn without the native loops."""

    def infer(self) -> tuple[Tensor, ...]:
        with without_native_loops():
            return super().infer()

    def train(self) -> tuple[Tensor, ...]:
        with without_native_loops():
            return super().train()


@contextmanager
def without_native_loops() -> Iterator[None]:
    # Not at the top: benchmarks.versions times checkouts before 2.0, which do not have it.
    from masked_rnn._backends.bptt import library

    found = library.find
    library.find = lambda: "left out of this run"  # type: ignore[assignment]
    try:
        yield
    finally:
        library.find = found


class Padded(TorchRunner):
    def forward(self) -> tuple[Tensor, ...]:
        if self.states:
            kept = (1 - self.done).view(1, -1, 1)
            output, last = self.layer(self.input, given(tuple(kept * h for h in self.states)))
        else:
            output, last = self.layer(self.input)
        return output, *flat(last)


class Packing(TorchRunner):
    """Packs and unpacks in the fewest calls. PyTorch sorts, and restores the order."""

    def forward(self) -> tuple[Tensor, ...]:
        packed = pack_padded_sequence(self.input, self.lengths, batch_first=True, enforce_sorted=False)
        packed, last = self.layer(packed)
        output, _ = pad_packed_sequence(packed, batch_first=True, total_length=self.input.size(1))
        return output, *flat(last)


class Recipe(TorchRunner):
    """Sorts, packs, unpacks and restores the order, as many projects do by hand."""

    def forward(self) -> tuple[Tensor, ...]:
        N, T, _ = self.input.shape
        lengths = torch.full((N,), T) if self.lengths is None else self.lengths.cpu()
        lengths, order = lengths.sort(descending=True)
        packed, last = self.layer(pack_padded_sequence(self.input[order], lengths, batch_first=True))
        output, _ = pad_packed_sequence(packed, batch_first=True, total_length=T)
        back = order.argsort()
        return output[back], *(h[:, back] for h in flat(last))


def flat(last: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return last if isinstance(last, tuple) else (last,)


def given(states: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """Returns states as a layer takes them: a tuple for an LSTM alone."""
    return states if len(states) > 1 else states[0]
