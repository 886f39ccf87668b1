"""Versions, the CPU, and the loops that backend `bptt` runs. `python -m masked_rnn` prints them."""

from __future__ import annotations

import platform
from importlib import import_module
from typing import Literal, NamedTuple

import torch
from torch import __version__ as torch_version

from ._backends.bptt import library


class EnvInfo(NamedTuple):
    """The result of `get_env_info`. `print` shows it as a list."""

    masked_rnn: str
    """The version of this package. `python` and `torch` are versions too."""
    python: str
    torch: str
    platform: str
    cuda: bool
    threads: int
    cpu_capability: str
    """The kind of CPU that PyTorch's kernels use, in ATen's words."""
    loops: Literal["native", "ops"]
    """The loops that run float32 and float64 layers on a CPU: compiled from C++, or made of PyTorch's ops."""
    loops_capability: str | None
    """The kind of CPU that the native loops use: `default`, `avx2` or `avx512`."""
    why_not_native: str | None
    """Why PyTorch's ops run, and what to do about it."""

    def __str__(self) -> str:
        return "\n".join(f"{name:<18}{value}" for name, value in self._asdict().items() if value is not None)


def get_env_info() -> EnvInfo:
    """Return versions, the CPU's capability, threads, and which loops run on the CPU.

    `python -m masked_rnn` prints them. The native loops are built when the package is installed, where there is a C++
    compiler. Without them layers run the loops of PyTorch's ops, which give the same results and are slower.

    Returns:
        EnvInfo, a named tuple:

        - `masked_rnn`, `python`, `torch`: versions
        - `platform`: the system and the processor's architecture
        - `cuda`: whether there is a CUDA device
        - `threads`: as `torch.get_num_threads()`
        - `cpu_capability`: of PyTorch's kernels, as `torch.backends.cpu.get_cpu_capability()`
        - `loops`: `"native"`, or `"ops"`
        - `loops_capability`: of the native loops: `"default"`, `"avx2"` or `"avx512"`. None without them
        - `why_not_native`: why the loops of PyTorch's ops run, and what to do about it. None where the native loops run

    Raises:
        ValueError: The environment variable `MASKED_RNN_CPU_CAPABILITY` has an unknown value. `default`, `avx2` and
            `avx512` limit the native loops to this kind of CPU, `none` asks for the loops of PyTorch's ops.

    Example::

        >>> masked_rnn.get_env_info().loops in ("native", "ops")
        True
    """
    found = library.find()
    return EnvInfo(
        masked_rnn=import_module(__package__).__version__,
        python=platform.python_version(),
        torch=torch_version,
        platform=platform.platform(),
        cuda=torch.cuda.is_available(),
        threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        loops="ops" if isinstance(found, str) else "native",
        loops_capability=None if isinstance(found, str) else library.LEVELS[found.level],
        why_not_native=found if isinstance(found, str) else None,
    )
