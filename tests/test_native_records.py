"""engine/stack.h refuses a record (engine/interface.h) with wrong sizes before it reads anything."""

from __future__ import annotations

import ctypes
import re
from array import array
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.native_loops import SOURCES, make, needs_native, train
from support.oracle import random_states

from masked_rnn._backends.bptt import library
from masked_rnn._backends.bptt.record import ARRAYS, NUMBERS, Run
from masked_rnn._plan import plan_padded

pytestmark = needs_native
SIZES = ("batch", "steps", "sequences", "rows", "padded_rows", "inputs", "hidden", "fed_back", "layers", "directions")
FLAGS = (
    "has_biases",
    "projects",
    "batch_first",
    "input_is_padded",
    "output_is_padded",
    "first_is_flat",
    "last_is_flat",
)
PLANNED = {
    "lengths": {"lengths": [2, 6, 3, 6]},
    "mask": {"mask": torch.tensor([[n > t for t in range(6)] for n in (2, 6, 3, 6)])},
    "whole": {},
}
OPTIONAL = {
    "forward": {"lengths", "index", "order", "h_first", "saved"},
    "backward": {
        *("lengths", "index", "order", "d_output", "dh_last", "dc_last", "dh_first", "dc_first", "dx", "gradients"),
    },
}
"""Without these, a record is that of another call."""


class Record:
    """A call's record. The test fails if a changed number is not refused."""

    def __init__(self, function: str, run: Run, call: Callable[[str, Run], None]) -> None:
        self.function, self.run, self.call = function, run, call
        self.arrays = [name for name in ARRAYS if getattr(run, name)]

    def __getitem__(self, name: str) -> int:
        return int(getattr(self.run, name))

    def refuses(self, fault: str = "", **changes: int) -> None:
        changed = Run.from_buffer_copy(self.run)
        for name, value in changes.items():
            setattr(changed, name, value)
        with pytest.raises(RuntimeError, match=rf"given wrong sizes \(.*{fault}.*\)"):
            self.call(self.function, changed)

    def refuses_table(self, fault: str, name: str, place: int, value: int) -> None:
        """Checks that a table with another number at one place is refused."""
        table = array("q")
        table.frombytes(ctypes.string_at(self[name], 8 * self[f"{name}_size"]))
        assert table[place] != value
        table[place] = value
        self.refuses(fault, **{name: table.buffer_info()[0]})


