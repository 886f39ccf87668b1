"""Checks the initial state and brings it from either form to (L·D, N, P). Gives the last state the caller's form.

N batch, H hidden, P the state that is fed back (H, or proj_size), D directions, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._cells import Layer
from .._spec import Spec, States
from .._torch import is_autocast_on, is_zero_tensor, to_device
from .context import Context
from .inputs import Form
from .lengths import look_like_lengths
from .refusals import refusal


def open_states(context: Context, layer: Layer, spec: Spec, form: Form, hx: Any) -> States:
    """Return the given initial states, each (L·D, N, P or H)."""
    widths = spec.state_widths
    _refuse_lengths_as_hx(form, hx)
    given = (hx,) if len(widths) == 1 else hx
    if not isinstance(given, (tuple, list)) or len(given) != len(widths):
        found = f"{type(hx).__name__} of {len(given)}" if isinstance(hx, (tuple, list)) else type(hx).__name__
        raise RuntimeError(f"{type(layer).__name__}: hx must be the pair (h_0, c_0), got a {found}.")
    states = []
    for k, (h, width) in enumerate(zip(given, widths, strict=True)):
        name = "hx" if len(widths) == 1 else f"hx[{k}]"
        _check_state(form, h, name)
        if not context.compiling and is_zero_tensor(h):
            h = h.clone()  # it has no memory, which PyTorch's LSTM kernel would read
        state = _whole_state(form, h, spec.stacked, width)
        if state is None:
            raise _refused_shape(layer, spec, form, given, k, name)
        states.append(state)
    return tuple(states)


def close_states(
    flatten_hidden: bool,
    states: States,  # each (L·D, N, P or H)
    is_unbatched: bool,
) -> Tensor | States:
    """Return the last states as the layer returns them."""
    if flatten_hidden:
        states = tuple([torch.cat(h.unbind(0), -1) if h.size(0) > 1 else h.squeeze(0) for h in states])
    if is_unbatched:
        states = tuple([h.squeeze(-2) for h in states])
    return states[0] if len(states) == 1 else states


def forget(
    states: States,  # each (L·D, N, P or H)
    resets: Tensor,  # (1, N)
    lengths: Tensor | None,  # (N,)
    bidirectional: bool,
) -> States:
    """Zero the state of each sequence that starts anew, in the forward direction. For a batch of one step."""
    device = states[0].device
    anew = to_device(resets[0].clone(), device)  # autograd saves it, and the caller may change the original
    if lengths is not None:
        anew = anew & to_device(lengths > 0, device)
    if bidirectional:
        backward = torch.zeros_like(anew)
        anew = torch.stack([anew, backward]).repeat(states[0].size(0) // 2, 1)  # (L·D, N)
    return tuple(torch.where(anew.unsqueeze(-1), torch.zeros_like(h), h) for h in states)


def _refuse_lengths_as_hx(form: Form, hx: Any) -> None:
    if isinstance(hx, Tensor) and hx.is_floating_point():
        return
    given = hx[0] if isinstance(hx, (tuple, list)) and hx else hx
    if isinstance(given, Tensor) and given.dtype == torch.bool:
        marks = "mask=... if it marks real steps, resets=... if it marks where the state starts anew"
        cure = "Padded input takes marks of its steps" if form.is_rows else "Pass"
        raise TypeError(f"the second argument, hx, is the initial state, but got a bool tensor. {cure}: {marks}.")
    if look_like_lengths(hx):
        cure = f"{form.kind} carries its own: leave them out"
        if not form.is_rows:
            cure = "pass lengths=..., as in layer(input, lengths=[4, 2])"
        raise TypeError(
            f"the second argument, hx, is the initial state, but got whole numbers. If they are lengths, {cure}."
        )


def _check_state(form: Form, h: Any, name: str) -> None:
    if not isinstance(h, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(h).__name__}")
    data = form.data
    if h.dtype != data.dtype and not is_autocast_on(data.device.type):
        raise RuntimeError(
            f"{name} has dtype {h.dtype}, but the input has {data.dtype}. Convert it: {name}.to({data.dtype})"
        )


def _state_shapes(form: Form, stacked: int, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of a state as `nn.GRU` takes it, and flattened as the layer returns it."""
    if form.is_unbatched:
        return (stacked, width), (stacked * width,)
    return (stacked, form.batch, width), (form.batch, stacked * width)


def _whole_state(form: Form, h: Tensor, stacked: int, width: int) -> Tensor | None:
    """Return a state as (L·D, N, P). None if it has neither shape."""
    whole, flat = _state_shapes(form, stacked, width)
    # The number of dimensions first: a compiler adds a guard for each size that is compared.
    if h.dim() == len(whole) and tuple(h.shape) == whole:
        return h.unsqueeze(1) if form.is_unbatched else h
    if h.dim() == len(flat) and tuple(h.shape) == flat:
        batch = form.batch
        return h.reshape(1, batch, width) if stacked == 1 else h.reshape(batch, stacked, width).transpose(0, 1)
    return None


def _refused_shape(layer: Layer, spec: Spec, form: Form, given: Any, k: int, name: str) -> Exception:
    """Return the error for the state `given[k]`: in torch's words, unless it may have been meant as a flattened one."""
    sizes = [_state_shapes(form, spec.stacked, width) for width in spec.state_widths]
    # torch does not know flattened states: one of the right shape is replaced by one that torch takes.
    seen = tuple(
        h.new_empty(whole) if isinstance(h, Tensor) and tuple(h.shape) == flat else h
        for h, (whole, flat) in zip(given, sizes, strict=True)
    )
    whole, flat = sizes[k]
    found = tuple(given[k].shape)
    cure = f" Use {name}.transpose(0, 1)." if len(found) == 3 and (found[1], found[0], found[2]) == whole else ""
    if form.is_unbatched and found == (spec.stacked, 1, whole[1]):
        cure = f" Use {name}.squeeze(1)."
    if len(found) != len(whole):
        return RuntimeError(f"Expected {name} of size {whole}, or flattened {flat}, got {list(found)}.{cure}")

    def probe(theirs: Any) -> None:
        hx = seen if len(seen) > 1 else seen[0]
        if form.is_rows:
            theirs.check_forward_args(form.data, hx, [form.batch])
        else:
            theirs.forward(form.restore(form.data), hx)

    fallback = f"Expected {name} of size {whole}, got {list(found)}"
    hint = f"{name} may also be flattened, {flat}.{cure}"
    return refusal(layer, RuntimeError, probe, fallback, hint, dtype=form.data.dtype)
