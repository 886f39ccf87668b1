"""The rows of the CSV, and how the file is written and read."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Row:
    cell: str
    work: str
    """training, training without lengths, inference; training or inference of one step, without or with lengths;
    growth, memory, peak, threads and busy (all of training)"""
    shape: str
    N: int | None
    T: int | None
    I: int | None  # noqa: E741
    H: int | None
    L: int | None
    bidirectional: bool | None
    contender: str
    median_ms: float | None = None
    quartile_range_ms: float | None = None
    ratio_to_masked_rnn: float | None = None
    """Its time divided by masked_rnn's, median over the rounds. Above 1, masked_rnn is faster (or smaller)."""
    rounds: int | None = None
    peak_mib: float | None = None
    gflops: float | None = None
    threads: int | None = None
    version: str = ""
    group: str = ""
    """The group of cases of the works short and regions"""


def write(path: Path, rows: Iterable[Row], facts: Mapping[str, str]) -> None:
    """Writes the CSV. It begins with facts about the run, as comments."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        for name, fact in facts.items():
            file.write(f"# {name}: {' '.join(fact.split())}\n")
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in asdict(row).items()})


def read(path: Path) -> list[Row]:
    types = {f.name: str(f.type).split(" |")[0] for f in fields(Row)}
    parse = {"int": int, "float": float, "bool": "True".__eq__, "str": str}

    def value(name: str, text: str) -> object:
        return None if text == "" and types[name] != "str" else parse[types[name]](text)

    with path.open(newline="", encoding="utf-8") as file:
        lines = (line for line in file if not line.startswith("#"))
        return [Row(**{k: value(k, v) for k, v in raw.items()}) for raw in csv.DictReader(lines)]  # type: ignore[arg-type]


def speedups(rows: Iterable[Row], work: str, against: Sequence[str]) -> dict[str, float]:
    """Returns, by shape, how many times as fast masked_rnn is as the fastest of the contenders `against`."""
    found: dict[str, float] = {}
    for row in rows:
        if row.work == work and row.contender in against and row.ratio_to_masked_rnn:
            found[row.shape] = min(found.get(row.shape, float("inf")), row.ratio_to_masked_rnn)
    return found
