"""Compares masked_rnn with torch.nn on numbers below 1e-38, which many CPUs compute tens of times as slowly.

`python -m benchmarks.denormals` prints, for each cell, how many times as long a training step (forward, backward of the
output) takes on input, states and gradients of 1e-40 as on ordinary ones. If a loop is slowed down by them, the number
is above ten.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import masked_rnn

from .__main__ import load, processor
from .contenders import version_of
from .measure import Times, ratio
from .report import print_table

STEPS, BATCH, WIDTH = 40, 16, 32
TINY = 1e-40
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
    "lstm-proj": ("LSTM", {"proj_size": WIDTH // 2}),
    "rnn-tanh": ("RNN", {}),
    "rnn-relu": ("RNN", {"nonlinearity": "relu"}),
}
BACKENDS = ("packed", "padded", "bptt", "scan")


def train(layer: nn.Module, x: Tensor) -> None:
    output, _ = layer(x)
    output.backward(x[..., : output.size(-1)])


def slower_by(work: Callable[[Tensor], None], rounds: int) -> float:
    """Returns how many times as long the work takes on tiny numbers as on ordinary ones. The two take turns."""
    ordinary = torch.rand(STEPS, BATCH, WIDTH)
    inputs = (ordinary, ordinary * TINY)
    times: tuple[Times, Times] = ({}, {})
    for k in range(-1, rounds):  # the first is a warm-up
        for x, seconds in zip(inputs, times, strict=True):
            start = time.perf_counter()
            work(x)
            if k >= 0:
                seconds[k] = time.perf_counter() - start
    return ratio(*times)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.denormals", description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="one round: whether everything runs")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    busy, rounds = load(), 1 if arguments.quick else arguments.rounds

    sizes = f"T={STEPS}, N={BATCH}, I=H={WIDTH}, float32"
    print(f"{sizes}: times as long on numbers of {TINY} as on ordinary ones\n")
    table = [["cell", "torch.nn", *BACKENDS]]
    for cell, (name, options) in CELLS.items():
        layers = [getattr(nn, name)(WIDTH, WIDTH, bias=False, **options)]
        ours = getattr(masked_rnn, f"Masked{name}")
        layers += [ours(WIDTH, WIDTH, bias=False, backend=backend, **options) for backend in BACKENDS]
        row = [slower_by(lambda x, layer=layer: train(layer, x), rounds) for layer in layers]  # type: ignore[misc]
        table.append([cell, *(f"{times:.2f}" for times in row)])
    print_table(table)
    print(f"\n{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}; load before {busy:.1f}")
    print(f"torch {version_of('torch')}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
