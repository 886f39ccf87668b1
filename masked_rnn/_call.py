"""Opening and closing a call: every layout that comes in or goes out is known here, and nowhere below.

T time, N batch, I input, H hidden, P the state that is fed back (H, or proj_size), D directions, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ._cells import NAMES, States, Weights
from ._lengths import (
    Plan,
    check_lengths,
    check_mask,
    check_sorted,
    compact,
    is_on_host,
    live_steps,
    look_like_lengths,
    plan_full,
    plan_rows,
    real_steps,
    spread,
    values_can_be_read,
)
from ._torch import is_traced, jagged_like, ragged_dim


class Call:
    """One call in canonical form.

    `data` is the input with two leading dimensions, time and batch in the layer's order, or, from a PackedSequence or
    a nested tensor, its rows with one. Backends take it as `rows()` with a `plan()`, or as `padded()`.
    """

    def __init__(
        self,
        layer: Any,
        weights: list[tuple[Weights, ...]],
        data: Tensor,
        form: str,
        batch: int,
        steps: int,
        batch_first: bool,
    ) -> None:
        self.layer = layer
        self.weights = weights
        """For each layer, each direction's."""
        self.data = data
        self.form = form
        """padded, unbatched, packed or nested"""
        self.batch = batch
        self.steps = steps
        self.batch_first = batch_first
        self.lengths: Tensor | None = None
        self.mask: Tensor | None = None
        """(T, N)"""
        self.starts: Tensor | None = None
        """Of a nested tensor: where each sequence's rows begin."""
        self.packed: PackedSequence | None = None
        self.source: Any = None
        self.states: States = ()
        """Each (L·D, N, P or H), in the batch's order."""
        self.is_sorted = False
        self._plan: Plan | None = None

    @property
    def directions(self) -> int:
        return 2 if self.layer.bidirectional else 1

    def real(self) -> Tensor | None:
        """What says which steps are real, where anything does."""
        if self.packed is not None:
            return self.packed.batch_sizes
        return self.lengths if self.mask is None else self.mask

    def values_can_be_read(self) -> bool:
        real = self.real()
        return values_can_be_read(self.data if real is None else real)

    def is_empty(self) -> bool:
        """Whether no sequence has a step, as far as can be seen without waiting for a device."""
        if self.batch == 0 or self.data.numel() == 0:
            return True
        real = self.real()
        return real is not None and is_on_host(real) and values_can_be_read(real) and not bool(real.any())

    def wants_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(
            t is not None and t.requires_grad
            for t in (self.data, *self.states, *(t for layer in self.weights for w in layer for t in w))
        )

    def draws_dropout(self) -> bool:
        return bool(self.layer.dropout and self.layer.training and self.layer.num_layers > 1)

    def enter_weights_dtype(self, autocast: torch.dtype) -> list[torch.dtype]:
        """Cast the input and the states to the weights' dtype; the dtypes of the output and the last states that
        `torch.nn` returns under autocast, where a GRU's h and a projected LSTM's c keep the precision they came in."""
        dtype = self.weights[0][0].w_ih.dtype
        low = dtype if dtype == torch.float64 else autocast
        wide = [torch.promote_types(low, h.dtype) for h in self.states]
        if self.layer.mode == "GRU":
            results = [wide[0], wide[0]]
        else:
            results = [low] * (1 + len(wide))
            if self.layer.proj_size:
                results[2] = wide[1]
        self.data = self.data.to(dtype)
        self.states = tuple(h.to(dtype) for h in self.states)
        return results

    def plan(self) -> Plan:
        """Which rows run when. Reads the lengths on the host."""
        if self._plan is None:
            self._plan = self._make_plan()
        return self._plan

    def _make_plan(self) -> Plan:
        device, batch, steps = self.data.device, self.batch, self.steps
        if self.packed is not None:
            sizes = self.packed.batch_sizes.tolist()
            return Plan(sizes, batch, self.data.size(0), device, order=self.packed.sorted_indices)
        if self.lengths is None and self.mask is None:
            return plan_full(batch, steps, self.batch_first, device)
        if self.mask is not None:
            mask = self.mask.cpu()
            lengths, steps_of = mask.sum(0), real_steps(mask)
        else:
            assert self.lengths is not None
            lengths, steps_of = self.lengths.cpu(), None
        if self.starts is not None:
            starts, stride = self.starts.cpu(), 1
        elif self.batch_first:
            starts, stride = torch.arange(batch, device="cpu") * steps, 1
        else:
            starts, stride = torch.arange(batch, device="cpu"), batch
        size = self.data.size(0) if self.starts is not None else batch * steps
        return plan_rows(lengths, starts, stride, size, device, is_sorted=self.is_sorted, steps_of=steps_of)

    def rows(self) -> Tensor:
        """The input as rows, in the order in which the plan's index counts them."""
        return self.data if self.data.dim() == 2 else self.data.flatten(0, 1)

    def from_rows(self, output: Tensor) -> Tensor:
        """The output, as the input lies."""
        return output if self.data.dim() == 2 else output.unflatten(0, self.data.shape[:2])

    def padded(self) -> tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
        """The input (T, N, I), padding last; the lengths (N,), None where all are T; how to bring an output back."""
        if self.data.dim() == 2:
            plan = self.plan()
            steps = len(plan.batch_sizes)
            order = torch.arange(plan.live, device=plan.device) if plan.order is None else plan.order
            at = plan.grid(order)
            index = plan.index
            rows = self.data if index is None else self.data.index_select(0, index)
            x = rows.new_zeros(steps * plan.batch, rows.size(-1)).index_copy(0, at, rows)

            def back(output: Tensor) -> Tensor:
                rows = output.flatten(0, 1).index_select(0, at)
                return rows if index is None else rows.new_zeros(plan.size, rows.size(-1)).index_copy(0, index, rows)

            lengths = torch.zeros(plan.batch, dtype=torch.int64, device=plan.device)
            return x.view(steps, plan.batch, -1), lengths.index_copy(0, order, plan.sorted_lengths), back
        x = self.data.transpose(0, 1) if self.batch_first else self.data
        restore = _transposed if self.batch_first else same
        if self.mask is None:
            return x, None if self.lengths is None else self.lengths.to(x.device), restore
        x, place = compact(x, self.mask)
        return x, self.mask.sum(0), lambda output: restore(spread(output, place))

    def live(self) -> tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
        """As `padded`, but with padding where it is, and real steps marked (T, N, 1); None where all are."""
        if self.mask is None or self.data.dim() == 2:
            x, lengths, back = self.padded()
            return x, None if lengths is None else live_steps(lengths, x.size(0)), back
        x = self.data.transpose(0, 1) if self.batch_first else self.data
        return x, self.mask.unsqueeze(-1), _transposed if self.batch_first else same


