"""setup.py builds the same loops whatever the user's flags are, and one wheel for every Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.native_loops import COMPILER, SOURCES, assert_close, needs_native, run_python
from torch import Tensor

import masked_rnn

ROOT = Path(masked_rnn.__file__).parent.parent
pytestmark = [
    needs_native,
    pytest.mark.skipif(not SOURCES or COMPILER is None, reason="no C++ compiler, or no sources"),
]
VARIABLES = ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS")
RESULTS = """
import numpy, torch
from masked_rnn import get_env_info
from support.native_loops import make, train
from support.oracle import random_states

torch.manual_seed(3)
torch.set_num_threads(1)
results, tiny = [], numpy.array([1e-310])
for dtype in (torch.float32, torch.float64):
    for cell in ("gru", "lstm", "lstm-proj", "rnn-tanh", "rnn-relu"):
        layer = make(cell, 9, 21, bidirectional=True).to(dtype)
        states, lengths = random_states(layer, 5, dtype), [30, 0, 11, 6, 29]
        for number in (3.0, float("nan")):
            x = torch.randn(5, 30, 9, dtype=dtype) * 3
            x[2, 7, 4] = number
            results += train(layer, x.requires_grad_(), states, lengths=lengths)
assert get_env_info().loops == "native", get_env_info()
assert (tiny * 0.5)[0] > 0, "numbers below the smallest normal one became 0"
torch.save(results, TO)
"""


def copy_sources(to: Path) -> None:
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    shutil.copytree(ROOT / "masked_rnn", to / "masked_rnn", ignore=shutil.ignore_patterns("_native.*", "__pycache__"))


def set_up(folder: Path, *command: str, **environment: str) -> str:
    """Runs setup.py in a copy of the sources, and returns what it printed."""
    copy_sources(folder)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def results(folder: Path, root: Path) -> list[Tensor]:
    run_python(RESULTS.replace("TO", repr(str(folder / "results.pt"))), root)
    found: list[Tensor] = torch.load(folder / "results.pt")
    return found


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    """Returns the results of the library that the suite tests."""
    return results(tmp_path_factory.mktemp("usual"), ROOT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "-ffast-math -march=native",
        "-Ofast",
        "-funsafe-math-optimizations",
        "-ffinite-math-only -fassociative-math -freciprocal-math -fno-signed-zeros -fno-trapping-math",
    ],
)
def test_flags_of_the_user_change_no_result(flags: str, usual: list[Tensor], tmp_path: Path) -> None:
    told = set_up(
        tmp_path, "setup.py", "build_ext", "--inplace", CXX=f"{COMPILER} {flags}", **dict.fromkeys(VARIABLES, flags)
    )
    assert flags in told
    ours = results(tmp_path, tmp_path)
    for a, b in zip(ours, usual, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert_close([a.nan_to_num()], [b.nan_to_num()])


def test_sources_refuse_fast_math() -> None:
    assert COMPILER is not None
    source = next(path for path in SOURCES if path.stem == "baseline")
    command = [*COMPILER.split(), "-std=c++17", "-fsyntax-only", "-Wno-psabi", source]
    subprocess.run(command, check=True)
    for flag in ("-ffast-math", "-Ofast", "-ffinite-math-only"):
        done = subprocess.run([*command, flag], capture_output=True, text=True, check=False)
        assert done.returncode
        assert "the loops would give wrong numbers" in done.stderr


def test_each_header_opens_alone() -> None:
    """An editor shows a header as the compiler sees it, so each includes what it uses."""
    assert COMPILER is not None
    folder = SOURCES[0].parent
    for header in sorted(folder.glob("*.h")):
        command = [*COMPILER.split(), "-std=c++17", "-fsyntax-only", "-Wno-psabi", "-I", folder, "-x", "c++", "-"]
        done = subprocess.run(command, input=f'#include "{header.name}"', capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_macro_with_pragma_has_no_code() -> None:
    """GCC 14 and newer drop code that follows a pragma in one macro."""
    assert COMPILER is not None
    command = [*COMPILER.split(), "-E", "-P", "-I", SOURCES[0].parent, "-x", "c++", "-"]
    lines = ["#define LEVEL avx2", '#define LEVEL_TARGET "avx2"', '#include "level.h"', "LEVEL_BEGIN", "LEVEL_END"]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=True)
    found = [line for line in done.stdout.split("\n") if line.strip()]
    assert found
    assert all(line.startswith("#pragma") for line in found), found


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["with a lock", "free"])
def test_one_wheel_serves_every_python(threads: str, tmp_path: Path) -> None:
    """Free-threaded builds of Python have no stable ABI before 3.15. The library needs none."""
    code = f"""
import runpy, sys, sysconfig
sysconfig.get_config_vars()["Py_GIL_DISABLED"] = {int(threads == "free")}
sys.argv = ["setup.py", "bdist_wheel"]
runpy.run_path("setup.py", run_name="__main__")
"""
    set_up(tmp_path, "-c", code, CXX="false")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    name, _version, python, abi, platform = wheel.stem.split("-")
    assert (name, python, abi) == ("masked_rnn", "py3", "none")
    assert platform != "any"
