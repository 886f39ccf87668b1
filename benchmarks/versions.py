"""Times this checkout's CPU layers and those of another one, in turns, to show how much faster a change made them.

    git worktree add ../before 7380e2d  # 1.6.0
    python -m benchmarks.versions --other ../before

Each checkout runs in its own process, which is stopped while the other works. A figure is the median over the rounds of
(the other's time / ours). After it come the products that each side makes a second, over the whole call, as a share of
those of torch.mm. If the other's share is near 100 %, there is little to gain.
"""

from __future__ import annotations

import argparse
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from itertools import product
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from .problem import CELLS, SHAPES, Problem, Shape

SGEMM = 2048
"""The size of the square matrices that torch.mm multiplies for comparison."""
HERE = Path(__file__).resolve().parent.parent


class Checkout:
    """A process that imports `masked_rnn` from a folder and times its layers."""

    def __init__(self, folder: Path, threads: int, environment: dict[str, str]) -> None:
        code = f"import sys; sys.path.insert(0, {str(folder)!r}); import masked_rnn; "
        code += f"sys.path[0] = {str(HERE)!r}; from benchmarks.versions import serve; serve({threads})"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), **environment},
        )

    def ask(self, *question: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        os.kill(self.process.pid, signal.SIGCONT)
        pickle.dump(question, self.process.stdin)
        self.process.stdin.flush()
        answer = pickle.load(self.process.stdout)
        os.kill(self.process.pid, signal.SIGSTOP)
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def serve(threads: int) -> None:
    """Runs in a checkout's process. A question is a cell, a shape, whether every length is T, a step, and seconds."""
    import torch

    from .contenders.bare_products import Sgemm
    from .contenders.torch_layers import Masked

    torch.set_num_threads(threads)
    runners: dict[Any, Any] = {}
    while True:
        cell, shape, full, step, seconds = pickle.load(sys.stdin.buffer)
        problem = Problem(cell, Shape(*shape), full=full)
        if problem not in runners:
            runners.clear()
            runners[problem] = Masked(problem, threads)
        run, took = Sgemm(problem, threads, SGEMM).infer if step == "sgemm" else getattr(runners[problem], step), []
        if not seconds:
            run()  # warms up
        while not took or sum(took) < seconds:
            start = time.perf_counter()
            run()
            took.append(time.perf_counter() - start)
        pickle.dump(median(took), sys.stdout.buffer)
        sys.stdout.buffer.flush()


def shape_of(text: str) -> Shape:
    return SHAPES[int(text) - 1] if text.isdigit() else Shape(*map(int, text.split("x")))


def compare(sides: list[Checkout], problem: Problem, step: str, arguments: argparse.Namespace, title: str) -> float:
    """Prints how many times as fast the first side is at one shape, and returns it."""
    question = (problem.cell, tuple(problem.shape), problem.full, step)
    for side in sides:
        side.ask(*question, 0)
    rounds = [[side.ask(*question, arguments.seconds) for side in sides] for _ in range(arguments.rounds)]
    flop = sides[0].ask(*question[:3], "sgemm", arguments.seconds) / (2 * SGEMM**3)  # seconds for one, in torch.mm
    found, best = median(theirs / ours for ours, theirs in rounds), problem.flops(step) * flop
    ours, theirs = map(median, zip(*rounds, strict=True))
    print(
        f"{title} {problem.shape}: {found:.2f}, {1e3 * ours:.2f} ms; of torch.mm's {1e-9 / flop:.0f} GFLOP/s: "
        f"{best / theirs:.0%} there, {best / ours:.0%} here",
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.versions", description=__doc__)
    parser.add_argument("--other", type=Path, required=True, help="the other checkout")
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument(
        "--shapes", default=",".join(str(k + 1) for k in range(len(SHAPES))), help="numbers of `SHAPES`, or NxTxIxH"
    )
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--steps", default="train,infer")
    parser.add_argument("--full", action="store_true", help="no lengths: every sequence runs to its end")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.1, help="of one turn")
    parser.add_argument("--ours", default="", help="NAME=VALUE of our environment")
    parser.add_argument("--theirs", default="", help="NAME=VALUE of the other's")
    arguments = parser.parse_args()
    environments = [dict([pair.split("=", 1)] if pair else []) for pair in (arguments.ours, arguments.theirs)]
    for threads in map(int, arguments.threads.split(",")):
        with ExitStack() as stack:
            sides = [
                stack.enter_context(closing(Checkout(folder, threads, environment)))
                for folder, environment in zip((HERE, arguments.other.resolve()), environments, strict=True)
            ]
            for cell, step in product(arguments.cells.split(","), arguments.steps.split(",")):
                title, ratios = f"{threads} thread(s) {cell} {step}", []
                for shape in map(shape_of, arguments.shapes.split(",")):
                    problem = Problem(cell, shape, full=arguments.full)
                    ratios.append(compare(sides, problem, step, arguments, title))
                print(f"{title}: mean {geometric_mean(ratios):.2f}, least {min(ratios):.2f}", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that stopped checkouts end, too
    main()
