"""Compares every backend, over the full grid, with each sequence alone: outputs, last states and every gradient."""

from __future__ import annotations

import pytest
import torch
from support.oracle import (
    BACKENDS,
    INPUT,
    assert_same,
    call,
    cotangents,
    masked,
    oracle,
    prefix_mask,
    random_states,
)

STEPS = 5
LENGTHS = {
    "none": None,
    "full": [5, 5, 5, 5],
    "mixed": [3, 5, 1, 4],
    "zeros": [0, 4, 0, 2],
    "falling": [5, 3, 3, 0],
    "short": [2, 4, 1, 3],
    "empty": [0, 0, 0, 0],
}


@pytest.mark.slow_but_each(3)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("bias", "with_hx"), [(True, True), (False, False)])
def test_lengths_match_each_sequence_alone(
    cell: str, layers: int, bidirectional: bool, bias: bool, with_hx: bool, ran: list[str]
) -> None:
    batch_first = (layers == 1) ^ bidirectional ^ bias  # every pair of options occurs
    layer = masked(cell, num_layers=layers, bidirectional=bidirectional, bias=bias, batch_first=batch_first).double()
    for name, lengths in LENGTHS.items():
        x = torch.randn(4, STEPS, INPUT, dtype=torch.float64)
        states = random_states(layer, 4)
        pulled = cotangents(layer, 4, STEPS)
        mask = prefix_mask(lengths or [STEPS] * 4, STEPS)
        expected = oracle(layer, x, mask, states if with_hx else [torch.zeros_like(h) for h in states], pulled)
        for layer.backend in BACKENDS:
            found = call(layer, x, states if with_hx else None, pulled, lengths=lengths)
            assert_same(found, expected, note=(name, layer.backend))
            assert ran.pop() == ("bptt" if name == "empty" else layer.backend)


MASKS = {
    "left padding": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "holes": [[1, 0, 1, 0, 0], [0, 1, 0, 0, 1], [1, 1, 1, 1, 0]],
    "empty rows": [[0, 0, 0, 0, 0], [0, 1, 1, 0, 1], [0, 0, 0, 0, 0]],
    "nothing": [[0, 0, 0, 0, 0]] * 3,
    "everything": [[1, 1, 1, 1, 1]] * 3,
}


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize(
    ("layers", "bidirectional", "batch_first"), [(1, False, True), (1, True, False), (2, False, False), (2, True, True)]
)
def test_masks_match_each_sequence_alone(
    cell: str, backend: str, layers: int, bidirectional: bool, batch_first: bool, ran: list[str]
) -> None:
    options = {"num_layers": layers, "bidirectional": bidirectional, "batch_first": batch_first}
    layer = masked(cell, backend=backend, **options).double()
    for name, rows in MASKS.items():
        mask = torch.tensor(rows, dtype=torch.bool)
        x = torch.randn(3, 5, INPUT, dtype=torch.float64)
        states, pulled = random_states(layer, 3), cotangents(layer, 3, 5)
        expected = oracle(layer, x, mask, states, pulled)
        dirty = torch.where(mask.unsqueeze(-1), x, torch.nan)
        assert_same(call(layer, dirty, states, pulled, mask=mask), expected, note=name)
        assert ran.pop() == ("bptt" if name == "nothing" else backend)


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("garbage", [float("nan"), -float("inf"), 1e38])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_is_never_read(cell: str, backend: str, garbage: float, bidirectional: bool) -> None:
    layer = masked(cell, backend=backend, num_layers=2, bidirectional=bidirectional, batch_first=True).double()
    lengths = [3, 6, 0, 1]
    mask = prefix_mask(lengths, 6)
    x = torch.randn(4, 6, INPUT, dtype=torch.float64)
    states, pulled = random_states(layer, 4), cotangents(layer, 4, 6)
    clean = call(layer, x, states, pulled, lengths=lengths)
    dirty = call(layer, torch.where(mask.unsqueeze(-1), x, garbage), states, pulled, lengths=lengths)
    assert_same(dirty, clean, atol=0)
    assert dirty.output[~mask].eq(0).all()
    assert dirty.gradients["x"][~mask].eq(0).all()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_projection_to_one_number_matches_oracle(backend: str, bidirectional: bool) -> None:
    options = {"proj_size": 1, "num_layers": 2, "bidirectional": bidirectional, "batch_first": True}
    layer = masked("lstm", backend=backend, **options).double()
    x, mask = torch.randn(3, 5, INPUT, dtype=torch.float64), prefix_mask([3, 0, 5], 5)
    states, pulled = random_states(layer, 3), cotangents(layer, 3, 5)
    assert_same(call(layer, x, states, pulled, lengths=[3, 0, 5]), oracle(layer, x, mask, states, pulled))


def test_long_sequence_runs_in_chunks(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from masked_rnn._backends.bptt import library, ops_layer

    monkeypatch.setattr(library, "find", lambda: "left out here")
    for size in (1, 200, 1000):
        monkeypatch.setattr(ops_layer, "CHUNK_BYTES", size)
        for bidirectional in (False, True):
            layer = masked(cell, backend="bptt", num_layers=2, bidirectional=bidirectional).double()
            lengths = [7, 12, 3, 0, 10]
            x = torch.randn(5, 12, INPUT, dtype=torch.float64)
            states, pulled = random_states(layer, 5), cotangents(layer, 5, 12)
            expected = oracle(layer, x, prefix_mask(lengths, 12), states, pulled)
            assert_same(call(layer, x, states, pulled, lengths=lengths), expected)


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize(("batch", "steps"), [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("given", ["lengths", "mask"])
def test_call_without_steps_returns_hx(cell: str, backend: str, batch: int, steps: int, given: str) -> None:
    layer = masked(cell, backend=backend, num_layers=2, bidirectional=True, batch_first=True).double()
    x = torch.randn(batch, steps, INPUT, dtype=torch.float64)
    states, pulled = random_states(layer, batch), cotangents(layer, batch, steps)
    value = [0] * batch if given == "lengths" else torch.zeros(batch, steps, dtype=torch.bool)
    run = call(layer, x, states, pulled, **{given: value})
    assert run.output.shape == pulled[0].shape
    for h, before in zip(run.states, states, strict=True):
        assert torch.equal(h, before)
    for s, pulled_state in enumerate(pulled[1:]):
        assert torch.equal(run.gradients[f"hx[{s}]"], pulled_state)
    assert all(run.gradients[name].eq(0).all() for name, _ in layer.named_parameters())


def test_empty_batch_runs_without_lengths(cell: str, backend: str) -> None:
    layer = masked(cell, backend=backend)
    output, _ = layer(torch.randn(5, 0, INPUT, requires_grad=True))
    assert output.shape[:2] == (5, 0)
    output.sum().backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in layer.parameters())
