"""Hostile input at scale: random calls of every kind, each equal to the oracle or raising a documented error.

    python -m pytest tests/thorough.py --dist load

makes 20,000 calls that are right and 2,500 that are wrong, runs 4,000 more whose tensors end at a page that may not be
touched, and trains for 10,000 steps of varied shapes while it watches the memory (some minutes). This file is not part
of the suite, because pytest does not collect it by itself. MASKED_RNN_CALLS sets the number of right calls in each of
the ten tests.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import guarded
from support.oracle import BACKENDS, CELLS, INPUT, Run, call, cotangents, masked, oracle, random_states
from support.processes import run_each
from torch import Tensor

from masked_rnn._backends.bptt import library

CALLS = int(os.environ.get("MASKED_RNN_CALLS", "2000"))
COMMON: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
LOOPS = ["ops", "native"]


@pytest.fixture(scope="module", params=LOOPS)
def loops(request: pytest.FixtureRequest) -> Any:
    found = library.find()
    if request.param == "native" and isinstance(found, str):
        pytest.skip(found)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "ops":
            patch.setattr(library, "find", lambda: "not wanted here")
        yield request.param


def draw_layer(draw: st.DrawFn, cell: str) -> Any:
    options = {
        "num_layers": draw(st.integers(1, 3)),
        "bidirectional": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "flatten_hidden": draw(st.booleans()),
        "backend": draw(st.sampled_from(["auto", *BACKENDS])),
    }
    sizes = (INPUT, draw(st.sampled_from([3, 4, 17, 33])))
    layer = masked(cell, *sizes, **options).to(draw(st.sampled_from([torch.float64, torch.float32])))
    # Weights ten times as large make a layer chaotic, and inputs of 30 saturate it. Both are compared only in float64.
    scale = draw(st.sampled_from([1.0, 1e-3, 10.0] if layer.weight_ih_l0.dtype == torch.float64 else [1.0, 1e-3]))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(scale)
    return layer


@pytest.mark.parametrize("cell", CELLS)
def test_right_calls_match_oracle(cell: str, loops: str) -> None:
    @settings(max_examples=CALLS, **COMMON)
    @given(st.data(), st.integers(0, 2**32 - 1))
    def run(data: st.DataObject, seed: int) -> None:
        torch.manual_seed(seed)
        random = np.random.default_rng(seed)
        draw = data.draw
        layer = draw_layer(draw, cell)
        dtype = layer.weight_ih_l0.dtype
        batch, steps = draw(st.integers(0, 7)), draw(st.integers(0, 14))
        arguments: dict[str, Any] = {}
        mask = torch.ones(batch, steps, dtype=torch.bool)
        kind = draw(st.sampled_from(["lengths", "mask", "neither"] if steps else ["lengths", "mask"]))
        if kind == "lengths":
            lengths = torch.from_numpy(random.integers(0, steps + 1, batch))
            mask = torch.arange(steps) < lengths.view(-1, 1)
            as_given = draw(st.sampled_from([torch.as_tensor, list, np.array]))
            arguments["lengths"] = as_given(lengths.tolist()) if batch else lengths
        elif kind == "mask":
            mask = torch.from_numpy(random.random((batch, steps)) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0])))
            arguments["mask"] = mask
        resets = None
        if draw(st.booleans()):
            resets = torch.from_numpy(random.random((batch, steps)) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])))
            arguments["resets"] = resets
        scale = draw(st.sampled_from([1.0, 1e-6, 30.0] if dtype == torch.float64 else [1.0, 1e-6]))
        garbage = draw(st.sampled_from([0.0, torch.nan, torch.inf, -torch.inf, 1e30]))
        x = (scale * torch.randn(batch, steps, INPUT, dtype=torch.float64)).to(dtype)
        states = [h.to(dtype) for h in random_states(layer, batch)]
        with_hx = draw(st.booleans())
        first = states if with_hx else [torch.zeros_like(h) for h in states]
        pulled = [c.to(dtype) for c in cotangents(layer, batch, steps)]
        # The oracle has no results to join for an empty batch.
        expected = oracle(layer, x, mask, first, pulled, resets) if batch else None
        dirty = torch.where(mask.unsqueeze(-1), x, garbage)
        found = call(layer, dirty, states if with_hx else None, pulled, **arguments)
        assert found.output.dtype == dtype
        if expected is None:
            assert found.output.shape == pulled[0].shape
            return
        padded = found.output[~mask], found.gradients["x"][~mask]
        assert all(t.eq(0).all() for t in padded)
        try:
            assert_near(found, expected)
        except AssertionError:  # a chaotic layer, or a wrong value: the oracle on values a rounding away decides
            close = [t.double() * (1 + torch.finfo(dtype).eps * torch.randn_like(t.double())) for t in (x, *first)]
            assert_near(found, expected, oracle(layer, close[0], mask, close[1:], pulled, resets))

    run()


def assert_near(found: Run, expected: Run, close: Run | None = None) -> None:
    """Compares relative to each tensor's largest element. There is a floor, because a saturated gate's gradient has
    lost its digits in torch too. `close` is the result for input and states a rounding away: 300 times its distance is
    allowed as well. test_scale.py tests small values. Values that overflow only in float32 are not compared."""
    tolerance, floor = (1e-10, 1e-13) if found.output.dtype == torch.float64 else (2e-4, 2e-9)
    runs = (tensors(run, found.gradients) for run in (found, expected, close or expected))
    for own, truth, near in zip(*runs, strict=True):
        assert not own.isnan().any()
        largest = truth.abs().max().item() if truth.numel() else 0.0
        if largest < 1e30:
            spread = (near - truth).abs().max().item() if truth.numel() else 0.0
            atol = max(tolerance * largest, floor, 300 * spread)
            torch.testing.assert_close(own.double(), truth, rtol=0, atol=atol)


def tensors(run: Run, names: Iterable[str]) -> list[Tensor]:
    return [run.output, *run.states, *(run.gradients[name] for name in names)]


WRONG: list[Any] = [
    lambda x: {"lengths": [x.size(1) + 1] * x.size(0)},
    lambda x: {"lengths": [-1] * x.size(0)},
    lambda x: {"lengths": [1] * (x.size(0) + 1)},
    lambda x: {"lengths": [0.5] * x.size(0)},
    lambda x: {"lengths": [True] * x.size(0)},
    lambda x: {"lengths": "abc"},
    lambda x: {"lengths": [None] * x.size(0)},
    lambda x: {"lengths": torch.ones(x.size(0), 2, dtype=torch.int64)},
    lambda x: {"lengths": object()},
    lambda x: {"mask": torch.ones(x.size(0), x.size(1) + 1, dtype=torch.bool)},
    lambda x: {"mask": torch.ones(x.size(0), x.size(1))},
    lambda x: {"mask": [[True]]},
    lambda x: {"resets": torch.ones(x.size(0), x.size(1) + 1, dtype=torch.bool)},
    lambda x: {"resets": torch.ones(x.size(0), x.size(1), dtype=torch.int64)},
    lambda x: {"resets": np.ones((x.size(0), x.size(1)), bool)},
    lambda x: {"lengths": [1] * x.size(0), "mask": torch.ones(x.size(0), x.size(1), dtype=torch.bool)},
    lambda x: {"hx": [1] * x.size(0)},
    lambda x: {"hx": torch.ones(x.size(0), dtype=torch.int64)},
    lambda x: {"hx": torch.ones(7, 7, 7)},
    lambda x: {"hx": "state"},
    lambda x: {"input": x.unsqueeze(0)},
    lambda x: {"input": x.long()},
    lambda x: {"input": x[..., :-1]},
    lambda x: {"input": x.tolist()},
    lambda x: {"input": None},
]


@pytest.mark.parametrize("cell", CELLS)
def test_wrong_calls_raise_documented_errors(cell: str) -> None:
    @settings(max_examples=max(1, CALLS // 4), **COMMON)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        layer = draw_layer(data.draw, cell)
        layer.batch_first = True
        x = torch.randn(
            data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6)), INPUT, dtype=layer.weight_ih_l0.dtype
        )
        wrong = data.draw(st.sampled_from(WRONG))(x)
        with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
            layer(wrong.pop("input", x), **wrong)
        assert len(str(error.value)) > 20

    run()


@pytest.mark.parametrize("part", range(8))
def test_memory_beside_tensors_is_not_touched(part: int) -> None:
    cases = guarded.random_cases(CALLS // 4, seed=1 + part)
    faults = run_each(guarded.check_case, cases)
    assert not faults, {k: (cases[k], fault) for k, fault in faults.items()}


@pytest.mark.parametrize("loops", LOOPS)
def test_memory_stays_flat(loops: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains with varied shapes, forms and options: the peak of the first 6,000 steps must hold for 4,000 more."""
    pytest.importorskip("resource", reason="Windows does not tell")
    if loops == "ops":
        monkeypatch.setenv(library.VARIABLE, "none")
    # oneDNN caches a kernel for each of the last 1,024 shapes, for nn.LSTM too: some 100 MB.
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1")
    torch.multiprocessing.spawn(train_for_long, (str(tmp_path / "peaks"),))
    peaks = json.loads((tmp_path / "peaks").read_text())
    assert peaks[-1] <= 1.02 * peaks[2], peaks


