"""The parts that every work needs: the choice of contenders, their check, the timing in turns, and the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median, quantiles
from types import TracebackType
from typing import Any, Self

from .contenders import BACKENDS, CAPTURED, COMPILED, CONTENDERS, OURS, Contender
from .measure import Entry, Times, ratio, take_turns
from .problem import SHAPES, Problem, Result, Shape
from .rows import Row
from .truth import TOLERANCE, faults, oracle
from .worker import ContenderError, Worker

BY_CELL = ("growth", "memory", "peak", "one_step", "threads", "busy")
WORKS = ("training", "inference", *BY_CELL)
"""The works of the whole suite."""
REGIONS = ("short", "regions")
ON_CUDA = ("training", "inference", "growth", "one_step")
TF32 = 5e-3
"""The tolerance where products are made in TensorFloat-32, as cuDNN's are."""
STEPS = {"training": "train", "inference": "infer"}


@dataclass(frozen=True)
class Plan:
    """The works, shapes and contenders of a run, and how long it may take."""

    cells: tuple[str, ...] = ("gru", "lstm", "rnn")
    works: tuple[str, ...] = WORKS
    shapes: tuple[Shape, ...] = SHAPES
    only: tuple[str, ...] | None = None
    """Names of the contenders to compare with masked_rnn. None: all."""
    backends: bool = False
    """Also time masked_rnn with each backend forced."""
    captured: bool = False
    """Also time masked_rnn compiled, and exported to ONNX."""
    budget: float = 15.0
    """Seconds of timing for each shape and work."""
    least_rounds: int = 7
    growth: tuple[int, ...] = (250, 500, 1000, 2000, 4000)
    recipe_up_to: int = 2000
    """The longest T for the recipe: its cost is quadratic in T, and at 4000 a step takes minutes."""
    memory: int = 2000
    threads: int = 2
    device: str = "cpu"
    before: str = ""
    """The folder of another checkout, whose masked_rnn also takes part."""
    every: int = 1
    """Of the works of REGIONS, run every n-th case."""


QUICK = Plan(
    cells=("gru",),
    shapes=tuple(SHAPES[k] for k in (0, 1, 4, 6)),
    budget=2.0,
    least_rounds=3,
    growth=(250, 500),
    recipe_up_to=500,
    every=11,
)
ALONE = {
    "short": Plan(works=("short",), budget=0.4, least_rounds=15, threads=1),
    "regions": Plan(works=("regions",), budget=1.0, least_rounds=3, threads=1),
}
"""The plans of the works of REGIONS, each of which runs alone."""


