"""What a run prints: progress, speed-ups by shape, and the figures to reach.

`python -m benchmarks.report FILE.csv …` prints the tables of earlier runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import geometric_mean

from .contenders import CONTENDERS
from .goals import figures, speedups
from .rows import Row, read

Progress = tuple[Callable[[str], None], Callable[[int], None], Callable[[], None]]


@contextmanager
def progress() -> Iterator[Progress]:
    """Functions: what is being done, how many steps there will be, one is done. Plain lines without rich."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar
    except ImportError:
        yield lambda words: print(words, file=sys.stderr), lambda _: None, lambda: None
        return
    with Bar(BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")) as bar:
        task = bar.add_task("starting", total=None)
        yield (
            lambda words: bar.update(task, description=words),
            lambda steps: bar.update(task, total=steps),
            lambda: bar.advance(task),
        )


def print_speedups(rows: Sequence[Row]) -> None:
    """How many times as long as masked_rnn each contender takes, a line for each shape."""
    names = [c.name for c in CONTENDERS]
    for cell, work in dict.fromkeys((row.cell, row.work) for row in rows):
        if work in ("memory", "peak"):
            continue
        mine = [row for row in rows if (row.cell, row.work) == (cell, work)]
        columns = sorted({row.contender for row in mine}, key=lambda n: (names.index(n) if n in names else 99, n))
        print(f"\n{cell}, {work}: milliseconds of masked_rnn, and how many times as long the others take")
        table = [["shape", *columns]]
        for shape in dict.fromkeys(row.shape for row in mine):
            found = {row.contender: row for row in mine if row.shape == shape}
            cells = [_cell(found.get(name)) for name in columns]
            table.append([shape, *cells])
        print_table(table)


def _cell(row: Row | None) -> str:
    if row is None or row.median_ms is None:
        return "–"
    return f"{row.median_ms:.4g}" if row.contender == "masked_rnn" else f"{row.ratio_to_masked_rnn:.2f}"


AGAINST = (("recipe",), ("padded",), ("keras", "keras-xla"), ("flax",), ("paddle",), ("onnxruntime",))


def print_summary(rows: Sequence[Row]) -> None:
    """How many times as fast masked_rnn is: the geometric mean over shapes, the worst and the best."""
    for cell in dict.fromkeys(row.cell for row in rows):
        mine = [row for row in rows if row.cell == cell]
        works = [w for w in ("training", "training without lengths", "inference") if any(r.work == w for r in mine)]
        table = [[f"{cell} against", *works]]
        for names in AGAINST:
            found = [list(speedups(mine, work, names).values()) for work in works]
            if any(found):
                cells = [f"{geometric_mean(f):.2f} ({min(f):.2f}–{max(f):.2f})" if f else "–" for f in found]
                table.append([names[0], *cells])
        if len(table) > 1:
            print()
            print_table(table)


def print_figures(rows: Sequence[Row]) -> None:
    found = figures(rows)
    if found:
        print()
        marks = [("reached" if f.reached else "not reached") if f.goal else "" for f in found]
        print_table(
            [["cell", "figure", "goal", "value", ""]]
            + [[f.cell, f.what, f.goal, f.value, mark] for f, mark in zip(found, marks, strict=True)]
        )


def print_table(table: Sequence[Sequence[str]]) -> None:
    """As Markdown."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for k, line in enumerate(table):
        print("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |")
        if k == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("csv", type=Path, nargs="+")
    everything = [row for path in parser.parse_args().csv for row in read(path)]
    print_speedups(everything)
    print_summary(everything)
    print_figures(everything)
