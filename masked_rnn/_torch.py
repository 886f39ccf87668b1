"""All names of PyTorch that are private or missing in some supported releases, each with a fallback.

A fallback gives the same results, more slowly. `tests/test_torch.py` removes each name in turn.
"""

from __future__ import annotations

import ctypes
import operator
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, reduce, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _find(path: str) -> Any:
    """Return the object at a dotted path below torch. None: this release has none."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            return None
    return found


def _loaded(module: str, name: str) -> Any:
    """Return a name of a module. None: the module is not loaded, or has no such name."""
    return getattr(sys.modules.get(module), name, None)


# The dispatcher

_SKIPPED_KEYS = ("ADInplaceOrView", "AutocastCPU", "AutocastCUDA", "AutocastXPU", "AutocastMPS")


def _key_set(names: Sequence[str]) -> Any:
    known = [key for name in names if (key := _find(f"_C.DispatchKey.{name}")) is not None]
    key_set = _find("_C.DispatchKeySet")
    return reduce(operator.or_, map(key_set, known)) if key_set is not None and known else None


def below_autograd(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run a function of tensors below autograd, view tracking and autocast.

    For functions whose gradients are computed by hand: skipping those layers of the dispatcher makes each small op
    cheaper, and a backward that is called under autocast must not be cast.
    """
    below, exclude = _find("_C._AutoDispatchBelowAutograd"), _find("_C._ExcludeDispatchKeyGuard")
    keys = _key_set(_SKIPPED_KEYS)

    @wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if below is None or exclude is None or keys is None:
            device = next(t.device.type for t in args if isinstance(t, Tensor))
            with torch.no_grad(), torch.autocast(device, enabled=False):
                return cast(Result, _without_views(function(*args, **kwargs)))
        with below(), exclude(keys):
            return function(*args, **kwargs)

    return run


def in_fresh_thread(function: Callable[[], Result]) -> Result:
    """Call a function in a new thread, because modes, transforms and autocast hold in one thread only."""
    with ThreadPoolExecutor(1) as fresh:
        return fresh.submit(function).result()


def with_autograd(function: Callable[[], Result]) -> Result:
    """Call a function with autograd on and autocast off. In the kernel of an operator, autograd is off."""
    if _force_keys is None or _included_keys is None or _AUTOCAST_KEYS is None:
        return in_fresh_thread(function)
    with _force_keys(_included_keys(), _AUTOCAST_KEYS):
        return function()


_force_keys, _included_keys = _find("_C._ForceDispatchKeyGuard"), _find("_C._dispatch_tls_local_include_set")
_AUTOCAST_KEYS = _key_set([key for key in _SKIPPED_KEYS if key.startswith("Autocast")])


def _without_views(result: Any) -> Any:
    """Replace views by copies. Autograd forbids in-place changes of a view that is one of several outputs."""
    if isinstance(result, Tensor):
        return result if result._base is None else result.clone()
    if isinstance(result, (tuple, list)):
        parts = [_without_views(part) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)
    return result


unsafe_view: Callable[[Tensor, list[int]], Tensor] = _find("ops.aten._unsafe_view.default") or (
    lambda tensor, shape: tensor.reshape(shape).clone()
)
"""Reshapes without a copy. Autograd does not count the result as a view, so it may be changed in place."""


# Modes in which a tensor has no values, or only those of an example

is_traced: Callable[[], bool] = _find("_C._is_tracing") or _find("jit.is_tracing") or (lambda: False)
"""Whether `torch.jit.trace` is recording ops. A value that is read would become a constant of the trace."""


def _peek_interpreters() -> Callable[[], bool]:
    peek = _find("_C._functorch.peek_interpreter_stack")
    return (lambda: peek() is not None) if peek is not None else (lambda: False)


