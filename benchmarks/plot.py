"""Draws the charts of the docs from the CSV of a run. They can be read on light and on dark pages.

`python -m benchmarks.plot FILE.csv … [--out docs/images]`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .contenders import CONTENDERS
from .rows import Row, read

GREY = "#7a7a7a"
"""The color of text and lines: its contrast is above 4 on white and on black."""
COLOURS = {
    "masked_rnn": "#d9480f",
    "recipe": "#3b82c4",
    "padded": "#7a9a3a",
    "keras": "#c08a1e",
    "keras-xla": "#c08a1e",
    "flax": "#9a6fc9",
    "paddle": "#2fa39a",
    "onnxruntime": "#c75c8d",
}
WIDTH = 5.0
"""In inches. On a phone, where a picture is 360 pixels wide, its letters are about as large as the text's."""
LABELS = {c.name: c.label for c in CONTENDERS}
STYLE = {
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "legend.frameon": False,
    "legend.labelcolor": GREY,
    "svg.hashsalt": "masked_rnn",
    "text.color": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "images")
    arguments = parser.parse_args()
    rows = [row for path in arguments.csv for row in read(path)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    mpl.rcParams.update(STYLE)
    for cell in dict.fromkeys(row.cell for row in rows):
        mine = [row for row in rows if row.cell == cell]
        for work, draw in (("training", bars), ("inference", bars), ("growth", growth)):
            chosen = [row for row in mine if row.work == work]
            if chosen:
                figure = draw(cell, work, chosen)
                path = arguments.out / f"{work}-{cell}.svg"
                figure.savefig(path, transparent=True, metadata={"Date": None})
                print(path)


def bars(cell: str, work: str, rows: Sequence[Row]) -> Figure:
    """Draws how many times as long as masked_rnn the others take, by shape. For Keras, the faster of its two ways."""
    shapes = list(dict.fromkeys(row.shape for row in rows))
    groups = [["recipe"], ["padded"], ["keras", "keras-xla"], ["flax"], ["paddle"], ["onnxruntime"]]
    groups = [group for group in groups if any(row.contender in group for row in rows)]
    figure = Figure(figsize=(WIDTH, 7.5), layout="constrained")
    axes = figure.add_subplot()
    thickness = 0.8 / len(groups)
    for k, group in enumerate(groups):
        lengths = []
        for shape in shapes:
            ratios = [row.ratio_to_masked_rnn for row in rows if row.shape == shape and row.contender in group]
            lengths.append(min((ratio for ratio in ratios if ratio), default=float("nan")))
        at = [y + (k - (len(groups) - 1) / 2) * thickness for y in range(len(shapes))]
        axes.barh(
            at,
            [length - 1 for length in lengths],
            thickness * 0.92,
            left=1,
            color=COLOURS[group[0]],
            label=LABELS[group[0]](cell),
        )
    axes.axvline(1, color=COLOURS["masked_rnn"], linewidth=1.5, label=f"Masked{cell.upper()}")
    axes.set_xscale("log")
    plain_ticks(axes.xaxis)
    axes.set_yticks(range(len(shapes)), [shape.replace(" ", "\n") for shape in shapes])
    axes.invert_yaxis()
    axes.set_xlabel(f"time of {'a training step' if work == 'training' else work}, masked_rnn = 1")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def growth(cell: str, work: str, rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name in ("recipe", "padded", "masked_rnn"):
        points = sorted(
            (row.T, row.median_ms / 1e3) for row in rows if row.contender == name and row.T and row.median_ms
        )
        if points:
            label = f"Masked{cell.upper()}" if name == "masked_rnn" else LABELS[name](cell)
            axes.loglog(*zip(*points, strict=True), marker="o", color=COLOURS[name], label=label)
    plain_ticks(axes.yaxis)
    plain_ticks(axes.xaxis)
    axes.set_xticks(sorted({row.T for row in rows if row.T}))
    axes.set_xlabel(f"time steps T (N={rows[0].N}, H={rows[0].H})")
    axes.set_ylabel("seconds of a training step")
    axes.legend()
    return figure


def plain_ticks(axis: Axis) -> None:
    """Labels a logarithmic axis with plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


if __name__ == "__main__":
    main()
