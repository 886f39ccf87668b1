"""Tensors whose memory ends, or begins, at a page that may not be touched, and layers run over them.

`check_case` runs a case forward and backward, and compares every result with `backend="scan"` over ordinary tensors.
One access outside of a tensor ends the process: `processes.run_each` starts it, and says which case it died in.

N batch, T time, I input, H hidden.
"""

from __future__ import annotations

import ctypes
import mmap
import random
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from support.oracle import CELLS, as_hx, as_tuple, masked, state_shapes

Case = dict[str, Any]
PAGE = mmap.PAGESIZE
FORMS = ("full", "lengths", "mask", "resets", "lengths and resets", "mask and resets", "packed", "nested", "unbatched")
SIDES = ("end", "begin")
SIZES = (1, 2, 3, 5, 7, 8, 9, 15, 17, 31, 33)
"""Sizes around the widths of vectors of 2 to 16 numbers."""


def random_cases(number: int, seed: int) -> list[Case]:
    """Draws cases. Cells, forms and sides take turns, so that every combination occurs; the rest is random."""
    draw = random.Random(seed)
    turns = [(cell, form, side) for side in SIDES for form in FORMS for cell in CELLS]
    cases = []
    for k in range(number):
        cell, form, side = turns[k % len(turns)]
        hidden = draw.choice([h for h in SIZES if h > 2])
        large = draw.random() < 0.1  # enough work for two threads
        case = {
            "cell": cell,
            "form": form,
            "side": side,
            "input": draw.choice(SIZES),
            "hidden": hidden,
            "batch": 1 if form == "unbatched" else 67 if large else draw.choice(SIZES),
            "steps": draw.choice([1, 2, 3, 6, 9]),
            "num_layers": draw.choice([1, 1, 2]),
            "bidirectional": draw.random() < 0.5,
            "bias": draw.random() < 0.7,
            "batch_first": draw.random() < 0.5,
            "dtype": draw.choice(["float32", "float64"]),
            "hx": draw.random() < 0.5,
            "strided": draw.random() < 0.3,
            "expanded_gradients": draw.random() < 0.2,
            "learns": draw.random() < 0.85,
            "threads": 2 if large or draw.random() < 0.1 else 1,
            "seed": k,
        }
        cases.append(case)
    return cases


@cache
def _protect() -> Any:
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return protect


def guarded_flat(numel: int, dtype: torch.dtype, side: str) -> Tensor:
    """Returns new memory, filled with NaN or with ones, so that a read of unwritten memory shows."""
    if numel == 0:
        return torch.empty(0, dtype=dtype)
    size = numel * dtype.itemsize
    inside = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, inside + 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    place = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (place, place + PAGE + inside):
        if _protect()(page, PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE + (inside - size if side == "end" else 0)
    # The tensor keeps the memory alive: both are freed together.
    flat = torch.frombuffer(memory, dtype=dtype, count=numel, offset=offset)
    return flat.fill_(torch.nan if dtype.is_floating_point else 1)


def guarded(tensor: Tensor, side: str) -> Tensor:
    """Returns a copy with the same strides, or the tensor itself if it has holes or elements that share memory."""
    span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() == 0 or span != tensor.numel():
        return tensor
    flat = guarded_flat(span, tensor.dtype, side)
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor.detach())


class Guarding(TorchDispatchMode):
    """Guards every tensor that an op of PyTorch allocates, or that comes from NumPy or a list."""

    def __init__(self, side: str) -> None:
        super().__init__()
        self.side = side
        self.count = 0

    def __enter__(self) -> Any:
        self._made = torch.from_numpy, torch.tensor
        torch.from_numpy, torch.tensor = (self._guarding(make) for make in self._made)  # type: ignore[assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.from_numpy, torch.tensor = self._made  # type: ignore[assignment]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if types or not _allocates(func):  # a nested tensor must keep the offsets that it was made with
            return result
        if isinstance(result, (list, tuple)):
            return type(result)(map(self._guard, result))
        return self._guard(result)

    def _guard(self, result: Any) -> Any:
        if type(result) is not Tensor or not result.is_cpu or result.layout != torch.strided:
            return result
        self.count += 1
        return guarded(result, self.side)

    def _guarding(self, make: Any) -> Any:
        return lambda *args, **kwargs: self._guard(make(*args, **kwargs))


@cache
def _allocates(func: Any) -> bool:
    """Returns whether the op's results are new memory."""
    if func.name() in ("aten::_unsafe_view", "aten::lift_fresh"):
        return False
    return all(result.alias_info is None for result in func._schema.returns)


def make_layer(case: Case, backend: str) -> Any:
    names = ("num_layers", "bidirectional", "bias", "batch_first")
    options = {name: case[name] for name in names}
    layer = masked(case["cell"], case["input"], case["hidden"], backend=backend, **options)
    return layer.to(getattr(torch, case["dtype"]))