is_transformed: Callable[[], bool] = _find("_C._are_functorch_transforms_active") or _peek_interpreters()
"""Whether a torch.func transform (vmap, grad, jvp, ...) is running."""


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor has no values: it is on the meta device, or a `FakeTensor`."""
    if tensor.device.type == "meta":
        return True
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    if _FakeTensor is not None:
        return isinstance(tensor, _FakeTensor)
    try:
        tensor.tolist()
    except Exception:
        return True
    return False


_FakeTensor: Any = _find("_subclasses.FakeTensor")
_count_modes = _find("_C._len_torch_dispatch_stack")


is_zero_tensor: Callable[[Tensor], bool] = _find("_is_zerotensor") or (lambda tensor: False)
"""Whether a tensor is a ZeroTensor, which has no memory. Forward-mode differentiation makes such tensors."""


def is_recorded() -> bool:
    """Return whether `make_fx` is recording ops. A value that is read would become a constant of the graph."""
    proxy_mode = getattr(sys.modules.get("torch.fx.experimental.proxy_tensor"), "get_proxy_mode", None)
    if proxy_mode is not None:
        return proxy_mode() is not None
    # Without that function: any dispatch mode could be one that records.
    return _count_modes is not None and _count_modes() > 0


def values_can_be_read(tensor: Tensor) -> bool:
    """Return False while a call is compiled, traced, recorded or transformed, and for a fake tensor."""
    return not (torch.compiler.is_compiling() or is_traced() or is_transformed() or is_recorded() or is_fake(tensor))


_forward_ad = _find("autograd.forward_ad")
_BATCHED_TESTS = [_find(f"_C._functorch.{name}") for name in ("is_legacy_batchedtensor", "is_batchedtensor")]


def forward_gradients_run() -> bool:
    """Return whether forward-mode differentiation is active."""
    level = getattr(_forward_ad, "_current_level", None)
    if level is not None:
        return bool(level >= 0)
    try:
        _forward_ad.make_dual(torch.zeros(()), torch.zeros(()))
    except RuntimeError:  # no level has been entered
        return False
    return True


def is_batched(grad: Tensor) -> bool:
    """Return whether a gradient is batched. `autograd.grad(is_grads_batched=True)` has a vmap of its own."""
    return any(test is None or test(grad) for test in _BATCHED_TESTS)


def is_exporting_onnx() -> bool:
    """Return `torch.onnx.is_in_onnx_export()`, without loading the exporter. Dynamo would take that call for False."""
    exporting = _loaded("torch.onnx._internal.exporter._flags", "_is_onnx_exporting")
    if exporting is None:
        asked = _loaded("torch.onnx", "is_in_onnx_export")
        exporting = asked is not None and asked()
    return bool(exporting)


# Dynamo

# Both are tested from 2.13 on. In 2.6, the first returns a reference that it does not own, and Python crashes.
_is_tested = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
_asked = _find("_C._dynamo.eval_frame.get_eval_frame_callback") if _is_tested else None
graph_scan: Any = _find("ops.higher_order.scan") if _is_tested else None
"""A loop over tensors' first dimension that is one node of a graph, for any number of steps. None: there is none."""
_watching: Callable[[], Any] = _asked or (lambda: "not known")


def dynamo_watches() -> bool:
    """Return whether Dynamo would compile a function called now. An optimizer also loads Dynamo, which is then idle."""
    return "torch._dynamo" in sys.modules and _watching() is not None


def dynamo_refuses() -> bool:
    """Return whether Dynamo traces a layer that it will not compile. From torch 2.15 on it enters `forward` first."""
    return torch.compiler.is_dynamo_compiling() and not torch._dynamo.config.allow_rnn


def disable_dynamo(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Apply `torch.compiler.disable`, with a reason for reports of graph breaks. torch 2.6 takes no reason."""
    reason = "Dynamo compiles no torch.nn.RNNBase. To make it one operator, set torch._dynamo.config.allow_rnn = True"
    try:
        return cast(Callable[Arguments, Result], torch.compiler.disable(function, reason=reason))
    except TypeError:
        return cast(Callable[Arguments, Result], torch.compiler.disable(function))


# Kernels

KERNELS: dict[str, Any] = {
    mode: _find(f"_VF.{name}") or _find(name)
    for mode, name in (("GRU", "gru"), ("LSTM", "lstm"), ("RNN_TANH", "rnn_tanh"), ("RNN_RELU", "rnn_relu"))
}
"""PyTorch's recurrent kernels, by `nn.RNNBase.mode`."""


cudnn_forward, cudnn_backward = (_find(f"ops.aten.{name}.default") for name in ("_cudnn_rnn", "_cudnn_rnn_backward"))
graph_is_kept: Callable[[], bool] = _find("_C._autograd._get_current_graph_task_keep_graph") or (lambda: True)
"""Whether another backward may follow the one that runs."""


share_storage: Callable[[Tensor, Tensor], bool] = _find("_C._is_alias_of") or (
    lambda a, b: a.as_strided((0,), (1,), 0).is_set_to(b.as_strided((0,), (1,), 0))
)
"""Whether two tensors have the same storage."""


def has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available() and getattr(torch.backends.mkldnn, "enabled", True))


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is recording on a device's current stream, so that nothing may wait for it."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # PyTorch answers for the current device only
        return torch.cuda.is_current_stream_capturing()


