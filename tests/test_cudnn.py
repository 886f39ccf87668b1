"""The layer never gives cuDNN a call that it refuses. On the simulated device, a kernel refuses the same calls."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.batch import BATCH, HOLES, LENGTHS, RESETS, STEPS
from support.oracle import (
    INPUT,
    ON_CUDNN,
    ONE_STATE_AND_TWO,
    as_hx,
    as_tuple,
    held_refuses_hx,
    masked,
    plain,
    random_states,
)
from support.simulated_device import DEVICE, HOST, SimulatedTensor
from support.strict_kernel import check_chunk, with_cudnn
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import vector_to_parameters
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from masked_rnn._backends import cudnn, kernels, padded
from masked_rnn._backends.held import operators as operators_of_held
from masked_rnn._backends.held.marks import marks_for
from masked_rnn._capture import custom_op
from masked_rnn._spec import Spec, Weights

SORTED = [5, 3, 2, 0]
# The form of input, the number of steps, and the arguments, which lie on the device for "there".
FORMS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "whole": ("padded", STEPS, {}),
    "lengths": ("padded", STEPS, {"lengths": LENGTHS}),
    "lengths-there": ("padded", STEPS, {"lengths": torch.tensor(LENGTHS)}),
    "mask": ("padded", STEPS, {"mask": HOLES}),
    "mask-there": ("padded", STEPS, {"mask": HOLES}),
    "resets": ("padded", STEPS, {"lengths": LENGTHS, "resets": RESETS}),
    "resets-there": ("padded", STEPS, {"resets": RESETS}),
    "unbatched": ("unbatched", STEPS, {}),
    "unbatched-length": ("unbatched", STEPS, {"lengths": 3}),
    "packed-sorted": ("packed-sorted", STEPS, {}),
    "packed-unsorted": ("packed-unsorted", STEPS, {}),
    "nested": ("nested", STEPS, {}),
    "one-step": ("padded", 1, {}),
    "one-step-lengths": ("padded", 1, {"lengths": [1, 0, 1, 1]}),
    "one-step-lengths-there": ("padded", 1, {"lengths": torch.tensor([1, 0, 1, 1])}),
    "one-step-packed": ("packed-sorted", 1, {}),
    "one-step-resets": ("padded", 1, {"resets": RESETS[:, 1:2]}),
    "one-step-unbatched": ("unbatched", 1, {}),
    "empty-rows": ("padded", STEPS, {"lengths": SORTED}),
}
WITHOUT_PADDING = ("whole", "unbatched", "one-step", "one-step-resets", "one-step-unbatched")
"""With one step, a reset drops the initial state, and nothing else."""
STATES = ("none", "flat", "whole", "expanded", "transposed")


@pytest.fixture(autouse=True)
def operators(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names cuDNN's operators that the package has called."""
    return with_cudnn(monkeypatch, lambda x: isinstance(x, SimulatedTensor))


def arranged(form: str, x: Tensor) -> Any:
    """Brings x (N, T, I) into a form of input."""
    if form == "unbatched":
        return x[0]
    if form.startswith("packed"):
        own = torch.tensor(SORTED[:3] if form == "packed-sorted" else [3, 5, 2]).clamp(max=x.size(1))
        return pack_padded_sequence(x[:3], own, batch_first=True, enforce_sorted=form == "packed-sorted")
    if form == "nested":
        return torch.nested.nested_tensor_from_jagged(
            x.flatten(0, 1), torch.tensor([0, 5, 7, 12, 20]).to(x.device), torch.tensor([3, 0, 5, 8]).to(x.device)
        )
    return x


def initial(kind: str, form: str, states: tuple[Tensor, ...]) -> list[Tensor] | None:
    """Returns the leaves (L·D, N, P) as hx."""
    if form.startswith("packed"):
        states = tuple(h[:, :3] for h in states)
    if form == "unbatched":
        states = tuple(h[:, :1] for h in states)
    one = form == "unbatched"
    if kind == "none":
        return None
    if kind == "flat":
        return [h.transpose(0, 1).flatten(1)[0 if one else slice(None)] for h in states]
    if kind == "expanded":
        states = tuple(h[:1, :1].expand(h.shape) for h in states)
    if kind == "transposed":
        states = tuple(h.transpose(0, 1).contiguous().transpose(0, 1) for h in states)
    return [h[:, 0] if one else h for h in states]


