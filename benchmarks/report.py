"""Prints progress, and tables of speed-ups by shape, memory, and the share of the peak.

`python -m benchmarks.report FILE.csv … [--of masked_rnn-ops]` prints the tables of earlier runs, like those in
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean

from .contenders import CONTENDERS
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
    for cell, work in dict.fromkeys((row.cell, row.work) for row in rows):
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
    for cell in dict.fromkeys(row.cell for row in rows):
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
