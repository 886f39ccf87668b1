"""The reference notebook's printed tables, digit for digit, from the layer and from the NumPy reproduction.

The notebook reads the ids [1, 2, 3] as one-hot rows of width 4, and the same padded to [1, 2, 3, 0], with a GRU of
hidden size 1. Its weights are lost. With zero recurrent weights, though, each id has one update gate z and one
candidate n, h' = (1 - z) n + z h, and the printed numbers determine them. Only the two columns without lengths are
used for that, and of the forward direction only the second.
"""

import numpy as np
import pytest
import torch
from dynamic_rnn import bidirectional_dynamic_rnn, classic_gru_cell, dynamic_rnn, gru_cell

from masked_rnn import MaskedGRU

IDS = np.array([1, 2, 3, 0])
"""0 is the padding: its row is [1, 0, 0, 0], not zeros."""
INPUTS = {"no padding": (3, None), "padded, no lengths": (4, None), "padded, lengths=[3]": (4, [3])}
"""The number of ids that are read, and the lengths given with them."""

# The columns are those of INPUTS; last is the forward direction's, then the backward direction's.
TABLES = {
    "TF, one direction": {
        "forward": (
            "0.01561858 0.19808015 -0.00724778",
            "0.01561858 0.19808015 -0.00724778 -0.21284180",
            "0.01561858 0.19808015 -0.00724778 0.00000000",
        ),
        "last": ("-0.00724778", "-0.21284180", "-0.00724778"),
    },
    "TF, bidirectional": {
        "forward": (
            "-0.01149251 0.09828447 -0.03214497",
            "-0.01149251 0.09828447 -0.03214497 -0.10564233",
            "-0.01149251 0.09828447 -0.03214497 0.00000000",
        ),
        "backward": (
            "0.16380599 0.04323800 0.04969781",
            "0.15307006 0.02596181 0.02305467 -0.03366997",
            "0.16380599 0.04323800 0.04969781 0.00000000",
        ),
        "last": ("-0.03214497 0.16380599", "-0.10564233 0.15307006", "-0.03214497 0.16380599"),
    },
    "PyTorch, one direction": {
        "forward": ("0.4626 0.6538 0.7014", "0.4626 0.6538 0.7014 0.7997", "0.4626 0.6538 0.7014 0.0000"),
        "last": ("0.7014", "0.7997", "0.7014"),
    },
    "PyTorch, bidirectional": {
        "forward": ("-0.5312 0.0176 0.2241", "-0.5312 0.0176 0.2241 -0.3388", "-0.5312 0.0176 0.2241 0.0000"),
        "backward": ("-0.4415 0.1163 0.0834", "-0.5033 -0.0370 -0.1416 -0.3100", "-0.4415 0.1163 0.0834 0.0000"),
        "last": ("0.2241 -0.4415", "-0.3388 -0.5033", "0.2241 -0.4415"),
    },
}

FREE_Z = 0.25
"""The update gate if the numbers do not determine it. It is so small that every candidate lies in (-1, 1)."""


def gates_of(table):
    """Returns z and n of the ids in the order of IDS, for each direction."""
    return [solve(numbers(table[d][0]), numbers(table[d][1]), d) for d in ("forward", "backward") if d in table]


def solve(unpadded, padded, direction):
    z = np.full(4, FREE_Z)
    if direction == "forward":
        before = np.append(0, padded[:-1])
    else:
        # This direction reads 0, 3, 2, 1 or 3, 2, 1. The padding's share of the state shrinks by z at each step.
        added = np.append(padded[:3] - unpadded, padded[3])
        z[:3] = added[:3] / added[1:]
        before = np.append(padded[1:], 0)
    n = (padded - z * before) / (1 - z)
    assert ((z > 0) & (z < 1) & (np.abs(n) < 1)).all()
    return z, n


def input_weights(z, n):
    """Returns W_iz and W_in, (1, 4). A one-hot row picks its id's column."""
    W_iz, W_in = np.zeros((2, 1, 4))
    W_iz[0, IDS] = np.log(z / (1 - z))
    W_in[0, IDS] = np.arctanh(n)
    return W_iz, W_in


def torch_weights(z, n):
    W_iz, W_in = input_weights(z, n)
    # W_ir reaches the state only through the recurrent weights, which are zero.
    return np.concatenate([np.zeros((1, 4)), W_iz, W_in]), np.zeros((3, 1)), np.zeros(3), np.zeros(3)


def run_layer(backend, gates, x, lengths):
    layer = MaskedGRU(4, 1, batch_first=True, bidirectional=len(gates) == 2, dtype=torch.float64, backend=backend)
    with torch.no_grad():
        for (z, n), suffix in zip(gates, ("", "_reverse"), strict=False):
            for name, weight in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), torch_weights(z, n), strict=True):
                getattr(layer, f"{name}_l0{suffix}").copy_(torch.from_numpy(weight))
        output, last = layer(torch.from_numpy(x), lengths=lengths)
    return output[0].T.numpy(), last[0].numpy()


def torch_form(z, n):
    return gru_cell(*torch_weights(z, n))


def classic_form(z, n):
    W_iz, W_in = input_weights(z, n)
    gate_kernel = np.zeros((5, 2))
    gate_kernel[:4, 1] = W_iz
    return classic_gru_cell(gate_kernel, np.zeros(2), np.append(W_in.T, [[0]], axis=0), np.zeros(1))


def run_numpy(form, gates, x, lengths):
    cells = [form(z, n) for z, n in gates]
    zero = (np.zeros((1, 1)),)
    if len(cells) == 1:
        outputs, states = ([result] for result in dynamic_rnn(*cells, x, lengths, zero))
    else:
        outputs, states = bidirectional_dynamic_rnn(*cells, x, lengths, zero, zero)
    return np.stack([output[0, :, 0] for output in outputs]), np.array([h[0, 0] for (h,) in states])


RUNS = {
    **{f"MaskedGRU, {b}": (run_layer, b) for b in ("packed", "padded", "bptt", "scan")},
    "NumPy, torch form": (run_numpy, torch_form),
    "NumPy, classic form": (run_numpy, classic_form),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("column", range(3), ids=INPUTS)
@pytest.mark.parametrize("system", TABLES)
def test_printed_table_is_reproduced(system, column, run):
    table = TABLES[system]
    steps, lengths = list(INPUTS.values())[column]
    x = np.eye(4)[IDS[:steps]][None]
    runner, how = run
    outputs, last = runner(how, gates_of(table), x, lengths)
    directions = [d for d in ("forward", "backward") if d in table]
    digits = len(table["last"][0].split()[0].split(".")[1])
    assert {d: printed(output, digits) for d, output in zip(directions, outputs, strict=True)} == {
        d: table[d][column] for d in directions
    }
    assert printed(last, digits) == table["last"][column]


def numbers(text):
    return np.array(text.split(), dtype=float)


def printed(values, digits):
    return " ".join(f"{v:.{digits}f}" for v in values)
