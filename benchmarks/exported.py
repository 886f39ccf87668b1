"""Times an exported layer: one loop, one node for each step, and the operator, compiled by AOTInductor.

`python -m benchmarks.exported` prints the seconds to export and to compile a GRU, and the milliseconds of a call of 10,
100 and 1000 steps (one thread, inference). The loop and the operator are compiled once, with a dynamic number of steps.
A node for each step is compiled for each number up to `--unrolled`, because the time to compile grows with it.
`--quick` takes 10 steps only.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.export import Dim, export

from masked_rnn import MaskedGRU
from masked_rnn._backends import scan

from .__main__ import load, processor
from .contenders import version_of
from .report import print_table

BATCH, WIDTH = 16, 128
FORMS = {"loop": "scan", "steps": "scan", "operator": "auto"}
"""The backend of each form"""


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def compiled(form: str, x: Tensor, lengths: Tensor, path: str) -> tuple[float, float, Callable[..., Any]]:
    """Returns the seconds to export and to compile, and the compiled layer. Only steps have a fixed T."""
    layer = MaskedGRU(WIDTH, WIDTH, batch_first=True, backend=FORMS[form]).eval()  # type: ignore[arg-type]
    sizes = None if form == "steps" else ({1: Dim("time")}, None, None)
    unrolled = patch.object(scan, "graph_scan", None if form == "steps" else scan.graph_scan)
    with torch.no_grad(), unrolled:
        exporting, program = seconds_of(lambda: export(layer, (x, None, lengths), dynamic_shapes=sizes))
        compiling, _ = seconds_of(lambda: torch._inductor.aoti_compile_and_package(program, package_path=path))
    return exporting, compiling, torch._inductor.aoti_load_package(path)


def milliseconds(run: Callable[..., Any], x: Tensor, lengths: Tensor, seconds: float) -> str:
    used, times = 0.0, []
    with torch.no_grad():
        run(x, None, lengths)
        while used < seconds or len(times) < 3:
            took, _ = seconds_of(lambda: run(x, None, lengths))
            times.append(took)
            used += took
    return f"{median(times) * 1e3:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exported", description=__doc__)
    parser.add_argument("--seconds", type=float, default=2, help="how long each call is repeated")
    parser.add_argument("--unrolled", type=int, default=100, help="the most steps that get a node each")
    parser.add_argument("--quick", action="store_true", help="10 steps only: whether everything runs")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    busy = load()
    counts = (10,) if arguments.quick else (10, 100, 1000)
    batches = {T: (torch.randn(BATCH, T, WIDTH), torch.linspace(1, T, BATCH).long()) for T in counts}

    def calls(run: Callable[..., Any], timed: Sequence[int]) -> list[str]:
        return [milliseconds(run, *batches[T], arguments.seconds) if T in timed else "" for T in counts]

    eager = MaskedGRU(WIDTH, WIDTH, batch_first=True).eval()
    table = [["form", "export, s", "compile, s", *(f"call of {T} steps, ms" for T in counts)]]
    table.append(["eager layer", "", "", *calls(eager, counts)])
    unrolled = [("steps", (T,)) for T in counts if arguments.unrolled >= T]
    for form, timed in (("operator", counts), ("loop", counts), *unrolled):
        with TemporaryDirectory() as folder:
            exporting, compiling, run = compiled(form, *batches[timed[0]], str(Path(folder) / "layer.pt2"))
            name = f"a node for each of {timed[0]} steps" if form == "steps" else form
            table.append([name, f"{exporting:.1f}", f"{compiling:.1f}", *calls(run, timed)])

    print(f"N={BATCH}, I=H={WIDTH}, float32, lengths 1 to T\n")
    print_table(table)
    print(f"\n{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}; load before {busy:.1f}")
    print(f"torch {version_of('torch')}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
