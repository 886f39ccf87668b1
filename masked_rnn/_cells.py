"""One step of each cell and its local derivative, in the equations' letters.

Every cell is written twice: `step` in plain ops, which autograd can follow any number of times, and `run_`, `local`
and `run_back_`, the same step and its derivative in place, on rows of a buffer. A buffer's row has `width` blocks of H
columns: the input product fills the last `gates` of them, the recurrent product adds to the first `gates`. `local`
turns a buffer of activations into the derivatives of the gates by the state, so that a step back starts with one
product of the two.

In float32 and float64, tanh(a) is taken as 2 sigmoid(2a) - 1, since ATen's sigmoid is several times faster than its
tanh. The factor in the argument is folded into the weights, once a call.

I input, H hidden, P the state that is fed back (H, or proj_size), b rows of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

States = tuple[Tensor, ...]
Steps = Sequence[Sequence[Tensor]]
"""Of several tensors, the rows of each step, in the order in which the steps run."""
Add = Callable[[Tensor, Tensor], Any]
tanh_backward = torch.ops.aten.tanh_backward
sigmoid_backward = torch.ops.aten.sigmoid_backward


class Weights(NamedTuple):
    """One direction of one layer, as `torch.nn` names and shapes them."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None


NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
"""The attributes that hold them, before `_l0`, `_l0_reverse` and so on."""


class Cell:
    """A cell over the weights of one direction, or of two that run as a batch of two; so many `rows` run at first."""

    gates: ClassVar[int]
    width: ClassVar[int]
    states: ClassVar[int] = 1
    tanh_gate: ClassVar[int | None]
    """The gate, in PyTorch's order, whose pre-activation goes through tanh."""
    keeps_buffer: ClassVar[bool] = True
    """Whether the derivative needs the buffer, or only the states."""

    def __init__(self, weights: tuple[Weights, ...], rows: int) -> None:
        w_hh = weights[0].w_hh
        self.weights = weights
        self.hidden = w_hh.size(0) // self.gates
        self.paired = len(weights) == 2
        # It takes one op more, which pays from about a thousand values a step.
        many = rows * len(weights) * self.hidden >= 1024
        self.fast_tanh = many and w_hh.dtype in (torch.float32, torch.float64)
        self.one, self.minus_one = w_hh.new_ones(()), w_hh.new_full((), -1)
        self.mm: Callable[..., Any] = torch.bmm if self.paired else torch.mm
        self.w_hr = None if weights[0].w_hr is None else self.joined(*(w.w_hr for w in weights if w.w_hr is not None))

    def joined(self, *tensors: Tensor) -> Tensor:
        return torch.stack(tensors) if self.paired else tensors[0]

    def scaled(self, weight: Tensor) -> Tensor:
        """A weight or bias with the rows of the tanh gate doubled, where tanh is taken through the sigmoid."""
        if self.tanh_gate is None or not self.fast_tanh:
            return weight
        weight = weight.clone(memory_format=torch.contiguous_format)
        weight.unflatten(0, (self.gates, self.hidden))[self.tanh_gate].mul_(2)
        return weight

    def ordered(self, weight: Tensor) -> Tensor:
        """A recurrent weight or bias with its gates in the buffer's order."""
        return weight

    def tanh_(self, a: Tensor) -> None:
        """tanh in place, of what `scaled` weights gave."""
        if self.fast_tanh:
            torch.add(self.minus_one, a.sigmoid_(), alpha=2, out=a)
        else:
            a.tanh_()

    @staticmethod
    def step(x: Tensor, state: States, w: Weights) -> States:
        """The next state, from `x = W_ih x_t + b_ih` and this one."""
        raise NotImplementedError

    def parts(self, buffer: Tensor) -> States:
        """What `run_` works on."""
        raise NotImplementedError

    def run_(self, parts: Steps, before: Steps, after: Steps, add_: Add) -> None:
        """From the input products in the buffer and the states before: the activations, and the states after.

        `add_` adds the recurrent product of its second argument to its first.
        """
        raise NotImplementedError

    def local(self, buffer: Tensor, before: States, after: States, out: Tensor) -> States:
        """First `out`, the derivative of each gate's recurrent product by the state; then what else is needed."""
        raise NotImplementedError

    def back_parts(self, local: States, buffer: Tensor, grads: Sequence[Tensor]) -> States:
        """What `run_back_` works on, besides the states' gradients."""
        raise NotImplementedError

    def run_back_(self, parts: Steps, grads: Steps, before: Steps, add_: Add) -> None:
        """From the states' gradients: the gates', in place, and the earlier states', added to `before`.

        `add_` adds what comes back through the recurrent product to its first argument.
        """
        raise NotImplementedError

    def input_gradient_(self, local: States, grads: Sequence[Tensor]) -> None:
        """Turn `local[0]`, the gradient of the recurrent product, into that of the input's, gate for gate."""


