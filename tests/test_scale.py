"""Accuracy relative to each element's own size, at every scale of input, state, weight and gradient.

If every term of every sum is positive, nothing cancels. Then each element of each result has as many right digits as
the arithmetic has, however small it is, and each is compared with torch.nn's own error. Gradients cancel in places,
because the gates' gradients have both signs. There one element's error has no bound, so nine tenths of the elements are
compared.

The truth is torch.nn over packed sequences in float64, which test_oracle.py compares with each sequence alone.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.oracle import BACKENDS, Run, as_hx, as_tuple, call, cotangents, masked, plain, random_states
from torch import Tensor

# A step has 64 * 16 values: enough for the code that runs only for large steps.
BATCH, STEPS, INPUT, HIDDEN = 64, 8, 8, 16
SCALES = (1.0, 1e-2, 1e-4, 1e-8, 1e-12)
LENGTHS = [1 + n % STEPS for n in range(BATCH)]
# A weight's gradient is one sum over all rows; torch.nn adds one sum a step. Rounding grows as the root of the rows.
SUMMED = (BATCH * STEPS) ** 0.5


def allowed(name: str, own: Tensor, of: Any, dtype: torch.dtype) -> float:
    is_gradient = not name.startswith(("output", "last"))
    eps = torch.finfo(dtype).eps
    return max((3 if is_gradient else 2) * of(own), (SUMMED if is_gradient else 8) * eps)


def typical(error: Tensor, share: float = 0.9) -> float:
    return error.quantile(share).item() if len(error) else 0.0


def median(error: Tensor) -> float:
    return typical(error, 0.5)


def worst(error: Tensor) -> float:
    return error.max().item() if len(error) else 0.0


def relative(found: Run, truth: Run) -> dict[str, Tensor]:
    """Returns each element's error relative to its own size, by the name of the result."""
    pairs = [("output", found.output, truth.output)]
    pairs += [(f"last[{s}]", a, b) for s, (a, b) in enumerate(zip(found.states, truth.states, strict=True))]
    pairs += [(name, g, truth.gradients[name]) for name, g in found.gradients.items()]
    errors = {}
    for name, a, b in pairs:
        is_there = b.abs() > 1e-30
        errors[name] = ((a.double() - b).abs() / b.abs().clamp(min=1e-30))[is_there]
    return errors


def problem(cell: str, dtype: torch.dtype, scale: float, what: str, **options: Any) -> Any:
    ours = masked(cell, INPUT, HIDDEN, batch_first=True, bias=False, **options)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.uniform_(0.02, 0.1)
            if what == "weight":
                parameter.mul_(scale)
    ours = ours.to(dtype)
    theirs = plain(cell, INPUT, HIDDEN, batch_first=True, bias=False, bidirectional=ours.bidirectional).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(BATCH, STEPS, INPUT).to(dtype).add(0.1)
    states = tuple(h.abs().to(dtype) for h in random_states(ours, BATCH))
    pulled = [c.abs().to(dtype) for c in cotangents(ours, BATCH, STEPS)]
    if what == "input and state":
        x, states = x * scale, tuple(h * scale for h in states)
    if what == "gradient":
        pulled = [c * scale for c in pulled]
    return ours, theirs, x, states, pulled


