"""The tree follows CONTRIBUTING.md: imports go down, no backend imports another, no file or function is long."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import masked_rnn

ROOT = Path(masked_rnn.__file__).parent
MODULES = {str(path.relative_to(ROOT).with_suffix("")).removesuffix("/__init__"): path for path in ROOT.rglob("*.py")}
FLOORS = (
    ("__init__", "__main__", "_modules"),
    ("_environment", "_layers"),
    ("_dispatch",),
    ("_lean",),
    ("_capture",),
    ("_backends/packed", "_backends/padded", "_backends/bptt", "_backends/scan", "_backends/held"),
    ("_backends/kernels", "_backends/measured"),
    ("_backends/cudnn",),
    ("_backends/graph_loop",),
    ("_backends/recurrence", "_backends/double_backward", "_backends/gather", "_backends"),
    ("_call",),
    ("_segments",),
    ("_plan", "_cells"),
    ("_probe", "_memory"),
    ("_spec", "_torch"),
)
"""The floors, from the top. A module imports from floors below its own, and from its own folder."""


def floor(module: str) -> tuple[int, str]:
    """Returns a module's floor, and its room on that floor."""
    found = [
        (len(room), number, room)
        for number, rooms in enumerate(FLOORS)
        for room in rooms
        if module == room or module.startswith(f"{room}/")
    ]
    _, number, room = max(found)
    return number, room


def imports(module: str) -> set[str]:
    path = MODULES[module]
    folder = path.parent.relative_to(ROOT)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder
            for _ in range(node.level - 1):
                base = base.parent
            target = base / (node.module or "").replace(".", "/")
            for name in node.names:
                inner = str(target / name.name).removeprefix("./")
                found.add(inner if inner in MODULES else str(target).removeprefix("./"))
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name and name.startswith("masked_rnn") for name in names), "imports within are relative"
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module: str) -> None:
    own, room = floor(module)
    for imported in imports(module):
        number, other = floor(imported)
        assert number > own or other == room, f"{module} imports {imported}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_file_has_at_most_350_lines(module: str) -> None:
    assert len(MODULES[module].read_text().splitlines()) <= 350


@pytest.mark.parametrize("module", sorted(MODULES))
def test_function_has_at_most_60_lines(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, node.name


def test_file_name_is_unique() -> None:
    """Each name is unique in the repository, except names that have a meaning for Python or GitHub."""
    root = Path(__file__).parent.parent
    folders = ("masked_rnn", "tests", "benchmarks", "examples", "docs")
    names = [path.name for folder in folders for path in (root / folder).rglob("*.*") if path.suffix in KINDS]
    twice = {name for name in names if names.count(name) > 1}
    assert twice <= {"__init__.py", "__main__.py", "README.md"}


KINDS = (".py", ".h", ".cpp", ".md")
CLOCKS = {"time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time"}
CLOCKS |= {"process_time_ns", "thread_time", "thread_time_ns", "timeit", "default_timer", "elapsed_time", "Timer"}
TESTS = [path for path in Path(__file__).parent.rglob("*.py") if path.name != "mutants.py"]


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_tests_read_no_clock(path: Path) -> None:
    """A test with a clock would fail on a busy machine. benchmarks/ measures speed."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            assert called not in CLOCKS, f"line {node.lineno}"


def test_hypothesis_reads_no_clock() -> None:
    assert settings().deadline is None
    assert HealthCheck.too_slow in settings().suppress_health_check


def test_one_module_reads_addresses() -> None:
    """`_memory.py` checks a tensor before it returns its address."""
    asking = {module for module, path in MODULES.items() if "data_ptr" in path.read_text()}
    assert asking == {"_memory"}
