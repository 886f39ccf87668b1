"""ONNX: each layer is one node with sequence_lens. ONNX Runtime gives what the layer gives in PyTorch."""

from __future__ import annotations

from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from support.oracle import INPUT, as_hx, as_tuple, masked, needs_torch, random_states
from torch import Tensor, nn
from torch.export import Dim

pytestmark = needs_torch("2.13", "torch.onnx.export(dynamo=True)")
NODES = {"gru": "GRU", "lstm": "LSTM", "rnn-tanh": "RNN", "rnn-relu": "RNN"}
STACKED = ((1, 2), (1, 0), (2, 0))
"""How many layers of each kind, GRU, LSTM and RNN, a model has, and how many nodes of its stack come to them."""


class Model(nn.Module):
    """Several layers over the same input. The LSTM takes both states, the others the first, and a stack none."""

    def __init__(self, layers: list[Any], given: str) -> None:
        super().__init__()
        self.layers, self.given = nn.ModuleList(layers), given

    def forward(self, x: Tensor, real: Tensor | None, states: tuple[Tensor, ...] = ()) -> Any:
        results: list[Tensor] = []
        for layer in self.layers:
            fits = len(states) > 0 and len(states[0]) == layer.num_layers * (2 if layer.bidirectional else 1)
            hx = as_hx(states if layer.mode == "LSTM" else states[:1]) if fits else None
            output, last = layer(x, hx, **({} if real is None else {self.given: real}))
            results += [output, *as_tuple(last)]
        return tuple(results)


def exported(layers: list[Any], given: str, arguments: tuple[Any, ...], path: Any) -> onnx.ModelProto:
    batch, time = Dim("batch"), Dim("time")
    axes = (0, 1) if layers[0].batch_first else (1, 0)
    sizes = {axes[0]: batch, axes[1]: time}
    real = {"lengths": {0: batch}, "mask": sizes, "neither": None}[given]
    shapes: tuple[Any, ...] = (sizes, real)
    if len(arguments) > 2:
        shapes += (tuple({1: batch} for _ in arguments[2]),)
    program = torch.onnx.export(
        Model(layers, given).eval(), arguments, dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    assert program is not None
    program.save(path)
    return onnx.load(path)


def real_of(given: str, layer: Any, batch: int, steps: int) -> Tensor | None:
    if given == "lengths":
        return torch.cat([torch.tensor([0, steps]), torch.randint(0, steps + 1, (batch - 2,))])
    mask = torch.rand(batch, steps) > 0.4
    return (mask if layer.batch_first else mask.t()) if given == "mask" else None


def compare(path: Any, layers: list[Any], given: str, arguments: tuple[Any, ...]) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x, real, *states = arguments
    tensors = [x, *([] if real is None else [real]), *(states[0] if states else ())]
    feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), tensors, strict=True)}
    with torch.no_grad():
        expected = Model(layers, given)(*arguments)
    for found, own in zip(session.run(None, feed), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), own, atol=1e-5, rtol=1e-5)


