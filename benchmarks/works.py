"""The works, each of which adds its rows to the suite's.

They are training and inference by shape; then, for each cell, growth over T, memory, the share of the machine's peak, a
call of one step, more threads, and a busy machine. regions.py has the cases of `short` and `regions`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from statistics import median
from typing import Any

from .contenders import BACKENDS, OURS, PADDED, PRODUCTS, RECIPE, Contender
from .measure import Entry
from .problem import SHAPES, Problem, Shape
from .regions import run_cases
from .suite import BY_CELL, REGIONS, STEPS, Suite
from .truth import prove
from .worker import ContenderError, Worker

ONE_STEP = tuple(Shape(N, 1, 64, 64) for N in (1, 32))
SHARED = Shape(32, 100, 128, 128)
BUSY = "beside a busy process"
PEAK_SHAPES = (SHAPES[5], SHAPES[0])
SGEMM_SIZES = (1024, 2048, 3072)


def long(T: int) -> Shape:
    return Shape(32, T, 128, 128)


def one_step(suite: Suite, cell: str) -> None:
    """Times a call of one step, as in decoding, acting or streaming, without lengths and with (all 1).

    It is compared with PyTorch's layer.
    """
    contenders = [c for c in suite.contenders(cell) if c in (OURS, PADDED)]
    for shape, with_lengths in product(ONE_STEP, (False, True)):
        suffix = " of one step" + " with lengths" * with_lengths
        suite.race(suffix, contenders, Problem(cell, shape, full=not with_lengths), ["training", "inference"])


def threads(suite: Suite, cell: str) -> None:
    """Times training on one thread, and on all."""
    problem = Problem(cell, SHARED)
    suite.found_right([OURS], problem, True)
    alone = replace(OURS, name="masked_rnn, one thread")
    with _worker(1) as single, _worker(suite.plan.threads) as many:
        single.result(alone, problem, True)
        many.result(OURS, problem, True)
        entries = [Entry(OURS, problem, "train"), Entry(alone, problem, "train")]
        times = suite.take_turns(entries, f"{cell}: threads", worker_of=lambda c: single if c == alone else many)
    for entry in times:
        suite.add("threads", entry, times[entry], times[entries[0]])
    suite.rows[-1] = replace(suite.rows[-1], threads=1)


def busy(suite: Suite, cell: str) -> None:
    """Times training on a quiet machine, and beside a process that keeps one core busy, in turns."""
    problem = Problem(cell, SHARED)
    contenders = [c for c in suite.contenders(cell) if c in (OURS, PADDED, RECIPE)]
    fine = suite.found_right(contenders, problem, True)
    beside = {replace(c, name=f"{c.name}, {BUSY}"): c for c in fine}
    entries = [Entry(c, c.fit(problem), "train") for pair in beside.items() for c in pair[::-1]]
    with _neighbour() as neighbour:

        def worker_of(contender: Contender) -> Any:
            quiet = suite.worker(contender)
            return _Beside(quiet, neighbour) if contender in beside else quiet

        times = suite.take_turns(entries, f"{cell}: {BUSY}", worker_of=worker_of)
    for entry in times:
        suite.add("busy", entry, times[entry], times[entries[0]])
    suite.drop()


def growth(suite: Suite, cell: str) -> None:
    """Times training at every T, all in turns: the slow ones twice, the others as long as there is time."""
    entries = []
    for T in suite.plan.growth:
        problem = Problem(cell, long(T))
        those = (OURS, PADDED, RECIPE) if suite.plan.recipe_up_to >= T else (OURS, PADDED)
        contenders = [c for c in suite.contenders(cell) if c in those]
        entries += [Entry(c, c.fit(problem), "train") for c in suite.found_right(contenders, problem, True)]
    times = suite.take_turns(entries, f"{cell}: growth over T", 4 * suite.plan.budget, min(2, suite.plan.least_rounds))
    ours = {entry.problem.shape: entry for entry in entries if entry.contender == OURS}
    for entry in times:
        suite.add("growth", entry, times[entry], times[ours[entry.problem.shape]])
    suite.drop()


def memory(suite: Suite, cell: str) -> None:
    """Measures how much memory one training step adds to the peak, each contender in its own process."""
    problem = Problem(cell, long(suite.plan.memory))
    peaks = {}
    for contender in suite.contenders(cell):
        if contender not in (OURS, PADDED):
            continue
        suite.told(f"{cell}: memory of {contender.name} at T={suite.plan.memory}")
        worker = Worker(suite.plan.threads)
        try:
            peaks[contender] = worker.memory(contender, problem, replace(problem, shape=long(10)))
        except ContenderError as error:
            suite.left_out[f"{contender.name}, memory"] = str(error)
        finally:
            worker.close()
    for contender, peak in peaks.items() if OURS in peaks else ():
        row = suite.row("memory", contender, problem)
        suite.rows.append(replace(row, peak_mib=peak, ratio_to_masked_rnn=peak / peaks[OURS]))


def peak(suite: Suite, cell: str) -> None:
    """Measures products a second in training, and the most that this machine reaches in a plain product."""
    problems = [Problem(cell, shape) for shape in PEAK_SHAPES]
    for problem in problems:
        suite.found_right([OURS], problem, True)
    training = [Entry(OURS, problem, "train") for problem in problems]
    sgemm = {
        Entry(Contender(f"sgemm {n}", PRODUCTS.module, "Sgemm", PRODUCTS.needs, {"n": n}), problems[0], "infer"): n
        for n in SGEMM_SIZES
    }
    times = suite.take_turns([*training, *sgemm], f"{cell}: share of the sgemm peak")
    for entry in training:
        suite.add("peak", entry, times[entry], times[entry])
        suite.rows[-1] = replace(
            suite.rows[-1], gflops=entry.problem.flops("train") / median(times[entry].values()) / 1e9
        )
    for entry, n in sgemm.items():
        if entry not in times:
            continue
        row = suite.row("peak", entry.contender, problems[0])
        blank = replace(row, shape=f"{n}×{n}×{n}", N=None, T=None, I=None, H=None, L=None, bidirectional=None)
        best = 2 * n**3 / min(times[entry].values()) / 1e9
        suite.rows.append(
            replace(blank, median_ms=1e3 * median(times[entry].values()), rounds=len(times[entry]), gflops=best)
        )
    suite.drop()


class _Beside:
    """A worker whose turns run beside a process that keeps a core busy, the neighbour."""

    def __init__(self, worker: Worker, neighbour: int) -> None:
        self.worker, self.neighbour = worker, neighbour

    def turn(self, contender: Contender, problem: Problem, step: str, seconds: float) -> list[float]:
        os.kill(self.neighbour, signal.SIGCONT)
        time.sleep(0.02)
        try:
            took: list[float] = self.worker.turn(contender, problem, step, 3 * seconds)
        finally:
            os.kill(self.neighbour, signal.SIGSTOP)
        return took


@contextmanager
def _neighbour() -> Iterator[int]:
    """Starts the process that keeps a core busy. It is stopped except during turns."""
    process = get_context("spawn").Process(target=_keep_busy, daemon=True)
    process.start()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield process.pid
    finally:
        process.kill()


def _keep_busy() -> None:
    while True:
        sum(range(10_000))


@contextmanager
def _worker(threads: int) -> Iterator[Worker]:
    worker = Worker(threads)
    try:
        yield worker
    finally:
        worker.close()


RUN: dict[str, Callable[[Suite, str], None]] = {
    "growth": growth,
    "memory": memory,
    "peak": peak,
    "one_step": one_step,
    "threads": threads,
    "busy": busy,
    **{work: partial(run_cases, work=work) for work in REGIONS},
}


def run(suite: Suite) -> None:
    """Runs the works of a plan, cell by cell."""
    prove()
    works = [work for work in STEPS if work in suite.plan.works]
    for cell in suite.plan.cells:
        for shape in suite.plan.shapes:
            if works:
                suite.race("", suite.contenders(cell), Problem(cell, shape), works)
                suite.advance()
            if "training" in works:
                others = [c for c in suite.contenders(cell) if c in (OURS, PADDED, PRODUCTS, *BACKENDS)]
                suite.race(" without lengths", others, Problem(cell, shape, full=True), ["training"])
                suite.advance()
        for work in (*BY_CELL, *REGIONS):
            if work in suite.plan.works:
                RUN[work](suite, cell)
                suite.advance()