def train_for_long(_: int, path: str) -> None:
    import resource

    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    layers = [masked(cell, 8, 32, bidirectional=k % 2 == 0, batch_first=True) for k, cell in enumerate(CELLS)]
    optimizer = torch.optim.SGD([p for layer in layers for p in layer.parameters()], lr=1e-3)
    peaks = []
    for step in range(10_000):
        batch, steps = (64, 128) if step < len(layers) else random.integers(1, [65, 129])
        marks = torch.from_numpy(random.random((batch, steps)) < 0.9)
        lengths = random.integers(0, steps + 1, batch)
        given: Any = [{"lengths": lengths}, {"mask": marks}, {"lengths": lengths, "resets": ~marks}, {}][step % 4]
        output, _ = layers[step % len(layers)](torch.randn(batch, steps, 8), **given)
        optimizer.zero_grad(set_to_none=step % 3 == 0)
        (output**2).sum().backward()
        optimizer.step()
        if step % 2_000 == 1_999:
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    Path(path).write_text(json.dumps(peaks))


def test_comparison_notices_state_through_padding() -> None:
    """Checks that the comparison notices a state that runs through padding."""
    layer = masked("gru", batch_first=True).double()
    x, mask = torch.randn(2, 4, INPUT, dtype=torch.float64), torch.tensor([[1, 1, 0, 0], [1] * 4]).bool()
    states, pulled = random_states(layer, 2), cotangents(layer, 2, 4)
    expected = oracle(layer, x, mask, states, pulled)
    with pytest.raises(AssertionError):
        assert_near(call(layer, x, states, pulled), expected)