def same(output: Tensor) -> Tensor:
    return output


def _transposed(output: Tensor) -> Tensor:
    return output.transpose(0, 1)


def open_call(layer: Any, input: Any, hx: Any, lengths: Any, mask: Any) -> Call:
    weights = read_weights(layer)
    if isinstance(input, PackedSequence):
        call = _open_packed(layer, weights, input)
    elif isinstance(input, Tensor) and input.is_nested:
        call = _open_nested(layer, weights, input)
    else:
        call = _open_padded(layer, weights, input)
    if call.form in ("packed", "nested"):
        _refuse_twice(call.form, lengths, mask)
    else:
        _set_lengths(call, lengths, mask)
    if layer.enforce_sorted and call.form != "packed":
        counts = call.mask.sum(0) if call.mask is not None else call.lengths
        if counts is not None:
            check_sorted(counts)
        call.is_sorted = True
    call.states = _open_states(call, hx)
    return call


def read_weights(layer: Any) -> list[tuple[Weights, ...]]:
    """Read as attributes, so that parametrized and functional weights count."""
    suffixes = ("", "_reverse") if layer.bidirectional else ("",)
    has = (True, True, layer.bias, layer.bias, layer.proj_size > 0)
    names = [name if here else None for name, here in zip(NAMES, has, strict=True)]
    return [
        tuple(
            Weights(*(None if name is None else getattr(layer, f"{name}_l{k}{suffix}") for name in names))  # type: ignore[arg-type]
            for suffix in suffixes
        )
        for k in range(layer.num_layers)
    ]


def _check_input(layer: Any, weights: list[tuple[Weights, ...]], data: Tensor) -> None:
    """What `nn.RNNBase.check_input` refuses, by the weights that the call runs with."""
    dtype = weights[0][0].w_ih.dtype
    if data.dtype != dtype and not torch.is_autocast_enabled(data.device.type):
        raise ValueError(f"input must have the type {dtype}, got type {data.dtype}. Use input.to({dtype}).")
    if data.size(-1) != layer.input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {layer.input_size}, got {data.size(-1)}"
        )


