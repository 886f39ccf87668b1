"""The compiler, exporter, tracer or transform that is active around a call."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._torch import (
    forward_gradients_run,
    is_capturing,
    is_exporting_onnx,
    is_fake,
    is_recorded,
    is_traced,
    is_transformed,
)


class Context(NamedTuple):
    """The compiler, tracer or transform around a call. `find_context` finds it, `seen_with` looks at the tensors."""

    compiling: bool = False
    """True while torch.compile or torch.export traces the call."""
    captured_as: Literal["operator", "onnx"] | None = None
    """The form in which a compiler or an exporter captures the layer."""
    traced: bool = False
    """True while `torch.jit.trace` records the call. A value that is read would become a constant of the trace."""
    only_scan: str | None = None
    """Why only `scan` can follow the call."""
    readable: bool = True
    """Whether the values of lengths, mask and resets can be read."""
    cuda_graph: bool = False
    """True while a CUDA graph is being recorded: nothing may wait for the device."""

    def can_read(self, tensor: Tensor) -> bool:
        """Return whether a tensor's values can be read. False for a `FakeTensor` or one on the meta device."""
        return self.readable and not is_fake(tensor)

    def seen_with(
        self,
        data: Tensor,  # the input
        real: Tensor,  # lengths, mask or batch sizes; the input if all steps are real
        resets: Tensor | None,
    ) -> Context:
        """Return the context of a call of these tensors."""
        if not self.readable or (type(real) is type(data) is Tensor and real.is_cpu and data.is_cpu and resets is None):
            return self
        if is_fake(real) or (resets is not None and is_fake(resets)):
            return self._replace(readable=False)
        if not data.is_cpu and is_capturing(data.device):
            return self._replace(cuda_graph=True)
        return self


def records_gradients(*groups: Iterable[Tensor]) -> bool:
    """Return whether autograd records what is computed from these tensors."""
    if torch.is_grad_enabled():
        for tensors in groups:
            for tensor in tensors:
                if tensor.requires_grad:
                    return True
    return False


PLAIN = Context()
"""Nothing is active."""
TRANSFORM = "a torch.func transform (vmap, grad, jvp, ...) is active, which only backend='scan' can follow"
FORWARD_MODE = "forward-mode differentiation is active, which only backend='scan' can follow"


def find_context() -> Context:
    if torch.compiler.is_compiling():
        return Context(compiling=True, captured_as="onnx" if is_exporting_onnx() else "operator", readable=False)
    traced, transformed, recorded, forward_mode = is_traced(), is_transformed(), is_recorded(), forward_gradients_run()
    exporting = "torch.onnx" in sys.modules and is_exporting_onnx()
    if not (traced or transformed or recorded or forward_mode or exporting):
        return PLAIN
    return Context(
        captured_as="onnx" if exporting and not traced else None,
        traced=traced,
        only_scan=TRANSFORM if transformed else FORWARD_MODE if forward_mode else None,
        readable=not (traced or transformed or recorded),
    )
