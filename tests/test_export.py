"""torch.export: strict and not, batch and time dynamic, saved and loaded in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from support.oracle import INPUT, ONE_STATE_AND_TWO, as_hx, as_tuple, masked, needs_torch, random_states, torch_before
from torch import Tensor, nn
from torch.export import Dim, export

from masked_rnn._backends import scan

OTHERS = [(2, 9, [9, 0]), (7, 3, [3, 0, 1, 2, 3, 1, 0]), (5, 30, [1, 30, 0, 7, 2])]


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        return self.layer(x, None, lengths)


def flat(results: Any) -> list[Tensor]:
    return [results[0], *as_tuple(results[1])]


@pytest.mark.parametrize(
    ("cell", "strict"), [("gru", False), pytest.param("lstm-proj", False, marks=pytest.mark.slow), ("lstm-proj", True)]
)
def test_exported_layer_takes_other_sizes_and_lengths(cell: str, strict: bool, tmp_path: Any) -> None:
    layer = masked(cell, num_layers=2, bidirectional=True, batch_first=True)
    x, lengths = torch.randn(3, 6, INPUT), torch.tensor([6, 0, 2])
    sizes = ({0: Dim("batch"), 1: Dim("time")}, {0: Dim("batch")})
    program = export(Model(layer), (x, lengths), dynamic_shapes=sizes, strict=strict)
    torch.export.save(program, tmp_path / "model.pt2")
    for exported in (program.module(), torch.export.load(tmp_path / "model.pt2").module()):
        for batch, steps, own in OTHERS:
            x, lengths = torch.randn(batch, steps, INPUT), torch.tensor(own)
            x[:, -1][lengths < steps] = torch.nan
            for a, b in zip(flat(exported(x, lengths)), flat(layer(x, lengths=lengths)), strict=True):
                torch.testing.assert_close(a, b)
        with pytest.raises(ValueError, match=r"lengths\[1\] = 31, .*Expected 0 <= length <= 30"):
            exported(x, torch.tensor([1, 31, 0, 7, 2]))


@pytest.mark.slow_but("lstm-proj")
@pytest.mark.parametrize(("cell", "strict"), [("gru", True), ("lstm-proj", False)])
def test_exported_layer_takes_masks_and_hx(cell: str, strict: bool) -> None:
    class WithMask(Model):
        def forward(self, x: Tensor, mask: Tensor, states: tuple[Tensor, ...]) -> Any:  # type: ignore[override]
            return self.layer(x, states[0] if len(states) == 1 else states, mask=mask)

    layer = masked(cell, num_layers=2, bidirectional=True, batch_first=True)
    batch, time = Dim("batch"), Dim("time")

    def arguments(n: int, t: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        return torch.randn(n, t, INPUT), torch.rand(n, t) > 0.4, random_states(layer, n, torch.float32)

    first = arguments(3, 6)
    sizes = ({0: batch, 1: time}, {0: batch, 1: time}, tuple({1: batch} for _ in first[2]))
    exported = export(WithMask(layer), first, dynamic_shapes=sizes, strict=strict).module()
    for n, t in ((2, 9), (5, 4)):
        x, mask, states = arguments(n, t)
        expected = layer(x, states[0] if len(states) == 1 else states, mask=mask)
        for a, b in zip(flat(exported(x, mask, states)), flat(expected), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.slow_but("lstm-proj")
@pytest.mark.parametrize(("cell", "real"), [("gru", "lengths"), ("lstm-proj", "mask")])
def test_exported_layer_takes_resets(cell: str, real: str) -> None:
    class WithResets(Model):
        def forward(self, x: Tensor, real_steps: Tensor, resets: Tensor) -> Any:  # type: ignore[override]
            return self.layer(x, **{real: real_steps}, resets=resets)

    layer = masked(cell, num_layers=2, bidirectional=True, batch_first=True)
    batch, time = Dim("batch"), Dim("time")

    def arguments(n: int, t: int) -> tuple[Tensor, Tensor, Tensor]:
        given = torch.randint(0, t + 1, (n,)) if real == "lengths" else torch.rand(n, t) > 0.4
        return torch.randn(n, t, INPUT), given, torch.rand(n, t) < 0.3

    whole = {0: batch, 1: time}
    sizes = (whole, {0: batch} if real == "lengths" else whole, whole)
    exported = export(WithResets(layer), arguments(3, 6), dynamic_shapes=sizes).module()
    for n, t in ((2, 9), (5, 4)):
        x, given, resets = arguments(n, t)
        expected = layer(x, **{real: given}, resets=resets)
        for a, b in zip(flat(exported(x, given, resets)), flat(expected), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_exported_program_runs_in_fresh_process(tmp_path: Any) -> None:
    layer = masked("gru", num_layers=2, bidirectional=True, batch_first=True)
    x, lengths = torch.randn(3, 6, INPUT), torch.tensor([6, 0, 2])
    sizes = ({0: Dim("batch"), 1: Dim("time")}, {0: Dim("batch")})
    torch.export.save(export(Model(layer), (x, lengths), dynamic_shapes=sizes), tmp_path / "model.pt2")
    x, lengths = torch.randn(4, 9, INPUT), torch.tensor([9, 0, 3, 1])
    torch.save((x, lengths, flat(layer(x, lengths=lengths))), tmp_path / "case.pt")
    script = (
        "import sys, torch, masked_rnn\n"
        "x, lengths, expected = torch.load(sys.argv[1] + '/case.pt')\n"
        "model = torch.export.load(sys.argv[1] + '/model.pt2').module()\n"
        "for a, b in zip(model(x, lengths), expected, strict=True): torch.testing.assert_close(a, b)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=600)


@pytest.mark.parametrize("cell", ONE_STATE_AND_TWO)
def test_exported_layer_trains(cell: str) -> None:
    layer = masked(cell, bidirectional=True, batch_first=True)
    sizes = ({0: Dim("batch"), 1: Dim("time")}, {0: Dim("batch")})
    x, lengths = torch.randn(3, 6, INPUT), torch.tensor([6, 0, 2])
    exported = export(Model(layer), (x, lengths), dynamic_shapes=sizes).module()
    names, parameters = zip(*exported.named_parameters(), strict=True)
    found = torch.autograd.grad(exported(x, lengths)[0].square().sum(), parameters)
    own = [layer.get_parameter(name.removeprefix("layer.")) for name in names]
    expected = torch.autograd.grad(layer(x, lengths=lengths)[0].square().sum(), own)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    output = exported(x, lengths)[0]
    # An in-place change is allowed, as on any layer's output.
    found = torch.autograd.grad(output.mul_(2).square().sum(), parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, 4 * b)


class WithAll(nn.Module):
    """Passes every argument, under names whose order an example can follow."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, hx: list[Tensor], more: dict[str, Tensor]) -> Any:
        return self.layer(x, as_hx(hx) if hx else None, **more)


