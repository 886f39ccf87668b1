"""A device written in Python: each op runs on the CPU tensors inside, and each wait for the device is noted.

It is as strict as CUDA about ops that mix devices. Recurrent layers run ATen's fused cells there, as on CUDA without
cuDNN. With `strict_kernel.with_cudnn` they run a kernel as strict as cuDNN. Import this module before any test runs a
backward, because autograd then starts its threads, one for each device that it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("PyTorch 2.10 is the first in which a device can be written in Python", allow_module_level=True)

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique", "_unique2", "unique_dim")
WAITS += ("unique_consecutive", "unique_dim_consecutive")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
HOST = torch.device("cpu")

_noted: list[str] = []
_launched: list[str] = []
NO_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "alias")


@contextmanager
def watching() -> Iterator[list[str]]:
    """Notes each op that waits for the device, by its name, and each copy from the host, as `upload`."""
    _noted.clear()
    yield _noted


@contextmanager
def counting() -> Iterator[list[str]]:
    """Notes the names of the ops that start a kernel on the device: all but views and allocations."""
    _launched.clear()
    yield _launched


def starts_kernel(func: Any, name: str) -> bool:
    returns = func._schema.returns
    is_view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
    return not is_view and name not in NO_KERNEL


class SimulatedTensor(Tensor):
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> SimulatedTensor:
        assert not isinstance(held, SimulatedTensor)
        self: SimulatedTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        self.held = held
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t is not cls for t in types):
            return NotImplemented  # a nested tensor unwraps itself
        return run(func, *args, **(kwargs or {}))

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"SimulatedTensor({self.held!r})"


def run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs an op on the CPU tensors inside."""
    name = func._schema.name.removeprefix("aten::")
    given: list[Tensor] = []
    inner = [_each(lambda t: _open(t, given), value) for value in args]
    inner_kwargs = {key: _each(lambda t: _open(t, given), value) for key, value in kwargs.items()}
    target = kwargs.get("device")
    to_host = target is not None and target.type == "cpu"
    if target is not None:
        inner_kwargs["device"] = HOST
    if name in ("copy_", "_to_copy"):
        to_host = to_host or not isinstance(given[0], SimulatedTensor)
        if to_host or not isinstance(given[-1], SimulatedTensor):
            _noted.append(name if to_host else "upload")
    elif name != "_pack_padded_sequence":  # its lengths have to be on the CPU
        _refuse_mixed(func, name, args, given)
    if name in WAITS or _depends_on_values(name, args, kwargs):
        _noted.append(name)
    if starts_kernel(func, name):
        _launched.append(name)
    result = FUSED.get(name, func)(*inner, **inner_kwargs)
    if torch.Tag.inplace_view in func.tags:
        _follow(func, *args, **kwargs)
    if name == "_pack_padded_sequence":
        return SimulatedTensor(result[0]), result[1]
    if to_host:
        return given[0] if name == "copy_" else result
    # An in-place op returns the tensor that it was given.
    same = {id(t.held): t for t in given if isinstance(t, SimulatedTensor)}
    return _each(lambda t: same[id(t)] if id(t) in same else SimulatedTensor(t), result)


def _each(change: Callable[[Tensor], Any], value: Any) -> Any:
    """Does what a pytree's map does, which would take most of the time here."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_each(change, v) for v in value) if isinstance(value, list | tuple) else value


def _open(t: Tensor, given: list[Tensor]) -> Tensor:
    given.append(t)
    if not isinstance(t, SimulatedTensor):
        return t
    # `t.data = ...` and ops that resize would otherwise go unnoticed.
    assert (t.shape, t.dtype) == (t.held.shape, t.held.dtype)
    return t.held


def _follow(func: Any, *args: Any, **kwargs: Any) -> None:
    """Applies `transpose_` and similar ops to the outer tensor's own shape and strides."""
    with no_dispatch():
        before = torch._C._meta_in_tls_dispatch_include()
        torch._C._set_meta_in_tls_dispatch_include(True)
        try:
            func(*args, **kwargs)
        finally:
            torch._C._set_meta_in_tls_dispatch_include(before)


