"""The initial state: checked, and brought to (L·D, N, H) from either form, zeros where none is given; the last one.

N batch, H hidden, P the state that is fed back (H, or proj_size), D directions, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._cells import Layer, States
from ._lengths import look_like_lengths
from ._refusals import refusal
from ._torch import is_autocast_on, is_zero_tensor, to_device


def open_states(layer: Layer, hx: Any, form: str, batch: int, data: Tensor) -> States:
    widths = _state_widths(layer)
    stacked = layer.num_layers * (2 if layer.bidirectional else 1)
    if hx is None:
        return tuple(torch.zeros(stacked, batch, w, dtype=data.dtype, device=data.device) for w in widths)
    _refuse_lengths_as_hx(form, hx)
    given = (hx,) if len(widths) == 1 else hx
    if not isinstance(given, (tuple, list)) or len(given) != len(widths):
        more = f"{type(layer).__name__}: hx must be the pair (h_0, c_0), got {type(hx).__name__}"
        raise _refusal(layer, hx, form, batch, data, more)
    names = ("hx",) if len(widths) == 1 else ("hx[0]", "hx[1]")
    return tuple(
        _open_state(layer, given, h, stacked, w, name, form, batch, data)
        for h, w, name in zip(given, widths, names, strict=True)
    )


def close_states(layer: Layer, states: States, form: str) -> Tensor | States:
    """(L·D, N, H), as the layer returns them."""
    batch_dim = 1
    if layer.flatten_hidden:
        states = tuple(torch.cat(h.unbind(0), -1) if h.size(0) > 1 else h[0] for h in states)
        batch_dim = 0
    if form == "unbatched":
        states = tuple(h.squeeze(batch_dim) for h in states)
    return states[0] if len(states) == 1 else states


def forget(states: States, resets: Tensor, lengths: Tensor | None, bidirectional: bool) -> States:
    """Before a batch of one step: zeros in place of the state of the rows that start anew, in the forward direction."""
    device = states[0].device
    anew = to_device(resets[0].clone(), device)  # what autograd saves must not change with the caller's tensor
    if lengths is not None:
        anew = anew & to_device(lengths > 0, device)
    if bidirectional:
        backward = torch.zeros_like(anew)
        anew = torch.stack([anew, backward]).repeat(states[0].size(0) // 2, 1)  # (L·D, N)
    return tuple(torch.where(anew.unsqueeze(-1), torch.zeros_like(h), h) for h in states)


def _refuse_lengths_as_hx(form: str, hx: Any) -> None:
    if isinstance(hx, Tensor) and hx.is_floating_point():
        return
    given = hx[0] if isinstance(hx, (tuple, list)) and hx else hx
    if isinstance(given, Tensor) and given.dtype == torch.bool:
        marks = "mask=... if it marks real steps, resets=... if it marks where the state starts anew"
        cure = "Padded input takes marks of its steps" if form in ("packed", "nested") else "Pass"
        raise TypeError(f"the second argument, hx, is the initial state, but got a bool tensor. {cure}: {marks}.")
    if look_like_lengths(hx):
        carries = form in ("packed", "nested")
        cure = f"{form} input carries its lengths: leave them out" if carries else "pass lengths=..."
        raise TypeError(
            f"the second argument, hx, is the initial state, but got whole numbers. If they are lengths, {cure}."
        )


def _state_widths(layer: Layer) -> tuple[int, ...]:
    fed_back = layer.proj_size or layer.hidden_size
    return (fed_back, layer.hidden_size) if layer.mode == "LSTM" else (fed_back,)


def _open_state(
    layer: Layer, given: Any, h: Any, stacked: int, width: int, name: str, form: str, batch: int, data: Tensor
) -> Tensor:
    if not isinstance(h, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(h).__name__}")
    if not torch.compiler.is_compiling() and is_zero_tensor(h):
        h = h.clone()  # PyTorch's LSTM kernel would read memory that is not there
    if h.dtype != data.dtype and not is_autocast_on(data.device.type):
        raise RuntimeError(
            f"{name} has dtype {h.dtype}, but the input has {data.dtype}. Convert it: {name}.to({data.dtype})"
        )
    unbatched = form == "unbatched"
    whole = (stacked, width) if unbatched else (stacked, batch, width)
    flat = (stacked * width,) if unbatched else (batch, stacked * width)
    # Dimensions first: a compiler would note each size that is compared.
    if h.dim() == len(whole) and tuple(h.shape) == whole:
        return h.unsqueeze(1) if unbatched else h
    if h.dim() == len(flat) and tuple(h.shape) == flat:
        return h.reshape(1, batch, width) if stacked == 1 else h.reshape(batch, stacked, width).transpose(0, 1)
    raise _refused_shape(layer, given, name, form, batch, data)


def _refused_shape(layer: Layer, given: Any, name: str, form: str, batch: int, data: Tensor) -> Exception:
    stacked = layer.num_layers * (2 if layer.bidirectional else 1)
    rows = () if form == "unbatched" else (batch,)
    sizes = [((stacked, *rows, w), (*rows, stacked * w)) for w in _state_widths(layer)]
    # A flattened state that is right is no fault: torch sees a whole one in its place.
    seen = tuple(
        h.new_empty(whole) if isinstance(h, Tensor) and tuple(h.shape) == flat else h
        for h, (whole, flat) in zip(given, sizes, strict=True)
    )
    at = 1 if name == "hx[1]" else 0
    whole, flat = sizes[at]
    more = f"Expected {name} of size {whole}, or flattened {flat}, got {list(given[at].shape)}"
    return _refusal(layer, seen if len(seen) > 1 else seen[0], form, batch, data, more)


def _refusal(layer: Layer, hx: Any, form: str, batch: int, data: Tensor, more: str) -> Exception:
    def ask(their: Any) -> None:
        if form in ("packed", "nested"):
            their.check_forward_args(data, hx, [batch])
        else:
            their.forward(data.squeeze(0 if layer.batch_first else 1) if form == "unbatched" else data, hx)

    return refusal(layer, RuntimeError, ask, more=more, dtype=data.dtype)