def run(layer: Any, form: str, kind: str, x: Tensor, states: tuple[Tensor, ...], device: Any) -> list[Tensor]:
    """Returns the output, the last states and all gradients, on the CPU."""
    shape, steps, given = FORMS[form]
    own = {n: v.to(device) if "there" in form and isinstance(v, Tensor) else v for n, v in given.items()}
    leaf = x[:, :steps].to(device).requires_grad_()
    leaves = tuple(h.to(device).requires_grad_() for h in states)
    hx = initial(kind, shape, leaves)
    data = arranged(shape, leaf)
    with torch.no_grad():  # here cuDNN runs outside of training mode
        layer(data, None if hx is None else as_hx(hx), **own)
    output, last = layer(data, None if hx is None else as_hx(hx), **own)
    values = output.data if isinstance(output, PackedSequence) else output.values() if output.is_nested else output
    results = [values, *as_tuple(last)]
    score = sum((t * t).sum() for t in results)
    wanted = [leaf, *leaves, *layer.parameters()]
    found = torch.autograd.grad(score, wanted, allow_unused=True, materialize_grads=True)
    return [t.detach().cpu() for t in (*results, *found)]


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 2), (3, 1, 2)], ids=str)
def test_gradient_has_strides_of_its_parameter(cell: str, bidirectional: bool, sizes: tuple[int, int, int]) -> None:
    inputs, hidden, batch = sizes
    hidden = 3 if cell == "lstm-proj" else hidden
    layer = masked(cell, inputs, hidden, num_layers=2, bidirectional=bidirectional).to(DEVICE)
    x, lengths = torch.randn(3, batch, inputs).to(DEVICE), torch.tensor([1, 3][:batch]).to(DEVICE)
    for layer.backend in ON_CUDNN:
        layer.zero_grad()
        layer(x, lengths=lengths)[0].sum().backward()
        for name, p in layer.named_parameters():
            assert p.grad.stride() == p.stride(), (layer.backend, name, tuple(p.shape), p.grad.stride())


