"""Every floating dtype, autocast, and an error of at most twice torch.nn's own in the same precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.oracle import (
    BACKENDS,
    INPUT,
    ONE_STATE_AND_TWO,
    as_hx,
    as_tuple,
    call,
    cotangents,
    every,
    masked,
    oracle,
    plain,
    prefix_mask,
    random_states,
)
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn.utils.rnn import pack_padded_sequence

from masked_rnn._backends.bptt import library, ops_layer
from masked_rnn._probe import lstm_kernel_runs

STEPS, BATCH, HIDDEN = 30, 5, 24


def errors(run: Any, truth: Any) -> tuple[float, float]:
    def worst(pairs: Any) -> float:
        return max(((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-6)).item() for a, b in pairs)

    forward = worst(zip((run.output, *run.states), (truth.output, *truth.states), strict=True))
    return forward, worst((g, truth.gradients[name]) for name, g in run.gradients.items())


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # test_oracle.py and test_scale.py have float64
@pytest.mark.parametrize(
    ("backends", "bidirectional"), [(BACKENDS, True), (("bptt",), False)]
)  # `bptt` runs two directions as a batch of two, the others one after the other
def test_error_stays_near_torchs_own(
    cell: str, backends: tuple[str, ...], dtype: torch.dtype, bidirectional: bool
) -> None:
    sizes = {"bidirectional": bidirectional, "batch_first": True}
    ours, theirs = masked(cell, INPUT, HIDDEN, **sizes), plain(cell, INPUT, HIDDEN, **sizes)
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    theirs.load_state_dict(ours.state_dict())
    theirs.flatten_hidden = False
    our_worst, their_worst = dict.fromkeys(backends, (0.0, 0.0)), (0.0, 0.0)
    for _ in range(3):
        x = torch.randn(BATCH, STEPS, INPUT).to(dtype)
        states = tuple(h.to(dtype) for h in random_states(ours, BATCH))
        pulled = [c.to(dtype) for c in cotangents(ours, BATCH, STEPS)]
        truth = oracle(ours, x, prefix_mask([STEPS] * BATCH, STEPS), states, pulled)
        for ours.backend in backends:
            found = errors(call(ours, x, states, pulled), truth)
            our_worst[ours.backend] = tuple(map(max, our_worst[ours.backend], found))
        their_worst = tuple(map(max, their_worst, errors(call(theirs, x, states, pulled), truth)))
    floor = 4 * torch.finfo(dtype).eps
    for backend, (forward, backward) in our_worst.items():
        assert forward <= max(2 * their_worst[0], floor), backend
        assert backward <= max(3 * their_worst[1], floor), backend


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_lengths_in_float32_match_oracle(cell: str, backend: str, bidirectional: bool) -> None:
    """float32 has other kernels than float64, oneDNN's among them."""
    for hidden in (3, 300):
        layer = masked(cell, INPUT, hidden, bidirectional=bidirectional, batch_first=True, backend=backend)
        lengths = [3, 9, 0, 1]
        x = torch.randn(4, 9, INPUT)
        mask = prefix_mask(lengths, 9)
        states, pulled = random_states(layer, 4), cotangents(layer, 4, 9)
        states = tuple(h.float() for h in states)
        truth = oracle(layer, x, mask, states, pulled)
        found = call(layer, torch.where(mask.unsqueeze(-1), x, torch.nan), states, pulled, lengths=lengths)
        assert max(errors(found, truth)) < 1e-5


