"""Which backend runs a call, and why."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import BACKENDS, INPUT, masked, plain
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_sequence

from masked_rnn import _choice, _torch
from masked_rnn._backends import kernels
from masked_rnn._backends.bptt import library
from masked_rnn._call import open_call
from masked_rnn._plan import Plan

X = torch.randn(3, 6, INPUT)
ROWS = [X[0], X[1, :4], X[2, :1]]
CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "whole": (X, {}),
    "lengths": (X, {"lengths": [6, 4, 1]}),
    "mask": (X, {"mask": torch.rand(3, 6) > 0.5}),
    "unbatched": (X[0], {}),
    "packed": (pack_sequence(ROWS), {}),
    "nested": (torch.nested.nested_tensor(ROWS, layout=torch.jagged), {}),
}


@pytest.mark.parametrize("form", CALLS)
def test_on_the_cpu_bptt_trains(cell: str, form: str, ran: list[str]) -> None:
    x, given = CALLS[form]
    masked(cell, batch_first=True)(x, **given)
    suits = ("whole", "unbatched") if library.runs(torch.float32) else ("whole", "lengths", "unbatched")
    torchs_own = cell == "lstm" and form in suits
    assert ran == ["padded" if torchs_own else "bptt"]
    layer = masked(cell, batch_first=True).double()
    layer(x.double() if isinstance(x, torch.Tensor) else x.to(torch.float64), **given)
    assert ran[1:] == ["bptt"]


# (cell, batch, hidden, lengths, whether gradients are wanted, what runs); 20 steps.
FULL, HALF, ONE = "none", "half", "one long"
CHOICES = [
    ("gru", 1, 8, FULL, False, "bptt"),
    ("gru", 4, 127, HALF, False, "bptt"),
    ("gru", 1, 8, "mask", False, "bptt"),
    ("lstm", 64, 128, FULL, True, "padded"),
    ("lstm", 64, 128, FULL, False, "padded"),
    # N * width < 1400 + 0.8 * half of it
    ("lstm", 18, 128, HALF, True, "padded"),
    ("lstm", 19, 128, HALF, True, "bptt"),
    # N * width < 1400 + 1.6 * half of it
    ("lstm", 54, 128, HALF, False, "padded"),
    ("lstm", 55, 128, HALF, False, "bptt"),
    # The same work, most of it padding; and a small layer, whose rows cost as much as 16 wide.
    ("lstm", 54, 128, ONE, False, "bptt"),
    ("lstm", 512, 4, ONE, False, "bptt"),
    ("lstm", 512, 4, ONE, True, "bptt"),
    ("lstm", 16, 4, ONE, True, "padded"),
    ("lstm-proj", 64, 128, FULL, True, "bptt"),
]


@pytest.mark.skipif(not library.runs(torch.float32), reason="without the native loops")
@pytest.mark.parametrize(
    ("batch", "hidden", "expected"), [(7, 64, "padded"), (8, 64, "bptt"), (31, 4, "padded"), (32, 4, "bptt")]
)
@pytest.mark.parametrize("learns", [False, True])
def test_where_torchs_kernel_is_faster_than_native_loops(
    batch: int, hidden: int, expected: str, learns: bool, ran: list[str]
) -> None:
    """T * N * width < 10,000, where every step is real"""
    expected = expected if torch.backends.mkldnn.is_available() else "bptt"
    layer, x = masked("lstm", INPUT, hidden), torch.randn(20, batch, INPUT)
    with torch.set_grad_enabled(learns):
        layer(x)
        layer(x, lengths=[20] * batch)
        layer(x, lengths=[20, *[10] * (batch - 1)])
    assert ran == [expected, expected, "bptt"]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="without oneDNN")
def test_autocast_keeps_the_kernel_of_a_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own loops have not its precision."""
    monkeypatch.setattr(_choice, "lstm_kernel_runs", lambda _dtype: True)
    call = open_call(masked("lstm", INPUT, 64), torch.randn(20, 8, INPUT), None, None, None, None)
    native = library.runs(torch.float32)
    assert _choice.preferred(call, _choice.mode_of(call)) == ("bptt" if native else "padded")
    with torch.autocast("cpu", torch.bfloat16):
        assert _choice.preferred(call, _choice.mode_of(call)) == "padded"


