"""How many kernels a call starts on a device besides cuDNN's. `python tests/test_launches.py` prints the counts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from support.batch import LENGTHS, STEPS
from support.oracle import CELLS, INPUT, as_hx, as_tuple, masked, random_states
from support.python_calls import count
from support.simulated_device import DEVICE, SimulatedTensor, counting
from support.strict_kernel import with_cudnn

GIVEN: dict[str, Any] = {
    "lengths": {"lengths": torch.tensor(LENGTHS)},
    "mask": {"mask": torch.arange(STEPS) < torch.tensor(LENGTHS).unsqueeze(1)},
}


def count_kernels(
    cell: str, layers: int, directions: int, given: str, backend: str = "held", with_hx: bool = False
) -> tuple[int, int]:
    """Returns the kernels of forward and of backward."""
    options: dict[str, Any] = {"num_layers": layers, "bidirectional": directions == 2, "flatten_hidden": False}
    layer = masked(cell, batch_first=True, backend=backend, **options)
    hx = as_hx([h.to(DEVICE) for h in random_states(layer, 4, torch.float32)]) if with_hx else None
    layer = layer.to(DEVICE)
    x = torch.randn(4, STEPS, INPUT).to(DEVICE).requires_grad_()
    there = {name: value.to(DEVICE) for name, value in GIVEN[given].items()}
    layer(x, hx, **there)  # constants are made in the first call
    with counting() as launched:
        output, last = layer(x, hx, **there)
        forward = len(launched)
        results = [output, *as_tuple(last)]
        pulled = [torch.ones_like(t) for t in results]
        launched.clear()
        torch.autograd.grad(results, [x, *layer.parameters()], pulled)
        return forward, len(launched)


BUDGET = {  # of lengths: forward and backward of one layer, and of each further one; with two directions
    "gru": ((12, 6), (5, 3), (16, 6), (5, 4)),
    "lstm": ((16, 7), (7, 7), (20, 9), (9, 8)),
    "lstm-proj": ((16, 7), (7, 7), (20, 9), (9, 8)),
    "rnn-tanh": ((17, 8), (7, 8), (21, 12), (10, 11)),
    "rnn-relu": ((16, 6), (6, 6), (19, 8), (8, 7)),
}
TO_THE_FRONT = (7, 4)
"""What it takes more to move steps to the front by a mask, and back. A GRU's stay where they are."""


def assert_within(found: Sequence[int], most: Sequence[int]) -> None:
    """Compares each number with its own limit. Tuples are compared by their first difference alone."""
    assert all(a <= b for a, b in zip(found, most, strict=True)), (found, most)


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return with_cudnn(monkeypatch, lambda x: isinstance(x, SimulatedTensor))


def test_each_number_has_its_own_limit() -> None:
    assert_within((16, 6), (16, 6))
    for found in ((15, 99), (17, 1)):
        with pytest.raises(AssertionError):
            assert_within(found, (16, 6))


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_held_layers_start_few_kernels(
    cell: str, layers: int, directions: int, given: str, operators: list[str]
) -> None:
    first, further = BUDGET[cell][2 * directions - 2 : 2 * directions]
    moved = TO_THE_FRONT if given == "mask" and cell != "gru" else (0, 0)
    most = tuple([f + (layers - 1) * m + extra for f, m, extra in zip(first, further, moved, strict=True)])
    operators.clear()
    found = count_kernels(cell, layers, directions, given)
    assert_within(found, most)
    assert operators == ["cudnn_forward"] * 2 * layers + ["cudnn_backward"] * layers  # forward runs twice here


def test_initial_states_of_a_gru_cost_few_kernels_more(operators: list[str]) -> None:
    assert_within(count_kernels("gru", 1, 1, "lengths", with_hx=True), (16, 6))


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize(("layers", "directions", "most"), [(1, 1, (18, 13)), (1, 2, (33, 29)), (2, 2, (52, 58))])
def test_padded_starts_no_more_kernels_than_before(layers: int, directions: int, most: tuple[int, int]) -> None:
    assert_within(count_kernels("gru", layers, directions, "lengths", "padded"), most)


@pytest.mark.parametrize("learns", [False, True])
def test_held_call_runs_little_python(learns: bool, operators: list[str]) -> None:
    layer, x = masked("gru", batch_first=True, backend="held").to(DEVICE), torch.randn(4, STEPS, INPUT).to(DEVICE)
    lengths = torch.tensor(LENGTHS).to(DEVICE)
    with torch.set_grad_enabled(learns):
        layer(x, lengths=lengths)
        assert count(lambda: layer(x, lengths=lengths)).calls <= 120


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patched:
        with_cudnn(patched, lambda x: isinstance(x, SimulatedTensor))
        for backend, cell, given in product(("padded", "held"), CELLS, GIVEN):
            found = [(f"{n}x{d}", count_kernels(cell, n, d, given, backend)) for n in (1, 2, 3) for d in (1, 2)]
            print(backend, cell, given, *found)
