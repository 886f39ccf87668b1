"""One step of each cell, and its derivative, in place on rows of a buffer.

A buffer's row has `width` blocks of H columns: the input product fills the last ones, one for each gate, the recurrent
product adds to the first ones. `local_derivatives` computes all factors that do not depend on the incoming gradient,
for a whole chunk.

tanh is ATen's own. 2 sigmoid(2a) - 1 is several times faster, and loses the digits of small values: the difference of
two numbers near 1 has their absolute error.

I input, H hidden, P the state that is fed back (H, or proj_size), b rows of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..._spec import LayerWeights, Spec, States

Steps = Sequence[Sequence[Tensor]]
"""For each of several tensors, its rows at each step, in the order in which the steps run."""
AddProduct = Callable[[Tensor, Tensor], Any]
"""Adds a recurrent product of its second argument to its first."""


class Cell:
    """A cell over the weights of one direction, or of two that run as a batch of two."""

    width: ClassVar[int]
    """How many blocks of H columns a buffer's row has"""
    saves_buffer: ClassVar[bool] = True
    """Whether the derivative needs the buffer, or only the states."""

    def __init__(self, spec: Spec, weights: LayerWeights) -> None:
        self.spec = spec
        self.weights = weights
        self.hidden = spec.hidden_size
        self.recurrent_only = (self.width - spec.gates) * spec.hidden_size
        """How many columns of a buffer's row, the first ones, only the recurrent product fills: the GRU's g"""
        self.mm: Callable[..., Any] = torch.bmm if spec.bidirectional else torch.mm
        self.w_hr = None if weights[0].w_hr is None else self.join(*(w.w_hr for w in weights if w.w_hr is not None))

    @cached_property
    def one(self) -> Tensor:
        return self.weights[0].w_hh.new_ones(())

    def join(self, *tensors: Tensor) -> Tensor:
        return torch.stack(tensors) if self.spec.bidirectional else tensors[0]

    def order_gates(self, weight: Tensor) -> Tensor:
        """Return a recurrent weight or bias with its gates in the buffer's order."""
        return weight

    def sigmoid_slope(self, s: Tensor, out: Tensor) -> Tensor:
        """Return the derivative of s = σ(a) by a: s (1 - s)."""
        return torch.sub(self.one, s, out=out).mul_(s)

    def tanh_slope(self, t: Tensor, out: Tensor) -> Tensor:
        """Return the derivative of t = tanh(a) by a: 1 - t²."""
        return torch.addcmul(self.one, t, t, value=-1, out=out)

    def parts(self, buffer: Tensor) -> States:
        """Return the parts of the buffer that `run_` uses."""
        raise NotImplementedError

    def run_(self, parts: Steps, before: Steps, after: Steps, add_: AddProduct) -> None:
        """Compute activations and new states from the input products in the buffer and the states before.

        `add_` adds the recurrent product of its second argument to its first.
        """
        raise NotImplementedError

    def local_derivatives(self, buffer: Tensor, before: States, after: States, out: Tensor) -> States:
        """Return `out`, the factor that turns a state's gradient into each gate's; then any other factors.

        `out` has the gates in the order of the weights, not of the buffer.
        """
        raise NotImplementedError

    def back_parts(self, derivatives: States, buffer: Tensor, grads: Sequence[Tensor]) -> States:
        """Return the tensors that `run_back_` uses, besides the states' gradients.

        Views of `grads`, the states' gradients at all rows, see what later steps of `run_back_` add to them.
        """
        raise NotImplementedError

    def run_back_(self, parts: Steps, grads: Steps, grads_before: Steps, add_: AddProduct) -> None:
        """Turn the factors into the gates' gradients, in place, and add to the gradients of the states before.

        `add_` adds the gradient through the recurrent product to its first argument.
        """
        raise NotImplementedError

    def input_gradient_(self, derivatives: States, grads: Sequence[Tensor]) -> None:
        """Turn `derivatives[0]`, the gradient of the recurrent product, into that of the input's, gate for gate."""


class GRU(Cell):
    """r, z = σ(W_i x + b_i + W_h h + b_h);  g = W_hn h + b_hn;  n = tanh(W_in x + b_in + r g);  h' = (1 - z) n + z h.

    Buffer: g, r, z, n.
    """

    width = 4

    def order_gates(self, weight: Tensor) -> Tensor:
        return weight.roll(self.hidden, 0)

    def parts(self, buffer: Tensor) -> States:
        H = self.hidden
        return buffer[..., : 3 * H], buffer[..., H : 3 * H], *buffer.split(H, -1)

    def run_(self, parts: Steps, before: Steps, after: Steps, add_: AddProduct) -> None:
        for grz, rz, g, r, z, n, h, h_out in zip(*parts, *before, *after, strict=True):
            add_(grz, h)
            rz.sigmoid_()
            n.addcmul_(r, g).tanh_()
            torch.lerp(n, h, z, out=h_out)

    def local_derivatives(self, buffer: Tensor, before: States, after: States, out: Tensor) -> States:
        g, r, z, n = buffer.split(self.hidden, -1)
        dr, dz, dg = out.split(self.hidden, -1)
        dn = self.tanh_slope(n, torch.empty_like(n)).mul_(1 - z)
        torch.mul(dn, r, out=dg)
        self.sigmoid_slope(r, dr).mul_(g).mul_(dn)
        self.sigmoid_slope(z, dz).mul_(before[0] - n)
        return out, dn

    def back_parts(self, derivatives: States, buffer: Tensor, grads: Sequence[Tensor]) -> States:
        H = self.hidden
        return derivatives[0], derivatives[0].unflatten(-1, (3, H)), grads[0].unsqueeze(-2), buffer[..., 2 * H : 3 * H]

    def run_back_(self, parts: Steps, grads: Steps, grads_before: Steps, add_: AddProduct) -> None:
        for rzg, gates, dh_for_gates, z, dh, dh_before in zip(*parts, *grads, *grads_before, strict=True):
            gates.mul_(dh_for_gates)
            add_(dh_before, rzg)
            dh_before.addcmul_(dh, z)

    def input_gradient_(self, derivatives: States, grads: Sequence[Tensor]) -> None:
        rzg, dn = derivatives
        torch.mul(dn, grads[0], out=rzg[..., 2 * self.hidden :])


