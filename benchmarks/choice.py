"""Times `padded` and `bptt`, between which `auto` chooses on the CPU, on batches with more and less padding.

`python -m benchmarks.choice` prints the times for each shape, measured in one process, the backend that `auto` takes,
and how much slower it is if it is not the faster one. The rule is `kernel_is_faster` in
masked_rnn/_backends/kernels.py; docs/backends.md explains it.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

import masked_rnn
from masked_rnn._call import open_call
from masked_rnn._dispatch import choose

from .__main__ import loops
from .report import print_table

SHAPES = ((512, 300, 4), (128, 200, 4), (64, 200, 8), (128, 200, 16), (32, 100, 16), (64, 100, 64), (16, 100, 128))
SMALL = ((1, 12, 64), (1, 100, 32), (1, 300, 64), (2, 16, 64), (4, 12, 64), (4, 100, 32), (8, 300, 16))
"""N, T, H. The input size I is H."""
ROUNDS = 7


def lengths_of(kind: str, batch: int, steps: int) -> Tensor:
    if kind == "all real":
        return torch.full((batch,), steps)
    longest = {"one long": 4, "to a quarter": steps // 4, "uniform": steps + 1}[kind]
    lengths = torch.randint(1, longest, (batch,), generator=torch.Generator().manual_seed(1))
    lengths[0] = steps
    return lengths


def compare(name: str, learns: bool, kind: str, batch: int, steps: int, hidden: int) -> list[str]:
    make = getattr(masked_rnn, name)
    layers = {backend: make(hidden, hidden, backend=backend) for backend in ("padded", "bptt", "auto")}
    x, lengths = torch.randn(steps, batch, hidden), lengths_of(kind, batch, steps)

    def run(layer: Any) -> None:
        with torch.set_grad_enabled(learns):
            output, _ = layer(x, lengths=lengths)
            if learns:
                output.sum().backward()

    with torch.set_grad_enabled(learns):
        chosen = choose(open_call(layers["auto"], x, None, lengths, None, None))
    contenders = {backend: layers[backend] for backend in ("padded", "bptt")}
    for layer in contenders.values():
        run(layer)
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(ROUNDS):
        for backend, layer in contenders.items():
            start = time.perf_counter()
            run(layer)
            best[backend] = min(best[backend], time.perf_counter() - start)
    won = min(best, key=best.__getitem__)
    work = "training" if learns else "inference"
    real = f"{lengths.sum().item() / (batch * steps):.0%}"
    longer = best[chosen] / best[won]
    lost = f"{longer:.2f}× slower" if longer > 1.1 else ""
    times = [f"{1000 * seconds:.2f}" for seconds in best.values()]
    return [name, work, f"{batch}×{steps} {hidden}", kind, real, *times, chosen, lost]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choice", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    table = [["layer", "work", "N×T H", "lengths", "real", "padded, ms", "bptt, ms", "auto takes", "which is"]]
    for name, learns in (("MaskedLSTM", False), ("MaskedLSTM", True), ("MaskedGRU", False), ("MaskedRNN", False)):
        for kind in ("one long", "to a quarter", "uniform", "all real"):
            table += [compare(name, learns, kind, *shape) for shape in SHAPES + SMALL]
    print_table(table)
    right = sum(not line[-1] for line in table[1:])
    print(f"{right} of {len(table) - 1} choices took at most a tenth longer than the faster one")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {loops()}")


if __name__ == "__main__":
    main()
