"""Forward and backward of a layer: by the compiled loops where they can run, by PyTorch's ops elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..._cells import LayerWeights, States
from ..._lengths import values_can_be_read
from . import loops
from .spec import LayerSpec, Saved

DTYPES = (torch.float32, torch.float64)
"""That the compiled loops compute in."""
PLAIN = (Tensor, torch.nn.Parameter)


@cache
def compiled_loops() -> Any:
    """The compiled loops, or why there are none, in words."""
    try:
        numba = import_module("numba")
    except ModuleNotFoundError:
        return "Numba is not installed: pip install 'masked_rnn[fast]'"
    except Exception as error:  # whatever a package that does not fit its own dependencies raises
        return f"Numba can't be imported: {error}"
    if numba.version_info[:2] < (0, 68):
        return f"Numba {numba.__version__} is older than 0.68"
    if numba.config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT is set"
    return import_module(".compiled", __package__)


@cache
def _can_be_compiled(dtype: torch.dtype) -> bool:
    found = compiled_loops()
    try:
        found.prepare(dtype)
    except Exception as error:  # whatever a later Numba, or a strange machine, brings
        warnings.warn(
            f"the CPU engine's loops can't be compiled, PyTorch's ops run: {error}", RuntimeWarning, stacklevel=2
        )
        return False
    return True


def loops_are_compiled(dtype: torch.dtype) -> bool:
    """Whether they run for a dtype. The first time it compiles them."""
    return dtype in DTYPES and not isinstance(compiled_loops(), str) and _can_be_compiled(dtype)


def compile_loops(dtype: torch.dtype = torch.float32) -> None:
    """Compile the CPU engine's loops for a dtype now, or read them from Numba's cache, not in the first call.

    Compiling takes seconds, once on a machine; reading, a fraction of one.

    Args:
        dtype: `torch.float32` or `torch.float64`

    Raises:
        RuntimeError: they can't run here (Numba is an extra: `pip install "masked_rnn[fast]"`); layers run without.
        ValueError: another dtype, which they do not compute in

    Example::

        >>> masked_rnn.compile_loops()  # doctest: +SKIP
    """
    if dtype not in DTYPES:
        raise ValueError(f"the compiled loops compute in torch.float32 and torch.float64, got {dtype}.")
    found = compiled_loops()
    if isinstance(found, str):
        raise RuntimeError(f"the compiled loops can't run: {found}.")
    found.prepare(dtype)


def _loops(x: Tensor, initial: States, weights: LayerWeights) -> Any:
    if not values_can_be_read(x):
        return loops
    for t in (x, *initial, *(w for each in weights for w in each)):
        # The compiled loops read memory. PyTorch's ops know what else a tensor can be, and refuse what they must.
        if t is None:
            continue
        if type(t) not in PLAIN or t.device.type != "cpu" or t.dtype != x.dtype or t.is_neg():
            return loops
    return compiled_loops() if loops_are_compiled(x.dtype) else loops


def forward(
    spec: LayerSpec, x: Tensor, initial: States, weights: LayerWeights, save: bool, into: Saved | None = None
) -> tuple[Tensor, States, Saved]:
    """x (P, I) or (R, I), initial states (D, N, H) -> output (P, D·H) or (R, D·H), last states (D, N, H).

    What is saved for backward goes into `into`, or into new memory.
    """
    result: tuple[Tensor, States, Saved] = _loops(x, initial, weights).forward(spec, x, initial, weights, save, into)
    return result


def backward(
    spec: LayerSpec,
    x: Tensor,
    initial: States,
    weights: LayerWeights,
    saved: Saved,
    d_output: Tensor | None,
    d_last: Sequence[Tensor | None],
    want_x: bool,
    want_weights: bool,
) -> tuple[Tensor | None, States, LayerWeights | None]:
    """The gradients of x, of the initial states and of the weights."""
    result: tuple[Tensor | None, States, LayerWeights | None] = _loops(x, initial, weights).backward(
        spec, x, initial, weights, saved, d_output, d_last, want_x, want_weights
    )
    return result