def _refuse_mixed(func: Any, name: str, args: Any, given: list[Tensor]) -> None:
    """Refuses what CUDA refuses. A number may be a CPU tensor without dimensions, and indices may be on the CPU."""
    if len(given) < 2:
        return
    indices = [i for i in args[1] if i is not None] if name in INDEXING else []
    scalars = name in INDEXING or torch.Tag.pointwise in func.tags or name in ("fill_", "masked_fill", "masked_fill_")
    for t in given:
        if not (isinstance(t, SimulatedTensor) or (scalars and t.dim() == 0) or any(t is i for i in indices)):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{DEVICE} and {t.device}! ({name})"
            )


def _depends_on_values(name: str, args: Any, kwargs: Any) -> bool:
    if name in INDEXING:
        return any(isinstance(i, SimulatedTensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return name == "repeat_interleave" and kwargs.get("output_size") is None


def _gru(x: Tensor, h: Tensor, state: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None) -> Any:
    rx, zx, nx = (x if b_ih is None else x + b_ih).chunk(3, 1)
    rh, zh, nh = (h if b_hh is None else h + b_hh).chunk(3, 1)
    r, z = (rx + rh).sigmoid(), (zx + zh).sigmoid()
    n = (nx + r * nh).tanh()
    return n + z * (state - n), torch.cat([r, z, n, state, nh], 1)


def _gru_backward(grad: Tensor, kept: Tensor, has_bias: bool) -> Any:
    r, z, n, state, nh = kept.chunk(5, 1)
    dn = grad * (1 - z) * (1 - n * n)
    dr, dz = dn * nh * r * (1 - r), grad * (state - n) * z * (1 - z)
    dx, dh = torch.cat([dr, dz, dn], 1), torch.cat([dr, dz, dn * r], 1)
    return dx, dh, grad * z, *((dx.sum(0), dh.sum(0)) if has_bias else (None, None))


def _lstm(x: Tensor, h: Tensor, c: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None) -> Any:
    i, f, g, o = (x + h if b_ih is None else x + h + b_ih + b_hh).chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    new = f * c + i * g
    return o * new.tanh(), new, torch.cat([i, f, g, o], 1)


def _lstm_backward(
    dh: Tensor | None, dc: Tensor | None, c: Tensor, new: Tensor, kept: Tensor, has_bias: bool
) -> tuple[Tensor | None, ...]:
    i, f, g, o = kept.chunk(4, 1)
    th = new.tanh()
    dh = torch.zeros_like(c) if dh is None else dh
    dc = dh * o * (1 - th * th) + (0 if dc is None else dc)
    d = [dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g), dh * th * o * (1 - o)]
    gates = torch.cat(d, 1)
    return gates, dc * f, gates.sum(0) if has_bias else None


FUSED = {
    "_thnn_fused_gru_cell": _gru,
    "_thnn_fused_gru_cell_backward": _gru_backward,
    "_thnn_fused_lstm_cell": _lstm,
    "_thnn_fused_lstm_cell_backward_impl": _lstm_backward,
}
"""These ops have no CPU kernel."""


class _Module:
    """The functions that `torch.<device>` must have."""

    @staticmethod
    def is_initialized() -> bool:
        return True

    is_available = is_initialized

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass

    @staticmethod
    def get_rng_state(device: Any = None) -> Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend("simulated", _Module)
DEVICE = torch.device("simulated", 0)
_aten, _any = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
_any.fallback(run, "PrivateUse1")
_any.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # autocast changes no op here
# PyTorch's kernels would set the result's size later, or leave the copy to an op that the fallback does not reach.
for _op in (torch.ops.aten.arange.default, torch.ops.aten.arange.start, torch.ops.aten.arange.start_step):
    _aten.impl(_op, partial(run, _op), "PrivateUse1")
_aten.impl(
    "_copy_from", lambda source, target, _=False: run(torch.ops.aten.copy_.default, target, source), "PrivateUse1"
)
