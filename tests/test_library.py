"""The native loops' library is found and checked. If it can't be used, the reason is given, and PyTorch's ops run."""

from __future__ import annotations

import ctypes
import os
import runpy
import shutil
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.oracle import CELLS, INPUT, assert_same, call, cotangents, masked, oracle, prefix_mask, random_states

import masked_rnn
from masked_rnn._backends.bptt import library, native, ops_layer
from masked_rnn._backends.bptt.artifact import LIBRARY, sources_digest
from masked_rnn._backends.bptt.record import Run

ROOT = Path(__file__).parent.parent


class Function:
    """Replaces a function of ctypes, whose attributes can be set."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def __call__(self, *args: Any) -> Any:
        return self.result(*args) if callable(self.result) else self.result


class FakeLibrary:
    """Replaces the library, on a CPU that supports the first `levels` kinds."""

    def __init__(
        self, digest: str, interface: int = library.INTERFACE, record: int = ctypes.sizeof(Run), levels: int = 3
    ) -> None:
        self.masked_rnn_interface = Function(interface)
        self.masked_rnn_record_bytes = Function(record)
        self.masked_rnn_digest = Function(digest.encode())
        self.masked_rnn_supports = Function(lambda level: level.value < levels)
        self.masked_rnn_forward = Function(None)
        self.masked_rnn_backward = Function(None)
        self.masked_rnn_count = Function(None)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the folder of an installed `bptt`, with a library and its sources."""
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "loops.cpp").write_text("int one;")
    (tmp_path / "engine" / "loops.h").write_text("extern int one;")
    (tmp_path / LIBRARY).write_text("not a library")
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    monkeypatch.delenv(library.VARIABLE, raising=False)
    return tmp_path


find: Callable[[], library.Library | str] = library.find.__wrapped__
"""Looks for the library without the cache, as the first call of a process does."""


def load(monkeypatch: pytest.MonkeyPatch, **facts: Any) -> None:
    facts.setdefault("digest", sources_digest(library.FOLDER / "engine"))
    monkeypatch.setattr("ctypes.CDLL", lambda _path: FakeLibrary(**facts))


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize(("wanted", "most"), [(None, 2), ("", 2), ("default", 0), ("avx2", 1), ("AVX512", 2)])
def test_capability_is_at_most_the_cpus(
    wanted: str | None, most: int, levels: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(monkeypatch, levels=levels)
    if wanted is not None:
        monkeypatch.setenv(library.VARIABLE, wanted)
    found = find()
    assert isinstance(found, library.Library)
    assert found.level == min(most, levels - 1)


def test_unknown_capability_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch)
    monkeypatch.setenv(library.VARIABLE, "avx-512")
    with pytest.raises(ValueError, match="'avx-512': expected one of default, avx2, avx512 and none"):
        find()


def test_capability_none_selects_loops_of_ops(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch)
    monkeypatch.setenv(library.VARIABLE, "none")
    assert find() == "MASKED_RNN_CPU_CAPABILITY=none asks for PyTorch's ops"


@pytest.mark.parametrize("change", ["edit", "add", "rename", "remove"])
def test_changed_sources_ask_for_reinstall(change: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch)
    assert isinstance(find(), library.Library)
    source = folder / "engine" / "loops.cpp"
    if change == "edit":
        times = source.stat()
        source.write_text("int two;")
        os.utime(source, (times.st_atime, times.st_mtime))
    elif change == "add":
        (folder / "engine" / "more.h").touch()
    elif change == "rename":
        source.rename(folder / "engine" / "loop.cpp")
    else:
        source.unlink()
    assert "the C++ sources have changed since they were built: run `python -m pip install" in str(find())


