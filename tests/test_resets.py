"""Resets: the state starts anew before a step. Each segment alone is the truth, on every backend and in every form."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.oracle import (
    BACKENDS,
    CELLS,
    INPUT,
    ONE_STATE_AND_TWO,
    as_hx,
    as_tuple,
    assert_same,
    call,
    cotangents,
    cut,
    every,
    masked,
    oracle,
    prefix_mask,
    random_states,
)
from test_properties import SETTINGS, cases, close
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_sequence

from masked_rnn._backends import kernels

STEPS = 6
REAL: dict[str, Any] = {
    "every step": None,
    "lengths": [4, 6, 0, 1],
    "mask": [[0, 0, 1, 1, 0, 1], [1, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]],
    "nothing": [0, 0, 0, 0],
}
RESETS = {
    "some": [[0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 0, 1], [1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
    "at step 0, at padding": [[1, 0, 0, 0, 1, 0], [1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1]],
    "before the first real step": [[1, 1, 0, 0, 1, 1], [0, 1, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0]],
    "everywhere": [[1] * 6] * 4,
    "nowhere": [[0] * 6] * 4,
}
GRID = every(num_layers=[1, 2], bidirectional=[False, True])


@pytest.fixture(params=ONE_STATE_AND_TWO)
def cell(request: pytest.FixtureRequest) -> str:
    """Where a test has no cells of its own: resets cut rows before a cell runs."""
    return str(request.param)


def marks(rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool)


def given_for(real: Any) -> tuple[dict[str, Any], Tensor]:
    """Returns the arguments that mark the real steps, and their mask."""
    if real is None:
        return {}, torch.ones(4, STEPS, dtype=torch.bool)
    if isinstance(real[0], list):
        return {"mask": marks(real)}, marks(real)
    return {"lengths": real}, prefix_mask(real, STEPS)


@pytest.mark.slow_but_each(1)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("options", [GRID[0], GRID[-1]], ids=str)
def test_resets_match_each_segment_alone(cell: str, options: dict[str, Any], ran: list[str]) -> None:
    layer = masked(cell, **options).double()
    for k, (real, name) in enumerate(itertools.product(REAL, RESETS)):
        (arguments, mask), resets = given_for(REAL[real]), marks(RESETS[name])
        with_hx, layer.batch_first = k % 2 == 0, k % 3 == 0
        x = torch.randn(4, STEPS, INPUT, dtype=torch.float64)
        states, pulled = random_states(layer, 4), cotangents(layer, 4, STEPS)
        first = states if with_hx else [torch.zeros_like(h) for h in states]
        expected = oracle(layer, x, mask, first, pulled, resets)
        dirty = torch.where(mask.unsqueeze(-1), x, torch.nan)
        for layer.backend in BACKENDS:
            found = call(layer, dirty, states if with_hx else None, pulled, **arguments, resets=resets)
            assert_same(found, expected, note=(real, name, with_hx, layer.backend))
            backend = ran.pop()
            if real != "nothing":
                assert backend == layer.backend


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_do_not_cross_resets(cell: str, backend: str) -> None:
    layer = masked(cell, backend=backend, batch_first=True).double()
    layer.bias_ih_l0.data.fill_(1.0)  # keeps the ReLU active
    x = torch.randn(2, STEPS, INPUT, dtype=torch.float64, requires_grad=True)
    states = [h.requires_grad_() for h in random_states(layer, 2)]
    output, _ = layer(x, as_hx(states), resets=marks([[0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]]))
    output[:, 4].sum().backward()
    assert x.grad is not None
    assert x.grad[0, :3].eq(0).all()
    assert x.grad[0, 3:5].ne(0).any()
    assert x.grad[0, 5:].eq(0).all()
    for h in states:
        assert h.grad is not None
        assert h.grad.eq(0).all()


def test_nan_state_is_dropped_at_reset(cell: str, backend: str) -> None:
    """The state before a reset has no effect, whatever it was."""
    layer = masked(cell, backend=backend, batch_first=True).double()
    x = torch.randn(2, STEPS, INPUT, dtype=torch.float64)
    resets = marks([[0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    states = [torch.full_like(h, torch.nan) for h in random_states(layer, 2)]
    output, last = layer(x, as_hx(states), resets=resets)
    assert output[0, :2].isnan().all()
    assert not output[0, 2:].isnan().any()
    assert not output[1].isnan().any()
    assert not any(h.isnan().any() for h in as_tuple(last))


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("form", ["int", "mask", "none"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_unbatched_resets_equal_batch_of_one(cell: str, backend: str, form: str, bidirectional: bool) -> None:
    layer = masked(cell, backend=backend, num_layers=2, bidirectional=bidirectional).double()
    x = torch.randn(STEPS, INPUT, dtype=torch.float64)
    resets, mask = marks([0, 0, 1, 0, 1, 0]), marks([1, 1, 0, 1, 1, 0])
    single = {"int": {"lengths": 5}, "mask": {"mask": mask}, "none": {}}[form]
    batched = {"int": {"lengths": [5]}, "mask": {"mask": mask.unsqueeze(1)}, "none": {}}[form]
    states = random_states(layer, 1)
    expected, last = layer(x.unsqueeze(1), as_hx(states), **batched, resets=resets.unsqueeze(1))
    output, own = layer(x, as_hx([h.squeeze(1) for h in states]), **single, resets=resets)
    torch.testing.assert_close(output, expected.squeeze(1))
    for a, b in zip(as_tuple(own), as_tuple(last), strict=True):
        torch.testing.assert_close(a, b[0])


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize(("batch", "steps"), [(0, 5), (3, 0), (0, 0)])
def test_resets_without_steps_return_hx(cell: str, backend: str, batch: int, steps: int) -> None:
    layer = masked(cell, backend=backend, num_layers=2, bidirectional=True, batch_first=True).double()
    x = torch.randn(batch, steps, INPUT, dtype=torch.float64)
    states, pulled = random_states(layer, batch), cotangents(layer, batch, steps)
    resets = torch.ones(batch, steps, dtype=torch.bool)
    run = call(layer, x, states, pulled, lengths=[0] * batch, resets=resets)
    assert run.output.shape == pulled[0].shape
    for s, (h, before) in enumerate(zip(run.states, states, strict=True)):
        assert torch.equal(h, before)
        assert torch.equal(run.gradients[f"hx[{s}]"], pulled[1 + s])


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("options", [GRID[0], GRID[-1]], ids=str)
def test_one_step_with_resets_matches_oracle(cell: str, backend: str, options: dict[str, Any]) -> None:
    """A policy that acts makes such calls. There is nothing to cut, but the given state may be dropped."""
    layer = masked(cell, backend=backend, **options).double()
    resets = marks([[1], [0], [1], [0]])
    for arguments in ({}, {"lengths": [1, 1, 0, 0]}, {"mask": marks([[1], [1], [0], [0]])}):
        mask = arguments.get("mask", prefix_mask(arguments.get("lengths", [1] * 4), 1))
        x = torch.randn(4, 1, INPUT, dtype=torch.float64)
        states, pulled = random_states(layer, 4), cotangents(layer, 4, 1)
        expected = oracle(layer, x, mask, states, pulled, resets)
        assert_same(call(layer, x, states, pulled, **arguments, resets=resets), expected, note=arguments)


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("flatten_hidden", [False, True])
def test_stepwise_rollout_equals_whole_sequence(cell: str, backend: str, flatten_hidden: bool) -> None:
    layer = masked(cell, num_layers=2, backend=backend, batch_first=True, flatten_hidden=flatten_hidden).double()
    x, resets = torch.randn(4, STEPS, INPUT, dtype=torch.float64), marks(RESETS["some"])
    whole, last = layer(x, resets=resets)
    state, outputs = None, []
    for t in range(STEPS):
        output, state = layer(x[:, t : t + 1], state, resets=resets[:, t : t + 1])
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    for a, b in zip(as_tuple(state), as_tuple(last), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_resets_match_oracle_in_each_dtype(cell: str, backend: str, dtype: torch.dtype) -> None:
    layer = masked(cell, backend=backend, num_layers=2, bidirectional=True, batch_first=True).to(dtype)
    x, resets = torch.randn(4, STEPS, INPUT).to(dtype), marks(RESETS["some"])
    states, pulled = [h.to(dtype) for h in random_states(layer, 4)], cotangents(layer, 4, STEPS)
    mask = prefix_mask([4, 6, 0, 1], STEPS)
    expected = oracle(layer, x, mask, states, [c.to(dtype) for c in pulled], resets)
    found = call(layer, x, states, pulled, lengths=[4, 6, 0, 1], resets=resets)
    assert {found.output.dtype, *(h.dtype for h in found.states)} == {dtype}
    assert_same(found, expected, atol=300 * torch.finfo(dtype).eps)


def test_autocast_with_resets_keeps_dtypes_and_values(cell: str, backend: str) -> None:
    """A row without resets has the results and dtypes of a call without resets."""
    layer = masked(cell, backend=backend, batch_first=True)
    x, resets = torch.randn(2, STEPS, INPUT), marks([[0, 0, 1, 0, 0, 0], [0] * STEPS])
    with torch.autocast("cpu", torch.bfloat16):
        try:
            expected, last = layer(x, lengths=[5, 6])
        except ValueError as error:
            pytest.skip(str(error))
        output, own = layer(x, resets=resets)
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output[1], expected[1], atol=2e-2, rtol=0)
    for a, b in zip(as_tuple(own), as_tuple(last), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a[1], b[1], atol=2e-2, rtol=0)


def test_dropout_acts_between_layers_with_resets(cell: str, backend: str) -> None:
    layer = masked(cell, backend=backend, num_layers=2, dropout=1.0, batch_first=True).double()
    x, resets = torch.randn(4, STEPS, INPUT, dtype=torch.float64), marks(RESETS["some"])
    output, _ = layer(x, resets=resets)
    alone = masked(cell, *((layer.proj_size or layer.hidden_size, layer.hidden_size)), batch_first=True).double()
    alone.load_state_dict({k.replace("l1", "l0"): v for k, v in layer.state_dict().items() if "l1" in k})
    expected, _ = alone(torch.zeros_like(output), resets=resets)
    torch.testing.assert_close(output, expected)
    torch.manual_seed(1)
    layer.dropout = 0.5
    without, _ = layer(x, resets=resets)
    torch.manual_seed(1)
    with torch.no_grad():
        again, _ = layer(x, resets=resets)
    torch.testing.assert_close(again, without)


@pytest.mark.slow_but_each(1)
@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives_with_resets_pass_gradgradcheck(cell: str, backend: str) -> None:
    layer = masked(cell, backend=backend, batch_first=True, bidirectional=True).double()
    if cell == "rnn-relu":
        layer.bias_ih_l0.data.fill_(3.0)  # away from the kink
    resets = marks([[0, 0, 1, 0], [0, 1, 0, 0]])
    x = torch.randn(2, 4, INPUT, dtype=torch.float64, requires_grad=True)
    hx = [h.requires_grad_() for h in random_states(layer, 2)]

    def run(x: Tensor, *hx: Tensor) -> tuple[Tensor, ...]:
        output, last = layer(x, as_hx(hx), [3, 4], resets=resets)
        return output, *as_tuple(last)

    torch.autograd.gradgradcheck(run, (x, *hx), fast_mode=True)


@SETTINGS
@given(cases(), st.integers(0, 2**16))
def test_resets_nowhere_change_nothing(case: tuple[Any, Tensor, Tensor], seed: int) -> None:
    layer, x, lengths = case
    resets = torch.zeros(x.shape[:2], dtype=torch.bool)
    # Resets at padding steps alone, at the end, change nothing either.
    resets = resets | (torch.arange(x.size(1)) >= lengths.unsqueeze(1)) if seed % 2 else resets
    close(layer(x, lengths=lengths, resets=resets), layer(x, lengths=lengths))


@SETTINGS
@given(cases())
def test_resets_everywhere_isolate_every_step(case: tuple[Any, Tensor, Tensor]) -> None:
    layer, x, lengths = case
    output, _ = layer(x, lengths=lengths, resets=torch.ones(x.shape[:2], dtype=torch.bool))
    real = torch.arange(x.size(1)) < lengths.unsqueeze(1)
    alone, _ = layer(x.flatten(0, 1).unsqueeze(1), lengths=real.flatten().long())
    torch.testing.assert_close(output, alone.squeeze(1).unflatten(0, x.shape[:2]))


@SETTINGS
@given(cases(), st.integers(0, 2**16), st.booleans())
def test_resets_equal_batch_of_segments(case: tuple[Any, Tensor, Tensor], seed: int, holes: bool) -> None:
    layer, x, lengths = case
    generator = torch.Generator().manual_seed(seed)
    resets = torch.rand(x.shape[:2], generator=generator) < 0.3
    mask = torch.arange(x.size(1)) < lengths.unsqueeze(1)
    if holes:
        mask = mask & (torch.rand(x.shape[:2], generator=generator) < 0.7)
    pieces = [(n, times) for n in range(x.size(0)) for times, _ in cut(mask[n], resets[n])]
    arguments = {"mask": mask} if holes else {"lengths": lengths}
    output, _ = layer(x, **arguments, resets=resets)
    expected = torch.zeros_like(output)
    if pieces:
        rows, _ = layer(pack_sequence([x[n, times] for n, times in pieces], enforce_sorted=False))
        padded, _ = torch.nn.utils.rnn.pad_packed_sequence(rows, batch_first=True)
        for k, (n, times) in enumerate(pieces):
            expected[n, times] = padded[k, : len(times)]
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(
    ("resets", "error", "words"),
    [
        (torch.zeros(4, STEPS), TypeError, r"resets must be a bool tensor.*torch\.float32\. Use resets\.bool\(\)"),
        (torch.full((4, STEPS), 0.5), TypeError, r"dtype is torch\.float32\.$"),
        ([[True] * STEPS] * 4, TypeError, r"got list\. Use torch\.as_tensor\(resets\)"),
        (torch.zeros(STEPS, 4, dtype=torch.bool), ValueError, r"resets has shape \(6, 4\).*\(4, 6\)"),
        (torch.zeros(4, dtype=torch.bool), ValueError, r"resets has shape \(4,\).*\(4, 6\)"),
    ],
)
def test_wrong_resets_are_refused(resets: Any, error: type[Exception], words: str, backend: str) -> None:
    layer = masked("gru", backend=backend, batch_first=True)
    with pytest.raises(error, match=words):
        layer(torch.randn(4, STEPS, INPUT), resets=resets)


def test_resets_with_packed_or_nested_input_are_refused() -> None:
    layer = masked("gru", batch_first=True)
    resets = torch.zeros(2, 3, dtype=torch.bool)
    rows = [torch.randn(3, INPUT), torch.randn(2, INPUT)]
    with pytest.raises(ValueError, match=r"resets mark steps of a padded batch, but the input is a PackedSequence"):
        layer(pack_sequence(rows), resets=resets)
    with pytest.raises(ValueError, match=r"but the input is a nested tensor\. Give padded input with lengths"):
        layer(torch.nested.nested_tensor(rows, layout=torch.jagged), resets=resets)


def test_input_without_steps_is_refused_with_resets() -> None:
    with pytest.raises(RuntimeError, match="the input has no time steps"):
        masked("gru")(torch.randn(0, 3, INPUT), resets=torch.zeros(0, 3, dtype=torch.bool))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_jit_trace_refuses_resets(backend: str) -> None:
    layer = masked("gru", backend=backend, batch_first=True)

    def run(x: Tensor, resets: Tensor) -> Any:
        return layer(x, resets=resets)[0]

    for steps in (1, 3):
        with pytest.raises(ValueError, match=r"torch\.jit\.trace would record the resets of this call"):
            torch.jit.trace(run, (torch.randn(2, steps, INPUT), torch.ones(2, steps, dtype=torch.bool)))


def test_sorted_lengths_work_with_resets(cell: str, backend: str) -> None:
    """The segments come in any order, though the rows are sorted."""
    layer = masked(cell, backend=backend, batch_first=True, enforce_sorted=True).double()
    x, resets = torch.randn(3, STEPS, INPUT, dtype=torch.float64), marks(RESETS["some"])[:3]
    states, pulled = random_states(layer, 3), cotangents(layer, 3, STEPS)
    expected = oracle(layer, x, prefix_mask([6, 6, 3], STEPS), states, pulled, resets)
    assert_same(call(layer, x, states, pulled, lengths=[6, 6, 3], resets=resets), expected)


@pytest.mark.parametrize("cell", CELLS)
def test_result_may_be_changed_in_place(cell: str, backend: str) -> None:
    layer = masked(cell, backend=backend, batch_first=True).double()
    x = torch.randn(4, STEPS, INPUT, dtype=torch.float64, requires_grad=True)
    output, last = layer(x, resets=marks(RESETS["some"]))
    output.mul_(2)
    for h in as_tuple(last):
        h.mul_(2)
    (output.sum() + sum(h.sum() for h in as_tuple(last))).backward()


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("steps", [1, 3])
def test_gradient_ignores_later_change_of_resets(cell: str, backend: str, steps: int) -> None:
    """A policy that acts may fill one buffer of resets again and again."""
    layer = masked(cell, backend=backend, batch_first=True).double()
    x, state = torch.randn(2, 3 * steps, INPUT, dtype=torch.float64), None
    buffer, outputs = torch.zeros(2, steps, dtype=torch.bool), []
    for start in range(0, 3 * steps, steps):
        output, state = layer(x[:, start : start + steps], state, resets=buffer)
        outputs.append(output)
        buffer.logical_not_()
    found = torch.autograd.grad(torch.cat(outputs, 1).square().sum(), list(layer.parameters()))
    resets = torch.zeros(2, 3 * steps, dtype=torch.bool)
    resets[:, steps : 2 * steps] = True
    expected = torch.autograd.grad(layer(x, resets=resets)[0].square().sum(), list(layer.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_resets_passed_as_hx_are_refused() -> None:
    layer, starts = masked("gru", batch_first=True), torch.zeros(2, 3, dtype=torch.bool)
    x = torch.randn(2, 3, INPUT)
    for misplaced in ((starts,), (None, starts)):
        with pytest.raises(TypeError, match="resets"):
            layer(x, *misplaced)
    with pytest.raises(TypeError, match=r"resets=\.\.\."):
        masked("lstm", batch_first=True)(x, (starts, starts))


def test_auto_uses_bptt_for_resets_on_cpu(ran: list[str]) -> None:
    """PyTorch's kernel does not run even where it would without resets, because it would have to pad the segments."""
    resets = marks([[0, 0, 1], [0, 1, 0]])
    for cell in CELLS:
        masked(cell, batch_first=True)(torch.randn(2, 3, INPUT), resets=resets)
    assert set(ran) == {"bptt"}


