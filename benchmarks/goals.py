"""The figures to reach, worked out from the rows of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from statistics import geometric_mean
from typing import NamedTuple

from .rows import Row

FRAMEWORKS = ("keras", "keras-xla", "flax", "paddle")


class Figure(NamedTuple):
    cell: str
    what: str
    goal: str
    value: str
    reached: bool


def figures(rows: Sequence[Row]) -> list[Figure]:
    cells = dict.fromkeys(row.cell for row in rows)
    return [figure for cell in cells for figure in _of_cell(cell, [row for row in rows if row.cell == cell])]


def _of_cell(cell: str, rows: Sequence[Row]) -> Iterable[Figure]:
    gru = cell == "gru"
    layer = f"nn.{cell.upper()}"

    def compare(work: str, against: Sequence[str], mean: float | None, least: float | None) -> Iterable[Figure]:
        found = speedups(rows, work, against)
        if found:
            yield _figure(cell, f"{work} against {name_of(against[0], work, layer)}", found, mean, least)

    yield from compare("training", ["masked_rnn-ops"], None, None)
    yield from compare("inference", ["masked_rnn-ops"], None, None)
    yield from compare("training", ["recipe"], 6.5 if gru else 5, {"gru": 2.4, "lstm": 1.5, "rnn": 2.5}[cell])
    for row in rows:
        if row.work == "growth" and row.contender == "recipe" and row.T == 2000:
            yield _at_least(cell, "training at T=2000 against the recipe", row.ratio_to_masked_rnn, 60)
    ours = {row.T: row.median_ms for row in rows if row.work == "growth" and row.contender == "masked_rnn"}
    if ours.get(500) and ours.get(4000):
        grows = (ours[4000] / 4000) / (ours[500] / 500)  # type: ignore[operator]
        yield Figure(cell, "cost per step from T=500 to T=4000 grows", "≤ 1.15×", f"{grows:.2f}×", grows <= 1.15)
    yield from compare("training without lengths", ["padded"], 1.5 if gru else None, 1 if gru else None)
    yield from compare("inference", ["recipe"], 1.8 if cell == "lstm" else 2, 1.2 if cell == "rnn" else 1.1)
    for row in rows:
        if row.work == "memory" and row.contender == "padded" and row.ratio_to_masked_rnn:
            share = 1 / row.ratio_to_masked_rnn
            what = f"peak memory of a training step at T={row.T} against {layer} on the padded batch"
            yield Figure(cell, what, "≤ 0.35×", f"{share:.2f}×", share <= 0.35)
    for work, most in product(("training of one step", "inference of one step"), (1.15, 1.5)):
        work += " with lengths" * (most == 1.5)
        for shape, ratio in speedups(rows, work, ["padded"]).items():
            what = f"{work}, {shape}: its time over {layer}'s"
            yield Figure(cell, what, f"≤ {most}×", f"{1 / ratio:.2f}×", 1 / ratio <= most)
    threads = max((row.threads or 0 for row in rows), default=0)
    for row in rows:
        ratio = row.ratio_to_masked_rnn
        if row.work == "threads" and row.contender != "masked_rnn" and ratio:
            yield Figure(
                cell, f"training {row.shape}: {threads} threads over one", "≥ 1.6×", f"{ratio:.2f}×", ratio >= 1.6
            )
        if row.work == "busy" and row.contender.startswith("masked_rnn, ") and ratio:
            what = f"training {row.shape} beside a busy process: its time over the quiet one"
            yield Figure(cell, what, "≤ 1.5×", f"{ratio:.2f}×", ratio <= 1.5)
    best = max((row.gflops or 0 for row in rows if row.contender.startswith("sgemm")), default=0)
    for row in rows:
        if row.work == "peak" and row.contender == "masked_rnn" and row.gflops and best:
            goal = 75 if row.H == 512 else 45
            share = 100 * row.gflops / best
            what = f"share of sgemm peak ({best:.0f} GFLOP/s) in training, N={row.N}, H={row.H}"
            yield Figure(cell, what, f"≥ {goal} %" if gru else "", f"{share:.0f} %", share >= goal or not gru)
    yield from compare("training", ["padded"], None, None)
    for work, mean, least in (("training", 2.5, 1.2), ("inference", 1.4, 1.0)):
        for against in (["keras", "keras-xla"], ["flax"], ["paddle"], ["onnxruntime"]):
            yield from compare(work, against, mean if gru else None, least if gru else None)
    for work in ("training", "inference"):
        yield from _times(cell, f"{work}: the recipe's time over the products' alone", rows, work, "recipe", "products")
    what = "training compiled: its time over eager's"
    yield from _times(cell, what, rows, "training", "masked_rnn-compiled", "masked_rnn", 1.1)
    what = "exported, in ONNX Runtime: its time over a hand-built graph's"
    yield from _times(cell, what, rows, "inference", "masked_rnn-onnx", "onnxruntime", 1.1)


def speedups(rows: Iterable[Row], work: str, against: Sequence[str]) -> dict[str, float]:
    """By shape: how many times as fast as the fastest of those it is held against."""
    found: dict[str, float] = {}
    for row in rows:
        if row.work == work and row.contender in against and row.ratio_to_masked_rnn:
            found[row.shape] = min(found.get(row.shape, float("inf")), row.ratio_to_masked_rnn)
    return found


def name_of(contender: str, work: str, layer: str) -> str:
    padded = f"{layer} itself" if "without" in work else f"{layer} on the padded batch"
    names = {"recipe": "the recipe", "padded": padded, "keras": "Keras", "flax": "Flax", "paddle": "Paddle"}
    names |= {"onnxruntime": "ONNX Runtime", "masked_rnn-ops": "the layer in PyTorch's ops"}
    return names[contender]


def _figure(cell: str, what: str, found: dict[str, float], mean: float | None, least: float | None) -> Figure:
    average, lowest = geometric_mean(found.values()), min(found, key=found.__getitem__)
    goals = [f"mean ≥ {mean:g}×" if mean else "", f"least ≥ {least:.3g}×" if least else ""]
    value = f"mean {average:.2f}×, least {found[lowest]:.2f}× ({lowest}), {len(found)} shapes"
    reached = average >= (mean or 0) and found[lowest] >= (least or 0)
    return Figure(cell, what, ", ".join(filter(None, goals)), value, reached)


def _times(
    cell: str, what: str, rows: Sequence[Row], work: str, numerator: str, denominator: str, most: float | None = None
) -> Iterable[Figure]:
    above, below = speedups(rows, work, [numerator]), speedups(rows, work, [denominator])
    found = {shape: above[shape] / below[shape] for shape in above if shape in below}
    if found:
        average, highest = geometric_mean(found.values()), max(found, key=found.__getitem__)
        value = f"mean {average:.2f}×, most {found[highest]:.2f}× ({highest}), {len(found)} shapes"
        yield Figure(cell, what, f"mean ≤ {most:.2f}×" if most else "", value, most is None or average <= most)


def _at_least(cell: str, what: str, value: float | None, goal: float) -> Figure:
    return Figure(cell, what, f"≥ {goal:g}×", f"{value or 0:.1f}×", (value or 0) >= goal)