def test_library_loads_without_sources(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel has no sources."""
    load(monkeypatch, digest="of sources that stayed elsewhere")
    shutil.rmtree(folder / "engine")
    assert isinstance(find(), library.Library)


@pytest.mark.parametrize("other", [{"interface": library.INTERFACE + 1}, {"record": ctypes.sizeof(Run) - 8}])
def test_other_interface_asks_for_reinstall(
    other: dict[str, int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(monkeypatch, **other)
    assert "of another version of masked_rnn: run `python -m pip install" in str(find())


def test_missing_library_asks_for_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / LIBRARY).unlink()
    compiler = "Clang" if os.name == "nt" else "a C++17 compiler (GCC or Clang)"
    assert f"install {compiler}, then run `python -m pip install " in str(find())


def test_source_tree_that_hides_installed_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `pip install .`, if Python is started in the clone."""
    clone, site = tmp_path / "clone", tmp_path / "site-packages"
    for root in (clone, site):
        (root / "masked_rnn" / "_backends" / "bptt").mkdir(parents=True)
    (clone / "setup.py").touch()
    monkeypatch.setattr(library, "FOLDER", clone / "masked_rnn" / "_backends" / "bptt")
    monkeypatch.setattr(sys, "path", [str(clone), str(site)])
    monkeypatch.delenv(library.VARIABLE, raising=False)
    assert "was not built when masked_rnn was installed" in str(find())
    (site / "masked_rnn" / "_backends" / "bptt" / LIBRARY).touch()
    assert str(find()) == (
        f"Python imports {clone}, where the C++ code was not built, and not the package installed in {site}, "
        f"which has it: start Python in another folder, or run `python -m pip install -e {clone}`"
    )


@pytest.mark.parametrize("contents", [b"", b"not a library", b"\x7fELF"])
def test_unreadable_library_asks_for_reinstall(contents: bytes, folder: Path) -> None:
    (folder / LIBRARY).write_bytes(contents)
    assert "the C++ code can't be loaded: run `python -m pip install" in str(find())


def test_foreign_library_asks_for_reinstall(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _path: type("Other", (), {})())
    assert "the C++ code can't be loaded: run `python -m pip install" in str(find())


def test_install_command_fits_checkout_or_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "masked_rnn" / "_backends" / "bptt"
    folder.mkdir(parents=True)
    monkeypatch.setattr(library, "FOLDER", folder)
    hint = library._install_again()
    assert "pip install --force-reinstall --no-deps --no-cache-dir SOURCE`" in hint  # no index is named
    (tmp_path / "setup.py").touch()
    assert library._install_again() == f"`python -m pip install -e {tmp_path}`"


@pytest.mark.parametrize("cell", CELLS)
def test_loops_of_ops_run_without_library(cell: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "find", find)
    ran = []
    for module, names in ((ops_layer, ("forward", "backward")), (native, ("forward", "backward"))):
        for name in names:
            run = getattr(module, name)
            monkeypatch.setattr(
                module, name, lambda *args, of=module, run=run, name=name: ran.append((of, name)) or run(*args)
            )
    layer = masked(cell, backend="bptt", batch_first=True).double()
    x, lengths = torch.randn(3, 5, INPUT, dtype=torch.float64), [3, 0, 5]
    states, pulled = random_states(layer, 3), cotangents(layer, 3, 5)
    assert_same(
        call(layer, x, states, pulled, lengths=lengths), oracle(layer, x, prefix_mask(lengths, 5), states, pulled)
    )
    assert set(ran) == {(ops_layer, "forward"), (ops_layer, "backward")}


@pytest.fixture
def warns_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the library be looked for, and be missed, as in a new process."""
    monkeypatch.setattr(library, "find", find)
    monkeypatch.setattr(library, "_warn_of_slow_loops", cache(library._warn_of_slow_loops.__wrapped__))


@pytest.mark.skipif(os.name == "nt", reason="Windows may have no compiler for the loops")
@pytest.mark.usefixtures("warns_anew")
@pytest.mark.parametrize("backend", ["auto", "bptt"])
@pytest.mark.parametrize("fault", ["missing", "unreadable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_call_that_could_run_natively_warns(dtype: torch.dtype, fault: str, backend: str, folder: Path) -> None:
    if fault == "missing":
        (folder / LIBRARY).unlink()
    layer = masked("gru", backend=backend).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masked_rnn.get_env_info()

    def train() -> None:
        for _ in range(3):
            layer(torch.randn(5, 3, INPUT, dtype=dtype), lengths=[5, 2, 0])[0].sum().backward()

    with pytest.warns(masked_rnn.SlowLoopsWarning) as caught:
        train()
    (warning,) = caught
    assert str(warning.message) == (
        f"On the CPU, layers run in PyTorch's ops, which is slower: {find()}. "
        "MASKED_RNN_CPU_CAPABILITY=none in the environment silences this warning."
    )


@pytest.mark.usefixtures("warns_anew")
@pytest.mark.parametrize("why", ["they run", "none", "Windows"])
def test_call_does_not_warn(why: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = masked("gru")
    if why == "they run":
        load(monkeypatch)
    else:
        (folder / LIBRARY).unlink()
    if why == "none":
        monkeypatch.setenv(library.VARIABLE, "None")
    with warnings.catch_warnings(), monkeypatch.context() as patch:
        warnings.simplefilter("error")
        if why == "Windows":
            patch.setattr(os, "name", "nt")
            library._warn_of_slow_loops("no compiler")
        else:
            layer(torch.randn(5, 3, INPUT), lengths=[5, 2, 0])


def test_env_info_reports_loops(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "find", find)
    info = masked_rnn.get_env_info()
    assert (info.loops, info.loops_capability) == ("ops", None)
    assert info.why_not_native == find()
    load(monkeypatch, levels=2)
    info = masked_rnn.get_env_info()
    assert (info.loops, info.loops_capability, info.why_not_native) == ("native", "avx2", None)
    assert (info.masked_rnn, info.torch) == (masked_rnn.__version__, torch.__version__)
    assert info.cpu_capability == torch.backends.cpu.get_cpu_capability()


def test_command_prints_env_info(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(library, "find", find)
    monkeypatch.setenv(library.VARIABLE, "none")
    runpy.run_module("masked_rnn", run_name="__main__")
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    expected = masked_rnn.get_env_info()._asdict()
    assert expected["why_not_native"] == f"{library.VARIABLE}=none asks for PyTorch's ops"
    expected["loops"] = "ops (PyTorch's, slower)"
    assert told == {name: str(value) for name, value in expected.items() if value is not None}