def test_packed_backend_needs_no_padded_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments are packed even if no lengths are given, so oneDNN's LSTM under autocast is not needed."""
    monkeypatch.setattr(kernels, "lstm_kernel_runs", lambda *_: False)
    layer, x = masked("lstm", backend="packed", batch_first=True), torch.randn(2, 3, INPUT)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = layer(x, resets=marks([[0, 0, 1], [0, 1, 0]]))
        with pytest.raises(ValueError, match="no LSTM kernel"):
            layer(x)
    assert output.shape == (2, 3, 3)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_resets_without_values_run_or_are_refused(cell: str, backend: str) -> None:
    """On the meta device and under make_fx, resets are followed step by step, or refused."""
    layer = masked(cell, backend=backend, batch_first=True)
    x, resets = torch.randn(2, 3, INPUT), marks([[0, 0, 1], [0, 1, 0]])

    def run(x: Tensor, resets: Tensor) -> Tensor:
        output: Tensor = layer(x, resets=resets)[0]
        return output

    if backend in ("packed", "padded", "bptt"):
        with pytest.raises(
            ValueError, match=f"backend='{backend}' can't run this call: it reads resets, which have no"
        ):
            make_fx(run)(x, resets)
        return
    others = marks([[1, 1, 0], [0, 0, 0]])
    torch.testing.assert_close(make_fx(run)(x, resets)(x, others), run(x, others))
    layer = layer.to("meta")
    assert run(x.to("meta"), resets.to("meta")).shape == (2, 3, layer.proj_size or 3)