def _open_padded(layer: Any, weights: list[tuple[Weights, ...]], input: Any) -> Call:
    if not isinstance(input, Tensor):
        raise TypeError(
            f"{type(layer).__name__}: expected input to be a tensor or a PackedSequence, got {type(input).__name__}"
        )
    if input.dim() not in (2, 3):
        raise ValueError(f"{type(layer).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead")
    form = "padded" if input.dim() == 3 else "unbatched"
    data = input if form == "padded" else input.unsqueeze(0 if layer.batch_first else 1)
    _check_input(layer, weights, data)
    batch, steps = data.shape[:2] if layer.batch_first else (data.shape[1], data.shape[0])
    return Call(layer, weights, data, form, batch, steps, layer.batch_first)


def _open_packed(layer: Any, weights: list[tuple[Weights, ...]], input: PackedSequence) -> Call:
    data, batch_sizes, order, _ = input
    if data.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
    _check_input(layer, weights, data)
    batch: Any = batch_sizes[0] if order is None else order.size(0)
    call = Call(layer, weights, data, "packed", batch if is_traced() else int(batch), batch_sizes.size(0), False)
    call.packed = input
    return call


def _open_nested(layer: Any, weights: list[tuple[Weights, ...]], input: Tensor) -> Call:
    if input.layout != torch.jagged:
        raise ValueError(
            "a nested input must have the jagged layout, got a strided one. "
            "Use torch.nested.nested_tensor(..., layout=torch.jagged)."
        )
    if is_traced():
        raise ValueError("torch.jit.trace can't record a nested tensor's lengths. Give padded input and lengths.")
    if input.dim() != 3 or ragged_dim(input) != 1:
        raise ValueError(f"a nested input must be of shape (N, j, I) with time ragged, got {tuple(input.shape)}")
    values, offsets = input.values(), input.offsets()  # type: ignore[attr-defined]
    _check_input(layer, weights, values)
    narrowed = input.lengths()  # type: ignore[attr-defined]
    call = Call(layer, weights, values, "nested", offsets.size(0) - 1, 0, True)
    call.starts, call.lengths = offsets[:-1], offsets.diff() if narrowed is None else narrowed
    call.source = input
    return call


def _refuse_twice(form: str, lengths: Any, mask: Any) -> None:
    kind = "a PackedSequence" if form == "packed" else "a nested tensor"
    for name, given in (("lengths", lengths), ("mask", mask)):
        if given is not None:
            raise ValueError(
                f"{kind} carries its own lengths: {name} must be None, but {name} was given too. Leave it out."
            )


def _set_lengths(call: Call, lengths: Any, mask: Any) -> None:
    layout = f"batch_first={call.layer.batch_first}"
    device = call.data.device
    if lengths is not None and mask is not None:
        raise ValueError("lengths and mask say the same thing: give one of them, not both.")
    if lengths is not None:
        if call.form == "unbatched" and isinstance(lengths, int) and not isinstance(lengths, bool):
            lengths = [lengths]
        lengths = check_lengths(lengths, call.batch, call.steps, device, layout)
        # Where no row is padded, as far as can be seen, the call is one without lengths.
        whole = is_on_host(lengths) and values_can_be_read(lengths) and bool((lengths == call.steps).all())
        call.lengths = None if whole else lengths
    elif mask is not None:
        unbatched = call.form == "unbatched"
        mask = check_mask(mask, (call.steps,) if unbatched else tuple(call.data.shape[:2]), device, layout)
        if unbatched:
            mask = mask.unsqueeze(1)
        elif call.batch_first:
            mask = mask.t()
        call.mask = mask
    elif call.steps == 0:
        raise RuntimeError(
            "Expected sequence length to be larger than 0 in RNN: the input has no time steps. "
            "Give lengths (all 0) to run a batch of empty sequences."
        )


