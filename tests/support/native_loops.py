"""Helpers for the tests of the native loops."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from masked_rnn._backends.bptt import library
from masked_rnn._backends.bptt.library import LEVELS, Library
from support.oracle import as_hx, as_tuple, masked

TESTS = Path(__file__).parent.parent
found = library.find()
needs_native = pytest.mark.skipif(isinstance(found, str), reason=f"the native loops do not run: {found}")
SOURCES = sorted((library.FOLDER / "engine").glob("*.cpp"))
"""Empty in an installed wheel."""
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def levels() -> list[Any]:
    """Returns the kinds of CPU that this one can run. If AVX2 is the highest, it also plays AVX-512."""
    if isinstance(found, str):
        return [pytest.param("default", marks=needs_native)]
    own: list[Any] = list(LEVELS[: found.level + 1])
    if own[-1] == "avx2":
        cant_build = pytest.mark.skipif(not SOURCES or COMPILER is None, reason="no C++ compiler, or no sources")
        own.append(pytest.param("avx512 played", marks=cant_build))
    return own


@cache
def play_avx512(folder: Path) -> Library:
    """Builds the library with AVX-512's loops, their registers and tiles, compiled for AVX2."""
    flags = ["-std=c++17", "-O1", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-Wno-psabi"]
    assert COMPILER is not None
    command = [COMPILER, *flags, "-DPLAY_AVX512", '-DSOURCES_DIGEST=""', "-c"]
    objects = [folder / f"{source.stem}.o" for source in SOURCES]
    running = [subprocess.Popen([*command, source, "-o", to]) for source, to in zip(SOURCES, objects, strict=True)]
    assert [each.wait() for each in running] == [0] * len(SOURCES)
    subprocess.run([COMPILER, "-shared", *objects, "-o", folder / "played.so"], check=True)
    built = ctypes.CDLL(str(folder / "played.so"))
    return library.bind(built, LEVELS.index("avx512"))


def use_loops_of_ops(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(library, "find", lambda: "left out here")


def use_own_threads(patch: pytest.MonkeyPatch) -> None:
    """Makes the loops start threads of their own instead of using GNU's OpenMP."""
    from masked_rnn._backends.bptt import threads

    patch.setattr(threads, "_start", lambda: 0)


def make(cell: str, inputs: int, hidden: int, fed_back: int | None = None, **options: Any) -> Any:
    """Returns a layer that runs `bptt`. A projection is to `fed_back`, by default to half of the hidden size."""
    if cell == "lstm-proj":
        options["proj_size"] = fed_back or max(1, hidden // 2)
    kind = "lstm" if cell == "lstm-proj" else cell
    return masked(kind, inputs, hidden, backend="bptt", batch_first=True, flatten_hidden=False, **options)


def train(
    layer: Any, x: Any, states: Sequence[Tensor], pulls: str = "output and last", **given: Any
) -> list[Tensor | None]:
    """Returns the results of training and inference, and every gradient that is wanted, pulled back from `pulls`."""
    generator = torch.Generator().manual_seed(4)
    packs = isinstance(x, torch.nn.utils.rnn.PackedSequence)
    data = x.data if packs else x
    leaf = data.detach().requires_grad_(data.requires_grad)
    leaves = [h.detach().clone().requires_grad_() for h in states]

    def run() -> tuple[Tensor, ...]:
        output, last = layer(x._replace(data=leaf) if packs else leaf, as_hx(leaves), **given)
        return output.data if packs else output, *as_tuple(last)

    results = run()
    pulled = results if pulls == "output and last" else results[:1] if pulls == "output" else results[1:]
    gradients = [torch.randn(h.shape, generator=generator, dtype=torch.float64).to(h.dtype) for h in pulled]
    wanted = [t for t in (leaf, *leaves, *layer.parameters()) if t.requires_grad]
    gradients = list(torch.autograd.grad(pulled, wanted, gradients, allow_unused=True))
    with torch.no_grad():
        alone = run()
    return [None if t is None else t.detach().clone() for t in (*results, *alone, *gradients)]


def assert_close(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None], units: float = 30) -> None:
    """Allows an error of so many units in the last place of the largest number."""
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is None or b is None or not a.numel():
            continue
        atol = units * torch.finfo(a.dtype).eps * b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def assert_equal(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def run_python(code: str, root: Path = Path(library.__file__).parents[3], **environment: str) -> str:
    """Runs code in a new process, with the package in `root`."""
    path = os.pathsep.join([str(root), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2", **environment}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
