"""`padded` does not wait if lengths are on the device: none of its ops needs a value on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.oracle import INPUT, masked
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from masked_rnn._call import call, inputs, lengths

WAITS = (
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique",
    "aten::equal",
    "aten::_to_copy",
)


class NoWaiting(TorchDispatchMode):
    """Refuses every op whose result's shape, or whose caller, needs a value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "aten::_to_copy" and not (kwargs or {}).get("device"):
            return func(*args, **(kwargs or {}))
        if name in WAITS or (name in ("aten::index", "aten::index_put") and any(_is_mask(i) for i in args[1])):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("given", ["lengths", "mask", "neither"])
def test_padded_backend_never_waits(
    cell: str, bidirectional: bool, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = masked(cell, num_layers=2, bidirectional=bidirectional, batch_first=True, backend="padded")
    x = torch.randn(3, 6, INPUT, requires_grad=True)
    values = {"lengths": torch.tensor([6, 0, 2]), "mask": torch.rand(3, 6) > 0.5, "neither": None}
    for module in (lengths, inputs, call):
        monkeypatch.setattr(module, "is_on_host", lambda _t: False)
    for reading in ("tolist", "numpy"):  # these bypass the dispatcher
        monkeypatch.setattr(Tensor, reading, lambda *_, name=reading: pytest.fail(f"{name} waits for the device"))
    with NoWaiting():
        output, _ = layer(x, **({} if given == "neither" else {given: values[given]}))
        output.sum().backward()
    assert x.grad is not None


def test_no_waiting_mode_refuses_waiting_ops() -> None:
    x = torch.randn(3)
    for waiting in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: x[x > 0], lambda: bool(x.any())):
        with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
            waiting()