def current_stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device. From the CPU it goes through pinned memory, so that nothing waits for the device."""
    # If ops are recorded, a plain move: with pinned memory, each replay would read the memory of this call.
    if not tensor.is_cpu or device.type == "cpu" or not values_can_be_read(tensor):
        return tensor.to(device)
    if is_capturing(device):
        raise ValueError(
            "a CUDA graph is being recorded: CPU values would become constants of the graph. "
            f"Pass lengths, masks and resets as tensors on {device}."
        )
    if device.type != "cuda":
        return tensor.to(device)
    # Pinned memory of our own: the caller may change the original before it has been copied.
    return torch.empty_like(tensor, pin_memory=True).copy_(tensor).to(device, non_blocking=True)


def assert_async(holds: Tensor, message: str) -> bool:
    """Assert that a bool tensor is True, without waiting for its device, which reports a failure later.

    Returns False if the device has no such assertion. The values have to be read then.
    """
    if _assert_async is None:
        return False
    try:
        _assert_async(holds, message)
    except NotImplementedError:
        return False
    return True


_assert_async = _find("_assert_async")


def symbolic_node(kind: str, inputs: Any, attributes: dict[str, Any], dtypes: Any, shapes: Any) -> Any:
    """Add an ONNX node to the graph that is being exported."""
    return torch.onnx.ops.symbolic_multi_out(kind, inputs, attributes, dtypes=dtypes, shapes=shapes, version=None)


# Modules


def forward_pre_hooks(module: Any) -> list[tuple[Any, bool]]:
    """Return a module's forward pre-hooks, and for each whether it takes keyword arguments."""
    hooks, with_kwargs = (getattr(module, f"_forward_pre_hooks{more}", None) for more in ("", "_with_kwargs"))
    if hooks is None:
        raise TypeError("a weight is computed by a hook of its layer, which this release of PyTorch does not show")
    return [(hook, key in (with_kwargs or ())) for key, hook in hooks.items()]


def listed_weights(layer: Any) -> list[Tensor] | None:
    """Return the list of weights that `nn.RNNBase` gives to its kernel, because reading attributes takes longer.

    None: the weights are computed, or others are used in their place.
    """
    listed, own = getattr(layer, "_flat_weights", None), getattr(layer, "_parameters", {})
    if torch.compiler.is_compiling() or not listed or len(own) < len(listed):
        return None
    return listed if all(map(operator.is_, listed, own.values())) else None


# Jagged nested tensors


def ragged_dim(nested: Any) -> int:
    found = getattr(nested, "_ragged_idx", None)
    if found is not None:
        return int(found)
    return next(dim for dim, size in enumerate(nested.shape) if not isinstance(size, int))


def jagged_like(nested: Any, values: Tensor) -> Tensor:
    """Return a jagged tensor with other values and the offsets of this one."""
    return torch.nested.nested_tensor_from_jagged(
        values,
        nested.offsets(),
        nested.lengths(),
        min_seqlen=getattr(nested, "_maybe_min_seqlen", None),
        max_seqlen=getattr(nested, "_maybe_max_seqlen", None),
    )


def is_autocast_on(device: str) -> bool:
    """Return `torch.is_autocast_enabled(device)`, which would raise for meta."""
    return device != "meta" and torch.is_autocast_enabled(device)


IMPORTED_IN = os.getpid()
"""The process that imported this. A child forked from it must not use PyTorch's threads."""


@cache
def gnu_openmp_parallel() -> Any:
    """Return GNU OpenMP's function that runs a C function on PyTorch's threads. None: PyTorch uses another OpenMP."""
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        with suppress(OSError, AttributeError):
            return ctypes.CDLL(str(path), os.RTLD_NOLOAD).GOMP_parallel  # RTLD_NOLOAD: the copy that PyTorch has loaded
    return None