class LSTM(Cell):
    """i, f, g, o = σ, σ, tanh, σ (W_i x + b_i + W_h h + b_h);  c' = f c + i g;  m = o tanh(c');  h' = m, or W_hr m.

    Buffer: i, f, g, o.
    """

    width = 4

    def parts(self, buffer: Tensor) -> States:
        return buffer, buffer[..., : 2 * self.hidden], *buffer.split(self.hidden, -1)

    def run_(self, parts: Steps, before: Steps, after: Steps, add_: AddProduct) -> None:
        for ifgo, i_and_f, i, f, g, o, h, c, h_out, c_out in zip(*parts, *before, *after, strict=True):
            add_(ifgo, h)
            i_and_f.sigmoid_()
            g.tanh_()
            o.sigmoid_()
            torch.mul(f, c, out=c_out).addcmul_(i, g)
            m = h_out if self.w_hr is None else torch.empty_like(c_out)
            torch.tanh(c_out, out=m).mul_(o)
            if self.w_hr is not None:
                self.mm(m, self.w_hr.mT, out=h_out)

    def local_derivatives(self, buffer: Tensor, before: States, after: States, out: Tensor) -> States:
        i, f, g, o = buffer.split(self.hidden, -1)
        di, df, dg, do = out.split(self.hidden, -1)
        t = torch.tanh(after[1])
        self.sigmoid_slope(i, di).mul_(g)
        self.sigmoid_slope(f, df).mul_(before[1])
        self.tanh_slope(g, dg).mul_(i)
        self.sigmoid_slope(o, do).mul_(t)
        k = self.tanh_slope(t, torch.empty_like(t)).mul_(o)
        return (out, k) if self.w_hr is None else (out, k, t.mul_(o))

    def back_parts(self, derivatives: States, buffer: Tensor, grads: Sequence[Tensor]) -> States:
        H = self.hidden
        d, k = derivatives[:2]
        ifg, o = d[..., : 3 * H].unflatten(-1, (3, H)), d[..., 3 * H :]
        return d, ifg, grads[1].unsqueeze(-2), o, k, buffer[..., H : 2 * H]

    def run_back_(self, parts: Steps, grads: Steps, grads_before: Steps, add_: AddProduct) -> None:
        for ifgo, ifg, dc_for_ifg, o, k, f, dh, dc, dh_before, dc_before in zip(
            *parts, *grads, *grads_before, strict=True
        ):
            dm = dh if self.w_hr is None else self.mm(dh, self.w_hr)
            dc.addcmul_(dm, k)
            ifg.mul_(dc_for_ifg)
            o.mul_(dm)
            add_(dh_before, ifgo)
            dc_before.addcmul_(dc, f)


class RNNTanh(Cell):
    """h' = tanh(W_i x + b_i + W_h h + b_h). Buffer: the argument."""

    width, saves_buffer = 1, False

    def parts(self, buffer: Tensor) -> States:
        return (buffer,)

    def run_(self, parts: Steps, before: Steps, after: Steps, add_: AddProduct) -> None:
        for a, h, h_out in zip(*parts, *before, *after, strict=True):
            add_(a, h)
            self.activate(a, h_out)

    def activate(self, a: Tensor, out: Tensor) -> None:
        torch.tanh(a, out=out)

    def local_derivatives(self, buffer: Tensor, before: States, after: States, out: Tensor) -> States:
        return (self.tanh_slope(after[0], out),)

    def back_parts(self, derivatives: States, buffer: Tensor, grads: Sequence[Tensor]) -> States:
        return derivatives

    def run_back_(self, parts: Steps, grads: Steps, grads_before: Steps, add_: AddProduct) -> None:
        for d, dh, dh_before in zip(*parts, *grads, *grads_before, strict=True):
            d.mul_(dh)
            add_(dh_before, d)


class RNNReLU(RNNTanh):
    """h' = max(0, W_i x + b_i + W_h h + b_h). Buffer: the argument."""

    def activate(self, a: Tensor, out: Tensor) -> None:
        torch.clamp(a, min=0, out=out)

    def local_derivatives(self, buffer: Tensor, before: States, after: States, out: Tensor) -> States:
        return (torch.logical_not(after[0] <= 0, out=out),)  # NaN lets its gradient through, as in ATen


CELLS: dict[str, type[Cell]] = {"GRU": GRU, "LSTM": LSTM, "RNN_TANH": RNNTanh, "RNN_RELU": RNNReLU}
"""By `nn.RNNBase.mode`."""