@dataclass
class Suite:
    plan: Plan
    told: Callable[[str], None]
    """Reports to the progress bar what is being done."""
    advance: Callable[[], None]
    """Reports that one of `steps()` is done."""
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """The reason, by contender, and by shape if it is not left out for the whole run."""
    workers: dict[tuple[str, str], Worker] = field(default_factory=dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in self.workers.values():
            worker.close()

    def steps(self) -> int:
        works = self.plan.works
        each = len(self.plan.shapes) * (("training" in works or "inference" in works) + ("training" in works))
        return len(self.plan.cells) * (each + sum(work in works for work in (*BY_CELL, *REGIONS)))

    def contenders(self, cell: str, wanted: Sequence[Contender] = ()) -> list[Contender]:
        """Returns the contenders that can run here, of all or those wanted. The others' names go to `left_out`."""
        wanted = wanted or (*CONTENDERS, *(BACKENDS * self.plan.backends), *(CAPTURED * self.plan.captured))
        device = self.plan.device
        chosen = [c for c in wanted if c == OURS or self.plan.only is None or c.name in self.plan.only]
        if self.plan.before:
            chosen += [c.of(self.plan.before) for c in chosen if c in (OURS, COMPILED)]
        chosen = [c.on(device) for c in chosen if device in c.devices]
        for contender in chosen:
            if missing := contender.missing():
                self.left_out[contender.name] = f"not installed: {', '.join(missing)}"
        return [c for c in chosen if c.name not in self.left_out and cell in c.cells]

    def worker(self, contender: Contender) -> Worker:
        key = contender.module, contender.checkout
        worker = self.workers.get(key)
        if worker is None or not worker.process.is_alive():
            worker = self.workers[key] = Worker(self.plan.threads, self.plan.device, contender.checkout)
        return worker

    def race(self, suffix: str, contenders: Sequence[Contender], problem: Problem, works: Sequence[str]) -> None:
        """Checks contenders at one shape, and times the works of those that are right."""
        title = f"{problem.cell} {problem.shape}"
        fine = self.found_right(contenders, problem, "training" in works)
        for work in works:
            entries = [Entry(c, c.fit(problem), STEPS[work]) for c in fine if work == "inference" or c.trains]
            times = self.take_turns(entries, f"{title}: {work}{suffix}")
            ours = next(entry for entry in entries if entry.contender == OURS)
            for entry in times:
                self.add(work + suffix, entry, times[entry], times[ours])
        self.drop()

    def found_right(self, contenders: Sequence[Contender], problem: Problem, training: bool) -> list[Contender]:
        """Checks both steps of each contender against the oracle. One that fails goes to `left_out`."""
        self.told(f"{problem.cell} {problem.shape}: checking")
        fine = []
        truths: dict[Problem, Result] = {}
        for contender in contenders:
            if not contender.is_layer:
                fine.append(contender)
                continue
            checked = contender.fit(problem if contender.takes_lengths else replace(problem, full=True))
            if checked not in truths:
                truths[checked] = oracle(checked, training)
            wrong: list[str] = []
            try:
                for step in {training and contender.trains, False}:
                    found = self.worker(contender).result(contender, checked, step)
                    tolerance = TOLERANCE[problem.dtype] if self.plan.device == "cpu" else TF32
                    wrong += faults(checked, found, truths[checked], tolerance)
            except ContenderError as error:
                wrong = [str(error)]
            if contender == OURS and wrong:
                raise SystemExit(f"masked_rnn is wrong at {problem.cell} {problem.shape}: {'; '.join(wrong)}")
            if wrong:
                self.left_out[f"{contender.name}, {problem.cell} {problem.shape}"] = "; ".join(dict.fromkeys(wrong))
            else:
                fine.append(contender)
        return fine

    def take_turns(
        self,
        entries: Sequence[Entry],
        title: str,
        seconds: float | None = None,
        least_rounds: int | None = None,
        worker_of: Callable[[Contender], Any] | None = None,
    ) -> dict[Entry, Times]:
        self.told(title)
        return take_turns(
            entries,
            worker_of or self.worker,
            seconds or self.plan.budget,
            least_rounds or self.plan.least_rounds,
            self.give_up,
        )

    def give_up(self, entry: Entry, why: str) -> None:
        if entry.contender == OURS:
            raise SystemExit(f"masked_rnn failed at {entry.problem.cell} {entry.problem.shape}: {why}")
        self.left_out[f"{entry.contender.name}, {entry.problem.cell} {entry.problem.shape}, {entry.step}"] = why

    def drop(self) -> None:
        for worker in self.workers.values():
            worker.drop()

    def add(self, work: str, entry: Entry, times: Times, ours: Times) -> None:
        ms = [1e3 * seconds for seconds in times.values()]
        low, _, high = quantiles(ms, n=4) if len(ms) > 1 else (ms[0],) * 3
        self.rows.append(
            replace(
                self.row(work, entry.contender, entry.problem),
                median_ms=median(ms),
                quartile_range_ms=high - low,
                ratio_to_masked_rnn=ratio(ours, times),
                rounds=len(ms),
            )
        )

    def row(self, work: str, contender: Contender, problem: Problem) -> Row:
        return Row(
            cell=problem.cell,
            work=work,
            shape=str(problem.shape),
            **problem.shape._asdict(),
            contender=contender.name,
            threads=self.plan.threads,
            version=contender.version(),
        )