class GRU(Cell):
    """r, z = σ(W_i x + b_i + W_h h + b_h);  g = W_hn h + b_hn;  n = tanh(W_in x + b_in + r g);  h' = (1 - z) n + z h.

    Buffer: g, r, z, n.
    """

    gates, width, tanh_gate = 3, 4, 2

    def ordered(self, weight: Tensor) -> Tensor:
        return weight.roll(self.hidden, 0)

    @staticmethod
    def step(x: Tensor, state: States, w: Weights) -> States:
        (h,) = state
        x_r, x_z, x_n = x.chunk(3, -1)
        h_r, h_z, g = F.linear(h, w.w_hh, w.b_hh).chunk(3, -1)
        r = torch.sigmoid(x_r + h_r)
        z = torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * g)
        return (n + z * (h - n),)

    def parts(self, buffer: Tensor) -> States:
        H = self.hidden
        return buffer[..., : 3 * H], buffer[..., H : 3 * H], *buffer.split(H, -1)

    def run_(self, parts: Steps, before: Steps, after: Steps, add_: Add) -> None:
        for grz, rz, g, r, z, n, h, h_out in zip(*parts, *before, *after, strict=True):
            add_(grz, h)
            rz.sigmoid_()
            self.tanh_(n.addcmul_(r, g))
            torch.lerp(n, h, z, out=h_out)

    def local(self, buffer: Tensor, before: States, after: States, out: Tensor) -> States:
        g, r, z, n = buffer.split(self.hidden, -1)
        dr, dz, dg = out.split(self.hidden, -1)
        dn = tanh_backward(1 - z, n)
        torch.mul(dn, r, out=dg)
        gain = 0.5 if self.fast_tanh else 1.0  # g came from doubled weights
        sigmoid_backward((dn * g).mul_(gain), r, grad_input=dr)
        sigmoid_backward(before[0] - n, z, grad_input=dz)
        return out, dn

    def back_parts(self, local: States, buffer: Tensor, grads: Sequence[Tensor]) -> States:
        H = self.hidden
        return local[0], local[0].unflatten(-1, (3, H)), grads[0].unsqueeze(-2), buffer[..., 2 * H : 3 * H]

    def run_back_(self, parts: Steps, grads: Steps, before: Steps, add_: Add) -> None:
        for rzg, each, dh_for_each, z, dh, dh_before in zip(*parts, *grads, *before, strict=True):
            each.mul_(dh_for_each)
            add_(dh_before, rzg)
            dh_before.addcmul_(dh, z)

    def input_gradient_(self, local: States, grads: Sequence[Tensor]) -> None:
        rzg, dn = local
        torch.mul(dn, grads[0], out=rzg[..., 2 * self.hidden :])


