"""Versions, the CPU, and the code that runs layers on it. `python -m masked_rnn` prints them."""

from __future__ import annotations

import platform
from importlib import import_module
from typing import Literal, NamedTuple

import torch
from torch import __version__ as torch_version

from ._backends.bptt import library

LOOPS = {"native": "native (C++)", "ops": "ops (PyTorch's, slower)"}


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
    """The code that runs layers on a CPU: compiled from C++, or made of PyTorch's ops."""
    loops_capability: str | None
    """The kind of CPU that the C++ code uses: `default`, `avx2` or `avx512`."""
    why_not_native: str | None
    """Why PyTorch's ops run, and what to do about it."""

    def __str__(self) -> str:
        shown = self._asdict() | {"loops": LOOPS[self.loops]}
        return "\n".join(f"{name:<18}{value}" for name, value in shown.items() if value is not None)


def get_env_info() -> EnvInfo:
    """Return versions, the CPU's capability, threads, and whether layers run in C++ on the CPU.

    `python -m masked_rnn` prints them. The loops over the steps are built from C++ when the package is installed, if
    there is a compiler. Without it they are made of PyTorch's ops, which give the same results and are slower.

    Returns:
        EnvInfo, a named tuple:

        - `masked_rnn`, `python`, `torch`: versions
        - `platform`: the system and the processor's architecture
        - `cuda`: whether there is a CUDA device
        - `threads`: as `torch.get_num_threads()`
        - `cpu_capability`: of PyTorch's kernels, as `torch.backends.cpu.get_cpu_capability()`
        - `loops`: `"native"` in C++, `"ops"` in PyTorch's ops
        - `loops_capability`: of the C++ code: `"default"`, `"avx2"` or `"avx512"`. None without it
        - `why_not_native`: why PyTorch's ops run, and what to do about it. None where the C++ code runs

    Raises:
        ValueError: The environment variable `MASKED_RNN_CPU_CAPABILITY` has an unknown value. `default`, `avx2` and
            `avx512` limit the C++ code to this kind of CPU, `none` asks for PyTorch's ops.

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
