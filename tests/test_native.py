"""The native loops match the loops of PyTorch's ops, for every cell, kind of CPU, size, direction and dtype."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from support.native_loops import (
    assert_close,
    assert_equal,
    found,
    levels,
    make,
    needs_native,
    play_avx512,
    train,
    use_loops_of_ops,
    use_own_threads,
)
from support.oracle import ONE_STATE_AND_TWO, as_tuple, digest, masked, random_states
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from masked_rnn._backends.bptt import library, native, ops_layer

DTYPES = (torch.float32, torch.float64)


@pytest.fixture(params=levels())
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any) -> str:
    """Runs the loops of each kind of CPU in turn."""
    if request.param == "avx512 played":
        chosen = play_avx512(tmp_path_factory.getbasetemp())
    else:
        assert isinstance(found, library.Library)
        chosen = found._replace(level=library.LEVELS.index(request.param))
    monkeypatch.setattr(library, "find", lambda: chosen)
    return str(request.param)


_theirs: dict[bytes, list[Tensor | None]] = {}
"""The results of the loops of PyTorch's ops, which are the same for every kind of CPU."""


def compare(layer: Any, x: Any, **given: Any) -> None:
    batch = x.size(0) if isinstance(x, Tensor) else int(x.batch_sizes[0])
    states = random_states(layer, batch, layer.weight_ih_l0.dtype)
    ours = train(layer, x, states, **given)
    data, *order = (x,) if isinstance(x, Tensor) else (t for t in x if t is not None)
    key = digest((layer, layer.mode, given), [data, *order, *states, *layer.parameters()])
    if key not in _theirs:
        with pytest.MonkeyPatch.context() as patch:
            use_loops_of_ops(patch)
            _theirs[key] = train(layer, x, states, **given)
    assert_close(ours, _theirs[key])


# (N, T, input size, hidden size)
SHAPES = {
    "one row": (1, 50, 5, 16),
    "one row, several panels": (1, 30, 7, 65),
    "one step": (6, 1, 5, 16),
    "one number": (1, 1, 1, 2),
    "no whole register": (5, 9, 3, 7),
    "one input": (4, 6, 1, 9),
    "many rows": (70, 12, 9, 33),
    "blocks of sequences": (150, 5, 2, 6),
    "several tiles": (9, 10, 40, 70),
    "more columns than are packed at once": (3, 5, 4, 100),
    "columns packed thrice": (2, 4, 101, 200),
    "more rows than a gradient's product takes at once": (3, 400, 3, 17),
    # Few rows are multiplied with weights that are not packed:
    "few rows, few columns": (2, 1, 1, 3),
    "few rows, no whole register": (2, 1, 5, 7),
    "few rows, parts of registers": (1, 2, 70, 53),
    "few rows, several at once": (7, 1, 130, 200),
    "few rows in all": (3, 4, 257, 300),
}


@pytest.mark.slow_but_each(2)
@needs_native
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bidirectional", "dtype"), [(False, torch.float32), (True, torch.float64)])
@pytest.mark.usefixtures("level")
def test_native_loops_match_loops_of_ops(cell: str, bidirectional: bool, shape: str, dtype: torch.dtype) -> None:
    N, T, inputs, hidden = SHAPES[shape]
    x = torch.randn(N, T, inputs, dtype=dtype, requires_grad=True)
    bias = bidirectional ^ (list(SHAPES).index(shape) % 2 == 0)  # each dtype with and without it
    layer = make(cell, inputs, hidden, bidirectional=bidirectional, bias=bias).to(dtype)
    compare(layer, x, lengths=[*torch.randint(0, T + 1, (N - 1,)).tolist(), T])


EDGES = (*range(1, 18), 31, 32, 33, 63, 64, 65)


@pytest.mark.slow_but_each(2)
@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("level")
def test_sizes_at_tile_edges_match_loops_of_ops(cell: str, dtype: torch.dtype) -> None:
    """Covers each size as hidden size, as input size, as the number of sequences, and as projection size."""
    for k, hidden in enumerate(EDGES):
        if cell == "lstm-proj" and hidden == 1:
            continue
        N, inputs, fed_back = EDGES[k - 7], EDGES[k - 13], EDGES[k - 2]
        layer = make(cell, inputs, hidden, min(fed_back, max(1, hidden - 1)), bidirectional=k % 2 == 0).to(dtype)
        x = torch.randn(N, 3, inputs, dtype=dtype, requires_grad=True)
        compare(layer, x, lengths=[3, *torch.randint(0, 4, (N - 1,)).tolist()])


