"""Samples calls on the CPU, and prints those in which another backend is faster than `auto` by more than 5 %.

`python -m benchmarks.choice --budget 300` takes as many calls as there is time for: each cell, 1 to 300 steps, 1 to
4,096 sequences, 8 to 2,048 units, three dtypes, lengths, mask and hx, training and inference, one thread and two. The
environment chooses the kind of CPU, as docs/backends.md says. A call of `auto` and those of the backends take turns. A
loss is measured twice, and the smaller figure counts.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import masked_rnn

from .__main__ import loops
from .measure import Times, ratio
from .report import print_table

LAYERS = ("MaskedGRU", "MaskedLSTM", "MaskedRNN")
STEPS = (1, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 30, 100, 300)
BATCHES = tuple(2**k for k in range(13))
UNITS = tuple(2**k for k in range(3, 12))
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
KINDS = ("nothing", "nothing", "hx", "lengths", "lengths", "lengths, hx", "mask")
LENGTHS = ("one long", "to a quarter", "uniform", "all real")
MOST_WORK, MOST_VALUES = 7e8, 2**21
"""N·T·H² and N·T·H of the largest calls: 64×10 steps of 1024 units, 4096×16 of 32"""
BACKENDS = ("padded", "bptt", "packed")
LOSS = 1.05
ROUNDS, LEAST_ROUNDS, TURN, LONG = 9, 3, 0.004, 0.3
"""Rounds of a case, the fewest of them, seconds of a turn, and seconds after which no further round begins"""


@dataclass(frozen=True)
class Case:
    layer: str
    training: bool
    N: int
    T: int
    H: int
    dtype: torch.dtype
    given: str
    lengths: str
    threads: int

    def __str__(self) -> str:
        given = self.given.replace("lengths", f"lengths ({self.lengths})").replace("mask", f"mask ({self.lengths})")
        return f"{self.N}×{self.T} {self.H}, {str(self.dtype).removeprefix('torch.')}, {given}, {self.threads} threads"


def draw(rng: random.Random, threads: tuple[int, ...]) -> Case:
    while True:
        case = Case(
            rng.choice(LAYERS),
            rng.random() < 0.5,
            rng.choice(BATCHES),
            rng.choice(STEPS),
            rng.choice(UNITS),
            rng.choice(DTYPES),
            rng.choice(KINDS),
            rng.choice(LENGTHS),
            rng.choice(threads),
        )
        values = case.N * case.T * case.H
        if values <= MOST_VALUES and values * case.H <= MOST_WORK:
            return case


def lengths_of(kind: str, batch: int, steps: int) -> Tensor:
    if kind == "all real":
        return torch.full((batch,), steps)
    longest = {"one long": min(4, steps + 1), "to a quarter": steps // 4, "uniform": steps + 1}[kind]
    lengths = torch.randint(1, max(2, longest), (batch,), generator=torch.Generator().manual_seed(1))
    lengths[0] = steps
    return lengths


def calls_of(case: Case) -> dict[str, Callable[[], None]]:
    """Returns the calls of `auto`, and of each backend that can run the case."""
    x = torch.randn(case.T, case.N, case.H, dtype=case.dtype)
    lengths = lengths_of(case.lengths, case.N, case.T)
    more: dict[str, Any] = {}
    if "lengths" in case.given:
        more["lengths"] = lengths
    if "mask" in case.given:
        more["mask"] = torch.arange(case.T)[:, None] < lengths
    if "hx" in case.given:
        states = tuple(torch.randn(1, case.N, case.H, dtype=case.dtype) for _ in range(2))
        more["hx"] = states if case.layer == "MaskedLSTM" else states[0]
    state = getattr(masked_rnn, case.layer)(case.H, case.H).state_dict()

    def call_of(backend: str) -> Callable[[], None]:
        layer = getattr(masked_rnn, case.layer)(case.H, case.H, dtype=case.dtype, backend=backend)
        layer.load_state_dict(state)
        d_output = torch.ones_like(x)

        def call() -> None:
            with torch.set_grad_enabled(case.training):
                output, _ = layer(x, **more)
                if case.training:
                    output.backward(d_output)

        return call

    calls = {"auto": call_of("auto")}
    calls["auto"]()
    for backend in BACKENDS:
        call = call_of(backend)
        try:
            call()
        except (ValueError, RuntimeError):  # it can't run this call, or PyTorch has no such kernel
            continue
        calls[backend] = call
    return calls


def measure(calls: dict[str, Callable[[], None]]) -> dict[str, Times]:
    times: dict[str, Times] = {name: {} for name in calls}
    began = time.perf_counter()
    for k in range(ROUNDS):
        if k >= LEAST_ROUNDS and time.perf_counter() - began > LONG:
            break
        for name, call in calls.items():
            took: list[float] = []
            while not took or sum(took) < TURN:
                start = time.perf_counter()
                call()
                took.append(time.perf_counter() - start)
            times[name][k] = min(took)
    return times


def compare(case: Case) -> tuple[float, list[str]]:
    """Returns how many times as long as the fastest other backend `auto` takes, and a line of the table."""
    torch.set_num_threads(case.threads)
    calls = calls_of(case)
    found = []
    for _ in range(2):
        times = measure(calls)
        longer, won = max((1 / ratio(times["auto"], times[name]), name) for name in calls if name != "auto")
        found.append((longer, won, min(times["auto"].values()), min(times[won].values())))
        if longer <= LOSS:
            break
    longer, won, ours, theirs = min(found)
    work = "training" if case.training else "inference"
    return longer, [case.layer, work, str(case), f"{1000 * ours:.3f}", won, f"{1000 * theirs:.3f}", f"{longer:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choice", description=__doc__)
    parser.add_argument("--budget", type=float, default=120, help="seconds")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, of which each call gets one")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    threads = tuple(map(int, arguments.threads.split(",")))
    rng, end = random.Random(arguments.seed), time.monotonic() + arguments.budget
    lost, all_longer = [], []
    of_kind: Counter[tuple[str, bool]] = Counter()
    while time.monotonic() < end:
        case = draw(rng, threads)
        longer, line = compare(case)
        all_longer.append(longer)
        of_kind[line[1], longer > LOSS] += 1
        if longer > LOSS:
            lost.append((longer, line))
    lost.sort(reverse=True)
    print_table([["layer", "work", "N×T H", "auto, ms", "faster", "ms", "auto / it"], *(line for _, line in lost)])
    for work in ("inference", "training"):
        fine, bad = of_kind[work, False], of_kind[work, True]
        print(f"{work}: in {fine} of {fine + bad} calls no other backend was faster by more than 5 %")
    print(f"the worst: {max(all_longer):.2f}; torch {torch.__version__}, {arguments.threads} threads, {loops()}")


if __name__ == "__main__":
    main()
