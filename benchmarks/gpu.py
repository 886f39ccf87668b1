"""Compares and times `backend="held"` on an NVIDIA GPU, and prints what to report.

`python -m benchmarks.gpu` asks six questions, the smallest first, prints each line as soon as it is known, and at the
end the lines of a report. It has not run on a GPU yet: `held` is tested on a simulated device only. `--only 1,3` asks
some of the questions. `--device cpu` only shows that the script runs, with `padded` in the place of `held`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import masked_rnn

ROUNDS, CALLS = 7, 10
STEPS = (100, 3000)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "GRU": ("GRU", {}),
    "LSTM": ("LSTM", {}),
    "RNN": ("RNN", {}),
    "RNN, relu": ("RNN", {"nonlinearity": "relu"}),
}
Call = Callable[[], object]
report: list[str] = []
"""The lines that are worth reporting."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", default="1,2,3,4,5,6", help="questions, such as 1,3")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    device = torch.device(arguments.device)
    note(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {where(device)}, `{' '.join(sys.argv[1:])}`")
    questions = (same_results, kernels_started, layers_in_turns, packed_or_padded, captured, tests)
    failed = False
    for number in map(int, arguments.only.split(",")):
        question = questions[number - 1]
        say(f"\n{number}. {question.__doc__}")
        failed |= question(device) is False
    say("\nPlease report, in an issue, the whole output, or at least these lines:\n")
    for line in report:
        say(f"- {line}")
    return int(failed)


def say(text: str) -> None:
    print(text, flush=True)


def note(text: str) -> None:
    """Prints a line, which is also one of the report."""
    say(text)
    report.append(text)


def where(device: torch.device) -> str:
    if device.type == "cpu":
        return "CPU"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"


def backends(device: torch.device) -> tuple[str, ...]:
    """Returns the backends that call PyTorch's kernels, last the one that is asked about."""
    return ("packed", "padded", "held") if device.type == "cuda" else ("packed", "padded")


def by(backend: str, layer: Any) -> Any:
    """Returns a copy of a layer, with the same parameters, that runs by a backend."""
    own = copy.copy(layer)
    own.backend = backend
    return own


def same_results(device: torch.device) -> bool:
    """Does held give what packed gives in float64, and in other dtypes with at most three times its error?"""
    right, asked = True, backends(device)[-1]
    torch.backends.cudnn.allow_tf32 = False
    for cell, steps, dtype in itertools.product(CELLS, STEPS, DTYPES):
        layer, x, lengths = problem(cell, (32, steps, 32, 32), device, bidirectional=True, num_layers=2)
        real = (torch.arange(steps) < lengths.unsqueeze(1)).to(device)
        x = x.double().masked_fill(~real.unsqueeze(-1), torch.nan)
        expected = results(by("packed", layer.double()), x, lengths)
        low = layer.to(dtype)
        errors = []
        for backend in ("packed", asked):
            found = results(by(backend, low), x.to(dtype), lengths.to(device))
            errors.append([relative_error(a, b) for a, b in zip(found, expected, strict=True)])
        rounding = 1e-9 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
        fits = all(b <= 3 * a + rounding for a, b in zip(*errors, strict=True))
        right &= fits
        worst = [max(each) for each in errors]
        tell = note if dtype == torch.float64 or not fits else say
        what = f"{cell} 32×{steps} {dtype}, worst error: packed {worst[0]:.1e}, {asked} {worst[1]:.1e}"
        tell(f"{what}{'' if fits else ' WRONG'}")
    torch.backends.cudnn.allow_tf32 = True
    return right


def problem(
    cell: str, sizes: tuple[int, int, int, int], device: torch.device, **options: Any
) -> tuple[Any, Tensor, Tensor]:
    """Returns a layer, its input (N, T, I) and lengths (N,) on the CPU, one of them T. `sizes` are N, T, I, H."""
    torch.manual_seed(0)
    N, T, features, H = sizes
    name, more = CELLS[cell]
    layer = getattr(masked_rnn, f"Masked{name}")(features, H, batch_first=True, **more, **options).to(device)
    lengths = torch.randint(1, T + 1, (N,))
    lengths[0] = T
    return layer, torch.randn(N, T, features).to(device), lengths


def results(layer: Any, x: Tensor, lengths: Tensor) -> list[Tensor]:
    """Returns output, last state and all gradients, in float64 on the CPU."""
    leaf = x.detach().requires_grad_()
    output, last = layer(leaf, lengths=lengths)
    states = last if isinstance(last, tuple) else (last,)
    score = sum((t.float() if t.dtype != torch.float64 else t).square().sum() for t in (output, *states))
    found = torch.autograd.grad(score, [leaf, *layer.parameters()])
    return [t.detach().cpu().double() for t in (output, *states, *found)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def kernels_started(device: torch.device) -> None:
    """How many kernels does a training step start? GRU, 32×100 64→64, with cuDNN's own."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    for layers, bidirectional in ((1, False), (2, True)):
        layer, x, lengths = problem("GRU", (32, 100, 64, 64), device, num_layers=layers, bidirectional=bidirectional)
        found = []
        for backend in backends(device):
            step = training(by(backend, layer), x, lengths.to(device))
            step()
            with torch.profiler.profile(activities=activities) as profile:
                step()
                wait(device)
            found.append(f"{backend} {sum(event.device_type.name != 'CPU' for event in profile.events())}")
        note(f"kernels and copies, GRU ×{layers}{' bi' if bidirectional else ''}: " + ", ".join(found))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def in_turns(contenders: dict[str, Call], device: torch.device, calls: int = CALLS) -> dict[str, float]:
    """Returns the seconds of a call of each: the median over the rounds, in which all take turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for _ in range(ROUNDS):
        for name, call in contenders.items():
            wait(device)
            start = time.perf_counter()
            for _ in range(calls):
                call()
            wait(device)
            times[name].append((time.perf_counter() - start) / calls)
    return {name: median(each) for name, each in times.items()}


def training(layer: Any, x: Tensor, lengths: Tensor | None = None) -> Call:
    def step() -> None:
        layer.zero_grad(set_to_none=True)
        output, last = layer(x) if lengths is None else layer(x, lengths=lengths)
        states = last if isinstance(last, tuple) else (last,)
        torch.autograd.backward((output, *states), [torch.ones_like(t) for t in (output, *states)])

    return step


def inference(layer: Any, x: Tensor, lengths: Tensor | None = None) -> Call:
    def step() -> None:
        with torch.no_grad():
            layer(x) if lengths is None else layer(x, lengths=lengths)

    return step


class Packing(nn.Module):
    """Packing by hand."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Any]:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        output, last = self.layer(packed)
        return pad_packed_sequence(output, batch_first=True, total_length=x.size(1))[0], last


def layers_in_turns(device: torch.device) -> None:
    """How long do torch.nn over padding, packing by hand, and each backend take? N=32, T=100, I=H."""
    names = ("packing by hand", *backends(device))
    say(f"Milliseconds of torch.nn over padding; times as long: {', '.join(names)}")
    shares: dict[str, list[list[float]]] = {"training": [], "inference": []}
    sizes = itertools.product(("GRU", "LSTM"), (32, 128, 256, 1024), (1, 2), (False, True))
    for cell, H, layers, bidirectional in sizes:
        layer, x, lengths = problem(cell, (32, 100, H, H), device, num_layers=layers, bidirectional=bidirectional)
        own = getattr(nn, cell)(H, H, layers, batch_first=True, bidirectional=bidirectional).to(device)
        own.load_state_dict(layer.state_dict())
        there = lengths.to(device)
        for work in (training, inference):
            contenders = {"torch.nn": work(own, x), "packing": work(Packing(own), x, lengths)}
            contenders |= {backend: work(by(backend, layer), x, there) for backend in names[1:]}
            base, *others = in_turns(contenders, device).values()
            what = f"{cell} H={H} ×{layers}{' bi' if bidirectional else ''}, {work.__name__}"
            say(f"{what}: {base * 1e3:.2f} ms; " + " ".join(f"{seconds / base:.2f}" for seconds in others))
            shares[work.__name__].append([seconds / base for seconds in others])
    for work_name, rows in shares.items():
        means = [geometric_mean(each) for each in zip(*rows, strict=True)]
        named = ", ".join(f"{name} {mean:.2f}" for name, mean in zip(names, means, strict=True))
        note(f"{work_name}, times as long as torch.nn over padding, geometric mean: {named}")


def packed_or_padded(device: torch.device) -> None:
    """Is the kernel over packed rows faster where a batch is large? N=256, T=400, training, by share of padding."""
    for H, share in itertools.product((128, 256, 512), (0.25, 0.5, 0.75)):
        layer, x, _ = problem("GRU", (256, 400, H, H), device)
        lengths = torch.linspace(400 * max(0.0, 1 - 2 * share), min(400.0, 800 * (1 - share)), 256).round().long()
        contenders = {b: training(by(b, layer), x, lengths) for b in backends(device)}
        found = in_turns(contenders, device, calls=2)
        note(f"H={H}, {share:.0%} padding: " + ", ".join(f"{name} {s * 1e3:.1f} ms" for name, s in found.items()))


def captured(device: torch.device) -> None:
    """What do a compiled layer and a CUDA graph take? GRU, 32×100 64→64, training. Compiled layers refuse held."""
    torch._dynamo.config.allow_rnn = True
    layer, x, lengths = problem("GRU", (32, 100, 64, 64), device)
    there = lengths.to(device)
    contenders: dict[str, Call] = {}
    for mode in ("default", "reduce-overhead")[: 2 if device.type == "cuda" else 1]:
        contenders[f"compiled, {mode}"] = training(
            torch.compile(copy.deepcopy(layer), mode=mode, fullgraph=True), x, there
        )
    for backend in backends(device)[1:]:
        contenders[backend] = training(by(backend, layer), x, there)
        if device.type == "cuda":
            contenders[f"{backend} as a CUDA graph"] = recorded(contenders[backend])
    found = in_turns(contenders, device)
    note(", ".join(f"{name} {s * 1e3:.2f} ms" for name, s in found.items()))


def recorded(step: Call) -> Call:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def tests(device: torch.device) -> bool:
    """Do the tests for GPUs pass?"""
    command = [sys.executable, "-m", "pytest", "tests/test_cuda.py", "-m", "slow or not slow", "-n", "2"]
    finished = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    note(f"tests/test_cuda.py: {finished.stdout.strip().splitlines()[-1]}")
    if finished.returncode:
        say(finished.stdout[-6000:])
    return finished.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