def their_run(layer: Any, x: Tensor, states: Any, pulled: Any, dtype: torch.dtype) -> Run:
    """Runs torch.nn over sequences that were packed by hand."""
    layer = copy.deepcopy(layer).to(dtype)
    x = x.detach().to(dtype, copy=True).requires_grad_()
    leaves = [h.detach().to(dtype, copy=True).requires_grad_() for h in states]
    pulled = [c.to(dtype) for c in pulled]
    rnn = torch.nn.utils.rnn
    packed = rnn.pack_padded_sequence(x, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False)
    output, last = layer(packed, as_hx(leaves))
    output, _ = rnn.pad_packed_sequence(output, batch_first=True, total_length=STEPS)
    wanted = {"x": x, **{f"hx[{s}]": h for s, h in enumerate(leaves)}, **dict(layer.named_parameters())}
    return Run(output, as_tuple(last)).pull_back(pulled, wanted)


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("what", ["input and state", "weight", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("backends", "bidirectional"), [(BACKENDS, True), (("bptt",), False)]
)  # `bptt` runs two directions as a batch of two, the others one after the other
def test_each_element_stays_near_torchs_error(
    cell: str, dtype: torch.dtype, what: str, backends: tuple[str, ...], bidirectional: bool
) -> None:
    for scale in (1.0, 1e-4, 1e-12):
        ours, theirs, x, states, pulled = problem(cell, dtype, scale, what, bidirectional=bidirectional)
        truth = their_run(theirs, x, states, pulled, torch.float64)
        own = relative(their_run(theirs, x, states, pulled, dtype), truth)
        for ours.backend in backends:
            found = call(ours, x, states, pulled, lengths=LENGTHS)
            for name, error in relative(found, truth).items():
                of = worst if name.startswith(("output", "last")) else typical
                assert of(error) <= allowed(name, own[name], of, dtype), (ours.backend, scale, name)


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("scale", SCALES)
def test_float64_matches_torch_at_every_scale(cell: str, backend: str, scale: float) -> None:
    """No wider type gives the truth, but two ways to compute it differ only by rounding."""
    ours, theirs, x, states, pulled = problem(cell, torch.float64, scale, "input and state", backend=backend)
    expected = their_run(theirs, x, states, pulled, torch.float64)
    for name, error in relative(call(ours, x, states, pulled, lengths=LENGTHS), expected).items():
        of = worst if name.startswith(("output", "last")) else typical
        assert of(error) < 1e-13, name


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decaying_state_keeps_its_digits(cell: str, backend: str, dtype: torch.dtype) -> None:
    """After the input has stopped, its remainder still has its digits after 60 steps."""
    layer = masked(cell, INPUT, HIDDEN, batch_first=True, bias=False, backend=backend)
    for parameter in layer.parameters():
        torch.nn.init.uniform_(parameter, 0.02, 0.04)
    layer = layer.to(dtype)
    theirs = plain(cell, INPUT, HIDDEN, batch_first=True, bias=False).to(dtype)
    theirs.load_state_dict(layer.state_dict())
    x = torch.zeros(BATCH, 60, INPUT, dtype=dtype)
    x[:, 0] = torch.rand(BATCH, INPUT, dtype=dtype)
    with torch.no_grad():
        truth, _ = theirs.double()(x.double())
        found, _ = layer(x, lengths=[60] * (BATCH - 1) + [59])
    kept = truth[:-1, -1].abs()
    error = ((found[:-1, -1].double() - truth[:-1, -1]).abs() / kept)[kept > 1e-36]
    assert len(error)
    assert error.median().item() < (1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_median_error_stays_near_torchs(cell: str, backend: str, dtype: torch.dtype) -> None:
    """If terms cancel, one element's error has no bound, but the errors of most elements have."""
    for scale in (1.0, 1e-6):
        ours = masked(cell, INPUT, HIDDEN, batch_first=True, bidirectional=True, bias=False, backend=backend).to(dtype)
        theirs = plain(cell, INPUT, HIDDEN, batch_first=True, bidirectional=True, bias=False).to(dtype)
        theirs.load_state_dict(ours.state_dict())
        x = (torch.randn(BATCH, STEPS, INPUT) * scale).to(dtype)
        states = tuple((h * scale).to(dtype) for h in random_states(ours, BATCH))
        pulled = [c.to(dtype) for c in cotangents(ours, BATCH, STEPS)]
        truth = their_run(theirs, x, states, pulled, torch.float64)
        own = relative(their_run(theirs, x, states, pulled, dtype), truth)
        found = relative(call(ours, x, states, pulled, lengths=LENGTHS), truth)
        for name, error in found.items():
            assert median(error) <= allowed(name, own[name], median, dtype), (scale, name)
