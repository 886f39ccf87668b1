"""Tests which backend runs a call, and why."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.oracle import BACKENDS, INPUT, masked, plain
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

from masked_rnn import _dispatch, _probe, _torch
from masked_rnn._backends import cudnn, kernels, measured
from masked_rnn._backends.bptt import library
from masked_rnn._call import open_call
from masked_rnn._spec import Spec

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
def test_auto_trains_on_bptt_on_cpu(cell: str, form: str, ran: list[str]) -> None:
    x, given = CALLS[form]
    masked(cell, batch_first=True)(x, **given)
    torchs_own = cell == "lstm" and form in ("whole", "lengths", "unbatched") and not library.runs(torch.float32)
    assert ran == ["padded" if torchs_own else "bptt"]
    layer = masked(cell, batch_first=True).double()
    layer(x.double() if isinstance(x, torch.Tensor) else x.to(torch.float64), **given)
    assert ran[1:] == ["bptt"]


# (cell, batch, hidden, lengths, whether gradients are wanted, the backend that runs); 20 steps.
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
    # The same work, but most of it is padding. Then a small layer, whose rows cost as much as 16 wide.
    ("lstm", 54, 128, ONE, False, "bptt"),
    ("lstm", 512, 4, ONE, False, "bptt"),
    ("lstm", 512, 4, ONE, True, "bptt"),
    ("lstm", 16, 4, ONE, True, "padded"),
    ("lstm-proj", 64, 128, FULL, True, "bptt"),
]


@pytest.mark.skipif(not library.runs(torch.float32), reason="without the native loops")
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("learns", [False, True])
def test_auto_runs_lstm_in_native_loops(batch: int, learns: bool, ran: list[str]) -> None:
    """They are faster than oneDNN's kernel, with every step real, too."""
    layer, x = masked("lstm", INPUT, 64), torch.randn(20, batch, INPUT)
    with torch.set_grad_enabled(learns):
        layer(x)
        layer(x, lengths=[20] * batch)
        layer(x, lengths=[10] * batch)
    assert ran == ["bptt"] * 3


@pytest.mark.skipif(not library.runs(torch.float32), reason="without the native loops")
@pytest.mark.parametrize(
    ("batch", "hidden", "dtype", "given", "learns", "expected"),
    [
        (64, 512, torch.float32, {}, False, "padded"),
        (64, 512, torch.float32, {"lengths": [2] * 64}, False, "padded"),
        (64, 512, torch.float32, {"lengths": [2] * 63 + [1]}, False, "bptt"),
        (64, 512, torch.float32, {}, True, "bptt"),
        (64, 512, torch.float64, {}, False, "bptt"),
        (63, 512, torch.float32, {}, False, "bptt"),
        (256, 256, torch.float32, {}, False, "bptt"),
    ],
)
def test_large_lstm_infers_on_onednn(
    batch: int, hidden: int, dtype: torch.dtype, given: dict[str, Any], learns: bool, expected: str, ran: list[str]
) -> None:
    layer = masked("lstm", 1, hidden).to(dtype)
    with torch.set_grad_enabled(learns):
        layer(torch.randn(2, batch, 1, dtype=dtype), **given)
    assert ran == [expected if torch.backends.mkldnn.is_available() else "bptt"]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="without oneDNN")
