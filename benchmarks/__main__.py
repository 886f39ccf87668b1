"""Runs the benchmark suite, prints the tables and writes the CSV."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from .contenders import BACKENDS, CAPTURED, CONTENDERS
from .problem import CELLS, SHAPES
from .report import print_groups, print_peaks, print_speedups, print_summary, progress
from .rows import write
from .suite import ALONE, ON_CUDA, QUICK, REGIONS, WORKS, Plan, Suite
from .works import run

PUBLISHED = Path(__file__).resolve().parent / "results"
BUSY = 0.5
"""With a load above this, times are not reliable."""


def main() -> int:
    arguments = parse()
    plan = make_plan(arguments)
    start, busy = time.perf_counter(), load()
    is_publishable = busy <= BUSY or arguments.out.resolve() != PUBLISHED
    if busy > BUSY:
        lost = "" if is_publishable else f", and are not published in {PUBLISHED.name}/; --out FOLDER keeps them"
        print(f"other work is running here (load {busy:.1f}): the times will be worth little{lost}", file=sys.stderr)
    with progress() as (told, started, advance), Suite(plan, told, advance) as suite:
        started(suite.steps())
        run(suite)
    print_speedups(suite.rows)
    print_summary(suite.rows)
    print_peaks(suite.rows)
    print_groups(suite.rows)
    for name, why in suite.left_out.items():
        print(f"left out: {name} ({why})")
    if not is_publishable:
        print(f"not written: the load was {busy:.1f} before the run, and {PUBLISHED.name}/ takes none above {BUSY}")
        return 0
    path = arguments.out / file_name(arguments.quick, plan)
    write(path, suite.rows, facts(suite, busy, time.perf_counter() - start))
    print(f"{path} written after {(time.perf_counter() - start) / 60:.1f} minutes")
    return 0


def parse() -> argparse.Namespace:
    def several(*names: str) -> dict[str, object]:
        def split(text: str) -> tuple[str, ...]:
            if unknown := set(text.split(",")) - set(names):
                raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: expected some of {','.join(names)}")
            return tuple(text.split(","))

        return {"type": split, "metavar": "A,B"}

    def positive(text: str) -> float:
        if not float(text) > 0:
            raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
        return float(text)

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="about two minutes: the GRU, a few shapes")
    parser.add_argument("--cell", help=f"of {','.join(CELLS)}; default all, with --quick gru", **several(*CELLS))  # type: ignore[arg-type]
    parser.add_argument(
        "--only",
        help=f"works, of {','.join(WORKS)}; or one of {','.join(REGIONS)}, alone, on one thread",
        **several(*WORKS, *REGIONS),
    )  # type: ignore[arg-type]
    names = [c.name for c in CONTENDERS[1:]]
    parser.add_argument("--against", help=f"contenders, of {','.join(names)}", **several(*names))  # type: ignore[arg-type]
    parser.add_argument("--backends", action="store_true", help="also masked_rnn with each backend forced")
    parser.add_argument("--captured", action="store_true", help="also masked_rnn compiled, and exported to ONNX")
    numbers = [str(k + 1) for k in range(len(SHAPES))]
    parser.add_argument("--shapes", help=f"by number, of {','.join(numbers)}", **several(*numbers))  # type: ignore[arg-type]
    parser.add_argument("--budget", type=positive, help="seconds of timing for each shape and work")
    parser.add_argument("--growth", type=positive, help="the longest T of the works growth and memory")
    parser.add_argument(
        "--before", type=Path, help="another checkout, whose masked_rnn also takes part", metavar="FOLDER"
    )
    parser.add_argument("--threads", type=int, choices=range(1, 257), metavar="N", help="default 2")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: those that run there")
    parser.add_argument("--out", type=Path, default=PUBLISHED)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and (lost := set(arguments.only or ()) - set(ON_CUDA)):
        parser.error(f"--only {','.join(sorted(lost))}: on cuda, expected some of {','.join(ON_CUDA)}")
    if arguments.only and len(arguments.only) > 1 and (alone := set(arguments.only) & set(REGIONS)):
        parser.error(f"--only {','.join(arguments.only)}: {' and '.join(sorted(alone))} run alone")
    return arguments


def make_plan(arguments: argparse.Namespace) -> Plan:
    plan = QUICK if arguments.quick else Plan()
    if arguments.only and arguments.only[0] in ALONE:
        alone = ALONE[arguments.only[0]]
        plan = replace(alone, cells=plan.cells, every=plan.every)
    if arguments.device == "cuda":
        plan = replace(plan, device="cuda", works=ON_CUDA)
    plan = replace(plan, backends=arguments.backends, captured=arguments.captured)
    if arguments.threads:
        plan = replace(plan, threads=arguments.threads)
    if arguments.before:
        plan = replace(plan, before=str(arguments.before.resolve()))
    if arguments.cell:
        plan = replace(plan, cells=arguments.cell)
    if arguments.only:
        plan = replace(plan, works=arguments.only)
    if arguments.against:
        plan = replace(plan, only=(*arguments.against, *(c.name for c in (*BACKENDS, *CAPTURED))))
    if arguments.shapes:
        plan = replace(plan, shapes=tuple(SHAPES[int(k) - 1] for k in arguments.shapes))
    if arguments.budget:
        plan = replace(plan, budget=arguments.budget, least_rounds=min(plan.least_rounds, 1 + int(arguments.budget)))
    if arguments.growth:
        longest = tuple(T for T in plan.growth if arguments.growth >= T) or (int(arguments.growth),)
        plan = replace(plan, growth=longest, memory=min(plan.memory, int(arguments.growth)))
    return plan


def file_name(quick: bool, plan: Plan) -> str:
    """Returns <device>-torch<version>-<date>.csv, with more words if the run is not the whole suite."""
    parts = [
        plan.device,
        f"torch{version('torch').split('+')[0]}",
        datetime.date.today().isoformat(),
    ]
    parts += ["quick"] * quick
    parts += plan.cells if plan.cells != (QUICK if quick else Plan()).cells else ()
    parts += plan.works if plan.works not in (WORKS, ON_CUDA) else ()
    return "-".join(parts) + ".csv"


def facts(suite: Suite, busy: float, seconds: float) -> dict[str, str]:
    return {
        "command": f"python -m benchmarks {shlex.join(sys.argv[1:])}",
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        **({} if suite.plan.device == "cpu" else {"card": card()}),
        "threads": str(suite.plan.threads),
        "python": platform.python_version(),
        **({"loops": loops()} if suite.plan.device == "cpu" else {}),
        "versions": ", ".join(dict.fromkeys(row.version for row in suite.rows)),
        "commit": commit(Path(__file__).parent),
        **({"commit before": commit(Path(suite.plan.before))} if suite.plan.before else {}),
        "load before": f"{busy:.1f}",
        "took": f"{seconds / 60:.0f} minutes",
        "left out": "; ".join(f"{name} ({why})" for name, why in suite.left_out.items()) or "none",
    }


def commit(checkout: Path) -> str:
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=checkout, capture_output=True, text=True)
    return found.stdout or "?"


def card() -> str:
    import torch

    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"


def load() -> float:
    """Returns the load of the last minute. 0 if the system does not report it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def loops() -> str:
    """Returns which loops masked_rnn runs on the CPU."""
    from masked_rnn import get_env_info

    info = get_env_info()
    return f"native loops ({info.loops_capability})" if info.loops == "native" else "loops of PyTorch's ops"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "?"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers end, too
    sys.exit(main())