def everything(layer: Any, batch: int, steps: int, given: str, with_hx: bool) -> tuple[Tensor, list[Tensor], Any]:
    """Returns arguments of `WithAll`, with NaN in padding."""
    x, lengths, mask = torch.randn(batch, steps, INPUT), torch.randint(0, steps + 1, (batch,)), None
    more = {}
    if "lengths" in given:
        more["lengths"], mask = lengths, torch.arange(steps) < lengths.unsqueeze(1)
    if "mask" in given:
        more["mask"] = mask = torch.rand(batch, steps) > 0.4
    if "resets" in given:
        more["resets"] = torch.rand(batch, steps) < 0.3
    if mask is not None:
        x[~mask] = torch.nan
    return x, list(random_states(layer, batch, torch.float32)) if with_hx else [], more


def dynamic(arguments: tuple[Tensor, list[Tensor], Any]) -> Any:
    batch, time = Dim("batch"), Dim("time")
    _, hx, more = arguments
    kinds = {name: {0: batch} if name == "lengths" else {0: batch, 1: time} for name in more}
    return {0: batch, 1: time}, [{1: batch} for _ in hx], kinds


@needs_torch("2.13", "a loop in a graph")
@pytest.mark.slow_but("gru-traced-resets and lengths")
@pytest.mark.parametrize("given", ["lengths", "mask", "neither", "resets", "resets and lengths", "resets and mask"])
@pytest.mark.parametrize(("strict", "with_hx"), [("strict", False), ("traced", True)], ids=["strict", "traced"])
def test_scan_exports_one_loop_for_any_size(cell: str, strict: str, with_hx: bool, given: str) -> None:
    layers = 2 if strict == "strict" else 1
    layer = masked(cell, num_layers=layers, bidirectional=True, batch_first=True, backend="scan")
    model = WithAll(layer)
    first = everything(layer, 3, 6, given, with_hx)
    program = export(model, first, dynamic_shapes=dynamic(first), strict=strict == "strict")
    if given == "neither" and torch_before("2.15"):  # refuses a loop whose results share memory
        program = program.run_decompositions()
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("scan") == 2 * layers
    assert not any("masked_rnn" in target or "sigmoid" in target for target in targets)
    exported = program.module()
    sizes_of_calls = [(1, 1), (1, 7), (5, 1), (4, 9), (0, 5)]
    if ("lengths" in given or "mask" in given) and not torch_before("2.14"):  # else one of the two refuses it
        sizes_of_calls.append((3, 0))
    for sizes in sizes_of_calls:
        arguments = everything(layer, *sizes, given, with_hx)
        with torch.no_grad():
            pairs = zip(flat(exported(*arguments)), flat(model(*arguments)), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b)
    if "lengths" in given:
        x, hx, more = everything(layer, 3, 6, given, with_hx)
        with pytest.raises(RuntimeError, match="a length is out of range: expected 0 <= length <= T"):
            exported(x, hx, {**more, "lengths": torch.tensor([6, 7, 0])})


