"""Tests on CUDA, where PyTorch's kernels are cuDNN's: values, waits, capture, autocast and second derivatives."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from support.batch import HOLES, LENGTHS, RESETS, STEPS
from support.oracle import (
    BACKENDS,
    INPUT,
    Run,
    as_hx,
    as_tuple,
    assert_same,
    call,
    cotangents,
    every,
    held_refuses_hx,
    masked,
    oracle,
    plain,
    prefix_mask,
    random_states,
)
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

if not torch.cuda.is_available():
    pytest.skip("CUDA is not available", allow_module_level=True)

NONE = torch.zeros(4, STEPS, dtype=torch.bool)
FORMS = {  # the arguments, and the mask that they mean
    "list": ({"lengths": LENGTHS}, prefix_mask(LENGTHS, STEPS)),
    "host": ({"lengths": torch.tensor(LENGTHS)}, prefix_mask(LENGTHS, STEPS)),
    "device": ({"lengths": torch.tensor(LENGTHS)}, prefix_mask(LENGTHS, STEPS)),
    "host-mask": ({"mask": HOLES}, HOLES),
    "device-mask": ({"mask": HOLES}, HOLES),
    "device-empty": ({"lengths": torch.zeros(4, dtype=torch.int32)}, NONE),
    "device-empty-mask": ({"mask": NONE}, NONE),
    "host-resets": ({"lengths": LENGTHS, "resets": RESETS}, prefix_mask(LENGTHS, STEPS)),
    "device-resets": ({"mask": HOLES, "resets": RESETS}, HOLES),
    "device-resets-alone": ({"resets": RESETS}, torch.ones(4, STEPS, dtype=torch.bool)),
    "neither": ({}, torch.ones(4, STEPS, dtype=torch.bool)),
}


@pytest.fixture(autouse=True)
def _every_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns off TensorFloat-32, which cuDNN's RNNs use by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=("auto", *BACKENDS, "held"))
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def refusing_to_wait() -> Iterator[Any]:
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def given_as(form: str) -> dict[str, Any]:
    given, _ = FORMS[form]
    return {name: value.cuda() for name, value in given.items()} if form.startswith("device") else given


def refuses(layer: Any, given: dict[str, Any], cudnn: bool = True) -> bool:
    """Returns whether `held` refuses a call with initial states."""
    return layer.backend == "held" and (not cudnn or (bool(given) and held_refuses_hx(layer)))


def on_gpu(layer: Any, backend: str) -> Any:
    """Returns a copy of the layer on the GPU, which runs by a backend."""
    there = copy.deepcopy(layer).cuda()
    there.backend = backend
    return there


def home(run: Run) -> Run:
    assert all(t.is_cuda for t in (run.output, *run.states, *run.gradients.values()))
    gradients = {name: g.cpu() for name, g in run.gradients.items()}
    return Run(run.output.cpu(), tuple(h.cpu() for h in run.states), gradients)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 5e-4)])  # cuDNN's own error
@pytest.mark.parametrize("cudnn", [True, False])
def test_cuda_matches_float64_oracle(
    cell: str, backend: str, dtype: torch.dtype, atol: float, cudnn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "enabled", cudnn)
    batch_first = [False, True] if cudnn else [True]
    for options in every(num_layers=[1, 2], bidirectional=[False, True], batch_first=batch_first, bias=[True, False]):
        for form, (given, mask) in FORMS.items():
            layer = masked(cell, backend=backend, **options).to(dtype)
            x = torch.randn(4, STEPS, INPUT, dtype=dtype).masked_fill(~mask.unsqueeze(-1), torch.nan)
            states, pulled = random_states(layer, 4, dtype), cotangents(layer, 4, STEPS)
            expected = oracle(layer, x.nan_to_num(), mask, states, pulled, given.get("resets"))
            called = layer.cuda(), x.cuda(), [h.cuda() for h in states], [c.cuda() for c in pulled]
            if refuses(layer, given, cudnn):
                with pytest.raises(ValueError, match="backend='held' can't run this call"):
                    call(*called, **given_as(form))
                continue
            found = home(call(*called, **given_as(form)))
            assert_same(found, expected, atol, (form, options))
            for padded in (found.output, found.gradients["x"]):
                assert not padded[~mask].any()


# The form of input, the number of steps, and the arguments.
STREAMS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "whole": ("padded", STEPS, {}),
    "list": ("padded", STEPS, {"lengths": LENGTHS}),
    "device": ("padded", STEPS, {"lengths": torch.tensor(LENGTHS)}),
    "sorted": ("padded", STEPS, {"lengths": [5, 3, 1, 0]}),
    "device-mask": ("padded", STEPS, {"mask": HOLES}),
    "host-resets": ("padded", STEPS, {"lengths": LENGTHS, "resets": RESETS}),
    "device-resets": ("padded", STEPS, {"resets": RESETS}),
    "unbatched": ("unbatched", STEPS, {}),
    "unbatched-length": ("unbatched", STEPS, {"lengths": 3}),
    "packed-sorted": ("packed-sorted", STEPS, {}),
    "packed-unsorted": ("packed-unsorted", STEPS, {}),
    "nested": ("nested", STEPS, {}),
    "one-step": ("padded", 1, {}),
    "one-step-list": ("padded", 1, {"lengths": [1, 0, 1, 1]}),
    "device-one-step": ("padded", 1, {"lengths": torch.tensor([1, 0, 1, 1])}),
    "device-one-step-resets": ("padded", 1, {"resets": RESETS[:, 1:2]}),
    "one-step-packed": ("packed-sorted", 1, {}),
    "one-step-unbatched": ("unbatched", 1, {}),
}

WITHOUT_PADDING = ("whole", "unbatched", "one-step", "device-one-step-resets", "one-step-unbatched")


def arranged(form: str, x: Tensor) -> Any:
    """Brings x (N, T, I) into a form of input."""
    lengths = [3, 5, 1, 2] if form in ("packed-unsorted", "nested") else [5, 3, 2, 1]
    rows = [row[:n] for row, n in zip(x, lengths, strict=True)]
    if form.startswith("packed"):
        return pack_sequence(rows, enforce_sorted=form == "packed-sorted")
    if form == "nested":
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    return x[0] if form == "unbatched" else x


@pytest.mark.parametrize("form", STREAMS)
@pytest.mark.parametrize("kind", ["flat", "expanded", "fed back"])
def test_hx_of_any_layout_is_accepted(cell: str, backend: str, form: str, kind: str) -> None:
    """cuDNN refuses a state that is not contiguous, such as the flattened one that the layer returned."""
    shape, steps, given = STREAMS[form]
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True, "enforce_sorted": form == "sorted"}
    layer = masked(cell, **options).double()
    x = torch.randn(4, STEPS, INPUT, dtype=torch.float64)[:, :steps]
    initial = random_states(layer, 4)

    def run(own: Any, device: str) -> list[Tensor]:
        to_there = {n: v.to(device) if form.startswith("device") else v for n, v in given.items()}
        leaf = x.to(device).requires_grad_()
        leaves = [h.to(device).requires_grad_() for h in initial]
        states: list[Tensor] = [h[:, :1] if shape == "unbatched" else h for h in leaves]
        if kind == "expanded":
            states = [h[:1, :1].expand(h.shape) for h in states]
        if kind == "flat":
            states = [h.transpose(0, 1).flatten(1) for h in states]
        hx = as_hx([h.squeeze(0 if kind == "flat" else 1) if shape == "unbatched" else h for h in states])
        results: list[Tensor] = []
        for _ in range(2 if kind == "fed back" else 1):
            output, hx = own(arranged(shape, leaf), hx, **to_there)
            values = output.data if shape.startswith("packed") else output.values() if shape == "nested" else output
            results += [values, *as_tuple(hx)]
        wanted = [leaf, *leaves, *own.parameters()]
        loss = sum((t * t).sum() for t in results)
        return [t.cpu() for t in (*results, *torch.autograd.grad(loss, wanted))]

    there = on_gpu(layer, backend)
    if held_refuses_hx(there) and form not in WITHOUT_PADDING:
        with pytest.raises(ValueError, match="can't hold hx"):
            run(there, "cuda")
        return
    expected = run(layer, "cpu")
    for found, own in zip(run(there, "cuda"), expected, strict=True):
        torch.testing.assert_close(found, own)


def test_cpu_lengths_are_refused_during_graph_capture(cell: str) -> None:
    layer = masked(cell, num_layers=2, bidirectional=True, batch_first=True).cuda()
    x, graph = torch.randn(4, STEPS, INPUT, device="cuda"), torch.cuda.CUDAGraph()
    layer(x, lengths=LENGTHS)
    words = "Give lengths, masks and resets as tensors on cuda"
    with pytest.raises(ValueError, match=words), torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        layer(x, lengths=LENGTHS)
    torch.cuda.synchronize()
    assert torch.isfinite(layer(x, lengths=LENGTHS)[0]).all()


def training_step(layer: Any, x: Tensor, **given: Any) -> tuple[Tensor, ...]:
    output, last = layer(x, **given)
    results = (output, *as_tuple(last))
    loss = sum(((t + 1) ** 3).sum() for t in results)
    return *results, *torch.autograd.grad(loss, [x, *layer.parameters()])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize(
    ("backend", "form"),
    [
        *product(
            ["auto", "padded", "held"],
            ["list", "host", "host-mask", "device", "device-mask", "device-empty", "neither"],
        ),
        ("scan", "device-resets"),
    ],
)
def test_training_step_makes_no_host_sync(cell: str, backend: str, form: str, refusing_to_wait: Any) -> None:
    layer = masked(cell, num_layers=2, bidirectional=True, batch_first=True, backend=backend).cuda()
    x, given = torch.randn(4, STEPS, INPUT, device="cuda", requires_grad=True), given_as(form)
    training_step(layer, x, **given)  # the first call sets cuDNN up
    refusing_to_wait()
    training_step(layer, x, **given)


@pytest.mark.parametrize(
    ("backend", "form"),
    [*product(["auto", "padded", "held"], ["device", "device-mask"]), ("auto", "device-resets-alone")],
)
def test_captured_graph_replays_with_new_values(cell: str, backend: str, form: str) -> None:
    layer = masked(cell, num_layers=2, bidirectional=True, batch_first=True).double()
    there = on_gpu(layer, backend)
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
@pytest.mark.parametrize(("form", "cudnn"), [("host", True), ("device", True), ("host", False)])
def test_autocast_matches_torch_dtypes_and_oracle(
    cell: str, backend: str, form: str, dtype: torch.dtype, atol: float, cudnn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "enabled", cudnn)
    layer = masked(cell, num_layers=2, bidirectional=True, batch_first=True, backend=backend)
    theirs = plain(cell, num_layers=2, bidirectional=True, batch_first=True).cuda()
    mask = prefix_mask(LENGTHS, STEPS)
    x, states, pulled = torch.randn(4, STEPS, INPUT), random_states(layer, 4), cotangents(layer, 4, STEPS)
    expected = oracle(layer, x, mask, states, pulled)
    layer, x = layer.cuda(), x.cuda().requires_grad_()
    states = [h.float().cuda().requires_grad_() for h in states]
    if refuses(layer, {"lengths": LENGTHS}, cudnn):
        with pytest.raises(ValueError, match="backend='held' can't run this call"):
            layer(x, as_hx(states), **given_as(form))
        return
    with torch.autocast("cuda", dtype=dtype):
        output, last = layer(x, as_hx(states), **given_as(form))
        their_output, their_last = theirs(x, as_hx(states))
    assert [t.dtype for t in (output, *as_tuple(last))] == [t.dtype for t in (their_output, *as_tuple(their_last))]
    lasts = tuple(h.unflatten(1, (4, -1)).transpose(0, 1) for h in as_tuple(last))
    wanted = {"x": x, **{f"hx[{s}]": h for s, h in enumerate(states)}, **dict(layer.named_parameters())}
    cast = [c.to("cuda", t.dtype) for c, t in zip(pulled, (output, *lasts), strict=True)]
    found = home(Run(output, lasts).pull_back(cast, wanted))
    # Gradients of weights, and their errors, add up over steps and rows.
    assert_same(Run(found.output, found.states), expected, atol)
    assert_same(found, expected, 10 * atol)


def test_second_derivatives_match_cpu(cell: str, backend: str) -> None:
    """cuDNN's backward has no derivative of its own."""
    layer = masked(cell, num_layers=2, bidirectional=True, batch_first=True).double()

    def penalty(own: Any, device: str) -> list[Tensor]:
        leaf = x.to(device).requires_grad_()
        (dx,) = torch.autograd.grad(own(leaf, lengths=lengths.to(device))[0].square().sum(), leaf, create_graph=True)
        wanted = [leaf, own.weight_ih_l0, own.weight_hh_l1_reverse]
        return [g.cpu() for g in torch.autograd.grad(dx.square().sum(), wanted)]

    x, lengths = torch.randn(4, STEPS, INPUT, dtype=torch.float64), torch.tensor(LENGTHS)
    expected = penalty(layer, "cpu")
    for found, own in zip(penalty(on_gpu(layer, backend), "cuda"), expected, strict=True):
        torch.testing.assert_close(found, own)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_second_derivatives_under_autocast_match_cpu(cell: str, backend: str, dtype: torch.dtype) -> None:
    layer = masked(cell, batch_first=True)
    x, lengths = torch.randn(4, STEPS, INPUT), torch.tensor(LENGTHS)

    def penalty(own: Any, device: str, enabled: bool) -> Tensor:
        leaf = x.to(device).requires_grad_()
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            output, _ = own(leaf, lengths=lengths)
            (dx,) = torch.autograd.grad(output.float().square().sum(), leaf, create_graph=True)
        (g,) = torch.autograd.grad(dx.square().sum(), own.weight_hh_l0)
        return g.cpu()

    expected = penalty(layer, "cpu", False)
    torch.testing.assert_close(penalty(on_gpu(layer, backend), "cuda", True), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_matches_float64(cell: str, backend: str, dtype: torch.dtype) -> None:
    layer = masked(cell, num_layers=2, bidirectional=True, batch_first=True).to(dtype)
    x = torch.randn(4, STEPS, INPUT, dtype=dtype)
    exact = copy.deepcopy(layer).double()
    expected, expected_last = exact(x.double(), lengths=LENGTHS)
    output, last = on_gpu(layer, backend)(x.cuda(), lengths=LENGTHS)
    for found, own in zip((output, *as_tuple(last)), (expected, *as_tuple(expected_last)), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double().cpu(), own, atol=20 * torch.finfo(dtype).eps, rtol=0)


def test_dropout_is_redrawn_alike_by_checkpoint(cell: str, backend: str) -> None:
    layer = masked(cell, num_layers=2, dropout=0.5, batch_first=True, backend=backend).double().cuda()
    x = torch.randn(4, STEPS, INPUT, dtype=torch.float64, device="cuda")

    def run(x: Tensor) -> Tensor:
        output: Tensor = layer(x, lengths=LENGTHS)[0]
        return output

    def gradients(through: Any) -> list[Tensor]:
        layer.zero_grad()
        leaf = x.detach().clone().requires_grad_()
        torch.manual_seed(3)
        through(leaf).square().sum().backward()
        return [leaf.grad, *(p.grad for p in layer.parameters())]

    expected = gradients(run)
    for use_reentrant in (False, True):  # True runs once without gradients, and once with them
        again = partial(checkpoint, run, use_reentrant=use_reentrant)
        for a, b in zip(gradients(again), expected, strict=True):
            torch.testing.assert_close(a, b)
    assert not torch.equal(run(x), run(x))


@pytest.mark.parametrize("form", ["packed", "nested"])
def test_packed_and_nested_input_match_cpu(cell: str, backend: str, form: str) -> None:
    layer = masked(cell, num_layers=2, bidirectional=True).double()
    rows = [torch.randn(n, INPUT, dtype=torch.float64) for n in (3, 5, 1)]

    def run(own: Any, device: str) -> list[Tensor]:
        leaves = [row.to(device).requires_grad_() for row in rows]
        if form == "packed":
            given: Any = pack_sequence(leaves, enforce_sorted=False)
        else:
            given = torch.nested.as_nested_tensor(leaves, layout=torch.jagged)
        output, last = own(given)
        values = output.data if form == "packed" else output.values()
        results = [values, *as_tuple(last)]
        return [t.cpu() for t in (*results, *torch.autograd.grad(sum(t.square().sum() for t in results), leaves))]

    expected = run(layer, "cpu")
    for found, own in zip(run(on_gpu(layer, backend), "cuda"), expected, strict=True):
        torch.testing.assert_close(found, own)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # from a trial of the compiler
def test_compiled_layer_matches_eager(cell: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`reduce-overhead` records a CUDA graph."""
    monkeypatch.setattr(torch._dynamo.config, "allow_rnn", True)
    layer = masked(cell, num_layers=2, bidirectional=True, batch_first=True).cuda()
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for lengths in ([3, 4, 0, 1], [5, 5, 2, 3], [1, 0, 4, 4]):
        x = torch.randn(4, STEPS, INPUT, device="cuda", requires_grad=True)
        results = []
        for own in (layer, compiled):
            output, last = own(x, lengths=torch.tensor(lengths, device="cuda"))
            loss = output.square().sum() + sum(h.sum() for h in as_tuple(last))
            gradients = torch.autograd.grad(loss, [x, *layer.parameters()])
            results.append([t.clone() for t in (output, *as_tuple(last), *gradients)])
        for found, own in zip(*results, strict=True):
            torch.testing.assert_close(found, own)


def test_length_out_of_range_fails_device_assertion() -> None:
    """The assertion makes the device unusable for its process, so the call runs in a process of its own."""
    code = (
        "import torch, masked_rnn\n"
        "gru = masked_rnn.MaskedGRU(2, 2, batch_first=True).cuda()\n"
        "gru(torch.randn(2, 3, 2).cuda(), lengths=torch.tensor([3, 4]).cuda())\n"
        "torch.cuda.synchronize()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode
    assert "a length is out of range: expected 0 <= length <= 3" in ended.stderr
