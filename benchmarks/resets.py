"""Compares masked_rnn with loops written by hand and TorchRL on resets within rows, as in reinforcement learning.

`python -m benchmarks.resets` prints how many times as long as `MaskedGRU(...)(x, hx, resets=resets)` each of them takes
in training (forward, backward of the output under a fixed random cotangent, every parameter's gradient) and inference.
A contender whose output or gradients differ from ours is printed as wrong, and is not timed.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from masked_rnn import MaskedGRU

from .__main__ import card, load, loops, processor
from .contenders import version_of
from .measure import MOST_ROUNDS, Times, ratio
from .report import print_table

BATCH, STEPS, QUICK_STEPS, WIDTH = 16, 2048, 128, 128
EPISODE = 60
"""Steps, on average."""
LEAST_PAIRS = 3
TOLERANCE = 1e-4


class Task(NamedTuple):
    x: Tensor
    hx: Tensor
    """(1, N, H)"""
    resets: Tensor
    cotangent: Tensor


class Contender(NamedTuple):
    layer: nn.Module
    forward: Callable[[], Tensor]
    """The output (N, T, H)."""

    def run(self, cotangent: Tensor, learns: bool) -> tuple[Tensor, ...]:
        """Returns the output; in training also the gradients of w_ih, w_hh, b_ih and b_hh."""
        with torch.set_grad_enabled(learns):
            output = self.forward()
        gradients = torch.autograd.grad(output, list(self.layer.parameters()), cotangent) if learns else ()
        if output.is_cuda:
            torch.cuda.synchronize()
        return output.detach(), *gradients


def draw(steps: int, device: str) -> Task:
    torch.manual_seed(1)
    resets = torch.rand(BATCH, steps) < 1 / EPISODE
    resets[0, 0] = True  # so that an initial state is dropped, too
    x, cotangent = torch.randn(2, BATCH, steps, WIDTH)
    return Task(*(t.to(device) for t in (x, torch.randn(1, BATCH, WIDTH), resets, cotangent)))


def masked(task: Task) -> Contender:
    layer = MaskedGRU(WIDTH, WIDTH, batch_first=True, device=task.x.device)
    return Contender(layer, lambda: layer(task.x, task.hx, resets=task.resets)[0])


def loop_cell(task: Task) -> Contender:
    cell, keep = nn.GRUCell(WIDTH, WIDTH, device=task.x.device), 1 - task.resets.float()

    def forward() -> Tensor:
        h, outputs = task.hx[0], []
        for t in range(task.x.size(1)):
            h = cell(task.x[:, t], h * keep[:, t].unsqueeze(1))
            outputs.append(h)
        return torch.stack(outputs, 1)

    return Contender(cell, forward)


def loop_gru(task: Task) -> Contender:
    """Runs nn.GRU one step at a time, as CleanRL and sb3-contrib run nn.LSTM."""
    layer, keep = nn.GRU(WIDTH, WIDTH, batch_first=True, device=task.x.device), 1 - task.resets.float()

    def forward() -> Tensor:
        h, outputs = task.hx, []
        for t in range(task.x.size(1)):
            output, h = layer(task.x[:, t : t + 1], h * keep[:, t].view(1, -1, 1))
            outputs.append(output)
        return torch.cat(outputs, 1)

    return Contender(layer, forward)


def torchrl(task: Task, backend: str = "pad") -> Contender:
    """Runs TorchRL's GRUModule.

    Its default backend `pad` cuts rows at resets, pads the pieces and packs them for nn.GRU. `scan` runs step by step.
    """
    from tensordict import TensorDict
    from torchrl.modules import GRUModule, set_recurrent_mode

    keys = {"in_keys": ["x", "state"], "out_keys": ["output", ("next", "state")]}
    module = GRUModule(WIDTH, WIDTH, recurrent_backend=backend, device=task.x.device, **keys)
    # A rollout has a state for each step. The module reads those at the beginning of pieces.
    states = torch.zeros(*task.resets.shape, 1, WIDTH, device=task.x.device)
    states[:, 0, 0] = task.hx[0] * ~task.resets[:, :1]

    def forward() -> Tensor:
        steps = {"x": task.x, "state": states, "is_init": task.resets.unsqueeze(-1)}
        with set_recurrent_mode(True):
            output: Tensor = module(TensorDict(steps, task.resets.shape))["output"]
        return output

    return Contender(module, forward)


OTHERS: dict[str, Callable[[Task], Contender]] = {
    "loop-cell": loop_cell,
    "loop-gru": loop_gru,
    "torchrl": torchrl,
    "torchrl-scan": partial(torchrl, backend="scan"),
}


def compare(ours: Contender, other: Contender, cotangent: Tensor, learns: bool, budget: float) -> tuple[str, Times]:
    """Returns how many times as long as ours the other takes, or by how much it is wrong; and our seconds.

    They take turns until the budget is spent. Without a budget, each has one turn. The check is their warm-up.
    """
    found, expected = other.run(cotangent, learns), ours.run(cotangent, learns)
    # Gradients are sums over all steps, so their errors are relative to the largest value, if that is above 1.
    scales = [1.0, *(max(1.0, g.abs().max().item()) for g in expected[1:])]
    apart = [((a - b).abs().max() / scale).item() for a, b, scale in zip(found, expected, scales, strict=True)]
    if not all(d <= TOLERANCE for d in apart):
        return f"wrong, by {max(apart):.2g}", {}
    mine: Times = {}
    theirs: Times = {}
    for k in range(MOST_ROUNDS):
        for contender, times in ((ours, mine), (other, theirs)):
            start = time.perf_counter()
            contender.run(cotangent, learns)
            times[k] = time.perf_counter() - start
        if not budget or (k + 1 >= LEAST_PAIRS and sum(mine.values()) + sum(theirs.values()) > budget):
            break
    return f"{ratio(mine, theirs):.2f}", mine


def main() -> None:
    def some(text: str) -> list[str]:
        if unknown := set(text.split(",")) - OTHERS.keys():
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: expected some of {','.join(OTHERS)}")
        return text.split(",")

    parser = argparse.ArgumentParser(prog="python -m benchmarks.resets", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"T={QUICK_STEPS} and one pair: whether everything runs")
    parser.add_argument("--budget", type=float, default=20, help="seconds of timing for each contender and work")
    parser.add_argument("--against", type=some, default=list(OTHERS), metavar="A,B", help=f"of {','.join(OTHERS)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    busy = load()

    torch.backends.cudnn.allow_tf32 = False  # else its rounding would count as a wrong result
    task = draw(QUICK_STEPS if arguments.quick else STEPS, arguments.device)
    ours = masked(task)
    seconds: dict[str, list[float]] = {"training": [], "inference": []}
    cells: dict[tuple[str, str], str] = {}
    left_out = []
    for name in arguments.against:
        try:
            other = OTHERS[name](task)
            for own, weight in zip(other.layer.parameters(), ours.layer.parameters(), strict=True):
                own.data.copy_(weight)
            for work in seconds:
                budget = 0 if arguments.quick else arguments.budget
                cells[work, name], mine = compare(ours, other, task.cotangent, work == "training", budget)
                seconds[work] += mine.values()
        except Exception as error:  # a package that does not fit this torch may raise anything
            if not name.startswith("torchrl"):
                raise
            left_out.append(f"left out: {name} ({type(error).__name__}: {error})")

    sizes = f"N={BATCH}, T={task.resets.size(1)}, I=H={WIDTH}, float32, {int(task.resets.sum())} resets"
    print(f"GRU, {sizes}: milliseconds of masked_rnn, and how many times as long the others take\n")
    table = [["work", "masked_rnn, ms", *arguments.against]]
    for work, all_mine in seconds.items():
        ratios = [cells.get((work, name), "–") for name in arguments.against]
        table.append([work, f"{1000 * median(all_mine):.4g}" if all_mine else "–", *ratios])
    print_table(table)
    print("", *left_out, sep="\n")
    print(f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}; load before {busy:.1f}")
    if arguments.device == "cuda":
        print(card())
    versions = ", ".join(f"{package} {version_of(package)}" for package in ("torch", "torchrl"))
    print(f"masked_rnn with {loops()}, {versions}, {torch.get_num_threads()} threads")
    if any(text.startswith("wrong") for (_, name), text in cells.items() if name.startswith("loop")):
        raise SystemExit("a loop over torch.nn's own cell disagrees with masked_rnn")


if __name__ == "__main__":
    main()