def _open_states(call: Call, hx: Any) -> States:
    layer = call.layer
    widths = _state_widths(layer)
    stacked = layer.num_layers * call.directions
    if hx is None:
        return tuple(
            torch.zeros(stacked, call.batch, w, dtype=call.data.dtype, device=call.data.device) for w in widths
        )
    _refuse_lengths_as_hx(call, hx)
    if len(widths) == 1:
        hx = (hx,)
    elif not isinstance(hx, (tuple, list)) or len(hx) != 2:
        raise RuntimeError(f"{type(layer).__name__}: hx must be the pair (h_0, c_0), got {type(hx).__name__}")
    names = ("hx",) if len(widths) == 1 else ("hx[0]", "hx[1]")
    return tuple(_open_state(call, h, stacked, w, name) for h, w, name in zip(hx, widths, names, strict=True))


def _refuse_lengths_as_hx(call: Call, hx: Any) -> None:
    if isinstance(hx, Tensor) and hx.is_floating_point():
        return
    is_mask = isinstance(hx, Tensor) and hx.dtype == torch.bool
    if is_mask or look_like_lengths(hx):
        what, name = ("a bool tensor", "mask") if is_mask else ("whole numbers", "lengths")
        carries = call.form in ("packed", "nested")
        cure = f"{call.form} input carries its lengths: leave them out" if carries else f"pass {name}=..."
        raise TypeError(f"the second argument, hx, is the initial state, but got {what}. If they are {name}, {cure}.")


def _state_widths(layer: Any) -> tuple[int, ...]:
    fed_back = layer.proj_size or layer.hidden_size
    return (fed_back, layer.hidden_size) if layer.mode == "LSTM" else (fed_back,)


def _open_state(call: Call, h: Any, stacked: int, width: int, name: str) -> Tensor:
    if not isinstance(h, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(h).__name__}")
    unbatched = call.form == "unbatched"
    whole = (stacked, width) if unbatched else (stacked, call.batch, width)
    flat = (stacked * width,) if unbatched else (call.batch, stacked * width)
    if h.dtype != call.data.dtype and not torch.is_autocast_enabled(call.data.device.type):
        raise RuntimeError(
            f"{name} has dtype {h.dtype}, but the input has {call.data.dtype}. Convert it: {name}.to({call.data.dtype})"
        )
    if h.dim() == len(whole):
        if tuple(h.shape) != whole:
            raise RuntimeError(f"Expected {name} of size {whole}, or flattened {flat}, got {list(h.shape)}")
        return h.unsqueeze(1) if unbatched else h
    if h.dim() == len(flat):
        if tuple(h.shape) != flat:
            raise RuntimeError(f"Expected flattened {name} of size {flat}, or {whole}, got {list(h.shape)}")
        return h.reshape(call.batch, stacked, width).transpose(0, 1)
    kind = "unbatched 2-D" if unbatched else "batched 3-D"
    raise RuntimeError(
        f"For {kind} input, {name} should be {len(whole)}-D {whole} or {len(flat)}-D {flat}, but got {h.dim()}-D tensor"
    )


def close_call(call: Call, output: Tensor, states: States) -> tuple[Any, Any]:
    result: Any = output
    if call.form == "unbatched":
        result = output.squeeze(0 if call.batch_first else 1)
    elif call.packed is not None:
        result = PackedSequence(
            output, call.packed.batch_sizes, call.packed.sorted_indices, call.packed.unsorted_indices
        )
    elif call.form == "nested":
        result = jagged_like(call.source, output)
    if call.layer.flatten_hidden:
        stacked = call.layer.num_layers * call.directions
        states = tuple(torch.cat(h.unbind(0), -1) if stacked > 1 else h[0] for h in states)
        batch_dim = 0
    else:
        batch_dim = 1
    if call.form == "unbatched":
        states = tuple(h.squeeze(batch_dim) for h in states)
    return result, states[0] if len(states) == 1 else states


def each_layer(
    call: Call,
    x: Tensor,
    run: Callable[[Tensor, States, tuple[Weights, ...]], tuple[Tensor, States]],
    initial: States | None = None,
) -> tuple[Tensor, States]:
    """Run the layers, one upon the other's output, with dropout between them."""
    layer, D = call.layer, call.directions
    lasts: list[States] = []
    for k, weights in enumerate(call.weights):
        if k and layer.dropout and layer.training:
            x = nn.functional.dropout(x, layer.dropout)
        x, last = run(x, tuple(h[k * D : (k + 1) * D] for h in initial or call.states), weights)
        lasts.append(last)
    return x, lasts[0] if len(lasts) == 1 else tuple(torch.cat(states) for states in zip(*lasts, strict=True))
