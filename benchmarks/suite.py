"""The works: training, inference, growth, memory and peak, each of which adds its rows; the others are in `sharing`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median, quantiles
from types import TracebackType
from typing import Any, Self

from . import sharing
from .contenders import BACKENDS, CAPTURED, CONTENDERS, OURS, PADDED, PRODUCTS, RECIPE, Contender
from .measure import Entry, Times, ratio, take_turns
from .problem import SHAPES, Problem, Result, Shape
from .rows import Row
from .truth import TOLERANCE, faults, oracle, prove
from .worker import ContenderError, Worker

BY_CELL = ("growth", "memory", "peak", "one_step", "threads", "busy")
WORKS = ("training", "inference", *BY_CELL)
ON_CUDA = ("training", "inference", "growth", "one_step")
TF32 = 5e-3
"""What an output may be off by where products are made in TensorFloat-32, as cuDNN's are."""
STEPS = {"training": "train", "inference": "infer"}
PEAK_SHAPES = (SHAPES[5], SHAPES[0])
SGEMM_SIZES = (1024, 2048, 3072)


def long(T: int) -> Shape:
    return Shape(32, T, 128, 128)


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    cells: tuple[str, ...] = ("gru", "lstm", "rnn")
    works: tuple[str, ...] = WORKS
    shapes: tuple[Shape, ...] = SHAPES
    only: tuple[str, ...] | None = None
    """Names of the contenders that masked_rnn meets; None: all."""
    backends: bool = False
    """Also time masked_rnn with each backend forced."""
    captured: bool = False
    """Also time masked_rnn compiled, and exported to ONNX."""
    budget: float = 15.0
    """Seconds of timing for each shape and work."""
    least_rounds: int = 7
    growth: tuple[int, ...] = (250, 500, 1000, 2000, 4000)
    recipe_up_to: int = 2000
    """The recipe's cost is quadratic in T: at 4000 a step takes minutes."""
    memory: int = 2000
    threads: int = 2
    device: str = "cpu"


QUICK = Plan(
    cells=("gru",),
    shapes=tuple(SHAPES[k] for k in (0, 1, 4, 6)),
    budget=2.0,
    least_rounds=3,
    growth=(250, 500),
    recipe_up_to=500,
)