@pytest.mark.parametrize("name", ["gru", "rnn-tanh", "lstm-proj"])
@pytest.mark.parametrize(
    ("steps", "batch", "hidden", "has_lengths", "learns", "expected"),
    [
        (1, 64, 32, True, True, "at once"),
        (2, 64, 32, True, True, "bptt"),
        (4, 64, 32, False, True, "at once"),
        (5, 64, 32, False, True, "bptt"),
        (4, 64, 32, True, True, "bptt"),
        (7, 4, 127, False, False, "padded"),
        (7, 4, 127, True, False, "padded"),
        (7, 4, 127, False, True, "bptt"),
        (7, 4, 128, False, False, "bptt"),
        (8, 4, 127, True, False, "bptt if native"),
        (15, 4, 127, False, False, "bptt if native"),
        (16, 4, 127, False, False, "bptt"),
    ],
)
def test_few_steps(
    name: str, steps: int, batch: int, hidden: int, has_lengths: bool, learns: bool, expected: str, ran: list[str]
) -> None:
    layer = masked(name, INPUT, hidden)
    with torch.set_grad_enabled(learns):
        layer(torch.randn(steps, batch, INPUT), lengths=[steps, *[steps // 2] * (batch - 1)] if has_lengths else None)
    if expected == "bptt if native":
        expected = "bptt" if library.runs(torch.float32) else "padded"
    assert ran == [expected]


@pytest.mark.parametrize(("name", "batch", "hidden", "given", "learns", "expected"), CHOICES)
def test_where_torchs_kernel_is_faster(
    name: str,
    batch: int,
    hidden: int,
    given: str,
    learns: bool,
    expected: str,
    ran: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library, "find", lambda: "left out here")
    if name == "lstm" and not torch.backends.mkldnn.is_available():
        expected = "bptt"
    layer = masked(name, INPUT, hidden)
    lengths = {HALF: [10] * (batch - 1) + [10], ONE: [20] + [1] * (batch - 1)}.get(given)
    values = {"lengths": lengths} if lengths else {}
    if given == "mask":
        values = {"mask": torch.ones(20, batch, dtype=torch.bool)}
    with torch.set_grad_enabled(learns):
        layer(torch.randn(20, batch, INPUT), **values)
    assert ran == [expected]


@pytest.mark.parametrize("form", CALLS)
def test_a_forced_backend_runs(cell: str, backend: str, form: str, ran: list[str]) -> None:
    x, given = CALLS[form]
    masked(cell, batch_first=True, backend=backend)(x, **given)
    assert ran == [backend]


@pytest.mark.parametrize("at_once", [False, True])
def test_elsewhere(at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator: by where the lengths lie, and whether a kernel runs all steps of a padded batch at once."""
    capturing = False
    monkeypatch.setattr(_choice, "is_capturing", lambda _device: capturing)
    monkeypatch.setattr(_choice, "runs_all_steps_at_once", lambda *_: at_once)
    mode = _choice.Mode(only_scan=None, traced=False, readable=True)
    there, here = (SimpleNamespace(device=SimpleNamespace(type=name)) for name in ("xpu", "cpu"))

    def taken(dims: int, sizes: tuple[int, ...] = (), **given: Any) -> str:
        data = SimpleNamespace(device=there.device, dim=lambda: dims)
        nothing = {"lengths": None, "mask": None, "resets": None, "packed": None}
        plan = Plan(list(sizes), 9, sum(sizes), torch.device("cpu"))
        call: Any = SimpleNamespace(layer=masked("gru"), data=data, plan=plan, **{**nothing, **given})
        return _choice.preferred(call, mode)

    assert taken(3) == taken(3, lengths=here) == ("padded" if at_once else "packed")
    assert taken(3, lengths=there) == taken(3, mask=there) == taken(3, resets=there) == "padded"
    assert taken(2, (9, *[1] * 60)) == ("padded" if at_once else "packed")
    assert taken(2, (19, *[1] * 60)) == "packed"
    capturing = True
    assert taken(3, resets=there) == "scan"
    assert taken(2, (9, 9), packed=True) == "packed"
    assert taken(3, lengths=there) == "padded"


@pytest.mark.parametrize("mode", ["is_traced", "is_transformed", "is_recorded", "is_fake", "is_capturing", ""])
def test_pinned_memory_is_for_values_that_are_there(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is recorded would read it at each replay."""
    there: Any = SimpleNamespace(type="cuda")
    host: Any = SimpleNamespace(is_cpu=True, to=lambda device, **_: "moved")
    pinned: Any = SimpleNamespace(copy_=lambda _: SimpleNamespace(to=lambda device, non_blocking: "pinned"))
    monkeypatch.setattr(torch, "empty_like", lambda _, pin_memory: pinned)
    for name in ("is_traced", "is_transformed", "is_recorded", "is_fake", "is_capturing"):
        monkeypatch.setattr(_torch, name, lambda *_, name=name: name == mode)
    assert _torch.to_device(host, there) == ("moved" if mode else "pinned")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert _torch.to_device(host, there) == "moved"


@pytest.mark.parametrize("name", ["GRU", "LSTM", "RNN"])
def test_kernels_that_run_all_steps_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mode, most = name if name != "RNN" else "RNN_TANH", 384 if name == "RNN" else 192
    assert not kernels.runs_all_steps_at_once(mode, X, 8, 0)
    monkeypatch.setattr(kernels, "runs_cudnn", lambda _x: True)
    assert kernels.runs_all_steps_at_once(mode, X, most, 0)
    assert not kernels.runs_all_steps_at_once(mode, X, most + 1, 0)
    assert not kernels.runs_all_steps_at_once(mode, X, 8, 4)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "dual"])
def test_under_a_transform_scan_runs(cell: str, transform: str, ran: list[str]) -> None:
    layer = masked(cell, batch_first=True)

    def loss(x: Any) -> Any:
        return layer(x, lengths=[4] if x.dim() == 2 else [4, 2, 6])[0].sum()

    if transform == "vmap":
        torch.func.vmap(loss)(X)
    elif transform == "grad":
        torch.func.grad(loss)(X)
    elif transform == "jvp":
        torch.func.jvp(loss, (X,), (X,))
    else:
        with torch.autograd.forward_ad.dual_level():
            loss(torch.autograd.forward_ad.make_dual(X, X))
    assert ran == ["scan"]


def test_every_backend_answers_for_itself() -> None:
    assert tuple(_choice.BACKENDS) == BACKENDS
    for name, backend in _choice.BACKENDS.items():
        assert backend.name == name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [{}, {"lengths": [6, 4, 1]}], ids=str)
def test_autocast_where_the_cpu_lacks_the_kernel(
    dtype: torch.dtype, given: dict[str, Any], ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` runs whatever the CPU; a forced kernel that it lacks is refused."""
    layer = masked("lstm", batch_first=True)
    with torch.autocast("cpu", dtype):
        output, (h, _) = layer(X, **given)
    assert output.dtype == h.dtype == dtype
    output.float().sum().backward()
    monkeypatch.setattr(_choice, "lstm_kernel_runs", lambda _dtype: False)
    with torch.autocast("cpu", dtype):
        assert layer(X, **given)[0].dtype == dtype
        assert ran[-1] == "bptt"
        for layer.backend in ("padded", *(() if given else ("packed",))):
            words = rf"can't run this call: PyTorch has no LSTM kernel for {dtype} under autocast on this CPU.*'auto'"
            with pytest.raises(ValueError, match=words):
                layer(X, **given)


def torchs_lstm_runs(dtype: torch.dtype) -> bool:
    with torch.no_grad(), torch.autocast("cpu", dtype):
        try:
            plain("lstm")(torch.zeros(1, 1, INPUT))
        except RuntimeError:
            return False
    return True


def test_what_a_cpu_lacks_is_found_out_under_any_mode() -> None:
    """The answer is kept for good: a mode in which nothing is computed must not give it."""
    for dtype in (torch.bfloat16, torch.float16):
        _torch._lstm_kernel_runs.cache_clear()
        truth = _torch.lstm_kernel_runs(dtype)
        assert truth == torchs_lstm_runs(dtype)
        _torch._lstm_kernel_runs.cache_clear()
        with FakeTensorMode(), torch.device("meta"):
            assert _torch.lstm_kernel_runs(dtype) == truth
        _torch._lstm_kernel_runs.cache_clear()
        graph = make_fx(lambda x: x + _torch.lstm_kernel_runs(dtype))(torch.zeros(1)).graph  # noqa: B023
        assert len(graph.nodes) == 3
        _torch._lstm_kernel_runs.cache_clear()
        assert torch.func.vmap(lambda x: x + _torch.lstm_kernel_runs(dtype))(torch.zeros(1)).item() == truth  # noqa: B023


def test_full_lengths_are_no_lengths(cell: str) -> None:
    layer = masked(cell, batch_first=True)
    assert open_call(layer, X, None, [6, 6, 6], None, None).lengths is None
    assert open_call(layer, X, None, [6, 6, 5], None, None).lengths is not None