def test_autocast_keeps_lstm_kernel_for_full_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own loops do not have the precision of the kernel."""
    monkeypatch.setattr(kernels, "lstm_kernel_runs", lambda *_: True)
    call = open_call(masked("lstm", INPUT, 64), torch.randn(20, 8, INPUT), None, None, None, None)
    native = library.runs(torch.float32)
    assert _dispatch.choose(call) == ("bptt" if native else "padded")
    with torch.autocast("cpu", torch.bfloat16):
        assert _dispatch.choose(call) == "padded"


@pytest.mark.parametrize("name", ["gru", "rnn-tanh", "lstm-proj"])
@pytest.mark.parametrize(
    ("steps", "batch", "hidden", "has_lengths", "learns", "expected"),
    [
        (1, 64, 32, True, True, "padded"),
        (2, 64, 32, True, True, "bptt"),
        (4, 64, 32, False, True, "padded"),
        (5, 64, 32, False, True, "bptt"),
        (4, 64, 32, True, True, "bptt"),
        (7, 4, 127, False, False, "padded"),
        (7, 4, 127, True, False, "padded"),
        (7, 4, 127, False, True, "bptt"),
        (7, 4, 128, False, False, "bptt"),
        (15, 4, 127, True, False, "padded"),
        (15, 4, 127, False, False, "padded"),
        (16, 4, 127, False, False, "bptt"),
    ],
)
def test_auto_uses_padded_for_few_steps_without_native_loops(
    name: str,
    steps: int,
    batch: int,
    hidden: int,
    has_lengths: bool,
    learns: bool,
    expected: str,
    ran: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths = [steps, *[steps // 2] * (batch - 1)] if has_lengths else None
    layer = masked(name, INPUT, hidden)
    with torch.set_grad_enabled(learns):
        layer(torch.randn(steps, batch, INPUT), lengths=lengths)
        if library.runs(torch.float32):
            assert ran == ["bptt"]
            ran.clear()
            monkeypatch.setattr(library, "find", lambda: "left out here")
            layer(torch.randn(steps, batch, INPUT), lengths=lengths)
    assert ran == [expected]


@pytest.mark.parametrize(("name", "batch", "hidden", "given", "learns", "expected"), CHOICES)
def test_auto_picks_faster_backend_without_native_loops(
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


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("form", CALLS)
def test_forced_backend_runs(cell: str, backend: str, form: str, ran: list[str]) -> None:
    x, given = CALLS[form]
    masked(cell, batch_first=True, backend=backend)(x, **given)
    assert ran == [backend]


@pytest.mark.parametrize("mode", ["is_traced", "is_transformed", "is_recorded", "is_fake", ""])
def test_pinned_memory_is_used_only_in_eager_calls(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded graph would read the pinned memory at each replay."""
    there: Any = SimpleNamespace(type="cuda")
    host: Any = SimpleNamespace(is_cpu=True, to=lambda device, **_: "moved")
    pinned: Any = SimpleNamespace(copy_=lambda _: SimpleNamespace(to=lambda device, non_blocking: "pinned"))
    monkeypatch.setattr(torch, "empty_like", lambda _, pin_memory: pinned)
    monkeypatch.setattr(_torch, "is_capturing", lambda _device: False)
    for name in ("is_traced", "is_transformed", "is_recorded", "is_fake"):
        monkeypatch.setattr(_torch, name, lambda *_, name=name: name == mode)
    assert _torch.to_device(host, there) == ("moved" if mode else "pinned")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert _torch.to_device(host, there) == "moved"


@pytest.mark.parametrize("name", ["GRU", "LSTM", "RNN"])
def test_cudnn_runs_all_steps_within_size_limit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits are PyTorch's, in `get_algo`: never in float64, and in backward for smaller layers than in forward."""
    mode = name if name != "RNN" else "RNN_TANH"
    assert not measured.runs_all_steps_at_once(Spec(mode, 2, 8), X, False)
    monkeypatch.setattr(cudnn, "runs_cudnn", lambda _x: True)
    for in_training, most in ((False, 384 if name == "RNN" else 192), (True, 256 if name == "RNN" else 128)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert measured.runs_all_steps_at_once(Spec(mode, 2, most), X.to(dtype), in_training)
            assert not measured.runs_all_steps_at_once(Spec(mode, 2, most + 1), X.to(dtype), in_training)
        assert not measured.runs_all_steps_at_once(Spec(mode, 2, 8), X.double(), in_training)
        assert not measured.runs_all_steps_at_once(Spec(mode, 2, 8, proj_size=4), X, in_training)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "dual"])
def test_auto_uses_scan_under_transforms(cell: str, transform: str, ran: list[str]) -> None:
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


def test_backend_registry_lists_each_by_name() -> None:
    assert tuple(_dispatch.BACKENDS) == (*BACKENDS, "held")
    for name, backend in _dispatch.BACKENDS.items():
        assert name in str(backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [{}, {"lengths": [6, 4, 1]}], ids=str)
