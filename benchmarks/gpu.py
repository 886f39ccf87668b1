"""Proves and times the layer on an NVIDIA GPU, with gates that hold the state over padding and without.

`python -m benchmarks.gpu` asks seven questions, the smallest first, and prints each line as soon as it is known. If
gates do not hold (1) or the tests fail (7), `IS_PROVEN` in masked_rnn/_backends/cudnn.py has to stay False.
`--only 1,3` asks some of them. On a device named by `--device cpu` it only shows that the script runs.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import masked_rnn
from masked_rnn._backends import cudnn

ROUNDS, CALLS = 7, 10
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Call = Callable[[], object]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", default="1,2,3,4,5,6,7", help="questions, such as 1,3")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    device = torch.device(arguments.device)
    say(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {where(device)}")
    questions = (gates_hold, time_by_kernel, costs, layers_in_turns, packed_or_padded, captured, tests)
    failed = False
    for number in map(int, arguments.only.split(",")):
        question = questions[number - 1]
        say(f"\n{number}. {question.__doc__}")
        failed |= question(device) is False
    return int(failed)


def say(text: str) -> None:
    print(text, flush=True)


def where(device: torch.device) -> str:
    if device.type == "cpu":
        return "CPU"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"


@contextlib.contextmanager
def held(wanted: bool) -> Iterator[None]:
    """Has gates hold the state, or not."""
    before, cudnn.IS_PROVEN = cudnn.IS_PROVEN, wanted
    try:
        yield
    finally:
        cudnn.IS_PROVEN = before


def gates_hold(device: torch.device) -> bool:
    """Do gates hold the state in cuDNN, over 100 steps and over 3,000?"""
    right = True
    for name, steps, dtype in itertools.product(("GRU", "LSTM", "RNN"), (100, 3000), DTYPES):
        for tf32 in (False, True)[: 1 + (dtype == torch.float32)]:
            torch.backends.cudnn.allow_tf32 = tf32
            layer, x, lengths = problem(name, (32, steps, 32, 32), device, bidirectional=True)
            layer = layer.to(dtype)
            x = x.to(dtype).masked_fill(padding(lengths, steps, device).unsqueeze(-1), torch.nan)
            expected = results(copy.deepcopy(layer).cpu().double(), x.cpu().double(), lengths)
            errors = []
            for wanted in (False, True):
                with held(wanted):
                    found = results(layer, x, lengths.to(device))
                errors.append([relative_error(a, b) for a, b in zip(found, expected, strict=True)])
            # At most three times the error of the other way, and a few roundings.
            rounding = 8 * torch.finfo(torch.bfloat16 if tf32 else dtype).eps
            fits = all(b <= 3 * a + rounding for a, b in zip(*errors, strict=True))
            right &= fits
            worst = [max(each) for each in errors]
            what = f"{name} 32×{steps} {dtype}{', TF32' if tf32 else ''}"
            say(f"   {what}: worst error {worst[0]:.1e}, held {worst[1]:.1e}{'' if fits else ' WRONG'}")
    torch.backends.cudnn.allow_tf32 = True
    return right


def problem(
    name: str, sizes: tuple[int, int, int, int], device: torch.device, **options: Any
) -> tuple[Any, Tensor, Tensor]:
    """Returns a layer, its input (N, T, I) and lengths (N,) on the CPU, one of them T. `sizes` are N, T, I, H."""
    torch.manual_seed(0)
    N, T, features, H = sizes
    layer = getattr(masked_rnn, f"Masked{name}")(features, H, batch_first=True, **options).to(device)
    lengths = torch.randint(1, T + 1, (N,))
    lengths[0] = T
    return layer, torch.randn(N, T, features).to(device), lengths


def padding(lengths: Tensor, steps: int, device: torch.device) -> Tensor:
    return (torch.arange(steps) >= lengths.unsqueeze(1)).to(device)


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


def time_by_kernel(device: torch.device) -> None:
    """Where does the time of a training step go?"""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    layer, x, lengths = problem("GRU", (32, 100, 64, 64), device)
    for wanted in (False, True):
        step = training(layer, x, lengths.to(device))
        with held(wanted):
            step()
            with torch.profiler.profile(activities=activities) as profile:
                step()
                wait(device)
        say(f"   held: {wanted}")
        say(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))


def costs(device: torch.device) -> None:
    """What do an operator, a Function, an assertion and a copy cost?"""
    x, holds, host = torch.zeros(32, device=device), torch.ones((), dtype=torch.bool, device=device), torch.zeros(32)
    pinned = host.pin_memory() if device.type == "cuda" else host
    contenders: dict[str, Call] = {
        "an operator": lambda: x.add(1),
        "a Function": lambda: Nothing.apply(x),
        "an assertion": lambda: torch._assert_async(holds, "no"),
        "a pinned copy": lambda: pinned.to(device, non_blocking=True),
        "memory pinned, and a copy": lambda: torch.empty_like(host, pin_memory=device.type == "cuda").to(device),
    }
    for name, seconds in in_turns(contenders, device, calls=1000).items():
        say(f"   {name}: {seconds * 1e6:.1f} µs")


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


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
    """How long do torch.nn over padding, packing by hand, and the layer in both ways take? N=32, T=100, I=H."""
    say(
        "   milliseconds of torch.nn over padding; times as long: packing by hand, the layer as it is, held; no lengths"
    )
    sizes = itertools.product(("GRU", "LSTM"), (32, 128, 256, 1024), (1, 2), (False, True))
    for name, H, layers, bidirectional in sizes:
        layer, x, lengths = problem(name, (32, 100, H, H), device, num_layers=layers, bidirectional=bidirectional)
        own = getattr(nn, name)(H, H, layers, batch_first=True, bidirectional=bidirectional).to(device)
        own.load_state_dict(layer.state_dict())
        there = lengths.to(device)
        for work in (training, inference):
            contenders = {
                "torch.nn": work(own, x),
                "packing": work(Packing(own), x, lengths),
                "not held": with_held(False, work(layer, x, there)),
                "held": with_held(True, work(layer, x, there)),
                "not held, no lengths": with_held(False, work(layer, x)),
                "held, no lengths": with_held(True, work(layer, x)),
            }
            base, *others = in_turns(contenders, device).values()
            what = f"{name} H={H} ×{layers}{' bi' if bidirectional else ''}, {work.__name__}"
            say(f"   {what}: {base * 1e3:.2f} ms; " + " ".join(f"{seconds / base:.2f}" for seconds in others))


def with_held(wanted: bool, call: Call) -> Call:
    def run() -> None:
        with held(wanted):
            call()

    return run


def packed_or_padded(device: torch.device) -> None:
    """Is the kernel over packed rows faster where a batch is large? N=256, T=400, training, by share of padding."""
    for H, share in itertools.product((128, 256, 512), (0.25, 0.5, 0.75)):
        layer, x, _ = problem("GRU", (256, 400, H, H), device)
        lengths = torch.linspace(400 * max(0.0, 1 - 2 * share), min(400.0, 800 * (1 - share)), 256).round().long()
        contenders = {}
        for backend, wanted in (("packed", False), ("padded", False), ("padded", True)):
            own = copy.deepcopy(layer)
            own.backend = backend
            contenders[f"{backend}{' held' if wanted else ''}"] = with_held(wanted, training(own, x, lengths))
        found = in_turns(contenders, device, calls=2)
        say(f"   H={H}, {share:.0%} padding: " + ", ".join(f"{name} {s * 1e3:.1f} ms" for name, s in found.items()))


def captured(device: torch.device) -> None:
    """What do a compiled layer and a CUDA graph take? GRU, 32×100 64→64, training."""
    torch._dynamo.config.allow_rnn = True
    layer, x, lengths = problem("GRU", (32, 100, 64, 64), device)
    there = lengths.to(device)
    for wanted in (False, True):
        with held(wanted):
            eager = training(layer, x, there)
            contenders: dict[str, Call] = {"eager": eager}
            for mode in ("default", "reduce-overhead")[: 2 if device.type == "cuda" else 1]:
                contenders[mode] = training(torch.compile(copy.deepcopy(layer), mode=mode, fullgraph=True), x, there)
            if device.type == "cuda":
                contenders["CUDA graph"] = recorded(eager)
            found = in_turns(contenders, device)
        say(f"   held {wanted}: " + ", ".join(f"{name} {s * 1e3:.2f} ms" for name, s in found.items()))


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
    """Do the tests for GPUs pass, with gates that hold and without?"""
    command = [sys.executable, "-m", "pytest", "tests/test_cuda.py", "-m", "slow or not slow", "-n", "2"]
    finished = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    say(f"   {finished.stdout.strip().splitlines()[-1]}")
    if finished.returncode:
        say(finished.stdout[-6000:])
    return finished.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
