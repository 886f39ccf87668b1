"""The works `short` and `regions`: groups of cases beside the suite's shapes, each against what the layer replaces.

short: few steps, one sequence, small layers. regions: large layers, half precision, many rows, one longer sequence,
compiled layers. `print_groups` in report.py prints a table for each group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from .contenders import COMPILED, FLAX, ONNXRUNTIME, OURS, PACKING, PADDED, Contender
from .problem import Problem, Shape
from .suite import Suite


class Case(NamedTuple):
    group: str
    problem: Problem
    against: tuple[Contender, ...]
    works: tuple[str, ...] = ("inference", "training")


WITHOUT, WITH = "without lengths", "with lengths"
ONE_STEP = [Shape(N, 1, H, H) for H, N in product((16, 64), (1, 8, 32))]
FEW_STEPS = [Shape(N, T, H, H) for H, N, T in product((16, 64), (1, 8, 32), (2, 3, 5, 8, 16))]
SMALL = [Shape(4, 6, 32, 32), Shape(8, 4, 32, 32), Shape(32, 2, 32, 32)]
ALONE = [Shape(1, T, H, H) for H, T in product((16, 64), (30, 50))]
LARGE = [
    *(Shape(N, T, 512, 512) for N, T in ((16, 50), (32, 20), (64, 10), (128, 50))),
    *(Shape(N, T, 1024, 1024) for N, T in ((16, 20), (32, 5), (64, 10), (128, 5))),
    *(Shape(N, T, 2048, 2048) for N, T in ((16, 5), (16, 20), (64, 5))),
]
HALF = [Shape(8, 50, 64, 64), Shape(32, 20, 128, 128), Shape(64, 10, 512, 512)]
MANY_ROWS = {
    "gru": [Shape(4096, 5, 32, 32)],
    "lstm": [Shape(4096, 10, 8, 8), Shape(4096, 5, 32, 32)],
    "rnn": [Shape(4096, 5, 32, 32), Shape(1024, 20, 32, 32)],
}
LONGER = Shape(1, 100, 128, 128)


def short_cases(cell: str) -> Iterator[Case]:
    for group, shapes in (("one step", ONE_STEP), ("few steps", FEW_STEPS), ("one sequence", ALONE), ("small", SMALL)):
        for shape in shapes:
            yield Case(f"{group}, {WITHOUT}", Problem(cell, shape, full=True), (PADDED,))
            yield Case(f"{group}, {WITH}", Problem(cell, shape, listed=True), (PACKING,))
    for shape in ONE_STEP:
        problem = Problem(cell, shape, full=True, acting=True)
        yield Case("one acting step with resets", problem, (PADDED,), ("inference",))


def region_cases(cell: str) -> Iterator[Case]:
    for shape in LARGE:
        yield Case(f"large layers, {WITHOUT}", Problem(cell, shape, full=True), (PADDED,))
    for dtype, shape in product(("bfloat16", "float16"), HALF):
        yield Case(f"{dtype}, {WITHOUT}", Problem(cell, shape, full=True, dtype=dtype), (PADDED,))
        yield Case(f"{dtype}, {WITH}", Problem(cell, shape, dtype=dtype), (PACKING,))
    for name, shape in product((cell, "rnn-relu") if cell == "rnn" else (cell,), MANY_ROWS[cell]):
        yield Case(f"many rows, {WITHOUT}", Problem(name, shape, full=True), (PADDED,))
    yield Case("a sequence of 100 steps", Problem(cell, LONGER), (PADDED, PACKING, ONNXRUNTIME, FLAX))
    yield Case("compiled layers", Problem(cell, Shape(4, 6, 32, 32)), (COMPILED,))


CASES = {"short": short_cases, "regions": region_cases}


def run_cases(suite: Suite, cell: str, work: str) -> None:
    """Runs the cases of a work. Each row gets the group of its case."""
    for case in list(CASES[work](cell))[:: suite.plan.every]:
        done = len(suite.rows)
        suite.race("", suite.contenders(cell, (OURS, *case.against)), case.problem, case.works)
        suite.rows[done:] = [replace(row, group=case.group) for row in suite.rows[done:]]