def test_autocast_falls_back_without_lstm_kernel(
    dtype: torch.dtype, given: dict[str, Any], ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` runs on every CPU. A forced backend is refused if the CPU lacks its kernel."""
    layer = masked("lstm", batch_first=True)
    with torch.autocast("cpu", dtype):
        output, (h, _) = layer(X, **given)
    assert output.dtype == h.dtype == dtype
    output.float().sum().backward()
    monkeypatch.setattr(kernels, "lstm_kernel_runs", lambda *_: False)
    with torch.autocast("cpu", dtype):
        assert layer(X, **given)[0].dtype == dtype
        assert ran[-1] == "bptt"
        for layer.backend in ("padded", *(() if given else ("packed",))):
            words = rf"can't run this call: PyTorch has no LSTM kernel for {dtype} under autocast on this CPU.*'auto'"
            with pytest.raises(ValueError, match=words):
                layer(X, **given)


def torchs_lstm_runs(dtype: torch.dtype, learns: bool, bidirectional: bool) -> bool:
    with torch.set_grad_enabled(learns), torch.autocast("cpu", dtype):
        try:
            output, _ = plain("lstm", bidirectional=bidirectional)(torch.zeros(1, 1, INPUT))
            if learns:
                output.sum().backward()
        except RuntimeError:
            return False
    return True


@pytest.fixture
def _asks_anew() -> Iterator[None]:
    _probe._lstm_kernel_runs.cache_clear()
    yield
    _probe._lstm_kernel_runs.cache_clear()


@pytest.mark.usefixtures("_asks_anew")
def test_lstm_kernel_probe_is_right_in_any_mode() -> None:
    """The answer is cached for good, so it must not come from a mode in which nothing is computed."""
    for case in product((torch.bfloat16, torch.float16), (False, True), (False, True)):

        def ask(case: Any = case) -> bool:
            _probe._lstm_kernel_runs.cache_clear()
            return _probe.lstm_kernel_runs(*case)

        truth = torchs_lstm_runs(*case)
        assert ask() == truth
        with FakeTensorMode(), torch.device("meta"):
            assert ask() == truth
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert ask() == truth
        graph = make_fx(lambda x: x + ask())(torch.zeros(1)).graph
        assert len(graph.nodes) == 3
        assert torch.func.vmap(lambda x: x + ask())(torch.zeros(1)).item() == truth


def played_lstm(inference: bool, training: bool) -> Any:
    """Returns the kernel of a CPU whose oneDNN has only some of its forms under autocast."""
    kernel = _torch.KERNELS["LSTM"]

    def run(x: Tensor, hx: Any, *more: Any) -> Any:
        if isinstance(hx, Tensor) or not torch.is_autocast_enabled("cpu"):  # oneDNN does not run packed rows
            return kernel(x, hx, *more)
        if not (training if torch.is_grad_enabled() else inference):
            raise RuntimeError("could not create a primitive descriptor for the LSTM forward propagation primitive")
        with torch.autocast("cpu", enabled=False):
            weights, *options = more
            result = kernel(x.float(), tuple(h.float() for h in hx), weights, *options)
        return tuple(t.to(torch.get_autocast_dtype("cpu")) for t in result)

    return run


@pytest.mark.slow_but_each(2)
@pytest.mark.usefixtures("_asks_anew")
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="without oneDNN")
@pytest.mark.parametrize(("inference", "training"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("given", [{}, {"lengths": [6, 4, 1]}, {"lengths": [1, 0, 1]}], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_adapts_to_onednn_kernels_of_cpu(
    dtype: torch.dtype,
    dropout: float,
    given: dict[str, Any],
    inference: bool,
    training: bool,
    ran: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The CPU has a kernel for both, for inference, or for none. `auto` runs; a forced backend gives its reason."""
    monkeypatch.setitem(_torch.KERNELS, "LSTM", played_lstm(inference, training))
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": dropout}
    layer = masked("lstm", **options)
    x = X[:, :1] if given.get("lengths") == [1, 0, 1] else X
    for learns in (False, True):
        there = training if learns else inference
        with torch.set_grad_enabled(learns), torch.autocast("cpu", dtype):
            layer.backend = "auto"
            output, _ = layer(x, **given)
            assert output.dtype == dtype
            if not given:
                # With dropout, a pass without gradients must choose the same backend as one with gradients.
                assert ran[-1] == ("padded" if (training if dropout else there) else "bptt")
            for layer.backend in ("padded", *(() if given else ("packed",))):
                if there:
                    assert layer(x, **given)[0].dtype == dtype
                    continue
                words = rf"can't run this call: PyTorch has no LSTM kernel for {dtype} under autocast on this CPU"
                words += " while gradients are recorded" if inference else ""
                with pytest.raises(ValueError, match=rf"{words}\. Use backend='auto'"):
                    layer(x, **given)
        if learns:
            output.float().sum().backward()
    layer.backend = "auto"

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            drawn: Tensor = layer(x, **given)[0]
            return drawn

    torch.manual_seed(3)
    expected = run(x.requires_grad_())
    torch.manual_seed(3)
    again = checkpoint(run, x, use_reentrant=True)
    torch.testing.assert_close(again, expected, atol=0.0 if dropout else 0.05, rtol=0)
    again.float().sum().backward()


def test_full_lengths_count_as_no_lengths(cell: str) -> None:
    layer = masked(cell, batch_first=True)
    assert open_call(layer, X, None, [6, 6, 6], None, None).lengths is None
    assert open_call(layer, X, None, [6, 6, 5], None, None).lengths is not None
