"""The works beside the shapes: a call of one step, a machine that is shared with other work, and more threads."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from .contenders import OURS, PADDED, RECIPE, Contender
from .measure import Entry
from .problem import Problem, Shape
from .worker import Worker

if TYPE_CHECKING:
    from .suite import Suite

ONE_STEP = tuple(Shape(N, 1, 64, 64) for N in (1, 32))
SHARED = Shape(32, 100, 128, 128)
BUSY = "beside a busy process"


def one_step(suite: Suite, cell: str) -> None:
    """A step, as one decodes, acts or streams, without lengths and with, all 1; against PyTorch's layer."""
    contenders = [c for c in suite.contenders(cell) if c in (OURS, PADDED)]
    for shape, with_lengths in product(ONE_STEP, (False, True)):
        suffix = " of one step" + " with lengths" * with_lengths
        suite.race(suffix, contenders, Problem(cell, shape, full=not with_lengths), ["training", "inference"])


def threads(suite: Suite, cell: str) -> None:
    """Training on one thread, and on all: how many times as fast."""
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
    """Training on a quiet machine, and beside a process that keeps one core busy, in turns."""
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


class _Beside:
    """A worker whose turns are taken beside a neighbour."""

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
    """The process that keeps a core busy, stopped until its time comes."""
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
