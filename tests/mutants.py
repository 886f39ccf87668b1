"""Mutation testing: puts one fault after another into the package, and reports which ones the suite notices.

    python -m pip install -e ".[test,mutants]"
    python tests/mutants.py                             # every mutant of every file: days
    python tests/mutants.py --sample 20 --seconds 40    # 20 of each file, 40 seconds of tests for each: some hours
    python tests/mutants.py masked_rnn/_plan.py         # every mutant of one file
    python tests/mutants.py --again --seconds 600       # those that survived, against more of the suite

cosmic-ray makes the mutants: another operator, comparison, number, keyword or exception, a decorator or a loop left
out. Of the many that replace one operator, one is drawn. A change of annotations, overloads or `strict=` alone does not
count.

Each mutant runs against the tests that pass through its line. pytest-cov records them first, in one run of the suite.
One case of each test function runs first, then a second of each, until one fails. A mutant that hangs is killed.
Results go to build/mutants/results.jsonl. A mutant with a result is not run again. Processes must fork (Linux, macOS).

The native loops are C++ and have no mutants.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "mutants"
COVERAGE, DURATIONS, RESULTS = BUILD / "coverage", BUILD / "durations.json", BUILD / "results.jsonl"
LIBRARY = [str(path.relative_to(ROOT)) for path in (ROOT / "masked_rnn/_backends/bptt").glob("_native.*")]
"""The compiled native loops, if there are any. git ignores them."""
BROKEN, NO_TESTS = 99, 5
"""Exit statuses of a failure of this script, not of a mutant: its own, and pytest's."""


@dataclass
class Mutant:
    file: str
    operator: str
    occurrence: int
    line: int
    source: str
    """digest of the unchanged file"""
    diff: str = ""
    verdict: str = ""
    """killed, survived, or no test (none passes through the line)"""
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.file, self.operator, self.occurrence, self.source


def main() -> None:
    parser = argparse.ArgumentParser(description="Put faults into the package and see whether the suite finds them.")
    parser.add_argument("files", nargs="*", help="of the package; all if none is named")
    parser.add_argument("--sample", type=int, help="mutants of each file, drawn by the seed; all if it is not given")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="of tests for one mutant, as they last unhurt"
    )
    parser.add_argument("--tests", nargs="+", default=[], help="observe these tests anew, and use no others")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--again", action="store_true", help="only mutants that survived so far")
    parser.add_argument("--report", action="store_true", help="run nothing: print the table and who survived")
    args = parser.parse_args()

    BUILD.mkdir(parents=True, exist_ok=True)
    results = read_results()
    if not args.report:
        if args.tests or not DURATIONS.exists():
            observe(args.jobs, args.tests)
        files = args.files or sorted(str(path.relative_to(ROOT)) for path in (ROOT / "masked_rnn").rglob("*.py"))
        if args.again:
            queue = [m for m in results.values() if m.verdict != "killed" and m.file in files]
        else:
            # Files take turns, so that the script can be stopped at any time.
            turns = zip_longest(*(draw_mutants(file, args.sample, args.seed) for file in files))
            queue = [m for turn in turns for m in turn if m and m.key not in results]
        run_all(queue, args.seconds, args.jobs, results)
    report(results)


def read_results() -> dict[tuple[str, str, int, str], Mutant]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    mutants = [Mutant(**json.loads(line)) for line in lines]
    # The latest line of a mutant counts. Lines of files that have changed since are left out.
    return {m.key: m for m in mutants if (ROOT / m.file).exists() and m.source == digest(m.file)}


def digest(file: str) -> str:
    return hashlib.sha256((ROOT / file).read_bytes()).hexdigest()[:12]


# Drawing mutants


def draw_mutants(file: str, count: int | None, seed: int) -> list[Mutant]:
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import MutationVisitor
    from cosmic_ray.plugins import get_operator, operator_names

    source = (ROOT / file).read_text()
    places: dict[tuple[Any, str], list[Mutant]] = defaultdict(list)
    nodes = list(ast_nodes(get_ast(source)))
    for name in operator_names():
        kind = name.split("_")[0]
        if kind in ("core/VariableReplacer", "core/VariableInserter"):  # these need the name of a variable
            continue
        positions = [position for node in nodes for position in get_operator(name)().mutation_positions(node)]
        for occurrence, (start, end) in enumerate(positions):
            places[(start, end), kind].append(Mutant(file, name, occurrence, start[0], digest(file)))
    draw = random.Random(f"{seed} {file}")
    candidates = [draw.choice(places[place]) for place in sorted(places, key=str)]
    draw.shuffle(candidates)
    mutants: list[Mutant] = []
    unhurt = what_runs(source)
    for mutant in candidates:
        if len(mutants) == count:
            break
        mutated = MutationVisitor.mutate_code(source, get_operator(mutant.operator)(), mutant.occurrence)
        try:
            changes = what_runs(mutated) != unhurt
        except SyntaxError:
            continue
        if changes:
            lines = difflib.unified_diff(source.splitlines(), mutated.splitlines(), lineterm="", n=0)
            mutant.diff = "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))
            mutants.append(mutant)
    return mutants


