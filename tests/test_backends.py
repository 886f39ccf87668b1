"""Which backend runs a call, and why."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import BACKENDS, INPUT, masked
from torch.nn.utils.rnn import pack_sequence

from masked_rnn import _backends

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
    torchs_own = cell == "lstm" and form in ("whole", "lengths", "unbatched")
    assert ran == ["padded" if torchs_own else "bptt"]
    layer = masked(cell, batch_first=True).double()
    layer(x.double() if isinstance(x, torch.Tensor) else x.to(torch.float64), **given)
    assert ran[1:] == ["bptt"]


@pytest.mark.parametrize(
    ("name", "batch", "hidden", "given", "learns", "expected"),
    [
        ("gru", 4, 127, "lengths", False, "padded"),
        ("gru", 4, 128, "lengths", False, "bptt"),
        ("gru", 4, 128, "neither", False, "bptt"),
        ("gru", 1, 8, "lengths", True, "bptt"),
        ("gru", 1, 8, "mask", False, "bptt"),
        ("rnn-tanh", 1, 8, "lengths", False, "padded"),
        ("lstm", 64, 128, "neither", True, "padded"),
        ("lstm", 64, 128, "neither", False, "padded"),
        ("lstm", 31, 128, "lengths", True, "padded"),
        ("lstm", 32, 128, "lengths", True, "bptt"),
        ("lstm", 63, 128, "lengths", False, "padded"),
        ("lstm", 64, 128, "lengths", False, "bptt"),
        ("lstm-proj", 64, 128, "neither", True, "bptt"),
    ],
)
def test_where_torchs_kernel_is_faster(
    name: str, batch: int, hidden: int, given: str, learns: bool, expected: str, ran: list[str]
) -> None:
    layer = masked(name, INPUT, hidden)
    values = {"lengths": [1] * batch, "mask": torch.ones(2, batch, dtype=torch.bool), "neither": None}
    with torch.set_grad_enabled(learns):
        layer(torch.randn(2, batch, INPUT), **({} if given == "neither" else {given: values[given]}))
    assert ran == [expected]


@pytest.mark.parametrize("form", CALLS)
def test_a_forced_backend_runs(cell: str, backend: str, form: str, ran: list[str]) -> None:
    x, given = CALLS[form]
    masked(cell, batch_first=True, backend=backend)(x, **given)
    assert ran == [backend]


@pytest.mark.parametrize(
    ("lengths_on", "expected"),
    [
        (None, ("packed", "padded", "scan")),
        ("cpu", ("packed", "padded", "scan")),
        ("cuda", ("padded", "packed", "scan")),
    ],
)
def test_elsewhere_the_lengths_place_decides(lengths_on: str | None, expected: tuple[str, ...]) -> None:
    def on(device: str | None) -> Any:
        return None if device is None else SimpleNamespace(device=SimpleNamespace(type=device))

    call: Any = SimpleNamespace(data=on("cuda"), lengths=on(lengths_on), mask=None, form="padded")
    assert _backends.preferred(call) == expected
    call = SimpleNamespace(data=on("cuda"), lengths=None, mask=on(lengths_on), form="padded")
    assert _backends.preferred(call) == expected


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
    assert tuple(_backends.BACKENDS) == BACKENDS
    for name, backend in _backends.BACKENDS.items():
        assert backend.name == name


def test_a_reason_moves_auto_on(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = _backends.BACKENDS["bptt"]._replace(why_not=lambda _call: ["it is a test"])
    monkeypatch.setitem(_backends.BACKENDS, "bptt", refusing)
    masked("gru", batch_first=True)(X, lengths=[6, 4, 1])
    assert ran == ["packed"]
    with pytest.raises(ValueError, match=r"backend='bptt' can't run this call: it is a test\. Use backend='auto'"):
        masked("gru", batch_first=True, backend="bptt")(X)


def test_full_lengths_are_no_lengths(cell: str) -> None:
    from masked_rnn._call import open_call

    layer = masked(cell, batch_first=True)
    assert open_call(layer, X, None, [6, 6, 6], None).lengths is None
    assert open_call(layer, X, None, [6, 6, 5], None).lengths is not None


@pytest.mark.skipif(not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()), reason="no MKL")
@pytest.mark.parametrize(
    ("hidden", "batch", "dtype", "enabled", "expected"),
    [
        (256, 2, torch.float32, True, True),
        (255, 2, torch.float32, True, False),
        (256, 1, torch.float32, True, False),
        (256, 2, torch.float64, True, False),
        (256, 2, torch.float32, False, False),
    ],
)
@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of torch's own, as it sets the flag
def test_large_weights_are_laid_out_once(
    hidden: int, batch: int, dtype: torch.dtype, enabled: bool, expected: bool
) -> None:
    layer = masked("gru", INPUT, hidden, backend="bptt").to(dtype)
    x = torch.randn(2, batch, INPUT, dtype=dtype)
    with torch.backends.mkldnn.flags(enabled=enabled), torch.profiler.profile() as profile:
        layer(x)[0].sum().backward()
    calls = sum(event.count for event in profile.key_averages() if "_linear_pointwise" in event.key)
    assert calls == (4 if expected else 0)  # two steps, there and back
