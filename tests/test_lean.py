"""Ordinary calls go the lean way in, and give the results of any other way. Most calls here have few steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.oracle import INPUT, as_hx, as_tuple, masked, plain, random_states
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from masked_rnn import _dispatch
from masked_rnn._backends.bptt import library, native
from masked_rnn._lean import run_lean
from masked_rnn._memory import NotPlainError
from masked_rnn._probe import lstm_kernel_runs

N = 4
NATIVE = library.runs(torch.float32)
FEW = "bptt" if NATIVE else "padded"
"""The backend that runs few steps"""
SOME = torch.tensor([1, 0, 1, 1])
GIVEN: dict[str, tuple[int, dict[str, Any]]] = {
    "one step": (1, {}),
    "few steps": (4, {}),
    "all real": (1, {"lengths": [1] * N}),
    "lengths": (1, {"lengths": SOME}),
    "none real": (1, {"lengths": [0] * N}),
    "mask": (1, {"mask": SOME.bool()}),
    "resets": (1, {"resets": torch.tensor([True, False, False, True])}),
    "resets and lengths": (1, {"resets": torch.tensor([True, True, False, True]), "lengths": SOME}),
    "resets and mask": (1, {"resets": torch.tensor([True, True, False, True]), "mask": SOME.bool()}),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"batch_first": True, "flatten_hidden": False},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"num_layers": 2, "bias": False, "bidirectional": True, "flatten_hidden": False},
]


def laid(layer: Any, x: Tensor, given: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Brings x (N, T, I) and marks (N,) of one step into the layer's layout."""
    given = {name: value if name == "lengths" else value.unsqueeze(1) for name, value in given.items()}
    if layer.batch_first:
        return x, given
    return x.transpose(0, 1), {name: value if name == "lengths" else value.t() for name, value in given.items()}


def results_and_gradients(layer: Any, x: Tensor, states: tuple[Tensor, ...] | None, given: Any) -> list[Tensor]:
    x, initial = x.clone().requires_grad_(), [h.clone().requires_grad_() for h in states or ()]
    laid_x, laid_given = laid(layer, x, given)
    output, last = layer(laid_x, as_hx(initial) if initial else None, **laid_given)
    results = [output, *as_tuple(last)]
    total = sum((t * torch.linspace(1, 2, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in results)
    assert isinstance(total, Tensor)
    inputs = [x, *initial, *layer.parameters()]
    return [*results, *torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)]


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("has_state", [False, True])
def test_few_steps_match_scan(cell: str, given: str, options: dict[str, Any], has_state: bool, ran: list[str]) -> None:
    """Other tests compare `scan` with the oracle. Rows without a step hold NaN in the input, and in the state too."""
    steps, more = GIVEN[given]
    layer = masked(cell, **options).double()
    x = torch.randn(N, steps, INPUT, dtype=torch.float64)
    states = random_states(layer, N) if has_state else None
    if "lengths" in more or "mask" in more:
        idle = ~torch.as_tensor(more.get("lengths", more.get("mask"))).bool()
        x[idle] = torch.nan
        for h in states or ():
            h[:, idle] = torch.nan
    found = results_and_gradients(layer, x, states, more)
    kernel_ran = cell.startswith("rnn") and given in ("one step", "all real", "resets")
    assert ran == ["bptt" if given == "none real" else "padded" if kernel_ran else FEW]
    layer.backend = "scan"
    expected = results_and_gradients(layer, x, states, more)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert all(bool(gradient.isfinite().all()) for gradient in found[-len(list(layer.parameters())) :])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_few_steps_equal_torchs(cell: str, options: dict[str, Any], ran: list[str]) -> None:
    ours = masked(cell, **{**options, "flatten_hidden": False})
    theirs = plain(cell, **{name: value for name, value in options.items() if name != "flatten_hidden"})
    theirs.load_state_dict(ours.state_dict())
    x, states = torch.randn(N, 3, INPUT), random_states(ours, N, torch.float32)
    for a, b in zip(*(results_and_gradients(layer, x, states, {}) for layer in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)
    assert ran == [FEW]


def test_flattened_hx_is_fed_back_step_by_step(cell: str, ran: list[str]) -> None:
    layer = masked(cell, num_layers=2)
    x = torch.randn(3, N, INPUT)
    whole, last = layer(x)
    state = None
    for step, expected in zip(x.split(1), whole.split(1), strict=True):
        output, state = layer(step, state)
        torch.testing.assert_close(output, expected)
    for a, b in zip(as_tuple(state), as_tuple(last), strict=True):
        torch.testing.assert_close(a, b)
    assert ran == [FEW, *["padded" if cell.startswith("rnn") else FEW] * 3]


def test_dropout_is_drawn_like_torchs(cell: str, ran: list[str]) -> None:
    ours = masked(cell, num_layers=2, dropout=0.5, flatten_hidden=False)
    theirs = plain(cell, num_layers=2, dropout=0.5)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, N, INPUT)
    outputs = []
    for training in (True, False):
        for layer in (ours.train(training), theirs.train(training)):
            torch.manual_seed(5)
            outputs.append(layer(x)[0])
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[2], outputs[3])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)
    assert ran == [FEW] * 2


