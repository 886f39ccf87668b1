"""Which loops run a layer: the compiled ones where they can, those of PyTorch's ops elsewhere."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..._cells import LayerWeights, States
from ..._torch import values_can_be_read
from . import loops

DTYPES = (torch.float32, torch.float64)
"""That the compiled loops compute in."""
PLAIN = (Tensor, torch.nn.Parameter)


@cache
def compiled_loops() -> Any:
    """The compiled loops, or why there are none, in words."""
    try:
        numba = import_module("numba")
        if numba.version_info[:2] < (0, 68):
            return f"Numba {numba.__version__} is older than 0.68: pip install -U numba"
        if numba.config.DISABLE_JIT:
            return "NUMBA_DISABLE_JIT is set"
        return import_module(".compiled", __package__)
    except Exception as error:  # whatever a package that does not fit its own dependencies raises
        if isinstance(error, ModuleNotFoundError) and error.name == "numba":
            return "Numba is not installed: pip install numba"
        return f"Numba can't be imported: {error}"


@cache
def _why_not_compiled(dtype: torch.dtype) -> str | None:
    try:
        compiled_loops().prepare(dtype)
    except Exception as error:  # whatever a later Numba, or a strange machine, brings
        why = f"Numba can't compile them: {error}"
        warnings.warn(f"PyTorch's ops run in place of the compiled loops. {why}", RuntimeWarning, stacklevel=2)
        return why
    return None


def loops_are_compiled(dtype: torch.dtype) -> bool:
    """Whether they run for a dtype. The first time it compiles them."""
    return dtype in DTYPES and not isinstance(compiled_loops(), str) and _why_not_compiled(dtype) is None


def compile_loops(dtype: torch.dtype = torch.float32) -> None:
    """Compile the CPU engine's loops for a dtype now, or read them from Numba's cache, not in the first call.

    Compiling takes seconds, once on a machine; reading, a fraction of one.

    Args:
        dtype: `torch.float32` or `torch.float64`

    Raises:
        RuntimeError: they can't run here, and why (Numba is an extra, `fast`); layers run without.
        ValueError: another dtype, which they do not compute in

    Example::

        >>> masked_rnn.compile_loops()  # doctest: +SKIP
    """
    if dtype not in DTYPES:
        raise ValueError(f"the compiled loops compute in torch.float32 and torch.float64, got {dtype}.")
    found = compiled_loops()
    why_not = found if isinstance(found, str) else _why_not_compiled(dtype)
    if why_not:
        raise RuntimeError(f"the compiled loops can't run. {why_not}")


def loops_for(x: Tensor, initial: States, weights: LayerWeights) -> Any:
    """The module whose `forward` and `backward` run a layer over these tensors: `.loops`, or `.compiled`."""
    if not values_can_be_read(x):
        return loops
    for t in (x, *initial, *(w for each in weights for w in each)):
        # The compiled loops read memory. PyTorch's ops know what else a tensor can be, and refuse what they must.
        if t is None:
            continue
        if type(t) not in PLAIN or not t.is_cpu or t.dtype != x.dtype or t.is_neg():
            return loops
    return compiled_loops() if loops_are_compiled(x.dtype) else loops
