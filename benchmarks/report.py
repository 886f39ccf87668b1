"""Prints progress, and tables of speed-ups by shape, memory, and the share of the peak.

`python -m benchmarks.report FILE.csv … [--of masked_rnn-ops]` prints the tables of earlier runs, like those in
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean

from .contenders import BEFORE, COMPILED, CONTENDERS, PADDED
from .rows import Row, read, speedups

Progress = tuple[Callable[[str], None], Callable[[int], None], Callable[[], None]]


@contextmanager
def progress() -> Iterator[Progress]:
    """Yields functions that report what is being done, how many steps there are, and that one is done.

    Without the package rich, they print plain lines.
    """
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


OURS = "masked_rnn"
AGAINST = (("recipe",), ("padded",), ("keras", "keras-xla"), ("flax",), ("paddle",), ("onnxruntime",))
"""In each group, the faster counts: Keras has two ways."""


def held_against(rows: Sequence[Row], of: str) -> list[Row]:
    """Returns the rows with ratios to the contender `of` in place of masked_rnn: ratios of the median ratios."""
    own = {(row.cell, row.work, row.shape): row.ratio_to_masked_rnn for row in rows if row.contender == of}
    found = []
    for row in rows:
        ratio, base = row.ratio_to_masked_rnn, own.get((row.cell, row.work, row.shape))
        found.append(replace(row, ratio_to_masked_rnn=ratio / base if ratio and base else None))
    return found


def print_speedups(rows: Sequence[Row], of: str = OURS) -> None:
    """Prints how many times as long as a contender the others take, a line for each shape."""
    together = {names[0]: names for names in AGAINST}
    known = dict.fromkeys([of, f"{OURS}-ops", *together, *(c.name for c in CONTENDERS)])
    for cell, work in dict.fromkeys((row.cell, row.work) for row in rows if not row.group):
        mine = [row for row in rows if (row.cell, row.work) == (cell, work) and row.ratio_to_masked_rnn]
        ran = dict.fromkeys(row.contender for row in mine)
        if work in ("memory", "peak") or of not in ran:
            continue
        hidden = {other for names in together.values() if names[0] in ran for other in names[1:]}
        columns = [n for n in {**known, **ran} if n in ran and n not in hidden and (n == of or of == OURS or n != OURS)]
        print(f"\n{cell}, {work}: milliseconds of {of}, and how many times as long the others take\n")
        own = {row.shape: row.median_ms or 0 for row in mine if row.contender == of}
        ratios = {n: speedups(mine, work, together.get(n, (n,))) for n in columns[1:]}
        table = [["shape", *columns]]
        for shape, ms in own.items():
            table.append([shape, f"{ms:.1f}", *(f"{r[shape]:.2f}" if shape in r else "–" for r in ratios.values())])
        if len(own) > 1:
            table.append(["geometric mean", "", *(f"{geometric_mean(r.values()):.2f}" for r in ratios.values())])
        print_table(table)


def print_summary(rows: Sequence[Row], of: str = OURS) -> None:
    """Prints how many times as fast a contender is: the geometric mean over shapes, the worst and the best."""
    for cell in dict.fromkeys(row.cell for row in rows if not row.group):
        mine = [row for row in rows if row.cell == cell]
        works = [w for w in ("training", "training without lengths", "inference") if any(r.work == w for r in mine)]
        table = [[f"{cell}, {of} against", *works]]
        for names in AGAINST:
            found = [list(speedups(mine, work, names).values()) for work in works]
            if any(found):
                cells = [f"{geometric_mean(f):.2f} ({min(f):.2f}–{max(f):.2f})" if f else "–" for f in found]
                table.append([names[0], *cells])
        if len(table) > 1:
            print()
            print_table(table)


def print_peaks(rows: Sequence[Row]) -> None:
    """Prints the memory that a training step adds, and products a second beside those of large `torch.mm`."""
    memory = [[r.cell, r.shape, r.contender, f"{r.peak_mib:.0f}"] for r in rows if r.peak_mib]
    speed = [[r.cell, r.shape, r.contender, f"{r.gflops:.0f}"] for r in rows if r.gflops]
    for unit, table in (("MiB", memory), ("GFLOP/s", speed)):
        if table:
            print()
            print_table([["cell", "shape", "contender", unit], *table])


def print_groups(rows: Sequence[Row]) -> None:
    """Prints how many times as fast masked_rnn is in each group of cases, by shape, cell and work.

    If another checkout took part, its figure comes first. The group of compiled layers is held against eager ones.
    """
    for group in dict.fromkeys(row.group for row in rows if row.group):
        mine = [row for row in rows if row.group == group]
        ran = [name for name in dict.fromkeys(row.contender for row in mine) if not name.endswith(BEFORE)]
        if COMPILED.name in ran:
            print_group(mine, f"{group}, against eager ones", COMPILED.name, OURS)
            continue
        for other in ran:
            if other != OURS:
                print_group(mine, f"{group}, against {'torch.nn' if other == PADDED.name else other}", OURS, other)


def print_group(rows: Sequence[Row], title: str, of: str, other: str) -> None:
    times = {(row.shape, row.cell, row.work, row.contender): row.ratio_to_masked_rnn or 0 for row in rows}
    columns = list(dict.fromkeys((row.cell, row.work) for row in rows if row.contender == other))
    # The speed before, if another checkout took part, and now, by shape and column.
    sides = [(f"{of}{BEFORE}", f"{other}{BEFORE}" if other == OURS else other), (of, other)]
    speeds: list[dict[tuple[str, str, str], float]] = [
        {
            (shape, *column): times[shape, *column, o] / times[shape, *column, name]
            for shape in dict.fromkeys(row.shape for row in rows)
            for column in columns
            if (shape, *column, o) in times and (shape, *column, name) in times
        }
        for name, o in sides
    ]
    speeds = [side for side in speeds if side]

    def joined(figures: Iterable[float]) -> str:
        return " → ".join(f"{figure:.2f}" for figure in figures)

    print(f"\n**{title}**, times as fast{' before → now' * (len(speeds) > 1)}\n")
    table = [["", *(f"{cell.upper()}, {work}" for cell, work in columns)]]
    for shape in dict.fromkeys(shape for shape, _, _ in speeds[-1]):
        cells = ([side[shape, *column] for side in speeds if (shape, *column) in side] for column in columns)
        table.append([shape, *(joined(figures) or "–" for figures in cells)])
    for name, of_all in (("geometric mean", geometric_mean), ("least", min)):
        by_column = ([[v for key, v in side.items() if key[1:] == column] for side in speeds] for column in columns)
        table.append([name, *(joined(of_all(values) for values in sides) for sides in by_column)])
    print_table(table)
    for work in dict.fromkeys(work for _, work in columns):
        of_work = [[v for key, v in side.items() if key[2] == work] for side in speeds]
        means, least = (joined(f(values) for values in of_work) for f in (geometric_mean, min))
        print(f"\n{work}: mean {means}, least {least}")


def print_table(table: Sequence[Sequence[str]]) -> None:
    """Prints a table as Markdown."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for k, line in enumerate(table):
        print("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |")
        if k == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("--of", default=OURS, help="the contender that the others are held against")
    arguments = parser.parse_args()
    everything = [row for path in arguments.csv for row in read(path)]
    held = everything if arguments.of == OURS else held_against(everything, arguments.of)
    print_speedups(held, arguments.of)
    print_summary(held, arguments.of)
    if arguments.of == OURS:
        print_peaks(everything)
        print_groups(everything)