@dataclass
class Suite:
    plan: Plan
    told: Callable[[str], None]
    """What is being done, for the progress bar."""
    advance: Callable[[], None]
    """One of `steps()` is done."""
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Why, by contender and, where it is not for the whole run, by shape."""
    workers: dict[str, Worker] = field(default_factory=dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in self.workers.values():
            worker.close()

    def steps(self) -> int:
        works = self.plan.works
        each = len(self.plan.shapes) * (("training" in works or "inference" in works) + ("training" in works))
        return len(self.plan.cells) * (each + sum(work in works for work in BY_CELL))

    def run(self) -> None:
        prove()
        works = [work for work in STEPS if work in self.plan.works]
        for cell in self.plan.cells:
            for shape in self.plan.shapes:
                if works:
                    self.race("", self.contenders(cell), Problem(cell, shape), works)
                    self.advance()
                if "training" in works:
                    others = [c for c in self.contenders(cell) if c in (OURS, PADDED, PRODUCTS, *BACKENDS)]
                    self.race(" without lengths", others, Problem(cell, shape, full=True), ["training"])
                    self.advance()
            for work in BY_CELL:
                if work in self.plan.works:
                    run = getattr(sharing, work, None)
                    run(self, cell) if run else getattr(self, work)(cell)
                    self.advance()

    def contenders(self, cell: str) -> list[Contender]:
        """Those that can run here; the others are left out by name."""
        wanted = (*CONTENDERS, *(BACKENDS * self.plan.backends), *(CAPTURED * self.plan.captured))
        device = self.plan.device
        chosen = [c for c in wanted if c == OURS or self.plan.only is None or c.name in self.plan.only]
        chosen = [c.on(device) for c in chosen if device in c.devices]
        for contender in chosen:
            if missing := contender.missing():
                self.left_out[contender.name] = f"not installed: {', '.join(missing)}"
        return [c for c in chosen if c.name not in self.left_out and cell in c.cells]

    def worker(self, contender: Contender) -> Worker:
        worker = self.workers.get(contender.module)
        if worker is None or not worker.process.is_alive():
            worker = self.workers[contender.module] = Worker(self.plan.threads, self.plan.device)
        return worker

    def race(self, suffix: str, contenders: Sequence[Contender], problem: Problem, works: Sequence[str]) -> None:
        """The works of one shape, by contenders that were found right."""
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
        """Checks both steps of each against the oracle; a contender that fails is left out, and named."""
        fine = []
        truths: dict[Problem, Result] = {}
        for contender in contenders:
            if not contender.is_layer:
                fine.append(contender)
                continue
            self.told(f"{problem.cell} {problem.shape}: checking {contender.name}")
            checked = contender.fit(problem if contender.takes_lengths else replace(problem, full=True))
            if checked not in truths:
                truths[checked] = oracle(checked, training)
            wrong: list[str] = []
            try:
                for step in {training and contender.trains, False}:
                    found = self.worker(contender).result(contender, checked, step)
                    wrong += faults(checked, found, truths[checked], TOLERANCE if self.plan.device == "cpu" else TF32)
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
        return take_turns(
            entries,
            worker_of or self.worker,
            seconds or self.plan.budget,
            least_rounds or self.plan.least_rounds,
            lambda words: self.told(f"{title}, {words}"),
            self.give_up,
        )

    def give_up(self, entry: Entry, why: str) -> None:
        if entry.contender == OURS:
            raise SystemExit(f"masked_rnn failed at {entry.problem.cell} {entry.problem.shape}: {why}")
        self.left_out[f"{entry.contender.name}, {entry.problem.cell} {entry.problem.shape}, {entry.step}"] = why

    def growth(self, cell: str) -> None:
        """Training over T, every T in one interleaving: the slow ones twice, the others as long as there is time."""
        entries = []
        for T in self.plan.growth:
            problem = Problem(cell, long(T))
            those = (OURS, PADDED, RECIPE) if self.plan.recipe_up_to >= T else (OURS, PADDED)
            contenders = [c for c in self.contenders(cell) if c in those]
            entries += [Entry(c, c.fit(problem), "train") for c in self.found_right(contenders, problem, True)]
        times = self.take_turns(entries, f"{cell}: growth over T", 4 * self.plan.budget, min(2, self.plan.least_rounds))
        ours = {entry.problem.shape: entry for entry in entries if entry.contender == OURS}
        for entry in times:
            self.add("growth", entry, times[entry], times[ours[entry.problem.shape]])
        self.drop()

    def memory(self, cell: str) -> None:
        """The peak that one training step adds, each in a process of its own."""
        problem = Problem(cell, long(self.plan.memory))
        peaks = {}
        for contender in self.contenders(cell):
            if contender not in (OURS, PADDED):
                continue
            self.told(f"{cell}: memory of {contender.name} at T={self.plan.memory}")
            worker = Worker(self.plan.threads)
            try:
                peaks[contender] = worker.memory(contender, problem, replace(problem, shape=long(10)))
            except ContenderError as error:
                self.left_out[f"{contender.name}, memory"] = str(error)
            finally:
                worker.close()
        for contender, peak in peaks.items() if OURS in peaks else ():
            row = self.row("memory", contender, problem)
            self.rows.append(replace(row, peak_mib=peak, ratio_to_masked_rnn=peak / peaks[OURS]))

    def peak(self, cell: str) -> None:
        """Products a second in training, and the most that this machine does in a plain product."""
        problems = [Problem(cell, shape) for shape in PEAK_SHAPES]
        for problem in problems:
            self.found_right([OURS], problem, True)
        training = [Entry(OURS, problem, "train") for problem in problems]
        sgemm = {
            Entry(Contender(f"sgemm {n}", PRODUCTS.module, "Sgemm", PRODUCTS.needs, {"n": n}), problems[0], "infer"): n
            for n in SGEMM_SIZES
        }
        times = self.take_turns([*training, *sgemm], f"{cell}: share of the sgemm peak")
        for entry in training:
            self.add("peak", entry, times[entry], times[entry])
            self.rows[-1] = replace(
                self.rows[-1], gflops=entry.problem.flops("train") / median(times[entry].values()) / 1e9
            )
        for entry, n in sgemm.items():
            if entry not in times:
                continue
            row = self.row("peak", entry.contender, problems[0])
            blank = replace(row, shape=f"{n}×{n}×{n}", N=None, T=None, I=None, H=None, L=None, bidirectional=None)
            best = 2 * n**3 / min(times[entry].values()) / 1e9
            self.rows.append(
                replace(blank, median_ms=1e3 * median(times[entry].values()), rounds=len(times[entry]), gflops=best)
            )
        self.drop()

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
