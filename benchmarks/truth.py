"""Right results for the check of contenders before they are timed: those of each sequence alone, in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from .problem import CELLS, PARTS, Array, Problem, Result, Shape

LAYERS: dict[str, type[nn.RNNBase]] = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""The largest allowed error, relative to the largest true value. The low precisions round the weights, too."""


def oracle(problem: Problem, training: bool) -> Result:
    """Computes the results by the equations, step by step, and holds a row's state where it has no step.

    `prove` checks this against each sequence alone.
    """
    torch.set_num_threads(1)  # the products are too small for a second thread to help
    data, (_, T, _, _, L, _) = problem.data(), problem.shape
    weights = {name: torch.from_numpy(w).double().requires_grad_(training) for name, w in data.weights.items()}
    real = torch.arange(T) < torch.from_numpy(data.lengths)[:, None]
    x = torch.from_numpy(data.input).double()
    last: list[tuple[Tensor, ...]] = []
    for layer in range(L):
        ways = []
        for suffix in ("", "_reverse")[: problem.shape.D]:
            w_ih, w_hh, b_ih, b_hh = (weights[f"{part}_l{layer}{suffix}"] for part in PARTS)
            pre = (x @ w_ih.T + b_ih).unbind(1)
            kept = torch.from_numpy(~data.starts)[:, None]
            states = tuple(torch.from_numpy(h[len(last)]).double() * kept for h in data.states)
            steps = {}
            for t in reversed(range(T)) if suffix else range(T):
                new = step(problem.cell, pre[t], states[0] @ w_hh.T + b_hh, states)
                states = tuple(torch.where(real[:, t, None], h, old) for h, old in zip(new, states, strict=True))
                steps[t] = states[0]
            ways.append(torch.stack([steps[t] for t in range(T)], 1))
            last.append(states)
        x = torch.cat(ways, 2)
    results = [x, *(torch.stack(parts) for parts in zip(*last, strict=True))]
    if training:
        torch.autograd.backward(results, [torch.from_numpy(d).double() for d in (data.d_output, *data.d_states)])
    output, *states_n = (r.detach().numpy() for r in results)
    grads = {name: w.grad.numpy() for name, w in weights.items() if w.grad is not None}
    return Result(output, tuple(states_n), grads if training else None)


def step(cell: str, a: Tensor, g: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Computes the next states from a = W_ih x + b_ih and g = W_hh h + b_hh."""
    h = states[0]
    if cell == "gru":
        (a_r, a_z, a_n), (g_r, g_z, g_n) = a.chunk(3, 1), g.chunk(3, 1)
        r, z = torch.sigmoid(a_r + g_r), torch.sigmoid(a_z + g_z)
        n = torch.tanh(a_n + r * g_n)
        return ((1 - z) * n + z * h,)
    if cell == "lstm":
        i, f, g, o = (a + g).chunk(4, 1)
        c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    return (torch.relu(a + g) if cell == "rnn-relu" else torch.tanh(a + g),)


def prove() -> None:
    """Checks on a small problem that the oracle gives what torch's layers give for each sequence alone."""
    for cell in CELLS:
        problem = Problem(cell, Shape(5, 6, 3, 4, 2, True))
        if wrong := faults(problem, oracle(problem, True), alone(problem), 1e-12):
            raise AssertionError(f"the oracle of {cell} is not what each sequence alone gives: {'; '.join(wrong)}")


def alone(problem: Problem) -> Result:
    """Runs torch's own layer on one sequence after the other, in float64."""
    data, shape = problem.data(), problem.shape
    layer = LAYERS[problem.cell](shape.I, shape.H, shape.L, bidirectional=shape.bidirectional, dtype=torch.float64)
    layer.load_state_dict({name: torch.from_numpy(w) for name, w in data.weights.items()})
    output = np.zeros((shape.N, shape.T, shape.D * shape.H))
    states = tuple(np.zeros((shape.L * shape.D, shape.N, shape.H)) for _ in data.d_states)
    for row, n in enumerate(data.lengths):
        out, last = layer(torch.from_numpy(data.input[row, :n]).double())
        last = last if isinstance(last, tuple) else (last,)
        cotangents = (data.d_output[row, :n], *(d[:, row] for d in data.d_states))
        torch.autograd.backward((out, *last), [torch.from_numpy(d).double() for d in cotangents])
        output[row, :n] = out.detach().numpy()
        for state, h in zip(states, last, strict=True):
            state[:, row] = h.detach().numpy()
    grads = {name: p.grad.numpy() for name, p in layer.named_parameters() if p.grad is not None}
    return Result(output, states, grads)


def faults(problem: Problem, result: Result, truth: Result, tolerance: float) -> list[str]:
    """Returns what is wrong with a result, in words. Outputs are compared at real steps only."""
    if len(result.states) != len(truth.states):
        return [f"{len(result.states)} last states instead of {len(truth.states)}"]
    real = np.arange(problem.shape.T) < problem.lengths()[:, None]
    pairs = {"the output": (result.output[real], truth.output[real])}
    for name, ours, true in zip(("h_n", "c_n"), result.states, truth.states, strict=False):
        pairs[name] = (ours, true)
    if result.grads is not None and truth.grads is not None:
        missing = [name for name in truth.grads if name.startswith("weight") and name not in result.grads]
        if missing:
            return [f"no gradient of {', '.join(missing)}"]
        pairs |= {f"the gradient of {name}": (g, truth.grads[name]) for name, g in result.grads.items()}
    return [words for name, (ours, true) in pairs.items() if (words := _fault(name, ours, true, tolerance))]


def _fault(name: str, ours: Array, true: Array, tolerance: float) -> str:
    if ours.shape != true.shape:
        return f"{name} has shape {ours.shape}, not {true.shape}"
    error = float(
        np.abs(ours - true).max() / (np.abs(true).max() or 1)
    )  # after one step from a zero state, W_hh has a gradient of 0
    return "" if error <= tolerance else f"{name} is off by {error:.1e} of its largest value"
