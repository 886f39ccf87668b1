"""native/library.cpp refuses a record (native/interface.h) with wrong sizes before it reads anything."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence

import pytest
import torch
from support.native_loops import make, needs_native, train
from support.oracle import random_states

from masked_rnn._backends.bptt import library

pytestmark = needs_native
WEIGHTS = ("w_ih*", "w_hh*", "b_ih*", "b_hh*", "w_hr*")
LAYER = [
    *("cell", "item_bytes", "directions", "batch", "sequences", "steps", "rows", "inputs", "hidden", "fed_back"),
    *("threads", "parallel", "gather", "scatter", "sizes*", "starts*", "index*", "order*", "x*", "x_row"),
    *(f"weights{d}_{name}" for d in range(2) for name in WEIGHTS),
    *("history*", "cells*", "buffer*"),
]
"""The fields in their order. A star marks an Array, which is two numbers: its address and its size."""
RECORDS = {
    "forward": [*LAYER, "h*", "c*", "output*", "output_row"],
    "backward": [
        *(*LAYER, "d_output*", "d_output_row", "dh*", "dc*", "dx*"),
        *(f"gradients{d}_{name}" for d in range(2) for name in WEIGHTS),
    ],
}
OPTIONAL = ("index", "order", "history", "d_output", "dx")


class Record:
    """A call's numbers by their names. The test fails if a changed number is not refused."""

    def __init__(self, function: str, numbers: Sequence[int], call: Callable[[str, Sequence[int]], None]) -> None:
        names = []
        for field in RECORDS[function]:
            name = field.removesuffix("*")
            names += [name] if field == name else [name, f"{name}_size"]
        self.function, self.call = function, call
        self.numbers = dict(zip(names, numbers, strict=True))
        self.arrays = [name for name in names if f"{name}_size" in names and self.numbers[name]]

    def __getitem__(self, name: str) -> int:
        return self.numbers[name]

    def refuses(self, fault: str = "", **changes: int) -> None:
        assert not set(changes) - set(self.numbers)
        with pytest.raises(RuntimeError, match=rf"given wrong sizes \(.*{fault}.*\)"):
            self.call(self.function, list({**self.numbers, **changes}.values()))

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

    def run(cell: str, bidirectional: bool, check: Callable[[Record], None]) -> None:
        seen = []
        call = library.call

        def checking(function: str, numbers: Sequence[int]) -> None:
            check(Record(function, numbers, call))
            call(function, numbers)
            seen.append(function)

        with monkeypatch.context() as patch:
            patch.setattr(library, "call", checking)
            layer = make(cell, 3, 5, bidirectional=bidirectional)
            x = torch.randn(4, 6, 3, requires_grad=True)
            # Each sequence has a step, and the last row of the input is one that runs, so every number is needed.
            train(layer, x, random_states(layer, 4, torch.float32), lengths=[2, 6, 3, 6])
        assert seen == ["forward", "backward", "forward"]

    return run


@pytest.mark.parametrize("bidirectional", [False, True])
def test_short_array_is_refused(cell: str, bidirectional: bool, check_each: Callable[..., None]) -> None:
    def check(record: Record) -> None:
        assert len(record.arrays) > 9
        for name in record.arrays:
            record.refuses(**{f"{name}_size": record[f"{name}_size"] - 1})
            record.refuses(**{f"{name}_size": 0})
            record.refuses(**{f"{name}_size": -1})

    check_each(cell, bidirectional, check)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_missing_array_is_refused(cell: str, bidirectional: bool, check_each: Callable[..., None]) -> None:
    def check(record: Record) -> None:
        for name in record.arrays:
            if name not in OPTIONAL and name != "gradients0_w_hh":  # this one asks for all of them
                record.refuses(**{name: 0})

    check_each(cell, bidirectional, check)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_mismatched_sizes_are_refused(cell: str, bidirectional: bool, check_each: Callable[..., None]) -> None:
    def check(record: Record) -> None:
        sizes = ("batch", "sequences", "steps", "rows", "inputs", "hidden", "fed_back")
        for name in (*sizes, "x_row", *(n for n in ("output_row", "d_output_row") if n in record.numbers)):
            for value in (record[name] + 1, 1 << 31, -1):
                record.refuses(**{name: value})
        for name in sizes:
            if name != "inputs":  # with fewer inputs, or a smaller projected state, all arrays are large enough
                record.refuses(**{name: 0})
                if cell != "lstm-proj" or name not in ("hidden", "fed_back"):
                    record.refuses(**{name: record[name] - 1})
        for name, values in (("cell", (-1, 4)), ("item_bytes", (0, 2, 16)), ("directions", (0, 3)), ("threads", (0,))):
            for value in values:
                record.refuses("sizes", **{name: value})

    check_each(cell, bidirectional, check)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_tables_pointing_outside_are_refused(cell: str, bidirectional: bool, check_each: Callable[..., None]) -> None:
    def check(record: Record) -> None:
        rows, steps = record["rows"], record["steps"]
        for value in (-1, 24, 1 << 31, 1 << 62, -(1 << 62)):
            for place in (0, rows // 2, rows - 1):
                record.refuses_table("", "index", place, value)
        for value in (-1, 4, 1 << 62):
            for place in (0, 3):
                record.refuses_table("order", "order", place, value)
        for place, value in ((0, 3), (1, 5), (2, 4), (steps - 1, 0), (steps, 1), (1, -1)):
            record.refuses_table("numbers of sequences", "sizes", place, value)
        for place in range(steps + 1):
            for value in (-1, rows + 1):
                record.refuses_table("numbers of sequences", "starts", place, value)

    check_each(cell, bidirectional, check)


def test_unsupported_cpu_level_is_refused(check_each: Callable[..., None]) -> None:
    found = library.find()
    assert isinstance(found, library.Library)

    def check(record: Record) -> None:
        numbers = array("q", record.numbers.values())
        for level in (-1, 3, 1 << 40):
            assert library.FAULTS[found.functions[record.function](numbers.buffer_info()[0], level)] == "sizes"

    check_each("gru", False, check)
