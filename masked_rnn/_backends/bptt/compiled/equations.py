"""One step of each cell and its derivative, number by number: what `..cells` does with tensors, in one pass."""

from __future__ import annotations

from .simd import Vector, elementwise, sigmoid, tanh


def gru(g: Vector, r: Vector, z: Vector, n: Vector, h: Vector) -> tuple[Vector, ...]:
    r, z = sigmoid(r), sigmoid(z)
    n = tanh(n + r * g)
    return r, z, n, n + z * (h - n)


def gru_back(g: Vector, r: Vector, z: Vector, n: Vector, h: Vector, d: Vector) -> tuple[Vector, ...]:
    """The gradients of g and of r's, z's and n's arguments; and what h gets of d without a product."""
    dn = d * (1.0 - z) * (1.0 - n * n)
    dz = d * (h - n) * z * (1.0 - z)
    return dn * r, dn * g * r * (1.0 - r), dz, dn, d * z


def lstm(i: Vector, f: Vector, g: Vector, o: Vector, c: Vector) -> tuple[Vector, ...]:
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    c = f * c + i * g
    return i, f, g, o, c, o * tanh(c)


def lstm_back(
    i: Vector, f: Vector, g: Vector, o: Vector, c: Vector, c_after: Vector, dm: Vector, dc: Vector
) -> tuple[Vector, ...]:
    """The gradients of the gates' arguments and of c; and m = o tanh(c_after) itself."""
    t = tanh(c_after)
    dc = dc + dm * o * (1.0 - t * t)
    di, df, dg = dc * g * i * (1.0 - i), dc * c * f * (1.0 - f), dc * i * (1.0 - g * g)
    return di, df, dg, dm * t * o * (1.0 - o), dc * f, o * t


def rnn_tanh(a: Vector) -> tuple[Vector]:
    return (tanh(a),)


def rnn_tanh_back(h: Vector, d: Vector) -> tuple[Vector]:
    return (d * (1.0 - h * h),)


def rnn_relu(a: Vector) -> tuple[Vector]:
    return (a.at_most(0.0, 0.0, a),)


def rnn_relu_back(h: Vector, d: Vector) -> tuple[Vector]:
    return (h.at_most(0.0, 0.0, d),)  # of NaN it is d, as PyTorch's


run_gru, run_gru_back = elementwise(gru, 5), elementwise(gru_back, 6)
run_lstm, run_lstm_back = elementwise(lstm, 5), elementwise(lstm_back, 8)
run_rnn_tanh, run_rnn_tanh_back = elementwise(rnn_tanh, 1), elementwise(rnn_tanh_back, 2)
run_rnn_relu, run_rnn_relu_back = elementwise(rnn_relu, 1), elementwise(rnn_relu_back, 2)
copy = elementwise(lambda x: (x,), 1)
add = elementwise(lambda x, y: (x + y,), 2)
