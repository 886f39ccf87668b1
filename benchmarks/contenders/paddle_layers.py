"""Paddle's nn.GRU(sequence_length=…), whose weights have torch's names, gates and layout."""

from __future__ import annotations

from typing import Any

import paddle

from ..problem import Problem, Result

LAYERS = {"gru": paddle.nn.GRU, "lstm": paddle.nn.LSTM, "rnn": paddle.nn.SimpleRNN}


class Paddle:
    def __init__(self, problem: Problem, threads: int) -> None:
        paddle.base.core.set_num_threads(threads)
        data, shape = problem.data(), problem.shape
        direction = "bidirect" if shape.bidirectional else "forward"
        self.layer = LAYERS[problem.cell](shape.I, shape.H, shape.L, direction)
        self.names = list(data.weights)
        self.parameters = [getattr(self.layer, name) for name in self.names]
        for parameter, name in zip(self.parameters, self.names, strict=True):
            parameter.set_value(data.weights[name])
        self.input = paddle.to_tensor(data.input)
        self.lengths = paddle.to_tensor(data.lengths.astype("int32"))
        self.cotangents = [paddle.to_tensor(d) for d in (data.d_output, *data.d_states)]

    def forward(self) -> list[Any]:
        output, last = self.layer(self.input, sequence_length=self.lengths)
        return [output, *(last if isinstance(last, tuple) else (last,))]

    def infer(self) -> list[Any]:
        with paddle.no_grad():
            return self.forward()

    def train(self) -> Any:
        results = self.forward()
        return results, paddle.grad(results, self.parameters, self.cotangents)

    def result(self, training: bool) -> Result:
        (output, *states), grads = self.train() if training else (self.infer(), None)
        named = None if grads is None else {n: g.numpy() for n, g in zip(self.names, grads, strict=True)}
        return Result(output.numpy(), tuple(h.numpy() for h in states), named)