def given_tensors(case: Case, layer: Any) -> dict[str, Any]:
    """Returns the tensors of a call, batch first. They are the same each time."""
    made = torch.Generator().manual_seed(case["seed"])
    lengths_of = np.random.default_rng(case["seed"])
    N, T, I = case["batch"], case["steps"], case["input"]  # noqa: E741
    dtype = getattr(torch, case["dtype"])
    lengths = torch.from_numpy(lengths_of.integers(0 if case["form"] != "packed" else 1, T + 1, N))
    D = 2 if layer.bidirectional else 1
    return {
        "x": torch.randn(N, T, I, generator=made, dtype=dtype),
        "hx": [torch.randn(shape, generator=made, dtype=dtype) for shape in state_shapes(layer, N)],
        "lengths": lengths,
        "mask": torch.rand(N, T, generator=made) < 0.7,
        "resets": torch.rand(N, T, generator=made) < 0.3,
        "output": torch.randn(N, T, D * (layer.proj_size or layer.hidden_size), generator=made, dtype=dtype),
        "last": [torch.randn(shape, generator=made, dtype=dtype) for shape in state_shapes(layer, N)],
    }


def run_case(case: Case, layer: Any, side: str | None) -> list[Tensor]:
    """Returns the output, last states and every gradient. Guards the tensors if there is a side."""

    def own(tensor: Tensor) -> Tensor:
        return tensor.clone() if side is None else guarded(tensor.contiguous(), side)

    def laid_out(tensor: Tensor) -> Tensor:
        """Brings (N, T, ...) into the layer's layout."""
        return own(tensor if layer.batch_first else tensor.transpose(0, 1))

    given, form = given_tensors(case, layer), case["form"]
    layer.flatten_hidden = False
    if side is not None:
        for name, parameter in list(layer.named_parameters()):
            setattr(layer, name, torch.nn.Parameter(own(parameter.detach())))
    for parameter in layer.parameters():
        parameter.requires_grad_(case["learns"])
        parameter.grad = own(torch.zeros_like(parameter)) if case["learns"] else None
    arguments: dict[str, Any] = {}
    for name in ("lengths", "mask", "resets"):
        if name in form:
            arguments[name] = own(given[name]) if name == "lengths" else laid_out(given[name])
    d_output = given["output"]
    if form == "unbatched":
        leaf = own(given["x"][0])
        d_output, input = own(d_output[0]), leaf
    elif form == "packed":
        packed = pack_padded_sequence(given["x"], given["lengths"], True, False)
        leaf = own(packed.data)
        parts = (packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        input = PackedSequence(leaf.requires_grad_(case["learns"]), *map(own, parts))
        d_output = own(pack_padded_sequence(d_output, given["lengths"], True, False).data)
    elif form == "nested":
        offsets = torch.nn.functional.pad(given["lengths"].cumsum(0), (1, 0))
        real = torch.arange(case["steps"]) < given["lengths"].view(-1, 1)
        leaf = own(given["x"][real])
        input = torch.nested.nested_tensor_from_jagged(leaf.requires_grad_(case["learns"]), own(offsets))
        d_output = own(d_output[real])
    elif case["strided"]:
        leaf = own(torch.nn.functional.pad(given["x"], (1, 1)).movedim(0, 1 - layer.batch_first))
        input, d_output = leaf.requires_grad_(case["learns"])[..., 1:-1], laid_out(d_output)
    else:
        leaf, d_output = laid_out(given["x"]), laid_out(d_output)
        input = leaf
    leaf.requires_grad_(case["learns"])
    if case["learns"]:
        leaf.grad = own(torch.zeros_like(leaf))
    first = [own(h[:, 0] if form == "unbatched" else h).requires_grad_(case["learns"]) for h in given["hx"]]
    output, last = layer(input, as_hx(first) if case["hx"] else None, **arguments)
    results = [output.data if form == "packed" else output.values() if form == "nested" else output, *as_tuple(last)]
    if not case["learns"]:
        return results
    pulled = [d_output, *(own(h[:, 0] if form == "unbatched" else h) for h in given["last"])]
    if case["expanded_gradients"]:
        pulled = [own(torch.ones(())).to(p.dtype).expand(p.shape) for p in pulled]
    torch.autograd.backward(results, pulled)
    gradients = [leaf.grad, *(p.grad for p in layer.parameters()), *(h.grad for h in first if case["hx"])]
    return [r.detach() for r in results] + [g for g in gradients if g is not None]


def check_case(case: Case) -> None:
    import torch.fx.experimental.proxy_tensor  # needed to distinguish a recording from any other mode

    torch.manual_seed(case["seed"])
    layer = make_layer(case, "bptt")
    plain = make_layer(case, "scan")
    plain.load_state_dict(layer.state_dict())
    torch.set_num_threads(1)
    expected = run_case(case, plain, None)
    torch.set_num_threads(case["threads"])
    with Guarding(case["side"]) as guards:
        found = run_case(case, layer, case["side"])
    assert guards.count, "nothing was guarded"
    tolerance = 1e-10 if case["dtype"] == "float64" else 1e-4
    for own, truth in zip(found, expected, strict=True):
        largest = max(1.0, truth.abs().max().item() if truth.numel() else 0.0)
        torch.testing.assert_close(own, truth, rtol=0, atol=tolerance * largest)


def trespass(how: str, dtype: torch.dtype, side: str) -> None:
    """Reads or writes the number just beside a guarded tensor, as a wrong bound would."""
    tensor = guarded(torch.ones(33, dtype=dtype), side)
    beside = tensor.data_ptr() + (33 if side == "end" else -1) * dtype.itemsize
    number = ctypes.c_char.from_address(beside)
    if how == "write":
        number.value = b"1"
    else:
        assert number.value is not None