@needs_torch("2.13", "a loop in a graph")
@pytest.mark.slow_but("gru-False")
@pytest.mark.parametrize("decomposed", [False, True])
def test_exported_loop_trains(cell: str, decomposed: bool) -> None:
    layer = masked(cell, bidirectional=decomposed, batch_first=True, backend="scan")
    model = WithAll(layer)
    first = everything(layer, 3, 6, "resets and lengths", True)
    program = export(model, first, dynamic_shapes=dynamic(first))
    exported = (program.run_decompositions() if decomposed else program).module()
    x, hx, more = everything(layer, 4, 9, "resets and lengths", True)
    x.requires_grad_()
    found, expected = (
        torch.autograd.grad(
            sum(t.square().sum() for t in flat(function(x, hx, more))),
            [x, *function.parameters()],
        )
        for function in (exported, model)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_complex_scan_exports_steps_with_gradients() -> None:
    """PyTorch's loop has no gradients of complex numbers."""
    layer = masked("gru", batch_first=True, backend="scan", dtype=torch.complex64)
    x, lengths = torch.randn(3, 4, INPUT, dtype=torch.complex64), torch.tensor([4, 0, 2])
    exported = export(Model(layer), (x, lengths)).module()
    for a, b in zip(flat(exported(x, lengths)), flat(layer(x, lengths=lengths)), strict=True):
        torch.testing.assert_close(a, b)
    pulled = torch.autograd.grad(exported(x, lengths)[0].abs().sum(), list(exported.parameters()))
    assert all(bool(d.abs().sum() > 0) for d in pulled)


@pytest.mark.slow_but("False")
@pytest.mark.parametrize("strict", [False, True])
def test_scan_without_loop_exports_steps(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is on releases of PyTorch without the loop."""
    monkeypatch.setattr(scan, "graph_scan", None)
    layer = masked("gru", batch_first=True, backend="scan")
    x, lengths = torch.randn(3, 4, INPUT), torch.tensor([4, 0, 2])
    program = export(Model(layer), (x, lengths), strict=strict)
    assert [str(node.target) for node in program.graph.nodes].count("aten.tanh.default") == 4
    for a, b in zip(flat(program.module()(x, lengths)), flat(layer(x, lengths=lengths)), strict=True):
        torch.testing.assert_close(a, b)