@pytest.fixture
def check_each(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Checks each call of a training step while its memory is allocated."""

    def run(cell: str, planned: str, check: Callable[[Record], None], **options: Any) -> None:
        seen = []
        call = library.call

        def checking(function: str, record: Run) -> None:
            check(Record(function, record, call))
            call(function, record)
            seen.append(function)

        with monkeypatch.context() as patch:
            patch.setattr(library, "call", checking)
            layer = make(cell, 3, 5, **options)
            x = torch.randn(4, 6, 3, requires_grad=True)
            # Each sequence has a step, and the last row of the input is one that runs, so every number is needed.
            train(layer, x, random_states(layer, 4, torch.float32), **PLANNED[planned])
        assert seen == ["forward", "backward", "forward"]

    return run


@pytest.mark.skipif(not SOURCES, reason="an installed wheel has no sources")
def test_fields_are_those_of_the_header() -> None:
    header = (library.FOLDER / "engine" / "interface.h").read_text()
    fields = re.findall(r"^    (int64_t|Parallel|Array) (\w+);", header.split("struct Run {")[1].split("};")[0], re.M)
    assert [name for kind, name in fields if kind != "Array"] == list(NUMBERS)
    assert [name for kind, name in fields if kind == "Array"] == list(ARRAYS)
    assert [name for _, name in fields] == [*NUMBERS, *ARRAYS]


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("planned", PLANNED)
@pytest.mark.parametrize("stack", [(1, False), (2, True)])
def test_short_or_missing_array_is_refused(
    cell: str, planned: str, stack: tuple[int, bool], check_each: Callable[..., None]
) -> None:
    def check(record: Record) -> None:
        assert len(record.arrays) >= 5
        for name in record.arrays:
            for size in (record[f"{name}_size"] - 1, 0, -1, -(1 << 62)):
                record.refuses(**{f"{name}_size": size})
            if name not in OPTIONAL[record.function]:
                record.refuses(**{name: 0})
        for name in ("weights", *(["gradients"] if record.function == "backward" else [])):
            for place in range(1, 2 * record[f"{name}_size"], 2):
                size = ctypes.c_int64.from_address(record[name] + 8 * place).value
                for wrong in (size - 1, 0, -1):
                    table = array("q")
                    table.frombytes(ctypes.string_at(record[name], 16 * record[f"{name}_size"]))
                    table[place] = wrong
                    record.refuses(name, **{name: table.buffer_info()[0]})

    layers, bidirectional = stack
    check_each(cell, planned, check, num_layers=layers, bidirectional=bidirectional)


@pytest.mark.parametrize("planned", PLANNED)
def test_mismatched_sizes_are_refused(cell: str, planned: str, check_each: Callable[..., None]) -> None:
    def check(record: Record) -> None:
        for name in SIZES:
            for value in (record[name] + 1, 1 << 31, 1 << 62, -1, -(1 << 63)):
                if (name, planned) != ("padded_rows", "mask") or value < record[name]:
                    record.refuses(**{name: value})
            if name != "inputs":  # with fewer inputs all arrays are large enough
                record.refuses(**{name: 0})
        wrong = {"cell": (-1, 4), "item_bytes": (0, 2, 16), "directions": (0, 3), "threads": (0, -1)}
        for name, values in wrong.items():
            for value in values:
                record.refuses("sizes", **{name: value})
        for name in FLAGS:
            record.refuses("sizes", **{name: 2})

    check_each(cell, planned, check)


def test_wrong_lengths_are_refused(cell: str, check_each: Callable[..., None]) -> None:
    def check(record: Record) -> None:
        for value in (-1, 7, 1 << 31, 1 << 62, -(1 << 62)):
            for place in range(4):
                record.refuses_table("lengths", "lengths", place, value)
        record.refuses_table("sizes", "lengths", 0, 3)  # other rows than the record says
        record.refuses_table("sizes", "lengths", 0, 0)

    check_each(cell, "lengths", check)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_tables_pointing_outside_are_refused(cell: str, bidirectional: bool, check_each: Callable[..., None]) -> None:
    def check(record: Record) -> None:
        rows, steps = record["rows"], record["steps"]
        for value in (-1, 24, 1 << 31, 1 << 62, -(1 << 62)):
            for place in (0, rows // 2, rows - 1):
                record.refuses_table("index", "index", place, value)
                # An output of more rows than the index may point to does not help.
                table = array("q", ctypes.string_at(record["index"], 8 * rows))
                table[place] = value
                record.refuses("index", index=table.buffer_info()[0], output_is_padded=0)
        for value in (-1, 4, 1 << 62):
            for place in (0, 3):
                record.refuses_table("order", "order", place, value)
        for place, value in ((0, 3), (1, 5), (2, 4), (steps - 1, 0), (steps, 1), (1, -1), (0, 1 << 62)):
            record.refuses_table("steps", "sizes", place, value)
        for place in range(steps + 1):
            for value in (-1, rows + 1, 1 << 62):
                record.refuses_table("steps", "starts", place, value)
        record.refuses("index", index=0)

    check_each(cell, "mask", check, bidirectional=bidirectional)


def test_unsupported_cpu_level_is_refused(check_each: Callable[..., None]) -> None:
    found = library.find()
    assert isinstance(found, library.Library)

    def check(record: Record) -> None:
        for level in (-1, 3, 1 << 40):
            assert getattr(found, record.function)(ctypes.byref(record.run), level) == b"level"

    check_each("gru", "whole", check)


@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_make_the_plan_of_python(batch_first: bool) -> None:
    """Runs a layer once by its lengths, which are planned in C++, and once by Python's plan of the same lengths."""
    from masked_rnn._backends.bptt import passes
    from masked_rnn._backends.bptt.job import Job
    from masked_rnn._spec import spec_of

    for lengths in ([5, 0, 3, 5, 1, 0, 4], [5, 5, 4, 1, 0], [0, 0, 1], [2], [1, 2, 3, 4, 5]):
        for bidirectional in (False, True):
            layer = make("gru", 3, 4, num_layers=2, bidirectional=bidirectional)
            N, steps = len(lengths), 5
            x = torch.randn((N, steps, 3) if batch_first else (steps, N, 3))
            spec, weights = spec_of(layer), list(layer.parameters())
            counts = (sum(n > 0 for n in lengths), sum(lengths))
            plan = plan_padded(torch.tensor(lengths), steps, batch_first, torch.device("cpu"))
            jobs = [
                Job(spec, N, steps, batch_first, array("q", lengths), counts),
                Job(spec, N, steps, batch_first, plan=plan),
            ]
            results = []
            for job in jobs:
                output, (last,), saved = passes.forward(job, x, (), weights, save=True)
                assert saved is not None
                grads = (torch.ones_like(output), torch.ones_like(last))
                dx, _, d_weights = passes.backward(job, x, (), weights, saved, grads, True, True)
                results.append([output, last, saved, dx, *(d_weights or [])])
            for a, b in zip(*results, strict=True):
                assert a is not None
                assert b is not None
                assert torch.equal(a, b)


def test_counts_are_right() -> None:
    def count(lengths: list[int], steps: int) -> library.Counts:
        table = array("q", lengths)
        return library.count(table.buffer_info()[0], len(lengths), steps)

    assert count([3, 0, 2, 2], 3) == (3, 7, -1, 2)
    assert count([3, 2, 2, 0], 3) == (3, 7, -1, -1)
    assert count([3, 2, 4, -1], 3).fault == 2
    assert count([3, -1], 3).fault == 1