@pytest.mark.slow_but("'given': 'lengths'")
@pytest.mark.parametrize(
    "case",
    [
        {"layers": 1, "bidirectional": False, "given": "lengths", "with_hx": True, "batch_first": False},
        {"layers": 2, "bidirectional": True, "given": "mask", "with_hx": True, "batch_first": True},
        {"layers": 1, "bidirectional": True, "given": "mask", "with_hx": False, "batch_first": False},
        {"layers": 2, "bidirectional": True, "given": "neither", "with_hx": True, "batch_first": True},
    ],
    ids=str,
)
def test_onnx_runtime_matches_layer(case: dict[str, Any], tmp_path: Any, ran: list[str]) -> None:
    """One model has a layer of every cell, and a stack without biases."""
    options = {"num_layers": case["layers"], "bidirectional": case["bidirectional"], "batch_first": case["batch_first"]}
    layers = [masked(cell, **options) for cell in NODES]
    layers.append(masked("gru", bias=False, num_layers=2, bidirectional=True, batch_first=case["batch_first"]))

    def arguments(batch: int, steps: int) -> tuple[Any, ...]:
        x = torch.randn(batch, steps, INPUT)
        real = real_of(case["given"], layers[0], batch, steps)
        if case["given"] == "lengths":
            x[torch.arange(steps) >= real.unsqueeze(1)] = torch.nan  # type: ignore[union-attr]
        states = random_states(layers[1], batch, torch.float32) if case["with_hx"] else ()
        x = x if case["batch_first"] else x.transpose(0, 1)
        return (x, real, states) if states else (x, real)

    path = tmp_path / "model.onnx"
    model = exported(layers, case["given"], arguments(3, 6), path)
    assert set(ran) == {"onnx"}
    kinds = [node.op_type for node in model.graph.node]
    assert [kinds.count(kind) for kind in ("GRU", "LSTM", "RNN")] == [case["layers"] * k + of for k, of in STACKED]
    assert not {"Loop", "Scan", "If", "SequenceAt"} & set(kinds)
    for node in model.graph.node:
        if node.op_type in NODES.values():
            assert bool(node.input[4]) == (case["given"] != "neither")
        if node.op_type == "GRU":
            assert {a.name: a.i for a in node.attribute}["linear_before_reset"] == 1
    for batch, steps in ((3, 6), (5, 4), (2, 11)):
        compare(path, layers, case["given"], arguments(batch, steps))


def test_resets_are_refused_with_reason() -> None:
    class WithResets(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = masked("gru", batch_first=True)

        def forward(self, x: Any, resets: Any) -> Any:
            return self.layer(x, resets=resets)

    with pytest.raises(Exception, match="can't be captured") as refused:
        torch.onnx.export(
            WithResets().eval(), (torch.randn(3, 6, INPUT), torch.rand(3, 6) < 0.3), dynamo=True, verbose=False
        )
    assert "ONNX's nodes know no resets within a sequence" in str(refused.value)


@pytest.mark.slow_but("held")
@pytest.mark.parametrize("forced", ["padded", "bptt", "held"])
def test_forced_backend_is_refused(forced: str) -> None:
    layer = masked("gru", backend=forced).eval()
    with pytest.raises(Exception, match=f"backend='{forced}' can't run this call: it is being compiled or exported"):
        torch.onnx.export(layer, (torch.randn(5, 2, INPUT),), dynamo=True, verbose=False)


@pytest.mark.slow
def test_projection_exports_through_scan(tmp_path: Any) -> None:
    """The export takes any batch, and as many steps as the example has."""
    layers = [masked("lstm-proj", num_layers=2, bidirectional=True, batch_first=True, backend="scan")]
    batch = Dim("batch")
    program = torch.onnx.export(
        Model(layers, "lengths").eval(),
        (torch.randn(3, 5, INPUT), torch.tensor([5, 0, 2])),
        dynamo=True,
        dynamic_shapes=({0: batch}, {0: batch}),
        verbose=False,
    )
    assert program is not None
    program.save(tmp_path / "model.onnx")
    for lengths in ([5, 0, 2], [1, 5, 3, 0]):
        given = torch.randn(len(lengths), 5, INPUT), torch.tensor(lengths)
        compare(tmp_path / "model.onnx", layers, "lengths", given)


def test_projection_is_refused_with_reason() -> None:
    layer = masked("lstm-proj", batch_first=True)
    with pytest.raises(Exception, match="can't be captured") as refused:
        torch.onnx.export(
            Model([layer], "lengths").eval(),
            (torch.randn(3, 6, INPUT), torch.tensor([6, 0, 2])),
            dynamo=True,
            verbose=False,
        )
    assert "ONNX's LSTM node has no projection (proj_size)" in str(refused.value)
