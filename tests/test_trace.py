"""Calls without values, or with those of an example: torch.jit.trace, ONNX by it, torch.fx, make_fx, fake tensors."""

from __future__ import annotations

from typing import Any

import onnxruntime
import pytest
import torch
from support.oracle import BACKENDS, INPUT, ONE_STATE_AND_TWO, as_tuple, masked
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from masked_rnn import MaskedGRU

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.trace"),
]


class Model(nn.Module):
    def __init__(self, layer: Any, given: str) -> None:
        super().__init__()
        self.layer, self.given = layer, given

    def forward(self, x: Tensor, real: Any = None) -> Any:
        if self.given == "packed":
            first = self.layer.batch_first
            output, last = self.layer(pack_padded_sequence(x, real, batch_first=first, enforce_sorted=False))
            return pad_packed_sequence(output, batch_first=first)[0], last
        return self.layer(x, **({} if self.given == "neither" else {self.given: real}))


def flat(results: Any) -> list[Tensor]:
    output, last = results
    return [output.data if isinstance(output, PackedSequence) else output, *as_tuple(last)]


def same(found: Any, expected: Any) -> None:
    for a, b in zip(flat(found), flat(expected), strict=True):
        torch.testing.assert_close(a, b)


def arguments(layer: Any, given: str, batch: int, steps: int, full: bool) -> tuple[Any, ...]:
    x = torch.randn(batch, steps, INPUT)
    if given == "mask":
        real = torch.ones(batch, steps, dtype=torch.bool) if full else torch.rand(batch, steps) > 0.4
        real = real if layer.batch_first else real.t()
    else:
        low = steps if full else 1 if given == "packed" else 0
        real = torch.randint(low, steps + 1, (batch,))
        real[0] = steps
    x = x if layer.batch_first else x.transpose(0, 1)
    return (x,) if given == "neither" else (x, real)


@pytest.mark.parametrize("given", ["lengths", "mask", "packed", "neither"])
@pytest.mark.parametrize(("cell", "bidirectional", "batch_first"), [("gru", True, True), ("lstm-proj", False, False)])
def test_traced_layer_takes_other_lengths(cell: str, given: str, bidirectional: bool, batch_first: bool) -> None:
    """The example's lengths may all be T, which otherwise count as no lengths, or shorter; or T may be 1."""
    layer = masked(cell, num_layers=2, bidirectional=bidirectional, batch_first=batch_first)
    model = Model(layer, given)
    for steps, full in ((5, True), (5, False), (1, True)):
        traced = torch.jit.trace(model, arguments(layer, given, 3, steps, full), check_trace=False)
        for batch, steps in ((4, 7), (1, 3)):
            later = arguments(layer, given, batch, steps, False)
            same(traced(*later), model(*later))


@pytest.mark.parametrize("backend", ["packed", "bptt", "scan"])
def test_backend_reports_why_it_cannot_be_traced(cell: str, backend: str) -> None:
    layer = masked(cell, backend=backend, batch_first=True)
    what = "the number of steps" if backend == "scan" else "the lengths"
    words = f"backend='{backend}' can't run this call: torch.jit.trace would record {what} of this call.*backend='auto'"
    with pytest.raises(ValueError, match=words):
        torch.jit.trace(Model(layer, "lengths"), arguments(layer, "lengths", 3, 5, False))


def test_nested_input_is_refused_in_trace(backend: str) -> None:
    layer = masked("gru", backend=backend)
    nested = torch.nested.nested_tensor([torch.randn(n, INPUT) for n in (2, 3)], layout=torch.jagged)
    with pytest.raises(
        ValueError, match=r"torch\.jit\.trace can't record a nested tensor's lengths. Give padded input"
    ):
        torch.jit.trace(lambda x: layer(nested)[0].values() + x, torch.zeros(()))