def test_second_derivatives_in_float32_match_scan(cell: str, backend: str) -> None:
    layer = masked(cell, backend=backend, bidirectional=True)
    x = torch.randn(6, 3, INPUT, requires_grad=True)

    def penalty() -> list[Tensor]:
        output, _ = layer(x, lengths=[6, 0, 4])
        (dx,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        wanted = [x, *layer.parameters()]
        return list(torch.autograd.grad(dx.square().sum(), wanted, allow_unused=True, materialize_grads=True))

    found = penalty()
    layer.backend = "scan"
    for a, b in zip(found, penalty(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_results_keep_input_dtype(cell: str, backend: str, dtype: torch.dtype) -> None:
    layer = masked(cell, backend=backend, num_layers=2, bidirectional=True).to(dtype)
    x = torch.randn(5, 3, INPUT).to(dtype).requires_grad_()
    output, last = layer(x, lengths=[5, 0, 2])
    assert output.dtype == dtype
    assert all(h.dtype == dtype for h in as_tuple(last))
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert output.isfinite().all()


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize(
    "case",
    every(
        x=[torch.float32, torch.bfloat16],
        hx=[None, torch.float32, torch.bfloat16],
        given=[{}, {"lengths": [5, 3, 2]}],
    ),
    ids=str,
)
def test_autocast_matches_torch_dtypes(cell: str, backend: str, case: dict[str, Any]) -> None:
    """The dtypes are those that torch.nn returns, and the values are as near the truth as its own."""
    ours, theirs = masked(cell, flatten_hidden=False, backend=backend), plain(cell)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 3, INPUT).to(case["x"])
    hx = None if case["hx"] is None else as_hx([h.to(case["hx"]) for h in random_states(ours, 3)])
    truth, _ = ours.float()(x.float(), _float(hx), **case["given"])
    packs = backend == "packed" and bool(case["given"])
    # The dtypes of oneDNN's LSTM under autocast depend on the CPU.
    lacking = cell == "lstm" and not packs and not lstm_kernel_runs(torch.bfloat16, True, False)
    with torch.autocast("cpu", torch.bfloat16):
        if lacking and backend in ("packed", "padded"):
            with pytest.raises(ValueError, match=r"PyTorch has no LSTM kernel for torch\.bfloat16 under autocast"):
                ours(x, hx, **case["given"])
            return
        if packs:
            packed = pack_padded_sequence(x, torch.tensor(case["given"]["lengths"]), enforce_sorted=True)
            expected, their_last = theirs(packed, hx)
            expected = expected.data
        elif not lacking:
            expected, their_last = theirs(x, hx)
        found, last = ours(x, hx, **case["given"])
    dtypes = [torch.bfloat16] * 3 if lacking else [t.dtype for t in (expected, *as_tuple(their_last))]
    assert [t.dtype for t in (found, *as_tuple(last))] == dtypes
    torch.testing.assert_close(found.float(), truth, atol=0.03, rtol=0)
    found.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", ["native", "ops"])
@functorch_config.patch(donated_buffer=False)  # the backward of a compiled layer runs twice
def test_backward_under_autocast_is_unchanged(
    cell: str, bidirectional: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward gives the same bits as outside of autocast, over several chunks too. So does the operator's, which
    does not depend on the cell.
    """
    if kind == "ops":
        monkeypatch.setattr(library, "find", lambda: "left out here")
        monkeypatch.setattr(ops_layer, "CHUNK_BYTES", 300)
    layer = masked(cell, num_layers=2, bidirectional=bidirectional, backend="bptt")
    x, lengths, parameters = torch.randn(6, 3, INPUT), torch.tensor([6, 2, 5]), list(layer.parameters())

    def by_operator(x: Tensor, lengths: Tensor) -> Any:
        with torch._dynamo.config.patch(allow_rnn=True):
            return torch.compile(layer, backend="aot_eager", fullgraph=True)(x, lengths=lengths)

    runs: list[Any] = [lambda x, lengths: layer(x, lengths=lengths)]
    if cell in ONE_STATE_AND_TWO and bidirectional:
        runs.append(by_operator)
    for run in runs:
        loss = run(x, lengths)[0].square().sum()
        expected = torch.autograd.grad(loss, parameters, retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            found = torch.autograd.grad(loss, parameters)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=0)
    layer.backend = "bptt"
    x.requires_grad_()
    loss = layer(x, lengths=lengths)[0].square().sum()
    (expected_dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(dx, expected_dx, atol=1e-5, rtol=1e-4)


def _float(hx: Any) -> Any:
    return None if hx is None else as_hx([h.float() for h in as_tuple(hx)])


def test_large_values_saturate(cell: str, backend: str) -> None:
    """Saturated tanh and gates give finite outputs and gradients."""
    layer = masked(cell, backend=backend, bidirectional=True)
    if layer.mode == "RNN_RELU":
        return
    x = (torch.randn(5, 3, INPUT) * 1e6).requires_grad_()
    output, _ = layer(x, lengths=[5, 2, 4])
    output.sum().backward()
    gradients: list[Tensor | None] = [x.grad, *(p.grad for p in layer.parameters())]
    assert output.isfinite().all()
    assert output.abs().max() <= 1
    assert all(g is not None and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("autocast", [False, True])
def test_growing_relu_state_stays_finite_over_padding(backend: str, autocast: bool) -> None:
    """Over padding, the state would reach infinity, and the weights' gradients 0 · inf = NaN."""
    layer = masked("rnn-relu", backend=backend, bidirectional=True)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.copy_(2 * torch.eye(*p.shape) if "weight_hh" in name else 0.1 * torch.rand(p.shape))
    x = torch.rand(300, 2, INPUT)
    found = []
    for steps in (300, 3):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output, last = layer(x[:steps], lengths=[3, 2])
        gradients = torch.autograd.grad(output.sum() + last.sum(), list(layer.parameters()))
        found.append([output[:3], last, *gradients])
    for long, short in zip(*found, strict=True):
        assert long.isfinite().all()
        torch.testing.assert_close(long, short, rtol=2e-2 if autocast else 1e-5, atol=0)