class _WhatRuns(ast.NodeTransformer):
    """Removes annotations and overloads, which only type checkers read, and `strict=`, which asserts."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.keyword | None:
        self.generic_visit(node)
        return None if node.arg == "strict" else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef | None:
        if ast.unparse(node.body[-1]) == "...":
            return None
        node.returns = None
        # PyTorch calls the methods of an autograd.Function through its class, where staticmethod makes no difference.
        node.decorator_list = [d for d in node.decorator_list if ast.unparse(d) != "staticmethod"]
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        node.annotation = ast.Constant(None)
        self.generic_visit(node)
        return node

    def visit_If(self, node: ast.If) -> ast.If | None:
        self.generic_visit(node)
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else node


def what_runs(source: str) -> str:
    return ast.dump(_WhatRuns().visit(ast.parse(source)))


# Choosing tests


class Durations:
    """A pytest plugin that records how long each passing test takes, with the setup of its file."""

    def __init__(self) -> None:
        self.own: dict[str, float] = {}
        self.setup: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: Any) -> None:
        file = report.nodeid.split("::")[0]
        if report.when == "setup":
            self.setup[file] = max(self.setup[file], report.duration)
        elif report.when == "call" and report.passed:
            self.own[report.nodeid] = report.duration

    def seconds(self) -> dict[str, float]:
        return {test: own + self.setup[test.split("::")[0]] for test, own in self.own.items()}


def observe(jobs: int, tests: list[str]) -> None:
    print("one run of the suite, to see which test passes through which line", flush=True)
    import pytest

    if pid := os.fork():  # a child imports the package; this process must not
        os.waitpid(pid, 0)
        return
    os.environ["COVERAGE_FILE"] = str(COVERAGE)
    enter(ROOT)
    watch = Durations()
    pytest.main(
        ["-n", str(jobs), "-m", "slow or not slow", "--cov=masked_rnn", "--cov-context=test", "--cov-report=", *tests],
        plugins=[watch],
    )
    DURATIONS.write_text(json.dumps(watch.seconds()))
    os._exit(0)


class Tests:
    """Finds the tests that pass through a line, one case of each function first."""

    def __init__(self) -> None:
        from coverage import CoverageData

        self.seconds: dict[str, float] = json.loads(DURATIONS.read_text())
        self.data = CoverageData(str(COVERAGE))
        self.data.read()

    def through(self, mutant: Mutant, seconds: float) -> list[str]:
        lines = self.data.contexts_by_lineno(str(ROOT / mutant.file))
        of_line = {c.split("|")[0] for c in lines.get(mutant.line, []) if c}
        of_file = {c.split("|")[0] for contexts in lines.values() for c in contexts if c}
        # Code that runs when the file is imported can affect any test.
        found = of_line & set(self.seconds) or (set(self.seconds) if of_file else set())
        ordered = self.in_turns(found, random.Random(str(mutant.key)))
        chosen, total = [], 0.0
        for test in ordered:
            total += self.seconds[test]
            if total > seconds and chosen:
                break
            chosen.append(test)
        return chosen

    def in_turns(self, tests: set[str], draw: random.Random) -> list[str]:
        """Orders one case of each test function first, then a second of each, …; the quickest first in each turn."""
        functions: dict[str, list[str]] = defaultdict(list)
        for test in draw.sample(sorted(tests), len(tests)):
            functions[test.split("[")[0]].append(test)
        turns = [(turn, self.seconds[test], test) for own in functions.values() for turn, test in enumerate(own)]
        return [test for _, _, test in sorted(turns)]


class InOrder:
    """A pytest plugin that runs only these tests, in this order."""

    def __init__(self, tests: list[str]) -> None:
        self.place = {test: place for place, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.place), key=lambda item: self.place[item.nodeid])


# Running mutants


def run_all(queue: list[Mutant], seconds: float, jobs: int, results: dict[tuple[str, str, int, str], Mutant]) -> None:
    # Imports once what every run needs, because a run is a fork of this process. masked_rnn must not be imported.
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import pytest  # noqa: F401
    import torch._dynamo  # noqa: F401

    tests = Tests()
    folders = [copy_of_the_tree(BUILD / f"tree{job}") for job in range(jobs)]
    one_of_each = {test.split("[")[0]: test for test in tests.seconds}
    unhurt = start(None, folders[0], [*one_of_each.values()], 0)
    if os.waitpid(unhurt, 0)[1]:
        raise SystemExit(f"without a mutant tests fail: {(folders[0] / 'log').read_text()}")
    running: dict[int, tuple[Mutant, Path, float, float]] = {}
    waiting = iter(queue)
    done = 0

    def finish(mutant: Mutant, verdict: str, took: float) -> None:
        nonlocal done
        done += 1
        mutant.verdict, mutant.seconds = verdict, round(took, 1)
        results[mutant.key] = mutant
        with RESULTS.open("a") as file:
            file.write(json.dumps(asdict(mutant)) + "\n")
        print(f"{done}/{len(queue)} {verdict:8} {took:5.0f}s {mutant.file}:{mutant.line} {mutant.operator}", flush=True)

    while True:
        while folders and (mutant := next(waiting, None)):
            chosen = tests.through(mutant, seconds)
            if not chosen:
                finish(mutant, "no test", 0)
                continue
            folder = folders.pop()
            limit = 120 + 5 * sum(tests.seconds[test] for test in chosen)
            running[start(mutant, folder, chosen, done)] = mutant, folder, time.monotonic(), limit
        if not running:
            return
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            for child, (_, _, began, limit) in running.items():
                if time.monotonic() - began > limit:
                    os.killpg(child, signal.SIGKILL)
            time.sleep(0.05)
        else:
            mutant, folder, began, _ = running.pop(pid)
            if os.waitstatus_to_exitcode(status) in (BROKEN, NO_TESTS):
                raise SystemExit((folder / "log").read_text())
            shutil.copy2(ROOT / mutant.file, folder / mutant.file)
            folders.append(folder)
            finish(mutant, "survived" if status == 0 else "killed", time.monotonic() - began)


def copy_of_the_tree(folder: Path) -> Path:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in (*listed.stdout.splitlines(), *LIBRARY):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def start(mutant: Mutant | None, folder: Path, chosen: list[str], number: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgrp()
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = run(mutant, folder, chosen, number)
        sys.stdout.flush()
        os._exit(code)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        os._exit(BROKEN)


def run(mutant: Mutant | None, folder: Path, chosen: list[str], number: int) -> int:
    import pytest
    from cosmic_ray.mutating import MutationVisitor
    from cosmic_ray.plugins import get_operator

    assert "masked_rnn" not in sys.modules
    if mutant:
        target = folder / mutant.file
        operator = get_operator(mutant.operator)()
        target.write_text(MutationVisitor.mutate_code(target.read_text(), operator, mutant.occurrence))
        os.utime(target, (number, number))  # no other mutant's bytecode has this time
    enter(folder)
    files = sorted({test.split("::")[0] for test in chosen})
    return pytest.main(
        ["-x", "-n", "0", "-m", "slow or not slow", "-p", "no:cacheprovider", "-p", "no:cov", *files],
        plugins=[InOrder(chosen)],
    )


def enter(tree: Path) -> None:
    """Makes this tree's package the one that is imported, also in processes started from here on."""
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    os.environ["MASKED_RNN_EXPECT_LOOPS"] = "native" if LIBRARY else "ops"
    sys.path.insert(0, str(tree))


def report(results: dict[tuple[str, str, int, str], Mutant]) -> None:
    mutants = sorted(results.values(), key=lambda m: (m.file, m.line))
    counts = Counter((m.file, m.verdict == "killed") for m in mutants)
    print("\n| file | killed | of | |\n|---|---|---|---|")
    for file, killed, total in rows(counts):
        print(f"| `{file}` | {killed} | {total} | {killed / total:.0%} |")
    for mutant in mutants:
        if mutant.verdict != "killed":
            print(f"\n{mutant.verdict}: {mutant.file}:{mutant.line} {mutant.operator}\n{mutant.diff}")


def rows(counts: Counter[tuple[str, bool]]) -> Iterator[tuple[str, int, int]]:
    files = sorted({file for file, _ in counts})
    for file in files:
        yield file.removeprefix("masked_rnn/"), counts[file, True], counts[file, True] + counts[file, False]
    if files:
        killed = sum(count for (_, dead), count in counts.items() if dead)
        yield "all", killed, sum(counts.values())


if __name__ == "__main__":
    main()