@pytest.mark.slow_but_each(2)
@needs_native
@pytest.mark.parametrize(("hidden", "fed_back"), [(2, 1), (9, 8), (33, 1), (40, 39), (150, 99)])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.usefixtures("level")
def test_projections_match_loops_of_ops(hidden: int, fed_back: int, bidirectional: bool) -> None:
    for dtype in DTYPES:
        layer = make("lstm-proj", 3, hidden, fed_back, bidirectional=bidirectional).to(dtype)
        for lengths in ([6, 1, 0, 4, 6], [1, 0, 1]):
            x = torch.randn(len(lengths), max(lengths), 3, dtype=dtype, requires_grad=True)
            compare(layer, x, lengths=lengths)


LENGTHS = {
    "all": [7] * 11,
    "all empty but one": [0] * 6 + [5] + [0] * 4,
    "one long": [1] * 4 + [7] + [1] * 6,
    "falling": [7, 7, 6, 5, 4, 4, 4, 3, 2, 1, 0],
    "of one step": [1] * 11,
    "rising": [0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7],
}


@pytest.mark.slow_but_each(2)
@needs_native
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("given", [*LENGTHS, "mask", "resets", "packed", "packed, sorted"])
@pytest.mark.usefixtures("level")
def test_lengths_and_order_match_loops_of_ops(cell: str, given: str, bidirectional: bool) -> None:
    layer = make(cell, 5, 6, bidirectional=bidirectional)
    x: Any = torch.randn(11, 7, 5, requires_grad=True)
    if given in LENGTHS:
        more: dict[str, Any] = {"lengths": LENGTHS[given]}
    elif given.startswith("packed"):
        lengths, more = [7, 6, 6, 6, 5, 4, 3, 2, 2, 1, 1], {}
        order = list(range(11)) if "sorted" in given else torch.randperm(11).tolist()
        x = pack_padded_sequence(
            x.detach(), torch.tensor(lengths)[order], batch_first=True, enforce_sorted="sorted" in given
        )
        x = x._replace(data=x.data.requires_grad_())
    else:
        more = {given: torch.rand(11, 7) < (0.3 if given == "resets" else 0.6)}
    compare(layer, x, **more)


@pytest.mark.slow_but_each(2)
@needs_native
@pytest.mark.parametrize("wanted", ["input", "weights", "states alone"])
@pytest.mark.parametrize("pulls", ["output", "last", "output and last"])
@pytest.mark.usefixtures("level")
def test_partial_gradients_match_loops_of_ops(cell: str, wanted: str, pulls: str) -> None:
    for bidirectional in (False, True):
        layer = make(cell, 5, 18, bidirectional=bidirectional).requires_grad_(wanted == "weights")
        x = torch.randn(9, 7, 5, requires_grad=wanted == "input")
        compare(layer, x, pulls=pulls, lengths=[7, 0, 3, 7, 1, 2, 6, 5, 4])


