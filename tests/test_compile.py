"""torch.compile: by default with the graph break that Dynamo imposes, with allow_rnn in one graph for every size."""

from __future__ import annotations

import collections
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.oracle import (
    INPUT,
    ONE_STATE_AND_TWO,
    as_tuple,
    cotangents,
    masked,
    needs_torch,
    raised_in_graph,
    random_states,
    torch_before,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from masked_rnn import MaskedGRU, _torch
from masked_rnn._backends import kernels, measured, padded, scan
from masked_rnn._backends.bptt import library
from masked_rnn._capture import custom_op
from masked_rnn._capture.arguments import Arguments

SIZES = [(5, 6), (4, 5), (2, 9), (3, 12)]
"""Batch and steps. The first are other numbers than the layers' sizes: Dynamo takes equal numbers for the same size."""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(function: Any, layer: Any, x: Tensor, hx: Any, pulled: list[Tensor], **given: Any) -> list[Tensor]:
    """Returns the results, and every gradient under the given cotangents."""
    x = x.detach().clone().requires_grad_()
    output, last = function(x, hx, **given)
    results = [output, *as_tuple(last)]
    cotangent = [pulled[0], *(c.transpose(0, 1).flatten(1) for c in pulled[1:])]
    gradients = torch.autograd.grad(results, [x, *layer.parameters()], [c.to(x.dtype) for c in cotangent])
    return [*results, *gradients]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def arguments(layer: Any, batch: int, steps: int, with_hx: bool = False) -> tuple[Tensor, Any, list[Tensor]]:
    states = random_states(layer, batch, torch.float32)
    hx = (states[0] if len(states) == 1 else states) if with_hx else None
    return torch.randn(batch, steps, INPUT), hx, cotangents(layer, batch, steps)


@pytest.mark.slow_but_each(1)
@pytest.mark.parametrize(("compiler", "given"), [("inductor", "lengths"), ("eager", "mask"), ("eager", "neither")])
def test_compiled_layer_matches_eager(cell: str, compiler: str, given: str) -> None:
    """Without allow_rnn no part of the layer is compiled."""
    layer = masked(cell, num_layers=2, bidirectional=True, batch_first=True)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(layer, backend=counter)
    for batch, steps in SIZES[:2]:
        x, hx, pulled = arguments(layer, batch, steps)
        more = options(given, batch, steps)
        close(run(compiled, layer, x, hx, pulled, **more), run(layer, layer, x, hx, pulled, **more))
    assert counter.frame_count == 0


class Before(torch.nn.Module):
    """A model whose code before the layer is a separate statement."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.linear, self.layer = torch.nn.Linear(INPUT, INPUT), layer

    def forward(self, x: Tensor, lengths: Any) -> Any:
        x = self.linear(x).relu()
        return self.layer(x, lengths=lengths)[0] * 2


@pytest.mark.parametrize("cell", ONE_STATE_AND_TWO)
def test_compiled_model_breaks_graph_at_layer(cell: str) -> None:
    """The code before the layer is one graph. The code after it runs eagerly; from torch 2.15 on it is a graph too."""
    model = Before(masked(cell, batch_first=True))
    counter = CompileCounterWithBackend("eager")
    x, lengths = torch.randn(3, 6, INPUT), torch.tensor([6, 0, 2])
    close([torch.compile(model, backend=counter)(x, lengths)], [model(x, lengths)])
    assert counter.frame_count == (1 if torch_before("2.15") else 2)
    targets = [str(n.target) for graph in counter.graphs for n in graph.graph.nodes if n.op.startswith("call")]
    assert not any("masked_rnn" in target or "gru" in target for target in targets)


@pytest.mark.skipif(
    "reason" not in inspect.signature(torch.compiler.disable).parameters, reason="torch shows no reason"
)
def test_graph_break_report_names_reason_and_cure() -> None:
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    torch.compile(Before(masked("gru", batch_first=True)), backend="eager")(torch.randn(3, 6, INPUT), [6, 0, 2])
    ours = [text for text in breaks if "call_layer" in text]
    assert ours
    for text in ours:
        assert "reason: Dynamo compiles no torch.nn.RNNBase" in text
        assert "torch._dynamo.config.allow_rnn = True" in text


def test_compiler_disable_works_without_reason_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "disable", lambda function, recursive=True: (function, recursive))
    assert _torch.disable_dynamo(len) == (len, True)


class ByName(MaskedGRU):
    def forward(self, input: Tensor, lengths: Any) -> Tensor:  # type: ignore[override]
        return MaskedGRU.forward(self, input, lengths=lengths)[1]


class BySuper(MaskedGRU):
    def forward(self, input: Tensor, lengths: Any) -> Tensor:  # type: ignore[override]
        return super().forward(input, lengths=lengths)[1]


@pytest.mark.parametrize("kind", [ByName, BySuper])
def test_compiled_subclass_matches_eager(kind: type[MaskedGRU]) -> None:
    if kind is BySuper and not torch_before("2.15"):
        pytest.skip("torch 2.15's Dynamo fails on super() in any subclass of nn.RNNBase; docs/versions.md")
    layer = kind(INPUT, 3, batch_first=True)
    x, lengths = torch.randn(3, 6, INPUT), torch.tensor([6, 0, 2])
    close([torch.compile(layer, backend="eager")(x, lengths)], [layer(x, lengths)])


@pytest.mark.usefixtures("allow_rnn")
def test_compiled_subclass_makes_one_graph() -> None:
    layer = BySuper(INPUT, 3, batch_first=True)
    x, lengths = torch.randn(3, 6, INPUT), torch.tensor([6, 0, 2])
    close([torch.compile(layer, backend="eager", fullgraph=True)(x, lengths)], [layer(x, lengths)])


def options(given: str, batch: int, steps: int) -> dict[str, Any]:
    if given == "neither":
        return {}
    more = {"resets": torch.rand(batch, steps) < 0.3} if "resets" in given else {}
    if "lengths" in given:
        return {"lengths": torch.randint(0, steps + 1, (batch,)), **more}
    return {"mask": torch.rand(batch, steps) > 0.4, **more} if "mask" in given else more


@pytest.mark.slow_but("eager")
@pytest.mark.parametrize(
    ("compiler", "given", "with_hx", "cell"),
    [
        ("inductor", "lengths", False, "gru"),
        ("inductor", "mask", True, "lstm-proj"),
        ("inductor", "resets", True, "lstm-proj"),
        ("inductor", "resets and lengths", True, "lstm-proj"),
        ("aot_eager", "resets and lengths", True, "lstm-proj"),
        ("eager", "mask", True, "gru"),
    ],
)
@pytest.mark.usefixtures("allow_rnn")
def test_compiled_layer_reuses_graph_for_every_size(cell: str, compiler: str, given: str, with_hx: bool) -> None:
    layer = masked(cell, num_layers=2 if compiler == "inductor" else 1, bidirectional=True, batch_first=True)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for batch, steps in SIZES:
        x, hx, pulled = arguments(layer, batch, steps, with_hx)
        more = options(given, batch, steps)
        close(run(compiled, layer, x, hx, pulled, **more), run(layer, layer, x, hx, pulled, **more))
    assert counter.frame_count <= 3
    targets = {str(node.target) for graph in counter.graphs for node in graph.graph.nodes}
    assert "masked_rnn.layer" in targets


@pytest.mark.slow_but("lstm-proj")
@pytest.mark.parametrize(("cell", "anew"), [("gru", False), ("lstm-proj", True)])
@pytest.mark.usefixtures("allow_rnn")
def test_recomputed_gradient_keeps_float32_precision(cell: str, anew: bool) -> None:
    """For few steps, the gradient runs the kernel once more, in float32."""
    layer = masked(cell, batch_first=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, hx, pulled = arguments(layer, 3, 1, with_hx=True)
    more = {"resets": torch.tensor([[True], [False], [True]])} if anew else {}
    found, expected = run(compiled, layer, x, hx, pulled, **more), run(layer, layer, x, hx, pulled, **more)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.slow_but("lstm-proj")
@pytest.mark.parametrize("cell", ONE_STATE_AND_TWO)
@pytest.mark.usefixtures("allow_rnn")
def test_compiled_backward_reuses_saved_values(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("the layer is run once more")

    monkeypatch.setattr(custom_op, "_run_kernel_again", fail)
    layer = masked(cell, batch_first=True).double()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(torch.randn(3, 9, INPUT, dtype=torch.float64), lengths=[9, 2, 0])[0].sum().backward()


@pytest.mark.slow_but("lstm-proj")
@pytest.mark.parametrize("cell", ONE_STATE_AND_TWO)
@pytest.mark.usefixtures("allow_rnn")
def test_hx_gradient_is_right_with_resets(cell: str) -> None:
    """Covers a row that drops the initial state, one that does not, and one without steps."""
    layer = masked(cell, bidirectional=True, batch_first=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    resets = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 1]], dtype=torch.bool)
    x, states, pulled = torch.randn(3, 3, INPUT), random_states(layer, 3, torch.float32), cotangents(layer, 3, 3)
    found = []
    for function in (compiled, layer):
        leaves = [h.clone().requires_grad_() for h in states]
        output, last = function(x, leaves[0] if len(leaves) == 1 else leaves, lengths=[3, 2, 0], resets=resets)
        pairs = zip(
            (output, *as_tuple(last)), (pulled[0], *(c.transpose(0, 1).flatten(1) for c in pulled[1:])), strict=True
        )
        found.append(torch.autograd.grad(sum((t * c).sum() for t, c in pairs), leaves))
    close(*found)


@pytest.mark.slow_but("aot_eager")
@pytest.mark.parametrize(("compiler", "cell"), [("aot_eager", "gru"), ("inductor", "lstm-proj")])
@pytest.mark.usefixtures("allow_rnn")
def test_static_shapes_compile_for_inference(compiler: str, cell: str) -> None:
    layer = masked(cell, bidirectional=True, batch_first=True)
    compiled = torch.compile(layer, backend=compiler, fullgraph=True)
    x, _, _ = arguments(layer, 3, 6)
    lengths = torch.tensor([6, 0, 2])
    with torch.no_grad():
        found, expected = compiled(x, lengths=lengths), layer(x, lengths=lengths)
    close([found[0], *as_tuple(found[1])], [expected[0], *as_tuple(expected[1])])


@pytest.mark.slow_but("gru-dtype0")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", ONE_STATE_AND_TWO)
@pytest.mark.usefixtures("allow_rnn")
def test_compiled_half_precision_matches_eager(cell: str, dtype: torch.dtype) -> None:
    layer = masked(cell, batch_first=True).to(dtype)
    x, hx, pulled = arguments(layer, 3, 5)
    x, pulled = x.to(dtype), [t.to(dtype) for t in pulled]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    expected = run(layer, layer, x, hx, pulled, lengths=[5, 0, 3])
    close(run(compiled, layer, x, hx, pulled, lengths=[5, 0, 3]), expected)
    assert {t.dtype for t in expected} == {dtype}


@pytest.mark.usefixtures("allow_rnn")
def test_list_lengths_compile_with_time_first() -> None:
    layer = masked("gru", bidirectional=True)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(6, 3, INPUT)
    close([compiled(x, lengths=[6, 0, 2])[0]], [layer(x, lengths=[6, 0, 2])[0]])
    close([compiled(x[:, 0], lengths=4)[0]], [layer(x[:, 0], lengths=4)[0]])


@pytest.mark.slow_but("gru")
@pytest.mark.parametrize("cell", ONE_STATE_AND_TWO)
@pytest.mark.usefixtures("allow_rnn")
def test_changing_list_lengths_recompile_once(cell: str) -> None:
    """The first lengths are compiled once, and all others once more: 0 and 1 are no special lengths."""
    layer = masked(cell, batch_first=True)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(3, 6, INPUT)
    for lengths in ([6, 0, 2], [1, 5, 4], (2, 2, 3), [0, 1, 0], [3, 6, 1], [4, 4, 4], [6, 6, 6]):
        close([compiled(x, lengths=lengths)[0]], [layer(x, lengths=lengths)[0]])
    assert counter.frame_count <= 3  # a tuple is another type than a list
    counter.frame_count = 0
    for length in (4, 6, 0, 1, 3, 5):
        close([compiled(x[0], lengths=length)[0]], [layer(x[0], lengths=length)[0]])
    assert counter.frame_count <= 2


@pytest.mark.parametrize("lengths", [[2.7, 3.0, 1.9], [3, 2.0, 1], [True, False, True], 2.5], ids=str)
@pytest.mark.usefixtures("allow_rnn")
def test_non_integer_lengths_are_refused_when_compiling(lengths: Any) -> None:
    """As in eager mode, lengths are not truncated on the way into a graph."""
    layer = masked("gru", batch_first=True)
    x = torch.randn(3, 6, INPUT) if isinstance(lengths, list) else torch.randn(6, INPUT)
    with pytest.raises(Exception, match=raised_in_graph(r"of type (float|bool)")):
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x, lengths=lengths)


@pytest.mark.parametrize(
    ("cell", "steps", "given"),
    [
        ("gru", 1, "neither"),
        ("lstm-proj", 3, "resets"),
        pytest.param("gru", 4, "lengths", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("allow_rnn")
def test_compiled_layer_runs_forced_bptt(cell: str, steps: int, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` runs PyTorch's kernel over so few steps."""
    for other in (padded, scan):
        monkeypatch.setattr(other, "run", lambda _call: pytest.fail("another backend ran"))
    layer = masked(cell, bidirectional=True, batch_first=True, backend="bptt")
    x, hx, pulled = arguments(layer, 3, steps, with_hx=True)
    more = options(given, 3, steps)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found, expected = run(compiled, layer, x, hx, pulled, **more), run(layer, layer, x, hx, pulled, **more)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("forced", ["packed", "padded", "held"])
@pytest.mark.usefixtures("allow_rnn")
def test_compiler_refuses_other_forced_backends(forced: str) -> None:
    layer = masked("gru", backend=forced)
    words = f"backend='{forced}' can't run this call: it is being compiled .*'auto'"
    with pytest.raises(Exception, match=raised_in_graph(words)):
        torch.compile(layer, backend="eager", fullgraph=True)(torch.randn(5, 2, INPUT))


@pytest.mark.usefixtures("allow_rnn")
def test_compiler_refuses_bptt_of_complex_layer() -> None:
    layer = masked("gru", backend="bptt", dtype=torch.complex64)
    x = torch.randn(5, 2, INPUT, dtype=torch.complex64)
    words = "backend='bptt' can't run this call: its gradients are those of real"
    with pytest.raises(Exception, match=raised_in_graph(words)):
        torch.compile(layer, backend="eager", fullgraph=True)(x)
    given = (x, None, None, [x.new_zeros(1, 2, 3)], list(layer.parameters()), "GRU", False)
    with pytest.raises(RuntimeError, match="backend='bptt' can't run this layer: its gradients are those of real"):
        torch.ops.masked_rnn.layer(*given, "bptt", False)
    with pytest.raises(RuntimeError, match="Expected backend 'auto' or 'bptt', got 'padded'"):
        torch.ops.masked_rnn.layer(*given, "padded", False)


@pytest.mark.parametrize("lengths", [None, [6, 2, 5]], ids=str)
def test_operator_backward_follows_its_forward(lengths: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient must not choose anew, because only the one that ran forward has saved anything."""
    layer = masked("lstm", batch_first=True)
    x, weights, states = torch.randn(3, 6, INPUT), list(layer.parameters()), [torch.zeros(1, 3, 3)] * 2
    given = None if lengths is None else torch.tensor(lengths)
    expected = torch.autograd.grad(layer(x, lengths=lengths)[0].square().sum(), weights)
    for first in (True, False):
        monkeypatch.setattr(measured, "has_onednn", lambda here=first: here)
        results = torch.ops.masked_rnn.layer(x, given, None, states, weights, "LSTM", True, "auto", True)
        monkeypatch.setattr(measured, "has_onednn", lambda here=first: not here)
        close(list(torch.autograd.grad(results[0].square().sum(), weights)), list(expected))


def test_operator_keeps_dtype_under_autocast(cell: str) -> None:
    """A graph that was compiled under autocast calls the operator under autocast."""
    layer = masked(cell, batch_first=True)
    x, states = torch.randn(3, 6, INPUT), random_states(layer, 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        results = torch.ops.masked_rnn.layer(
            x, torch.tensor([6, 2, 5]), None, states, list(layer.parameters()), layer.mode, True, "auto", False
        )
    assert all(t.dtype == torch.float32 for t in results[:-2])
    close([results[0]], [layer(x, states if len(states) > 1 else states[0], [6, 2, 5])[0]])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [None, [6, 2, 5]], ids=str)
def test_operator_runs_same_kernel_as_eager(
    bidirectional: bool, lengths: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN's LSTM runs, and runs once more for the gradient."""
    layer = masked("lstm", bidirectional=bidirectional, batch_first=True)
    ran: list[str] = []
    run_kernel = kernels.run_kernel
    monkeypatch.setattr(kernels, "run_kernel", lambda *a, **k: ran.append("kernel") or run_kernel(*a, **k))
    given = None if lengths is None else torch.tensor(lengths)
    x, weights = torch.randn(3, 6, INPUT), list(layer.parameters())
    states = random_states(layer, 3, torch.float32)
    called = (x, given, None, states, weights, "LSTM", True, "auto", True)
    found = torch.ops.masked_rnn.layer(*called)
    assert bool(ran) == (torch.backends.mkldnn.is_available() and not library.runs(torch.float32))
    expected = layer(x, states, lengths=lengths)
    close([found[0]], [expected[0]])
    pulled = [torch.randn_like(t) for t in found[:3]]
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(found[:3], weights, pulled)
    layer.backend, layer.flatten_hidden = "scan", False
    output, last = layer(x, states, lengths=lengths)
    close(list(gradients), list(torch.autograd.grad([output, *last], weights, pulled)))


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("steps", [1, 3, 9])
@pytest.mark.parametrize("given", ["neither", "full", "lengths", "resets", "no reset"])
def test_operator_matches_eager_bit_for_bit(cell: str, steps: int, given: str) -> None:
    """The plan, the choice and the loops are the same, so output, last states and every gradient are equal."""
    layer = masked(cell, bidirectional=True, batch_first=True, flatten_hidden=False)
    x, states = torch.randn(3, steps, INPUT, requires_grad=True), random_states(layer, 3, torch.float32)
    lengths = {"full": torch.full((3,), steps), "lengths": torch.tensor([steps, 0, 1])}.get(given)
    resets = {"resets": torch.rand(3, steps) < 0.4, "no reset": torch.zeros(3, steps, dtype=torch.bool)}.get(given)
    if steps == 1:
        resets = None  # the layer drops them before it calls the operator
    weights = list(layer.parameters())
    time_first = None if resets is None else resets.t()
    results = torch.ops.masked_rnn.layer(x, lengths, time_first, list(states), weights, layer.mode, True, "auto", True)
    output, last = layer(x, states if len(states) > 1 else states[0], lengths, resets=resets)
    found, expected = list(results[: 1 + len(states)]), [output, *as_tuple(last)]
    pulled = [torch.randn_like(t) for t in expected]
    for tensors in (found, expected):
        tensors += torch.autograd.grad(tensors, [x, *weights], pulled)
    for a, b in zip(found, expected, strict=True):
        # oneDNN has one LSTM for inference, which the operator's forward runs, and another for training.
        assert torch.allclose(a, b, atol=1e-6) if cell == "lstm" else torch.equal(a, b)


def test_operator_follows_lengths_and_resets_of_each_call() -> None:
    """It keeps the segments of the latest call, for calls with the same lengths and resets."""
    layer, x = masked("gru", batch_first=True, flatten_hidden=False), torch.randn(2, 3, INPUT)
    some, others = torch.tensor([[0, 1, 0], [1, 0, 0]]).bool(), torch.tensor([[0, 0, 1], [0, 1, 1]]).bool()
    for lengths, resets in (([3, 2], some), ([3, 2], others), ([1, 3], others), ([1, 3], some)):
        results = torch.ops.masked_rnn.layer(
            x,
            torch.tensor(lengths),
            resets.t(),
            [torch.zeros(1, 2, 3)],
            list(layer.parameters()),
            "GRU",
            True,
            "auto",
            False,
        )
        output, last = layer(x, lengths=lengths, resets=resets)
        close(results[:2], [output, last])


def test_operator_takes_resets_without_a_true_as_none() -> None:
    """As an eager call does: PyTorch's kernel runs one step of an RNN."""
    layer = masked("rnn-tanh")
    for resets in (None, torch.zeros(1, 3, dtype=torch.bool)):
        *_, kernel_ran = torch.ops.masked_rnn.layer(
            torch.randn(1, 3, INPUT),
            None,
            resets,
            [torch.zeros(1, 3, 3)],
            list(layer.parameters()),
            layer.mode,
            False,
            "auto",
            True,
        )
        assert kernel_ran


@pytest.mark.slow_but("gru-aot_eager")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("cell", ONE_STATE_AND_TWO)
@pytest.mark.usefixtures("allow_rnn")
def test_model_with_layer_compiles_and_trains(cell: str, compiler: str) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = masked(cell, 8, 3, bidirectional=True, batch_first=True)
            self.embed = torch.nn.Embedding(45, 8)
            self.head = torch.nn.LazyLinear(5)

        def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
            output, _ = self.rnn(self.embed(ids), lengths=lengths)
            return self.head(output.sum(1))

    model = Model()
    # Each id occurs once: code that torch 2.6 compiles on one thread without AVX-512 loses gradients of repeated ids.
    ids, lengths = torch.randperm(45)[:18].view(3, 6), torch.tensor([6, 1, 4])
    model(ids, lengths)
    compiled = torch.compile(model, backend=compiler, fullgraph=True, dynamic=True)
    for _ in range(2):
        model.zero_grad()
        expected = model(ids, lengths)
        expected.square().sum().backward()
        gradients = [p.grad for p in model.parameters()]
        model.zero_grad()
        found = compiled(ids, lengths)
        found.square().sum().backward()
        close([found, *(p.grad for p in model.parameters())], [expected, *gradients])
        ids, lengths = torch.randperm(45).view(5, 9), torch.tensor([9, 0, 4, 4, 2])


@pytest.mark.slow
@pytest.mark.usefixtures("allow_rnn")
def test_compile_work_is_independent_of_length() -> None:
    """Neither the graph nor the Python calls that make it grow with the length."""
    nodes, calls = [], []
    for steps in (10, 10, 1000):  # the first one fills caches
        torch._dynamo.reset()
        layer = masked("gru", batch_first=True)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, backend=counter, fullgraph=True)
        x, lengths = torch.randn(2, steps, INPUT), torch.tensor([0, 0])  # so that no step runs
        events: collections.Counter[str] = collections.Counter()
        sys.setprofile(lambda _, event, __, events=events: events.update((event,)))  # type: ignore[misc]
        try:
            compiled(x, lengths=lengths)
        finally:
            sys.setprofile(None)
        calls.append(events["call"])
        nodes.append(sum(len(graph.graph.nodes) for graph in counter.graphs))
    assert nodes[2] == nodes[1]
    assert calls[1] > 10_000
    assert calls[2] < 1.1 * calls[1]


@pytest.mark.slow_but("lstm-proj")
@pytest.mark.parametrize(("cell", "length"), [("gru", 7), ("lstm-proj", -1)])
@pytest.mark.usefixtures("allow_rnn")
def test_length_out_of_range_is_refused_at_run_time(cell: str, length: int) -> None:
    layer = masked(cell, batch_first=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 6, INPUT)
    compiled(x, lengths=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=rf"lengths\[1\] = {length}, .*Expected 0 <= length <= 6"):
        compiled(x, lengths=torch.tensor([1, length, 3]))


@pytest.mark.parametrize("with_resets", [False, True])
def test_device_backward_keeps_float32_precision(cell: str, with_resets: bool) -> None:
    """Runs on the CPU the backward that accelerators run."""
    layer = masked(cell)
    x, states = torch.randn(6, 3, INPUT), random_states(layer, 3, torch.float32)
    resets = torch.rand(6, 3) < 0.3 if with_resets else None
    weights = [p.detach() for p in layer.parameters()]
    grads = [torch.randn(6, 3, layer.proj_size or 3), *(torch.randn_like(h) for h in states)]
    lengths = torch.tensor([6, 2, 5])
    found, expected = (
        custom_op._run_kernel_again(
            Arguments(
                x.to(dtype),
                lengths,
                resets,
                [h.to(dtype) for h in states],
                [w.to(dtype) for w in weights],
                layer.mode,
                False,
                "auto",
            ),
            [g.to(dtype) for g in grads],
            True,
            True,
        )
        for dtype in (torch.float32, torch.float64)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-4)


@pytest.mark.slow_but("lstm-proj")
@pytest.mark.parametrize("cell", [*ONE_STATE_AND_TWO, "rnn-tanh"])  # rnn-tanh saves no buffer
def test_operator_passes_opcheck(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own checker tests schema, fake kernel, gradient registration and tracing."""
    # oneDNN's LSTM is off, because the checker compares the whole reserve, which that kernel does not write.
    monkeypatch.setattr(measured, "has_onednn", lambda: False)
    layer = masked(cell, bidirectional=True)
    x = torch.randn(5, 6, INPUT, requires_grad=True)  # few steps would run a kernel that does not write it either
    weights = list(layer.parameters())
    # Lengths are full. Otherwise part of the reserve is never written, and the checker compares all of it.
    cases = [(None, False, False), (torch.tensor([6] * 5), True, True)]
    for lengths, batch_first, anew in cases[:1] if cell == "rnn-tanh" else cases:
        resets = torch.ones(5, 6, dtype=torch.bool) if not batch_first else torch.ones(6, 5, dtype=torch.bool)
        batch = 5 if batch_first else 6
        shapes = [(2, batch, layer.proj_size or 3), (2, batch, 3)][: 2 if layer.mode == "LSTM" else 1]
        initial = [torch.zeros(shape) for shape in shapes]
        torch.library.opcheck(
            torch.ops.masked_rnn.layer,
            (x, lengths, resets if anew else None, initial, weights, layer.mode, batch_first, "auto", True),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@pytest.mark.slow_but("gru")
@pytest.mark.parametrize("cell", ONE_STATE_AND_TWO)
@pytest.mark.usefixtures("allow_rnn")
def test_same_lengths_compile_in_both_layouts(cell: str) -> None:
    lengths = torch.tensor([3, 1, 2])
    for batch_first in (False, True):
        layer = masked(cell, batch_first=batch_first)
        compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
        for steps in (5, 7, 4):
            x = torch.randn(3, steps, INPUT)
            x = x if batch_first else x.transpose(0, 1)
            close([compiled(x, lengths=lengths)[0]], [layer(x, lengths=lengths)[0]])


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [None, [4, 2, 2], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("anew", [False, True])
def test_operator_results_share_no_memory(
    cell: str, bidirectional: bool, lengths: list[int] | None, anew: bool
) -> None:
    layer = masked(cell, bidirectional=bidirectional)
    x = torch.randn(4, 3, INPUT)
    states, weights = random_states(layer, 3, torch.float32), [p.detach() for p in layer.parameters()]
    given = None if lengths is None else torch.tensor(lengths)
    called = (x, given, torch.rand(4, 3) < 0.4 if anew else None, states, weights, layer.mode, False, "auto")
    results = torch.ops.masked_rnn.layer(*called, True)
    grads = [torch.randn_like(result) for result in results[:-2]]
    found = torch.ops.masked_rnn.layer_gradient(*called, *results[-2:], grads, True, True)
    assert [g.shape for g in found] == [t.shape for t in (*states, x, *weights)]
    for tensors in ([*states, x, *weights, *results], [*states, x, *weights, *grads, *found]):
        places = [t.untyped_storage().data_ptr() for t in tensors]
        assert len(set(places)) == len(places)


@pytest.mark.slow_but("gru")
@pytest.mark.parametrize(("cell", "batch", "steps"), [("gru", 3, 0), ("lstm-proj", 0, 5)])
@pytest.mark.usefixtures("allow_rnn")
def test_empty_batch_compiles_and_trains(cell: str, batch: int, steps: int) -> None:
    layer = masked(cell, batch_first=True)
    x = torch.randn(batch, steps, INPUT, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    output, _ = compiled(x, lengths=torch.zeros(batch, dtype=torch.int64))
    output.sum().backward()
    assert output.shape[:2] == (batch, steps)
    assert x.grad is not None
    assert all(p.grad is not None and p.grad.eq(0).all() for p in layer.parameters())


@pytest.mark.slow_but("aot_eager")
@needs_torch("2.13", "a loop in a graph")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.usefixtures("allow_rnn")
def test_compiled_scan_makes_one_loop_for_every_size(compiler: str) -> None:
    """Without gradients. With them, each number of steps has its own graph."""
    layer = masked("lstm-proj", bidirectional=compiler == "inductor", batch_first=True, backend="scan")
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch, steps in SIZES:
            x, hx, _ = arguments(layer, batch, steps, with_hx=True)
            more = options("resets and lengths", batch, steps)
            found, expected = (function(x, hx, **more) for function in (compiled, layer))
            close([found[0], *as_tuple(found[1])], [expected[0], *as_tuple(expected[1])])
    assert counter.frame_count <= 2


@pytest.mark.slow_but("aot_eager")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.usefixtures("allow_rnn")
def test_compiled_scan_trains(compiler: str) -> None:
    layer = masked("gru", bidirectional=compiler == "inductor", batch_first=True, backend="scan")
    compiled = torch.compile(layer, backend=compiler, fullgraph=True, dynamic=True)
    x, hx, pulled = arguments(layer, 3, 4, with_hx=True)
    more = options("resets and lengths", 3, 4)
    close(run(compiled, layer, x, hx, pulled, **more), run(layer, layer, x, hx, pulled, **more))