@pytest.mark.slow_but_each(1)
@pytest.mark.parametrize("given", ["lengths", "mask"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_older_onnx_exporter_matches_layer(cell: str, given: str, tmp_path: Any) -> None:
    if cell == "lstm-proj":
        pytest.skip("torch's exporter has no LSTM with a projection")
    layer = masked(cell, num_layers=2, bidirectional=True, batch_first=True)
    model = Model(layer, given).eval()
    axes = {"x": {0: "n", 1: "t"}, "real": {0: "n"} if given == "lengths" else {0: "n", 1: "t"}}
    torch.onnx.export(
        model,
        arguments(layer, given, 3, 5, True),
        str(tmp_path / "model.onnx"),
        dynamo=False,
        input_names=["x", "real"],
        dynamic_axes=axes,
        opset_version=17,
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch, steps in ((4, 7), (2, 3)):
        x, real = arguments(layer, given, batch, steps, False)
        found = session.run(None, {"x": x.numpy(), "real": real.numpy()})
        for a, b in zip(found, flat(model(x, real)), strict=True):
            torch.testing.assert_close(torch.from_numpy(a), b, atol=1e-5, rtol=1e-5)


class Whole(nn.Module):
    def __init__(self, cell: str) -> None:
        super().__init__()
        self.before, self.layer = nn.Linear(INPUT, INPUT), masked(cell, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor, resets: Tensor) -> Tensor:
        output, _ = self.layer(self.before(x), lengths=lengths, resets=resets)
        return output * 2


def test_fx_treats_layer_as_leaf(cell: str) -> None:
    model = Whole(cell)
    traced = torch.fx.symbolic_trace(model)
    assert [str(n.target) for n in traced.graph.nodes if n.op == "call_module"] == ["before", "layer"]
    for lengths in ([5, 2, 0], [1, 5, 5]):
        given = torch.randn(3, 5, INPUT), torch.tensor(lengths), torch.rand(3, 5) < 0.5
        assert torch.equal(traced(*given), model(*given))
    with pytest.raises(
        torch.fx.proxy.TraceError, match=r"torch\.fx can't trace into Masked.* Trace a module that holds it"
    ):
        torch.fx.symbolic_trace(model.layer)


@pytest.mark.slow_but_each(1)
@pytest.mark.parametrize("given", ["lengths", "mask"])
@pytest.mark.parametrize("cell", ONE_STATE_AND_TWO)
def test_make_fx_keeps_no_lengths(cell: str, given: str) -> None:
    layer = masked(cell, bidirectional=True, batch_first=True)
    x, real = arguments(layer, given, 3, 5, True)
    for backend in ("auto", *(["scan"] if cell == "gru" else [])):
        layer.backend = backend
        recorded = make_fx(lambda x, real: Model(layer, given)(x, real))(x, real)
        later = arguments(layer, given, 3, 5, False)
        same(recorded(*later), Model(layer, given)(*later))
    for backend in ("packed", "bptt"):
        layer.backend = backend
        with pytest.raises(ValueError, match=r"it reads lengths, which have no values here \(FakeTensorMode, make_fx"):
            make_fx(lambda x, real: Model(layer, given)(x, real))(x, real)


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize(("batch", "steps"), [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("given", ["lengths", "mask"])
@pytest.mark.parametrize("cell", ONE_STATE_AND_TWO)
def test_fake_tensors_without_steps_run(cell: str, given: str, batch: int, steps: int) -> None:
    with FakeTensorMode():
        layer = masked(cell, num_layers=2, bidirectional=True, batch_first=True)
        real = {"lengths": torch.zeros(batch, dtype=torch.int64), "mask": torch.zeros(batch, steps, dtype=torch.bool)}
        output, _ = layer(torch.randn(batch, steps, INPUT, requires_grad=True), **{given: real[given]})
        assert output.shape == (batch, steps, 2 * (layer.proj_size or 3))
        output.sum().backward()


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("given", ["lengths", "list", "mask", "packed", "neither", "unbatched"])
@pytest.mark.parametrize(
    ("cell", "name"),
    [
        *(("gru", name) for name in ("auto", *BACKENDS)),
        ("lstm-proj", "auto"),
        ("lstm-proj", "scan"),
        ("lstm", "padded"),
    ],
)  # `padded` runs oneDNN's LSTM
def test_fake_tensors_give_shapes_or_reason(cell: str, given: str, name: str) -> None:
    """Forward and backward need shapes only. A backend that needs values is refused with the reason."""
    with FakeTensorMode():
        layer = masked(cell, bidirectional=True, batch_first=True, backend=name)
        x = torch.randn(3, 3, INPUT, requires_grad=True)
        lengths, mask = torch.tensor([3, 2, 1]), torch.ones(3, 3, dtype=torch.bool)
        more: dict[str, Any] = {"lengths": {"lengths": lengths}, "list": {"lengths": [3, 2, 1]}}.get(given, {})
        input: Any = x[0] if given == "unbatched" else x
        if given == "mask":
            more = {"mask": mask}
        if given == "packed":
            rows = torch.randn(6, INPUT, requires_grad=True)
            order = torch.tensor([0, 1, 2])
            input = PackedSequence(rows, torch.tensor([3, 2, 1]), order, order)
        # torch.nn's own kernel reads the number of packed rows at each step.
        refuses = given == "packed" or (name in ("packed", "bptt") and given in ("lengths", "list", "mask"))
        if refuses:
            with pytest.raises(ValueError, match="it reads lengths, which have no values here"):
                layer(input, **more)
            return
        output, _ = layer(input, **more)
        assert output.shape[-1] == 2 * (layer.proj_size or 3)
        output.sum().backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in layer.parameters())


def test_fx_traces_subclass_without_resets() -> None:
    class Older(MaskedGRU):
        def forward(self, input: Any, hx: Any = None, lengths: Any = None, *, mask: Any = None) -> Any:
            return super().forward(input, hx, lengths, mask=mask)

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Older(INPUT, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.layer(x)[0]
            return output

    model, x = Holder(), torch.randn(2, 5, INPUT)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