@needs_native
def test_native_loops_run(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the loops of ops ran")

    ran = []
    for name in ("forward", "backward"):
        monkeypatch.setattr(ops_layer, name, fail)
    call = library.call
    monkeypatch.setattr(native.library, "call", lambda name, numbers: ran.append(name) or call(name, numbers))
    layer = make(cell, 4, 6)
    train(layer, torch.randn(3, 5, 4), random_states(layer, 3, torch.float32), lengths=[5, 0, 2])
    assert ran == ["forward", "backward", "forward"]
    assert library.runs(torch.float32)
    assert not library.runs(torch.bfloat16)


@pytest.mark.slow_but_each(2)
@needs_native
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("own", [False, True], ids=["openmp", "own_threads"])
@pytest.mark.parametrize("batch", [1, 21, 140])
@pytest.mark.parametrize("cell", ONE_STATE_AND_TWO)
def test_threads_share_work_reproducibly(
    cell: str, bidirectional: bool, own: bool, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads share the work, and the same run gives the same bits."""
    if own:
        use_own_threads(monkeypatch)
    layer = make(cell, 10, 20, bidirectional=bidirectional)
    x, states = torch.randn(batch, 9, 10, requires_grad=True), random_states(layer, batch, torch.float32)
    lengths = [9, *torch.randint(0, 10, (batch - 1,)).tolist()]
    one = train(layer, x, states, lengths=lengths)
    assert_equal(train(layer, x, states, lengths=lengths), one)
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            several = train(layer, x, states, lengths=lengths)
            assert_equal(train(layer, x, states, lengths=lengths), several)
            assert_close(several, one)
    finally:
        torch.set_num_threads(1)


@pytest.mark.slow_but_each(2)
@needs_native
@pytest.mark.parametrize(
    "shape", [(6, 6, 40, 130), (6, 52, 1000, 130)], ids=["few rows", "more rows than a product takes"]
)
def test_threads_share_large_gradients(cell: str, shape: tuple[int, ...]) -> None:
    """Weights that are larger than all rows: each number of their gradients is written once, by one thread."""
    N, T, inputs, hidden = shape
    layer = make(cell, inputs, hidden, bidirectional=T < 10).double()
    x = torch.randn(N, T, inputs, dtype=torch.float64) / 10
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            compare(layer, x, lengths=[T, T - 1, T, 1, T, T])
    finally:
        torch.set_num_threads(1)


@needs_native
@pytest.mark.parametrize("own", [False, True], ids=["openmp", "own_threads"])
def test_concurrent_python_threads_give_same_results(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if own:
        use_own_threads(monkeypatch)
    lengths = [20, 3, 0, 7, 20, 1, 9, 12, 5]
    work = [(make("gru", 8, 16), torch.randn(9, 20, 8, requires_grad=True), torch.randn(1, 9, 16)) for _ in range(8)]
    results: list[Any] = [None] * len(work)

    def run(k: int) -> list[Tensor | None]:
        layer, x, h = work[k]
        return train(layer, x, (h,), lengths=lengths)

    def run_often(k: int) -> None:
        torch.set_num_threads(2)
        results[k] = [run(k) for _ in range(20)]

    expected = [run(k) for k in range(len(work))]
    threads = [threading.Thread(target=run_often, args=(k,)) for k in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(1)
    for once, many in zip(expected, results, strict=True):
        for each in many:
            assert_close(each, once)


@pytest.mark.slow_but_each(2)
@needs_native
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("level")
def test_nan_and_inf_come_out_as_from_torch(cell: str, value: float, dtype: torch.dtype) -> None:
    layer = make(cell, 5, 18).to(dtype)
    x = torch.randn(2, 6, 5, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        x[1, 3, 2] = value
    states = random_states(layer, 2, dtype)
    ours = train(layer, x, states, lengths=[6, 5])
    layer.backend = "packed"
    for a, b in zip(ours, train(layer, x, states, lengths=[6, 5]), strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a.isnan(), b.isnan())
        torch.testing.assert_close(a.nan_to_num(), b.nan_to_num(), rtol=1e-4, atol=1e-4)


def test_negated_and_expanded_views_match_loops_of_ops(cell: str) -> None:
    """Covers negated and expanded views of the input and of the gradient."""
    layer = masked(cell, 5, 6, backend="bptt")
    base = torch.randn(7, 3, 5, dtype=torch.complex64)
    inputs = [base.conj().imag, base.real, torch.randn(1, 1, 5).expand(7, 3, 5)]
    ones: list[list[Tensor]] = []
    one = masked(cell, 1, 3 if cell == "lstm-proj" else 1, backend="bptt")
    # It is contiguous, but its memory holds the number with the other sign.
    negated = base[:1, :1, :1].conj().imag
    width = one(negated)[0].size(-1)
    assert negated.is_neg()
    assert negated.is_contiguous()
    pulled_one = negated if width == 1 else negated.expand(1, 1, width)
    x_one, pull = negated.resolve_neg(), pulled_one.resolve_neg()
    for x, d_output in ((x_one, pull), (negated, pull), (x_one, pulled_one)):
        one.zero_grad()
        output, _ = one(x)
        output.backward(d_output)
        ones.append([output.detach(), *(p.grad.clone() for p in one.parameters())])
    for expected, in_x, in_gradient in zip(*ones, strict=True):
        torch.testing.assert_close(in_x, expected)
        torch.testing.assert_close(in_gradient, expected)

    def results() -> list[Tensor]:
        found = []
        for x in inputs:
            layer.zero_grad()
            output, last = layer(x, lengths=[7, 2, 4])
            pulled = torch.view_as_complex(torch.ones(7, 3, output.size(-1), 2)).conj().imag
            assert pulled.is_neg()
            state = as_tuple(last)[0]
            torch.autograd.backward((output, state), (pulled, torch.ones(1).expand_as(state)))
            found += [output.detach(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]
        return found

    ours = results()
    with pytest.MonkeyPatch.context() as patch:
        use_loops_of_ops(patch)
        theirs = results()
    assert_close(ours, theirs)


def test_saved_tensors_may_return_in_other_layout(cell: str) -> None:
    layer, x = make(cell, 5, 6, bidirectional=True), torch.randn(3, 7, 5, requires_grad=True)
    states = random_states(layer, 3, torch.float32)
    expected = train(layer, x, states, lengths=[7, 2, 4])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.mT.contiguous().mT if t.dim() > 1 else t):
        assert_close(train(layer, x, states, lengths=[7, 2, 4]), expected)


@needs_native
def test_weights_in_other_layout_run_natively(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parametrization or a hook may give such weights."""
    layer, x = make(cell, 5, 6, bidirectional=True), torch.randn(3, 7, 5, requires_grad=True)
    for name, weight in list(layer.named_parameters()):
        if weight.dim() == 2:
            setattr(layer, name, torch.nn.Parameter(weight.detach().t().contiguous().t()))
    states = random_states(layer, 3, torch.float32)
    compare(layer, x, lengths=[7, 2, 4])
    ran = []
    call = library.call
    monkeypatch.setattr(library, "call", lambda name, numbers: ran.append(name) or call(name, numbers))
    train(layer, x, states, lengths=[7, 2, 4])
    assert ran == ["forward", "backward", "forward"]


@needs_native
@pytest.mark.usefixtures("level")
def test_results_hold_with_denormals_flushed(cell: str) -> None:
    """Comparisons of numbers close to 0 mean something else if denormals are flushed."""
    layer, x = make(cell, 5, 20), torch.randn(3, 7, 5, requires_grad=True)
    states = random_states(layer, 3, torch.float32)
    expected = train(layer, x, states, lengths=[7, 2, 4])
    if torch.set_flush_denormal(True):  # False if this CPU can only compute with denormals
        try:
            assert_close(train(layer, x, states, lengths=[7, 2, 4]), expected)
        finally:
            torch.set_flush_denormal(False)


@cache
def arguments_and_truth(name: str, dtype: torch.dtype) -> tuple[Tensor, np.ndarray[Any, Any]]:
    """Returns numbers of every size, and the function's values there, rounded once."""
    generator = torch.Generator().manual_seed(3)
    least = -45 if dtype == torch.float32 else -323
    scales = 10.0 ** torch.arange(least, 3, dtype=torch.float64)
    sizes = scales * (1 + 9 * torch.rand(20, 1, generator=generator, dtype=torch.float64))
    usual = 25 * torch.rand(4000, generator=generator, dtype=torch.float64)
    a = torch.cat([sizes.flatten(), usual, torch.zeros(1)])
    a = torch.cat([a, -a]).to(dtype)
    with mpmath.workprec(200):
        functions = {"tanh": mpmath.tanh, "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x))}
        truth = [functions[name](mpmath.mpf(x)) for x in a.tolist()]
        rounded = np.array([float(y) for y in truth], np.float64)
    return a, rounded


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
@pytest.mark.usefixtures("level")
def test_activations_are_right_to_two_ulps(name: str, dtype: torch.dtype) -> None:
    """Uses the LSTM's g gate alone: c' = σ(∞) tanh(a) + σ(-∞) c; or its o gate: h' = σ(a) tanh(c') for a large c'."""
    a, truth = arguments_and_truth(name, dtype)
    layer = masked("lstm", 1, 1, backend="bptt", flatten_hidden=False).to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.weight_ih_l0[3 if name == "sigmoid" else 2] = 1
        # The biases of i, f, g, o.
        layer.bias_ih_l0.copy_(torch.tensor([0.0, 2000, 0, 0] if name == "sigmoid" else [2000.0, -2000, 0, 0]))
        c = torch.full((1, len(a), 1), 100.0, dtype=dtype)
        h, c = layer(a.view(1, -1, 1), (torch.zeros_like(c), c))[1]
    ours = (h if name == "sigmoid" else c).flatten().double().numpy()
    limits = np.finfo(np.float32 if dtype == torch.float32 else np.float64)
    errors = np.abs(ours - truth) / np.maximum(np.abs(truth) * float(limits.eps), float(limits.smallest_subnormal))
    worst = errors.argmax()
    assert errors[worst] <= 2, f"{errors[worst]} units at {a[worst]}"


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("level")
def test_zero_comes_out_with_torchs_sign(dtype: torch.dtype) -> None:
    least = torch.finfo(dtype).smallest_normal
    layer = make("rnn-tanh", 1, 19).to(dtype)
    theirs = torch.nn.RNN(1, 19, batch_first=True).to(dtype)
    with torch.no_grad():
        for p in (*layer.parameters(), *theirs.parameters()):
            p.zero_()
        for p in (layer.weight_ih_l0, theirs.weight_ih_l0):
            p.fill_(1)
        x = torch.tensor([0.0, least, -least, 1, -1], dtype=dtype).view(-1, 1, 1)
        assert layer(x)[0].signbit().equal(theirs(x)[0].signbit())


@needs_native
@pytest.mark.slow
def test_more_rows_than_2_to_29_run() -> None:
    steps, batch = 5, (1 << 29) // 5 + 1
    layer, x = masked("rnn-tanh", 1, 1, backend="bptt"), torch.rand(steps, batch, 1)
    expected = masked("rnn-tanh", 1, 1, backend="packed")
    expected.load_state_dict(layer.state_dict())
    with torch.no_grad():
        output, last = layer(x)
        for part in (slice(0, 100), slice(batch - 100, batch)):
            own, own_last = expected(x[:, part])
            torch.testing.assert_close(output[:, part], own)
            torch.testing.assert_close(last[part], own_last)