class Subclass(Tensor):
    pass


X = torch.randn(2, N, INPUT)
LONG = torch.tensor([2, 1, 0, 2])
WAYS: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "steps": (X, {}, True),
    "many steps": (torch.randn(40, N, INPUT), {}, True),
    "a list": (X, {"lengths": [2, 1, 0, 2]}, True),
    "a tuple": (X, {"lengths": (2, 1, 0, 2)}, True),
    "all real": (X, {"lengths": [2] * N}, True),
    "a tensor": (X, {"lengths": LONG}, True),
    "one step with resets": (X[:1], {"resets": SOME.bool().view(1, N)}, True),
    "other strides": (X.transpose(0, 2).contiguous().transpose(0, 2), {}, True),
    "an array": (X, {"lengths": LONG.numpy()}, False),
    "int32": (X, {"lengths": LONG.int()}, False),
    "other strides of lengths": (X, {"lengths": torch.stack([LONG, LONG], 1)[:, 0]}, False),
    "a list of tensors": (X, {"lengths": list(LONG)}, False),
    "no real step": (X, {"lengths": [0] * N}, False),
    "a mask": (X, {"mask": torch.rand(2, N) < 2}, False),
    "resets": (X, {"resets": torch.rand(2, N) < 2}, False),
    "another type": (X.as_subclass(Subclass), {}, False),
    "unbatched": (X[:, 0], {}, False),
    "no sequence": (X[:, :0], {}, False),
    "no step": (X[:0], {"lengths": [0] * N}, False),
    "packed": (nn.utils.rnn.pack_sequence([X[:, 0], X[:1, 1]]), {}, False),
    "nested": (torch.nested.nested_tensor([X[:, 0], X[:1, 1]], layout=torch.jagged), {}, False),
    "another device": (X.to("meta"), {}, False),
    "half precision": (X.bfloat16(), {"lengths": [2, 1, 0, 2]}, True),
}


