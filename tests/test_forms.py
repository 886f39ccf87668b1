"""Every form of a call: layouts, unbatched, packed and jagged input, states in both forms, lengths of every type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.oracle import (
    INPUT,
    ONE_STATE_AND_TWO,
    as_hx,
    as_tuple,
    assert_same,
    call,
    cotangents,
    masked,
    oracle,
    prefix_mask,
    random_states,
)
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

LENGTHS = [3, 6, 1, 4]


@pytest.fixture(params=ONE_STATE_AND_TWO)
def cell(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[False, True], ids=["forward", "bidirectional"])
def layer(cell: str, backend: str, request: pytest.FixtureRequest) -> Any:
    return masked(cell, num_layers=2, bidirectional=request.param, backend=backend, batch_first=True).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 6, INPUT, dtype=torch.float64)


@pytest.mark.parametrize(
    "lengths",
    [
        LENGTHS,
        tuple(LENGTHS),
        np.array(LENGTHS),
        np.array(LENGTHS, dtype=np.uint8),
        np.array(LENGTHS, dtype=np.uint64),
        np.array(LENGTHS[::-1])[::-1],
        np.array([n for length in LENGTHS for n in (length, 9)])[::2],
        np.array(LENGTHS, dtype=">i4"),
        np.array(LENGTHS, dtype="<u2"),
        np.array(LENGTHS, dtype=object),
        np.frombuffer(np.array(LENGTHS).tobytes(), dtype=np.int64),  # read-only
        range(3, 7),
        memoryview(np.array(LENGTHS)),
        list(np.array(LENGTHS)),
        [torch.tensor(n) for n in LENGTHS],
        *(torch.tensor(LENGTHS, dtype=d) for d in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)),
        torch.tensor([*LENGTHS, 9])[:4],
    ],
    ids=lambda v: f"{type(v).__name__}-{getattr(v, 'dtype', '')}",
)
def test_lengths_of_every_type_are_accepted(lengths: Any) -> None:
    layer = masked("gru", batch_first=True)
    x = torch.randn(4, 6, INPUT)
    before = list(lengths)
    expected = layer(x, lengths=torch.tensor([int(n) for n in before]))
    assert torch.equal(layer(x, lengths=lengths)[0], expected[0])
    assert list(lengths) == before


@pytest.mark.slow_but_each(2)
def test_lengths_are_third_positional_argument(layer: Any, x: Tensor) -> None:
    assert torch.equal(layer(x, None, LENGTHS)[0], layer(x, lengths=LENGTHS)[0])


def test_last_state_is_flattened_layer_by_layer(layer: Any, x: Tensor) -> None:
    output, last = layer(x, lengths=LENGTHS)
    layer.flatten_hidden = False
    _, h_n = layer(x, lengths=LENGTHS)
    for flat, whole in zip(as_tuple(last), as_tuple(h_n), strict=True):
        assert torch.equal(flat, torch.cat(list(whole), -1))
        assert flat.shape == (4, whole.size(0) * whole.size(2))
    P = layer.proj_size or layer.hidden_size
    D = 2 if layer.bidirectional else 1
    top = as_tuple(last)[0][:, -D * P :]
    at_last = output[torch.arange(4), torch.tensor(LENGTHS) - 1]
    assert torch.equal(top[:, :P], at_last[:, :P])
    if D == 2:
        assert torch.equal(top[:, P:], output[:, 0, P:])


@pytest.mark.parametrize("flatten_hidden", [False, True])
def test_returned_state_continues_sequence(cell: str, backend: str, x: Tensor, flatten_hidden: bool) -> None:
    """Two halves of a sequence, with the state passed on, give what the whole gives."""
    layer = masked(cell, num_layers=2, backend=backend, batch_first=True, flatten_hidden=flatten_hidden).double()
    whole, last = layer(x, lengths=[4, 6, 3, 5])
    first, state = layer(x[:, :3], lengths=[3, 3, 3, 3])
    second, end = layer(x[:, 3:], state, lengths=[1, 3, 0, 2])
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    for a, b in zip(as_tuple(end), as_tuple(last), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow_but_each(2)
def test_hx_is_accepted_in_both_forms(layer: Any, x: Tensor) -> None:
    states = random_states(layer, 4)
    flat = as_hx([h.transpose(0, 1).reshape(4, -1) for h in states])
    for lengths in (None, LENGTHS):
        whole, last = layer(x, as_hx(states), lengths)
        same, last_same = layer(x, flat, lengths)
        assert torch.equal(whole, same)
        assert all(torch.equal(a, b) for a, b in zip(as_tuple(last), as_tuple(last_same), strict=True))


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"lengths": 4},
        {"lengths": [4]},
        {"lengths": torch.tensor(4)},
        {"lengths": torch.tensor([4])},
        {"lengths": np.int64(4)},
        {"mask": torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)},
        {"lengths": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched_input_equals_batch_of_one(layer: Any, x: Tensor, given: dict[str, Any], batch_first: bool) -> None:
    layer.batch_first = True
    states = random_states(layer, 1)
    more = {"mask": given["mask"].unsqueeze(0)} if "mask" in given else {}
    if "lengths" in given:
        more["lengths"] = torch.as_tensor(given["lengths"]).reshape(1)
    batched, last = layer(x[:1], as_hx(states), **more)
    layer.batch_first = batch_first
    for flat in (False, True):
        hx = as_hx([h.transpose(0, 1).flatten() if flat else h.squeeze(1) for h in states])
        output, own = layer(x[0], hx, **given)
        assert torch.equal(output, batched[0])
        for a, b in zip(as_tuple(own), as_tuple(last), strict=True):
            assert torch.equal(a, b[0])
    layer.flatten_hidden = False
    _, own = layer(x[0], as_hx([h.squeeze(1) for h in states]), **given)
    for a, h in zip(as_tuple(own), states, strict=True):
        assert a.shape == h.squeeze(1).shape


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packed_sequence_matches_oracle(layer: Any, x: Tensor, enforce_sorted: bool) -> None:
    lengths = [6, 4, 3, 1] if enforce_sorted else LENGTHS
    states, pulled = random_states(layer, 4), cotangents(layer, 4, 6)
    expected = oracle(layer, x, prefix_mask(lengths, 6), states, pulled)
    x = x.requires_grad_()
    packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=enforce_sorted)
    output, last = layer(packed, as_hx(states))
    assert type(output) is type(packed)
    assert torch.equal(output.batch_sizes, packed.batch_sizes)
    padded, _ = pad_packed_sequence(output, batch_first=True)
    torch.testing.assert_close(padded, expected.output)
    for a, b in zip(as_tuple(last), expected.states, strict=True):
        torch.testing.assert_close(a, b.transpose(0, 1).flatten(1))
    loss = (padded * pulled[0]).sum()
    for h, c in zip(as_tuple(last), pulled[1:], strict=True):
        loss = loss + (h * c.transpose(0, 1).flatten(1)).sum()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    dx, *gradients = torch.autograd.grad(loss, [x, *parameters])
    torch.testing.assert_close(dx, expected.gradients["x"])
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(gradient, expected.gradients[name])


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("lengths", [LENGTHS, [6, 0, 2, 0], [0, 0, 0, 0]], ids=str)
def test_nested_tensor_matches_oracle(layer: Any, x: Tensor, lengths: list[int]) -> None:
    states, pulled = random_states(layer, 4), cotangents(layer, 4, 6)
    mask = prefix_mask(lengths, 6)
    expected = oracle(layer, x, mask, states, pulled)
    values = x[mask].requires_grad_()
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    nested = torch.nested.nested_tensor_from_jagged(values, offsets)
    output, last = layer(nested, as_hx(states))
    assert output.layout == torch.jagged
    assert output.offsets() is nested.offsets()
    torch.testing.assert_close(output.values(), expected.output[mask])
    for a, b in zip(as_tuple(last), expected.states, strict=True):
        torch.testing.assert_close(a, b.transpose(0, 1).flatten(1))
    loss = (output.values() * pulled[0][mask]).sum()
    for h, c in zip(as_tuple(last), pulled[1:], strict=True):
        loss = loss + (h * c.transpose(0, 1).flatten(1)).sum()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    dx, *gradients = torch.autograd.grad(loss, [values, *parameters], allow_unused=True)
    torch.testing.assert_close(dx, expected.gradients["x"][mask])
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(gradient, expected.gradients[name])


@pytest.mark.slow_but_each(2)
def test_nested_tensor_with_gaps_matches_each_row_alone(layer: Any) -> None:
    values = torch.randn(12, INPUT, dtype=torch.float64)
    lengths = torch.tensor([2, 0, 5])
    nested = torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 4, 6, 12]), lengths)
    output, last = layer(nested)
    for n, start in enumerate((0, 4, 6)):
        rows = slice(start, start + int(lengths[n]))
        alone, own = layer(values[rows].unsqueeze(0), lengths=[int(lengths[n])])
        torch.testing.assert_close(output.values()[rows], alone[0])
        for a, b in zip(as_tuple(last), as_tuple(own), strict=True):
            torch.testing.assert_close(a[n], b[0])
    assert output.values()[2:6].eq(0).all()


def test_nested_output_works_in_further_ops(layer: Any) -> None:
    nested = torch.nested.nested_tensor([torch.randn(n, INPUT).double() for n in LENGTHS], layout=torch.jagged)
    output, _ = layer(nested)
    assert (output * 2 + output).shape == output.shape


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("given", ["lengths", "mask"])
def test_enforce_sorted_skips_sorting(
    cell: str, backend: str, x: Tensor, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = masked(cell, num_layers=2, bidirectional=True, backend=backend, batch_first=True, enforce_sorted=True)
    layer = layer.double()
    lengths = [6, 4, 4, 0]
    states, pulled = random_states(layer, 4), cotangents(layer, 4, 6)
    mask = prefix_mask(lengths, 6)
    expected = oracle(layer, x, mask, states, pulled)
    monkeypatch.setattr(Tensor, "sort", lambda *_, **__: pytest.fail("nothing is to be sorted"))
    value = lengths if given == "lengths" else mask
    assert_same(call(layer, x, states, pulled, **{given: value}), expected)


def test_packed_sequence_accepts_int32_indices(cell: str, backend: str) -> None:
    """torch.nn takes any integers that can index."""
    packed = pack_sequence([torch.randn(n, INPUT) for n in (2, 4, 1)], enforce_sorted=False)
    places = (packed.sorted_indices.int(), packed.unsorted_indices.int())
    layer = masked(cell, backend=backend)
    expected, found = layer(packed), layer(PackedSequence(packed.data, packed.batch_sizes, *places))
    torch.testing.assert_close(found[0].data, expected[0].data)
    torch.testing.assert_close(found[1], expected[1])


def test_row_plan_matches_pack_sequence() -> None:
    """Rows run in the order of `pack_sequence`."""
    from masked_rnn._plan import plan_rows

    x = torch.randn(4, 6, INPUT)
    packed = pack_sequence([x[n, :length] for n, length in enumerate(LENGTHS)], enforce_sorted=False)
    plan = plan_rows(np.array(LENGTHS), np.arange(4) * 6, 1, 24, x.device)
    assert plan.batch_sizes == packed.batch_sizes.tolist()
    assert torch.equal(plan.order, packed.sorted_indices)
    assert torch.equal(x.flatten(0, 1)[plan.index], packed.data)


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("form", ["tensor", "list", "mask", "nested", "packed"])
def test_default_device_changes_nothing(cell: str, backend: str, form: str) -> None:
    """Lengths, and tensors made from them, stay on their device."""
    layer = masked(cell, backend=backend, batch_first=True)
    x, lengths = torch.randn(3, 5, INPUT), torch.tensor([3, 5, 1])
    mask = torch.arange(5) < lengths.unsqueeze(1)
    inputs: dict[str, tuple[Any, dict[str, Any]]] = {
        "tensor": (x, {"lengths": lengths}),
        "list": (x, {"lengths": [3, 5, 1]}),
        "mask": (x, {"mask": mask}),
        "nested": (torch.nested.as_nested_tensor([x[0, :3], x[1], x[2, :1]], layout=torch.jagged), {}),
        "packed": (pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False), {}),
    }
    given, more = inputs[form]
    expected = layer(given, **more)[1]
    with torch.device("meta"):
        found = layer(given, **more)[1]
    for a, b in zip(as_tuple(found), as_tuple(expected), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("given", ["lengths", "mask", "resets"])
def test_given_tensors_stay_resizable_after_call(cell: str, backend: str, given: str) -> None:
    """`Tensor.numpy` would prevent every later resize of the storage, which fully_shard needs for weights."""
    layer = masked(cell, batch_first=True, backend=backend)
    x = torch.randn(3, 5, INPUT, requires_grad=True)
    marks = torch.rand(3, 5) < 0.6
    values = {"lengths": torch.tensor([5, 2, 0]), "mask": marks, "resets": marks}
    output, _ = layer(x, **{given: values[given]})
    output.sum().backward()
    for tensor in (x, values[given], *layer.parameters()):
        assert tensor.untyped_storage().resizable()


def test_packed_sequence_with_empty_last_step_runs(cell: str, backend: str) -> None:
    """`torch.nn`'s layers take such a sequence."""
    layer = masked(cell, backend=backend)
    data = torch.randn(3, INPUT)
    output, last = layer(PackedSequence(data, torch.tensor([2, 1, 0])))
    expected, expected_last = layer(PackedSequence(data, torch.tensor([2, 1])))
    assert output.batch_sizes.tolist() == [2, 1, 0]
    for a, b in zip([output.data, *as_tuple(last)], [expected.data, *as_tuple(expected_last)], strict=True):
        torch.testing.assert_close(a, b)


def test_nested_tensor_accepts_int32_offsets(cell: str, backend: str) -> None:
    values = torch.randn(7, INPUT)
    given = [torch.tensor([0, 3, 7]), torch.tensor([2, 4])]
    results = []
    for dtype in (torch.int32, torch.int64):
        offsets, lengths = (t.to(dtype) for t in given)
        results.append(masked_last(cell, backend, torch.nested.nested_tensor_from_jagged(values, offsets, lengths)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def masked_last(cell: str, backend: str, input: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return as_tuple(masked(cell, backend=backend)(input)[1])


def test_gradient_ignores_later_change_of_mask(cell: str, backend: str) -> None:
    layer, x = masked(cell, backend=backend, batch_first=True), torch.randn(3, 5, INPUT)
    mask, found = torch.rand(3, 5) < 0.6, []
    for changes in (False, True):
        output, _ = layer(x, mask=mask)
        if changes:
            mask.logical_not_()
        found.append(torch.autograd.grad(output.sum(), list(layer.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
