"""Counts how much Python an eager call runs. `python tests/test_python_calls.py` prints the figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.python_calls import Counts, count

import masked_rnn
from masked_rnn._backends.bptt import library

STEPS, BATCH = 100, 32
CALLS: dict[str, tuple[int, int, Any]] = {  # steps, batch, lengths
    "lengths": (STEPS, BATCH, [STEPS, *range(50, 50 + BATCH - 1)]),
    "one sequence": (STEPS, 1, None),
    "one step": (1, BATCH, None),
    "one step, lengths": (1, BATCH, [0] + [1] * (BATCH - 1)),
}


def counts_of(name: str, learns: bool) -> Counts:
    steps, batch, lengths = CALLS[name]
    layer, x = masked_rnn.MaskedGRU(64, 64), torch.randn(steps, batch, 64)
    with torch.set_grad_enabled(learns):
        layer(x, lengths=lengths)  # the first call fills caches
        return count(lambda: layer(x, lengths=lengths))


@pytest.mark.skipif(not library.runs(torch.float32), reason="without the native loops")
@pytest.mark.parametrize(
    ("name", "learns", "most"),
    [  # release 1.6.0 had 162, 103, 18, 70 and 181, 111, 18, 74 with lengths; 26 and 42 calls for one step
        ("lengths", False, 46),
        ("lengths", True, 50),
        ("one sequence", False, 40),
        ("one sequence", True, 44),
        ("one step", False, 40),
        ("one step, lengths", False, 46),
    ],
)
def test_eager_call_runs_little_python(name: str, learns: bool, most: int) -> None:
    """The limits allow a few more calls, for modules that other tests loaded into this process, and for older torch."""
    assert counts_of(name, learns).calls <= most


if __name__ == "__main__":
    for name in CALLS:
        for learns in (False, True):
            print(f"{name}, {'training' if learns else 'inference'}: {counts_of(name, learns)}")