@pytest.mark.skipif(not NATIVE, reason="without the native loops no call goes the lean way")
@pytest.mark.parametrize("form", WAYS)
def test_ordinary_call_goes_lean_way_and_gives_same_bits(cell: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, given, is_lean = WAYS[form]
    is_lean = is_lean and not (cell.startswith("rnn") and form == "one step with resets")
    layer = masked(cell, batch_first=form == "nested").to("meta" if form == "another device" else "cpu")
    layer = layer.to(x.dtype if isinstance(x, Tensor) else torch.float32)
    given = {"lengths": None, "resets": None, **given}
    if "mask" not in given:
        found = run_lean(layer, x, None, given["lengths"], given["resets"])
        assert (found is not None) == is_lean
    if not is_lean:
        return
    assert found is not None
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    every = []
    for way in (run_lean, lambda *_: None):
        monkeypatch.setattr(_dispatch, "run_lean", way)
        output, last = layer(leaf, **given)
        results = [output, *as_tuple(last)]
        gradients = torch.autograd.grad([t.square().sum() for t in results], [leaf, *layer.parameters()])
        every.append([*results, *gradients])
    for a, b in zip(*every, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow_but_each(2)
@pytest.mark.skipif(not NATIVE, reason="without the native loops no call goes the lean way")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", ["flat", "stacked", "strided"])
def test_given_states_go_lean_way(cell: str, options: dict[str, Any], shape: str) -> None:
    layer = masked(cell, **options)
    states = random_states(layer, N, torch.float32)
    if shape == "flat":
        states = tuple(h.transpose(0, 1).flatten(1) for h in states)
    elif shape == "strided":
        states = tuple(torch.stack([h, h], -1)[..., 0] for h in states)
    x, given = laid(layer, torch.randn(N, 3, INPUT), {"lengths": [3, 0, 1, 2]})
    found = run_lean(layer, x, as_hx(states), given["lengths"], None)
    assert found is not None
    layer.backend = "scan"
    expected = layer(x, as_hx(states), **given)
    for a, b in zip((found[0], *as_tuple(found[1])), (expected[0], *as_tuple(expected[1])), strict=True):
        torch.testing.assert_close(a, b)
    assert run_lean(layer, x, None, None, None) is None  # backend="scan" was asked for


@pytest.mark.skipif(not NATIVE, reason="without the native loops no call goes the lean way")
def test_unusual_surroundings_are_not_lean(cell: str) -> None:
    layer = masked(cell)
    assert run_lean(layer, X, None, None, None) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert run_lean(layer, X, None, None, None) is None
    seen = []
    torch.func.vmap(lambda x: seen.append(run_lean(layer, X, None, None, None)) or x)(X)
    with torch.autograd.forward_ad.dual_level():
        seen.append(run_lean(layer, X, None, None, None))
    torch.jit.trace(lambda x: seen.append(run_lean(layer, X, None, None, None)) or x * 2, X, check_trace=False)
    assert seen == [None] * 3
    for backend in ("packed", "padded", "scan"):
        layer.backend = backend
        assert run_lean(layer, X, None, None, None) is None


@pytest.mark.skipif(not NATIVE, reason="without the native loops no call goes the lean way")
@pytest.mark.parametrize(
    ("hx", "lengths", "resets"),
    [
        (None, [2, 1], None),
        (None, [3, 1, 0, 2], None),
        (None, [-1, 1, 0, 2], None),
        (None, [2.0, 1, 0, 2], None),
        (None, [True, 1, 0, 2], None),
        (None, [1 << 70, 1, 0, 2], None),
        (None, torch.tensor([2, 1, 0, 3]), None),
        (None, torch.ones(N), None),
        (None, torch.ones(N, dtype=torch.bool), None),
        (None, torch.ones(N, 1, dtype=torch.int64), None),
        (torch.zeros(1, N, INPUT + 1), None, None),
        (torch.zeros(N), None, None),
        (torch.zeros(1, N, 4).double(), None, None),
        ([torch.zeros(1, N, 4)], None, None),
        (None, None, torch.ones(2, N)),
        (None, None, torch.ones(2, N + 1, dtype=torch.bool)),
    ],
)
def test_wrong_arguments_are_left_to_checks(hx: Any, lengths: Any, resets: Any) -> None:
    assert run_lean(masked("gru", INPUT, 4), X, hx, lengths, resets) is None


def changed(cell: str, how: str) -> tuple[Any, Any]:
    """Returns a layer with computed or replaced weights, and one whose parameters are the resulting weights."""
    layer = masked(cell)
    if how == "parametrized":
        parametrizations.weight_norm(layer, "weight_hh_l0")
        layer.parametrizations.weight_hh_l0.original0.data.mul_(2)
    elif how == "pruned":
        prune.random_unstructured(layer, "weight_ih_l0", 0.5)
        prune.random_unstructured(layer, "weight_hh_l0", 0.5)
    elif how == "plain":
        for name in list(layer._parameters):  # as in a replica of DataParallel
            layer.__dict__[name] = layer._parameters.pop(name).data + 1
    else:
        layer._parameters["weight_hh_l0"] = nn.Parameter(layer.weight_hh_l0 + 1)  # as functional_call does
    expected = masked(cell)
    for name in expected.state_dict():
        getattr(expected, name).data.copy_(getattr(layer, name))
    return layer, expected


@pytest.mark.parametrize("how", ["parametrized", "pruned", "plain", "replaced"])
def test_computed_weights_are_used(cell: str, how: str, ran: list[str]) -> None:
    layer, expected = changed(cell, how)
    torch.testing.assert_close(layer(X)[0], expected(X)[0])
    assert ran == [FEW] * 2


def test_subclass_with_more_parameters_runs(cell: str, ran: list[str]) -> None:
    layer = masked(cell)
    expected = layer(X)[0]
    layer.scale = nn.Parameter(torch.ones(1))
    assert torch.equal(layer(X)[0], expected)
    moved = copy.deepcopy(layer).double()
    torch.testing.assert_close(moved(X.double())[0].float(), expected)
    assert ran == [FEW] * 3


def test_transforms_of_one_step_run(cell: str, ran: list[str]) -> None:
    """Covers per-sample gradients and forward-mode derivatives of one step."""
    layer = masked(cell)
    x = torch.randn(3, 1, 1, INPUT)
    each = torch.func.vmap(torch.func.grad(lambda x: layer(x)[0].sum()))(x)
    alone = torch.stack([torch.func.grad(lambda x: layer(x)[0].sum())(one) for one in x])
    torch.testing.assert_close(each, alone)
    assert set(ran) == {"scan"}
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x[0], torch.ones_like(x[0]))
        tangent = torch.autograd.forward_ad.unpack_dual(layer(dual)[0]).tangent
    assert tangent is not None
    state = as_hx(random_states(layer, 1, torch.float32))
    with torch.autograd.forward_ad.dual_level():
        dual_state = as_hx([torch.autograd.forward_ad.make_dual(h, torch.ones_like(h)) for h in as_tuple(state)])
        assert torch.autograd.forward_ad.unpack_dual(layer(x[0], dual_state)[0]).tangent is not None


def test_autocast_uses_padded_where_cpu_has_kernel(cell: str, ran: list[str]) -> None:
    """The CPU may lack the LSTM kernel for autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = masked(cell)(X)
    of_lstm = "padded" if lstm_kernel_runs(torch.bfloat16, True, False) else "bptt"
    assert ran == [of_lstm if cell == "lstm" else FEW]
    assert output.dtype == torch.bfloat16 or cell == "gru"


@pytest.mark.parametrize(
    ("x", "hx", "given", "error"),
    [
        (X.double(), None, {}, r"(?=.*torch\.float64).*torch\.float32"),
        (X[..., :2], None, {}, "must be equal to input_size"),
        (X, torch.zeros(1, N, 5), {}, "Expected hidden size"),
        (X[:1], None, {"lengths": [1, 2, 1, 1]}, r"lengths\[1\] = 2, but the input has only 1 time steps"),
        (X[:1], None, {"lengths": [1, 1]}, "expected 4 lengths"),
        (X[:1], None, {"mask": torch.ones(1, 2, dtype=torch.bool)}, "mask has shape"),
        (X[:1], None, {"lengths": SOME, "mask": SOME.bool().view(1, N)}, "give one of them"),
        (X[:1], None, {"resets": torch.ones(1, 2, dtype=torch.bool)}, "resets has shape"),
    ],
)
def test_wrong_arguments_are_refused(x: Tensor, hx: Any, given: dict[str, Any], error: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=error):
        masked("gru")(x, hx, **given)


def test_enforce_sorted_refuses_unsorted_lengths() -> None:
    layer = masked("gru", enforce_sorted=True)
    layer(X[:1], lengths=[1, 1, 0, 0])
    with pytest.raises(ValueError, match=r"lengths\[2\] = 1 is longer than lengths\[1\] = 0"):
        layer(X[:1], lengths=SOME)


@pytest.mark.parametrize("with_lengths", [False, True])
def test_gradient_ignores_later_changes_by_caller(cell: str, with_lengths: bool) -> None:
    """The caller changes its buffers of resets and lengths in place before it asks for the gradient."""
    layer = masked(cell)
    states = [h.requires_grad_() for h in random_states(layer, N, torch.float32)]
    resets, lengths = torch.tensor([[True, False, True, False]]), SOME.clone()
    found = []
    for changes in (False, True):
        output, _ = layer(X[:1], as_hx(states), lengths if with_lengths else None, resets=resets)
        if changes:
            resets.logical_not_()
            lengths.sub_(1).neg_()
        found.append(torch.autograd.grad(output.sum(), [*states, *layer.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(not NATIVE, reason="without the native loops no call goes the lean way")
@pytest.mark.parametrize("with_lengths", [False, True])
def test_dropped_states_match_scan_in_loops_of_ops(cell: str, with_lengths: bool, monkeypatch: Any) -> None:
    """A lean call whose tensors turn out to be unusual, or that is differentiated twice, leaves the native loops."""

    def refuse(*_: Any) -> Any:
        raise NotPlainError

    layer = masked(cell, num_layers=2, bidirectional=True).double()
    x, states = torch.randn(N, 1, INPUT, dtype=torch.float64), random_states(layer, N)
    given = {"resets": torch.tensor([True, True, False, True]), **({"lengths": SOME} if with_lengths else {})}
    layer.backend = "scan"
    expected = results_and_gradients(layer, x, states, given)
    layer.backend = "bptt"
    monkeypatch.setattr(native, "forward", refuse)
    monkeypatch.setattr(native, "backward", refuse)
    for a, b in zip(results_and_gradients(layer, x, states, given), expected, strict=True):
        torch.testing.assert_close(a, b)