class LSTM(Cell):
    """i, f, g, o = σ, σ, tanh, σ (W_i x + b_i + W_h h + b_h);  c' = f c + i g;  m = o tanh(c');  h' = m, or W_hr m.

    Buffer: i, f, g, o.
    """

    gates, width, states, tanh_gate = 4, 4, 2, 2

    @staticmethod
    def step(x: Tensor, state: States, w: Weights) -> States:
        h, c = state
        i, f, g, o = (x + F.linear(h, w.w_hh, w.b_hh)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        m = torch.sigmoid(o) * torch.tanh(c)
        return (m if w.w_hr is None else F.linear(m, w.w_hr)), c

    def parts(self, buffer: Tensor) -> States:
        return buffer, *buffer.split(self.hidden, -1)

    def run_(self, parts: Steps, before: Steps, after: Steps, add_: Add) -> None:
        for ifgo, i, f, g, o, h, c, h_out, c_out in zip(*parts, *before, *after, strict=True):
            add_(ifgo, h)
            if self.fast_tanh:
                ifgo.sigmoid_()
                torch.add(self.minus_one, g, alpha=2, out=g)
            else:
                i.sigmoid_(), f.sigmoid_(), g.tanh_(), o.sigmoid_()
            torch.mul(f, c, out=c_out).addcmul_(i, g)
            m = h_out if self.w_hr is None else torch.empty_like(c_out)
            self.tanh_of(c_out, m)
            m.mul_(o)
            if self.w_hr is not None:
                self.mm(m, self.w_hr.mT, out=h_out)

    def tanh_of(self, c: Tensor, out: Tensor) -> None:
        if self.fast_tanh:
            self.tanh_(torch.mul(c, 2, out=out))
        else:
            torch.tanh(c, out=out)

    def local(self, buffer: Tensor, before: States, after: States, out: Tensor) -> States:
        i, f, g, o = buffer.split(self.hidden, -1)
        di, df, dg, do = out.split(self.hidden, -1)
        t = torch.empty_like(after[1])
        self.tanh_of(after[1], t)
        sigmoid_backward(g, i, grad_input=di)
        sigmoid_backward(before[1], f, grad_input=df)
        tanh_backward(i, g, grad_input=dg)
        sigmoid_backward(t, o, grad_input=do)
        k = tanh_backward(o, t)
        return (out, k) if self.w_hr is None else (out, k, t.mul_(o))

    def back_parts(self, local: States, buffer: Tensor, grads: Sequence[Tensor]) -> States:
        H = self.hidden
        d, k = local[:2]
        ifg, o = d[..., : 3 * H].unflatten(-1, (3, H)), d[..., 3 * H :]
        return d, ifg, grads[1].unsqueeze(-2), o, k, buffer[..., H : 2 * H]

    def run_back_(self, parts: Steps, grads: Steps, before: Steps, add_: Add) -> None:
        for ifgo, ifg, dc_for_each, o, k, f, dh, dc, dh_before, dc_before in zip(*parts, *grads, *before, strict=True):
            dm = dh if self.w_hr is None else self.mm(dh, self.w_hr)
            dc.addcmul_(dm, k)
            ifg.mul_(dc_for_each)
            o.mul_(dm)
            add_(dh_before, ifgo)
            dc_before.addcmul_(dc, f)


class RNNTanh(Cell):
    """h' = tanh(W_i x + b_i + W_h h + b_h). Buffer: the argument."""

    gates, width, keeps_buffer = 1, 1, False
    tanh_gate: ClassVar[int | None] = 0

    @staticmethod
    def step(x: Tensor, state: States, w: Weights) -> States:
        return (torch.tanh(x + F.linear(state[0], w.w_hh, w.b_hh)),)

    def parts(self, buffer: Tensor) -> States:
        return (buffer,)

    def run_(self, parts: Steps, before: Steps, after: Steps, add_: Add) -> None:
        for a, h, h_out in zip(*parts, *before, *after, strict=True):
            add_(a, h)
            self.activate(a, h_out)

    def activate(self, a: Tensor, out: Tensor) -> None:
        if self.fast_tanh:
            torch.add(self.minus_one, a.sigmoid_(), alpha=2, out=out)
        else:
            torch.tanh(a, out=out)

    def local(self, buffer: Tensor, before: States, after: States, out: Tensor) -> States:
        return (torch.addcmul(self.one, after[0], after[0], value=-1, out=out),)

    def back_parts(self, local: States, buffer: Tensor, grads: Sequence[Tensor]) -> States:
        return local

    def run_back_(self, parts: Steps, grads: Steps, before: Steps, add_: Add) -> None:
        for d, dh, dh_before in zip(*parts, *grads, *before, strict=True):
            d.mul_(dh)
            add_(dh_before, d)


class RNNReLU(RNNTanh):
    """h' = max(0, W_i x + b_i + W_h h + b_h). Buffer: the argument."""

    tanh_gate = None

    @staticmethod
    def step(x: Tensor, state: States, w: Weights) -> States:
        return (torch.relu(x + F.linear(state[0], w.w_hh, w.b_hh)),)

    def activate(self, a: Tensor, out: Tensor) -> None:
        torch.clamp(a, min=0, out=out)

    def local(self, buffer: Tensor, before: States, after: States, out: Tensor) -> States:
        return (torch.sign(after[0], out=out),)  # of what is never negative


CELLS: dict[str, type[Cell]] = {"GRU": GRU, "LSTM": LSTM, "RNN_TANH": RNNTanh, "RNN_RELU": RNNReLU}
"""By `nn.RNNBase.mode`."""
