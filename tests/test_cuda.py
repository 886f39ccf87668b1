"""On CUDA, where PyTorch's kernels are cuDNN's: values, waits, capture, autocast and second derivatives."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from oracle import (
    BACKENDS,
    INPUT,
    Run,
    as_hx,
    as_tuple,
    assert_same,
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

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available"),
    # One layer or direction of several is no flat chunk of weights, and is copied into one.
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk:UserWarning"),
]

STEPS = 5
LENGTHS = [3, 4, 0, 1]
HOLES = torch.tensor([[0, 0, 1, 0, 1], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
RESETS = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]], dtype=torch.bool)
NONE = torch.zeros(4, STEPS, dtype=torch.bool)
FORMS = {  # what is given, and what it means
    "list": ({"lengths": LENGTHS}, prefix_mask(LENGTHS, STEPS)),
    "host": ({"lengths": torch.tensor(LENGTHS)}, prefix_mask(LENGTHS, STEPS)),
    "device": ({"lengths": torch.tensor(LENGTHS)}, prefix_mask(LENGTHS, STEPS)),
    "host-mask": ({"mask": HOLES}, HOLES),
    "device-mask": ({"mask": HOLES}, HOLES),
    "device-empty": ({"lengths": torch.zeros(4, dtype=torch.int32)}, NONE),
    "device-empty-mask": ({"mask": NONE}, NONE),
    "host-resets": ({"lengths": LENGTHS, "resets": RESETS}, prefix_mask(LENGTHS, STEPS)),
    "device-resets": ({"mask": HOLES, "resets": RESETS}, HOLES),
    "neither": ({}, torch.ones(4, STEPS, dtype=torch.bool)),
}


@pytest.fixture(params=("auto", *BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def refusing_to_wait() -> Iterator[Any]:
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def given_as(form: str) -> dict[str, Any]:
    given, _ = FORMS[form]
    return {name: value.cuda() for name, value in given.items()} if form.startswith("device") else given


def home(run: Run) -> Run:
    assert all(t.is_cuda for t in (run.output, *run.states, *run.gradients.values()))
    gradients = {name: g.cpu() for name, g in run.gradients.items()}
    return Run(run.output.cpu(), tuple(h.cpu() for h in run.states), gradients)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 5e-3)])  # with TF32
def test_as_on_the_cpu_in_float64(cell: str, backend: str, dtype: torch.dtype, atol: float) -> None:
    for options in every(num_layers=[1, 2], bidirectional=[False, True], batch_first=[False, True]):
        for form, (given, mask) in FORMS.items():
            layer = masked(cell, backend=backend, **options).to(dtype)
            x = torch.randn(4, STEPS, INPUT, dtype=dtype).masked_fill(~mask.unsqueeze(-1), torch.nan)
            states, pulled = random_states(layer, 4, dtype), cotangents(layer, 4, STEPS)
            expected = oracle(layer, x.nan_to_num(), mask, states, pulled, given.get("resets"))
            states, pulled = [h.cuda() for h in states], [c.cuda() for c in pulled]
            found = home(call(layer.cuda(), x.cuda(), states, pulled, **given_as(form)))
            assert_same(found, expected, atol, (form, options))
            for padded in (found.output, found.gradients["x"]):
                assert not padded[~mask].any()


def training_step(layer: Any, x: Tensor, **given: Any) -> tuple[Tensor, ...]:
    output, last = layer(x, **given)
    results = (output, *as_tuple(last))
    loss = sum(((t + 1) ** 3).sum() for t in results)
    return *results, *torch.autograd.grad(loss, [x, *layer.parameters()])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize(
    ("backend", "form"),
    [*product(["auto", "padded"], ["device", "device-mask", "device-empty"]), ("auto", "device-resets")],
)
def test_nothing_waits(cell: str, backend: str, form: str, refusing_to_wait: Any) -> None:
    layer = masked(cell, num_layers=2, bidirectional=True, batch_first=True, backend=backend).cuda()
    x, given = torch.randn(4, STEPS, INPUT, device="cuda", requires_grad=True), given_as(form)
    training_step(layer, x, **given)  # the first call sets cuDNN up
    refusing_to_wait()
    training_step(layer, x, **given)


@pytest.mark.parametrize("form", ["device", "device-mask"])
def test_a_captured_graph_follows_the_lengths(cell: str, form: str) -> None:
    layer = masked(cell, num_layers=2, bidirectional=True, batch_first=True, backend="padded").double()
    there = copy.deepcopy(layer).cuda()
    x = torch.randn(4, STEPS, INPUT, dtype=torch.float64, device="cuda", requires_grad=True)
    given, graph, aside = given_as(form), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            training_step(there, x, **given)
    torch.cuda.current_stream().wait_stream(aside)
    with torch.cuda.graph(graph):
        results = training_step(there, x, **given)
    ((name, value),) = given.items()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        value.copy_(value.flip(0))
    graph.replay()
    expected = training_step(layer, x.detach().cpu().requires_grad_(), **{name: value.cpu()})
    for found, own in zip(results, expected, strict=True):
        torch.testing.assert_close(found.cpu(), own)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
@pytest.mark.parametrize("form", ["host", "device"])
def test_autocast(cell: str, backend: str, form: str, dtype: torch.dtype, atol: float) -> None:
    layer = masked(cell, num_layers=2, bidirectional=True, batch_first=True, backend=backend)
    theirs = plain(cell, num_layers=2, bidirectional=True, batch_first=True).cuda()
    mask = prefix_mask(LENGTHS, STEPS)
    x, states, pulled = torch.randn(4, STEPS, INPUT), random_states(layer, 4), cotangents(layer, 4, STEPS)
    expected = oracle(layer, x, mask, states, pulled)
    layer, x = layer.cuda(), x.cuda().requires_grad_()
    states = [h.float().cuda().requires_grad_() for h in states]
    with torch.autocast("cuda", dtype=dtype):
        output, last = layer(x, as_hx(states), **given_as(form))
        their_output, their_last = theirs(x, as_hx(states))
    assert [t.dtype for t in (output, *as_tuple(last))] == [t.dtype for t in (their_output, *as_tuple(their_last))]
    lasts = tuple(h.unflatten(1, (4, -1)).transpose(0, 1) for h in as_tuple(last))
    wanted = {"x": x, **{f"hx[{s}]": h for s, h in enumerate(states)}, **dict(layer.named_parameters())}
    cast = [c.to("cuda", t.dtype) for c, t in zip(pulled, (output, *lasts), strict=True)]
    found = home(Run(output, lasts).pull_back(cast, wanted))
    # Gradients of weights add up over steps and rows.
    assert_same(Run(found.output, found.states), expected, atol)
    assert_same(found, expected, 10 * atol)


def test_second_derivatives(cell: str, backend: str) -> None:
    """cuDNN's backward has none of its own."""
    layer = masked(cell, num_layers=2, bidirectional=True, batch_first=True, backend=backend).double()

    def penalty(own: Any, device: str) -> list[Tensor]:
        leaf = x.to(device).requires_grad_()
        (dx,) = torch.autograd.grad(own(leaf, lengths=lengths.to(device))[0].square().sum(), leaf, create_graph=True)
        wanted = [leaf, own.weight_ih_l0, own.weight_hh_l1_reverse]
        return [g.cpu() for g in torch.autograd.grad(dx.square().sum(), wanted)]

    x, lengths = torch.randn(4, STEPS, INPUT, dtype=torch.float64), torch.tensor(LENGTHS)
    expected = penalty(layer, "cpu")
    for found, own in zip(penalty(copy.deepcopy(layer).cuda(), "cuda"), expected, strict=True):
        torch.testing.assert_close(found, own)