@pytest.mark.slow_but_each(1)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("cell", ONE_STATE_AND_TWO)
@pytest.mark.parametrize("options", [{"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
def test_hx_of_any_layout_is_accepted(
    cell: str, form: str, kind: str, options: dict[str, Any], operators: list[str]
) -> None:
    """Covers the flattened state that the layer returns, an expanded one, and others, in each form of a call."""
    batch_first = FORMS[form][0] == "padded"
    enforced = form == "empty-rows" and options.get("num_layers") == 2
    layer = masked(cell, backend="scan", batch_first=batch_first, enforce_sorted=enforced, **options).double()
    there, x = copy.deepcopy(layer).to(DEVICE), torch.randn(BATCH, STEPS, INPUT, dtype=torch.float64)
    states = random_states(layer, BATCH)
    expected = run(layer, form, kind, x, states, "cpu")
    for there.backend in ON_CUDNN:
        operators.clear()
        if held_refuses_hx(there) and kind != "none" and form not in WITHOUT_PADDING:
            with pytest.raises(ValueError, match=r"of an LSTM or RNN can't hold hx over it.*backend='auto'"):
                run(there, form, kind, x, states, DEVICE)
            continue
        for a, b in zip(run(there, form, kind, x, states, DEVICE), expected, strict=True):
            torch.testing.assert_close(a, b, msg=lambda m: f"{there.backend}: {m}")
        assert bool(operators) == (there.backend == "held" and form not in WITHOUT_PADDING)


@pytest.mark.slow_but_each(1)
@pytest.mark.parametrize(("batch_first", "bias"), [(True, False), (False, True)])
def test_streamed_state_matches_cpu_for_every_cell(cell: str, batch_first: bool, bias: bool) -> None:
    """Covers stacked layers in both layouts. The returned state is fed back unchanged."""
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first, "bias": bias}
    layer = masked(cell, backend="scan", **options).double()
    there, x = copy.deepcopy(layer).to(DEVICE), torch.randn(STEPS, BATCH, INPUT, dtype=torch.float64)
    x = x.transpose(0, 1) if layer.batch_first else x

    def stream(own: Any, device: Any, given: dict[str, Any]) -> list[Tensor]:
        leaf, hx, results = x.to(device).requires_grad_(), None, []
        for _ in range(3):
            output, hx = own(leaf, hx, **given)
            results += [output, *as_tuple(hx)]
        found = torch.autograd.grad(sum((t * t).sum() for t in results), [leaf, *own.parameters()])
        return [t.detach().cpu() for t in (*results, *found)]

    for given in ({}, {"lengths": LENGTHS}):
        expected = stream(layer, "cpu", given)
        for there.backend in ON_CUDNN:
            if held_refuses_hx(there) and given:
                continue
            for a, b in zip(stream(there, DEVICE, given), expected, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.slow_but_each(1)
@pytest.mark.parametrize("given", [{}, {"lengths": LENGTHS}, {"mask": HOLES}], ids=str)
@pytest.mark.parametrize("cell", ONE_STATE_AND_TWO)
def test_dropout_is_redrawn_alike_with_flattened_hx(cell: str, given: dict[str, Any]) -> None:
    layer = masked(cell, num_layers=2, bidirectional=True, batch_first=True, dropout=0.5).to(DEVICE)
    x = torch.randn(BATCH, STEPS, INPUT).to(DEVICE).requires_grad_()
    hx = as_hx([h.transpose(0, 1).flatten(1).to(DEVICE) for h in random_states(layer, BATCH, torch.float32)])
    for layer.backend in ON_CUDNN:
        if held_refuses_hx(layer) and given:
            continue
        torch.manual_seed(3)
        expected = layer(x, hx, **given)[0]
        torch.manual_seed(3)
        again = checkpoint(lambda x: layer(x, hx, **given)[0], x, use_reentrant=True)
        assert torch.equal(again.cpu(), expected.cpu())
        again.sum().backward()


def test_strict_kernel_refuses_what_cudnn_refuses() -> None:
    kernel, layer = kernels.KERNELS["GRU"], plain("gru", num_layers=2).to(DEVICE)
    chunk = list(cudnn.in_one_chunk(list(layer.parameters())))
    x, h = torch.randn(STEPS, BATCH, INPUT).to(DEVICE).requires_grad_(), torch.zeros(2, BATCH, 3).to(DEVICE)

    def call(h: Tensor = h, weights: Any = chunk, train: bool = True) -> Tensor:
        output: Tensor = kernel(x, h, weights, True, 2, 0.0, train, False, False)[0]
        return output

    call().sum().backward()
    for refused in (torch.zeros(BATCH, 2, 3).to(DEVICE).transpose(0, 1), h[:, :1].expand(h.shape)):
        with pytest.raises(RuntimeError, match="hx is not contiguous"):
            call(refused)
    with pytest.raises(RuntimeError, match="single contiguous chunk"):
        call(weights=[p.clone() for p in chunk])
    with pytest.raises(RuntimeError, match="backward can only be called in training mode"):
        call(train=False).sum().backward()
    output = call()
    (output.sum() + output.square().sum()).backward(retain_graph=True)
    output.sum().backward()
    with pytest.raises(AssertionError, match="not the same dtype"):
        call(h.double())
    with pytest.raises(AssertionError, match="hidden size"):
        call(h[:1])
    bare = list(plain("gru", bias=False).parameters())
    with pytest.raises(RuntimeError, match="single contiguous chunk"):
        check_chunk(bare, has_biases=False)
    check_chunk(cudnn.in_one_chunk(bare), has_biases=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gru_state_is_held_over_3000_steps_of_padding(dtype: torch.dtype) -> None:
    """Padding comes first, so nothing is gathered: the state itself must stay."""
    layer = masked("gru", bidirectional=True, batch_first=True, flatten_hidden=False).to(dtype)
    there, steps = copy.deepcopy(layer).to(DEVICE), 3000
    there.backend = "held"
    x, hx = torch.randn(2, steps, INPUT, dtype=dtype), random_states(layer, 2, dtype)[0]
    mask = torch.zeros(2, steps, dtype=torch.bool)
    mask[0, -3:] = True
    expected = layer(x[:1, -3:], hx[:, :1])[1]
    found = there(x.to(DEVICE), hx.to(DEVICE), mask=mask.to(DEVICE))[1].cpu()
    close = {"atol": 4 * torch.finfo(dtype).eps, "rtol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(found[:, :1], expected, **close)
    torch.testing.assert_close(found[:, 1:], hx[:, 1:], **close)


def without_strides(t: Tensor) -> Tensor:
    """Copies as `save_on_cpu(pin_memory=True)` does."""
    return torch.empty_like(t, memory_format=torch.contiguous_format).copy_(t)


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize(
    ("backend", "given"),
    [("padded", {}), ("padded", {"lengths": LENGTHS}), ("held", {"lengths": LENGTHS})],
    ids=["whole", "padded", "held"],
)
@pytest.mark.parametrize("way", ["kept graph", "eval", "hooks", "checkpoint", "anomaly", "batched"])
@pytest.mark.parametrize("cell", [*ONE_STATE_AND_TWO, "rnn-relu"])
def test_autograd_features_match_cpu(cell: str, backend: str, given: dict[str, Any], way: str) -> None:
    layer = masked(cell, bidirectional=True, num_layers=2, batch_first=True).double()
    layer.train(way != "eval")
    there = copy.deepcopy(layer).to(DEVICE)
    there.backend = backend
    x = torch.randn(BATCH, STEPS, INPUT, dtype=torch.float64)

    def gradients(own: Any, device: Any) -> list[Tensor]:
        leaf = x.to(device).requires_grad_()
        wanted = [leaf, *own.parameters()]

        def forward(leaf: Tensor) -> Tensor:
            output, last = own(leaf, **given)
            return sum(((t * t).sum() for t in (output, *as_tuple(last))), output.new_zeros(()))

        if way == "hooks":
            with torch.autograd.graph.saved_tensors_hooks(without_strides, lambda t: t):
                total = forward(leaf)
        elif way == "checkpoint":
            total = checkpoint(forward, leaf, use_reentrant=False)
        elif way == "anomaly":
            with torch.autograd.set_detect_anomaly(True, check_nan=False):
                total = forward(leaf)
        else:
            total = forward(leaf)
        if way == "kept graph":
            torch.autograd.grad(total, wanted, retain_graph=True)
        if way == "batched":
            many = torch.tensor([1.0, 2.0], dtype=torch.float64).to(device)
            return [t.cpu() for t in torch.autograd.grad(total, wanted, many, is_grads_batched=True)]
        return [t.cpu() for t in torch.autograd.grad(total, wanted)]

    for a, b in zip(gradients(there, DEVICE), gradients(layer, "cpu"), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("mode", "inputs", "directions", "dtype", "expected"),
    [
        ("GRU", 4, 1, torch.float32, 4),
        ("LSTM", 7, 2, torch.float16, 1),
        ("GRU", 8, 1, torch.float64, 8),
        ("LSTM", 128, 1, torch.float16, 128),
        ("RNN_TANH", 256, 1, torch.float16, 128),
        ("GRU", 128, 1, torch.float16, 8),
        ("LSTM", 128, 2, torch.float16, 8),
        ("LSTM", 128, 1, torch.float32, 8),
        ("LSTM", 120, 1, torch.float16, 8),
    ],
)
def test_marks_round_the_input_up(mode: str, inputs: int, directions: int, dtype: torch.dtype, expected: int) -> None:
    assert marks_for(Spec(mode, inputs, 128, bidirectional=directions == 2), dtype) == expected


@pytest.mark.parametrize("backend", ["padded", "packed", "held"])
def test_gradient_of_a_row_without_steps_reaches_no_weight(cell: str, backend: str) -> None:
    layer = masked(cell, bidirectional=True, num_layers=2, batch_first=True, backend=backend).to(DEVICE)
    _, last = layer(torch.randn(BATCH, STEPS, INPUT).to(DEVICE), lengths=LENGTHS)
    pulled = [torch.ones(h.shape) for h in as_tuple(last)]
    for d in pulled:
        d[2] = torch.nan  # the row without steps
    found = torch.autograd.grad(as_tuple(last), list(layer.parameters()), [d.to(DEVICE) for d in pulled])
    assert all(bool(g.cpu().isfinite().all()) for g in found)


def test_no_reserve_is_made_without_gradients(operators: list[str]) -> None:
    layer = masked("gru", batch_first=True, backend="held").to(DEVICE)
    with torch.no_grad():
        layer(torch.randn(BATCH, STEPS, INPUT).to(DEVICE), lengths=LENGTHS)
    assert operators == ["cudnn_forward without reserve"]


def test_held_runs_in_cudnns_dtype_under_autocast(cell: str, operators: list[str]) -> None:
    layer = masked(cell, num_layers=2, bidirectional=True, batch_first=True)
    there, x = copy.deepcopy(layer).to(DEVICE), torch.randn(BATCH, STEPS, INPUT)
    there.backend = "held"
    found = []
    for own, device in ((there, DEVICE), (layer, HOST)):
        leaf = x.to(device).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=own is there):
            output, last = own(leaf, lengths=LENGTHS)
        results = [output, *as_tuple(last)]
        assert {t.dtype for t in results} == {torch.float16 if own is there else torch.float32}
        wanted = [leaf, *own.parameters()]
        gradients = torch.autograd.grad(sum(t.float().square().sum() for t in results), wanted)
        assert [g.dtype for g in gradients] == [torch.float32] * len(wanted)
        found.append([t.float().cpu() for t in (*results, *gradients)])
    assert operators == ["cudnn_forward"] * 2 + ["cudnn_backward"] * 2
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_held_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = masked("gru", batch_first=True, backend="held"), torch.randn(BATCH, STEPS, INPUT)
    there, moved = copy.deepcopy(layer).to(DEVICE), x.to(DEVICE)

    def refuses(words: str, own: Any = there, x: Tensor = moved) -> None:
        for given in ({}, {"lengths": LENGTHS}):
            with pytest.raises(ValueError, match=f"backend='held' can't run this call: {words}.*Use backend='auto'"):
                own(x, **given)

    refuses("it runs on an NVIDIA GPU, by cuDNN, and the input is on cpu", layer, x)
    with monkeypatch.context() as patched:
        patched.setattr(operators_of_held, "DTYPES", (torch.float16,))
        refuses(r"cuDNN does not run torch\.float32 on this device")
    words = r"make_fx and FakeTensorMode can't follow it into cuDNN's operators.*Use backend='auto'"
    with pytest.raises(ValueError, match=words):
        make_fx(lambda x: layer(x)[0])(x)
    with pytest.raises(ValueError, match=words), FakeTensorMode():
        masked("gru", backend="held")(torch.randn(BATCH, STEPS, INPUT))
    with monkeypatch.context() as patched:
        patched.setattr(torch.version, "hip", "6.2")
        refuses("it runs on an NVIDIA GPU, by cuDNN, and this PyTorch is one for AMD's")
    monkeypatch.setattr(operators_of_held, "cudnn_backward", None)
    refuses("this PyTorch lacks cuDNN's operators")


def test_weights_without_biases_need_zeros_behind_them() -> None:
    """Also if their storage ends right behind the matrices."""
    layer = plain("gru", bias=False)
    vector_to_parameters(torch.randn(sum(p.numel() for p in layer.parameters())), layer.parameters())
    check_chunk(cudnn.in_one_chunk(list(layer.parameters())), has_biases=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_relu_over_padding_stays_finite_in_cudnns_autocast(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN runs in float16 under any autocast."""
    monkeypatch.setattr(cudnn, "runs_cudnn", lambda _x: True)
    x, w = torch.randn(STEPS, BATCH, INPUT), Weights(torch.randn(3, INPUT), torch.randn(3, 3))
    with torch.autocast("cpu", dtype):
        _, wide = padded._with_states_at_zero(x, torch.ones(STEPS, BATCH, 1, dtype=torch.bool), w)
    assert bool(wide.w_ih.to(torch.float16).isfinite().all())


@pytest.mark.parametrize("lengths", [[STEPS + 1, 1, 1, 1], [1, -1, 1, 1]], ids=str)
def test_operator_refuses_lengths_out_of_range_on_device(lengths: list[int]) -> None:
    layer, x = masked("gru").to(DEVICE), torch.randn(STEPS, BATCH, INPUT).to(DEVICE)
    initial, weights = [torch.zeros(1, BATCH, 3).to(DEVICE)], [p.detach() for p in layer.parameters()]
    with pytest.raises(RuntimeError, match="out of range"):
        custom_op._forward(x, torch.tensor(lengths).to(DEVICE), None, initial, weights, "GRU", False, "auto", False)
