"""Every tensor is checked before it is read: unusual tensors give right values, or torch.nn's error.

The cases run in child processes, so that a crash is counted and named.
"""

from __future__ import annotations

import faulthandler
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from support import guarded
from support.oracle import BACKENDS, CELLS, as_hx, as_tuple, masked, random_states
from support.processes import run_each
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.rnn import PackedSequence
from torch.testing._internal.two_tensor import TwoTensor

POINTS: dict[str, Callable[[str], None]] = {}
Tensors = dict[str, Tensor]
INPUT, HIDDEN, BATCH, STEPS = 8, 32, 8, 9
LENGTHS = [1 + k % STEPS for k in range(BATCH)]


def point(check: Callable[[str], None]) -> Callable[[str], None]:
    """Registers a check of one cell, which runs in a child process."""
    POINTS[check.__name__] = check
    return check


def make(cell: str, backend: str = "bptt", **options: Any) -> Any:
    torch.manual_seed(0)
    return masked(cell, INPUT, HIDDEN, batch_first=True, flatten_hidden=False, backend=backend, **options)


def tensors(layer: Any) -> tuple[Tensor, list[Tensor]]:
    """Returns input and states that require gradients, the same at each call."""
    torch.manual_seed(1)
    x = torch.randn(BATCH, STEPS, INPUT, requires_grad=True)
    return x, [h.requires_grad_() for h in random_states(layer, BATCH, torch.float32)]


def results(layer: Any, input: Any, states: list[Tensor], **given: Any) -> list[Tensor]:
    output, last = layer(input, as_hx(states), **given)
    values = output.data if isinstance(output, PackedSequence) else output.values() if output.is_nested else output
    return [values, *as_tuple(last)]


def assert_near(found: Any, expected: Any, tolerance: float = 1e-4) -> None:
    for own, truth in zip(found, expected, strict=True):
        own = own.a if isinstance(own, TwoTensor) else own
        torch.testing.assert_close(own, truth, rtol=tolerance, atol=tolerance * max(1.0, float(truth.abs().max())))


def raises(kind: Any, words: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(kind) as error:
        run(*args, **kwargs)
    for word in [words] if isinstance(words, str) else words:
        assert word in str(error.value)


def free(tensor: Tensor, left: int = 0) -> Tensor:
    """Resizes the tensor's storage to so many bytes."""
    tensor.untyped_storage().resize_(left)
    return tensor


def negated(tensor: Tensor) -> Tensor:
    """Returns a view of the same values, with the negative bit set."""
    negative: Tensor = torch._neg_view(-tensor)
    return negative


def two(tensor: Tensor) -> Any:
    """Returns a wrapper subclass, which has no memory of its own, only two tensors inside."""
    return TwoTensor(tensor, tensor.clone())


def zero_tensor(tensor: Tensor) -> Tensor:
    made: Tensor = torch._efficientzerotensor(tuple(tensor.shape), dtype=tensor.dtype)
    return made


# Weights of another shape


def other_shapes(weight: Tensor) -> Iterator[tuple[int, ...]]:
    rows, *columns = weight.shape
    yield from [(rows + 4, *columns), (rows - 1, *columns), (1, *columns), (rows, *columns, 1), (0, *columns)]
    if columns:
        yield from [(rows, columns[0] - 1), (rows, columns[0] + 1), (rows, 1), (rows,), (*columns, rows)]
    else:
        yield from [(1,), (1, rows)]


@point
def weights_of_another_shape(cell: str) -> None:
    layer = make(cell, num_layers=2, bidirectional=True)
    x = torch.randn(BATCH, STEPS, INPUT)
    for backend in (*BACKENDS, "auto"):
        layer.backend = backend
        for steps in (STEPS, 1):
            for name, weight in layer.named_parameters():
                for shape in {*other_shapes(weight)} - {tuple(weight.shape)}:
                    given = {name: torch.full(shape, 0.1)}
                    words = f"Expected {name} of size {list(weight.shape)}, got {list(shape)}"
                    raises(RuntimeError, words, torch.func.functional_call, layer, given, (x[:, :steps],))


@point
def weights_of_another_shape_while_a_call_is_traced(cell: str) -> None:
    x = torch.randn(BATCH, STEPS, INPUT)
    layer = make(cell)
    for backend in ("packed", "padded", "auto"):
        layer.backend = backend
        torch.jit.trace(layer, x, check_trace=False)
        for name, weight in make(cell).named_parameters():
            changed = make(cell, backend)
            setattr(changed, name, nn.Parameter(torch.randn(weight.size(0) + 4, *weight.shape[1:])))
            words = f"Expected {name} of size {list(weight.shape)}"
            raises(RuntimeError, words, torch.jit.trace, changed, x, check_trace=False)


@point
def weights_put_in_place_of_others(cell: str) -> None:
    x = torch.randn(BATCH, STEPS, INPUT)
    for backend in (*BACKENDS, "auto"):
        for steps in (STEPS, 1):
            for name in dict(make(cell).named_parameters()):
                layer = make(cell, backend)
                weight = getattr(layer, name)
                shape = (weight.size(0) + 4, *weight.shape[1:])
                setattr(layer, name, nn.Parameter(torch.randn(shape)))
                raises(RuntimeError, (name, str(list(weight.shape)), str(list(shape))), layer, x[:, :steps])
                layer = make(cell, backend)
                getattr(layer, name).data = torch.randn(shape)
                raises(RuntimeError, name, layer, x[:, :steps])
                layer = make(cell, backend)
                parametrize.register_parametrization(layer, name, Widened(), unsafe=True)
                raises(RuntimeError, name, layer, x[:, :steps])
                setattr(layer := make(cell, backend), name, None)
                raises(TypeError, name, layer, x[:, :steps])


class Widened(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return torch.cat([weight, weight[:1]])


@point
def sizes_that_are_not_those_of_the_weights(cell: str) -> None:
    """The weights have fewer units, or an attribute was changed, while the layer's other attributes stayed."""
    x = torch.randn(BATCH, STEPS, INPUT)
    for backend in (*BACKENDS, "auto"):
        for steps in (STEPS, 1):
            layer, smaller = make(cell, backend), masked(cell, INPUT, HIDDEN - 8)
            for name, weight in smaller.named_parameters():
                setattr(layer, name, nn.Parameter(weight.detach()))
            raises(RuntimeError, "hidden_size=32", layer, x[:, :steps])
            layer.hidden_size = HIDDEN - 8
            layer(x[:, :steps])
            for attribute, value in (("hidden_size", 4), ("num_layers", 2), ("bias", False), ("bidirectional", True)):
                layer = make(cell, backend)
                setattr(layer, attribute, value)
                raises((RuntimeError, AttributeError), "", layer, x[:, :steps])
            layer = make(cell, backend)
            prune.random_unstructured(layer, "weight_hh_l0", 0.5)
            layer(x[:, :steps])
            layer.weight_hh_l0_mask = torch.ones(1, 1, 1)
            raises(RuntimeError, "weight_hh_l0", layer, x[:, :steps])


@point
def weights_elsewhere(cell: str) -> None:
    x = torch.randn(BATCH, STEPS, INPUT)
    for backend in (*BACKENDS, "auto"):
        for steps in (STEPS, 1):
            for name in dict(make(cell).named_parameters()):
                layer = make(cell, backend)
                setattr(layer, name, nn.Parameter(getattr(layer, name).detach().to("meta")))
                words = "Input and parameter tensors are not at the same device"
                with torch.no_grad():
                    raises(RuntimeError, words, layer, x[:, :steps])
                raises(RuntimeError, words, make(cell, backend), x[:, :steps].to("meta"))


@point
def the_operator_is_given_another_shape(cell: str) -> None:
    import masked_rnn._capture.custom_op  # noqa: F401

    layer = make(cell, bidirectional=True)
    weights = [p.detach() for p in layer.parameters()]
    x, states = tensors(layer)
    states = [h.detach() for h in states]
    lengths = torch.tensor(LENGTHS)

    rest = (layer.mode, True, "auto", True)

    def run(
        x: Tensor = x, lengths: Any = lengths, resets: Any = None, states: Any = states, weights: Any = weights
    ) -> list[Tensor]:
        found: list[Tensor] = torch.ops.masked_rnn.layer(x, lengths, resets, states, weights, *rest)
        return found

    assert_near(run()[:1], [layer(x, as_hx(states), lengths=LENGTHS)[0]])
    for k, weight in enumerate(weights):
        for shape in {*other_shapes(weight)} - {tuple(weight.shape)}:
            changed = [torch.full(shape, 0.1) if k == j else w for j, w in enumerate(weights)]
            raises(RuntimeError, str(list(shape)), run, weights=changed)
        raises(RuntimeError, "Expected", run, weights=weights[:k])
    raises(RuntimeError, "state", run, states=[h[:, :-1] for h in states])
    raises(RuntimeError, "states", run, states=states[:-1])
    raises(RuntimeError, "lengths", run, lengths=lengths[:-1])
    raises(ValueError, "lengths", run, lengths=lengths + STEPS)
    raises(RuntimeError, "resets", run, resets=torch.ones(STEPS, BATCH - 1, dtype=torch.bool))

    output, *last, saved, kernel_ran = run()
    grads = [output, *last]
    given = [x, lengths, None, states, weights, layer.mode, True, "auto", saved, kernel_ran, grads, True, True]
    torch.ops.masked_rnn.layer_gradient(*given)
    shorter = [output[:, :-1], *last]
    for at, value, words in ((8, saved[:-8], "saved"), (10, shorter, "gradient"), (1, lengths + STEPS, "lengths")):
        changed = [*given[:at], value, *given[at + 1 :]]
        raises((RuntimeError, ValueError), words, torch.ops.masked_rnn.layer_gradient, *changed)


# Between forward and backward


def gradient(layer: Any, between: Callable[[Any, Tensor, list[Tensor]], Any] = lambda *given: None) -> list[Tensor]:
    x, states = tensors(layer)
    found = results(layer, x, states, lengths=LENGTHS)
    between(layer, x, states)
    loss = sum(r.square().sum() for r in found)
    return list(torch.autograd.grad(loss, [x, *states, *layer.parameters()]))  # type: ignore[arg-type]


def right_or_refused(
    expected: list[Tensor], run: Callable[..., list[Tensor]], *args: Any, tolerance: float = 1e-4
) -> None:
    try:
        found = run(*args)
    except (RuntimeError, TypeError):
        return
    assert_near(found, expected, tolerance)


@point
def saved_tensors_given_back_by_hooks(cell: str) -> None:
    layer = make(cell)
    expected = gradient(layer)

    def with_hook(unpack: Callable[[Tensor], Any]) -> list[Tensor]:
        def given_back(tensor: Tensor) -> Any:
            return unpack(tensor) if tensor.is_floating_point() else tensor

        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, given_back):
            return gradient(layer)

    assert_near(with_hook(lambda t: t.clone()), expected)
    assert_near(with_hook(negated), expected)
    assert_near(with_hook(lambda t: t.t().contiguous().t() if t.dim() == 2 else t), expected)
    right_or_refused(expected, with_hook, lambda t: two(t.detach().contiguous()))
    right_or_refused(expected, with_hook, lambda t: t.double())
    right_or_refused(expected, with_hook, lambda t: t.bfloat16(), tolerance=0.1)
    raises(RuntimeError, "", with_hook, lambda t: t.to("meta"))
    raises(RuntimeError, "", with_hook, lambda t: t[:-1])
    try:
        found = with_hook(zero_tensor)
    except RuntimeError:
        return
    assert all(g.isfinite().all() for g in found)


@point
def tensors_replaced_before_backward(cell: str) -> None:
    layer = make(cell)
    expected = gradient(layer)

    def replaced(which: Callable[[Any, Tensor, list[Tensor]], Tensor]) -> list[Tensor]:
        def between(*given: Any) -> None:
            which(*given).data = torch.empty(0)

        return gradient(make(cell), between)

    for which in (
        lambda layer, x, states: states[0],
        lambda layer, x, states: states[-1],
        lambda layer, x, states: x,
        lambda layer, x, states: layer.weight_hh_l0,
        lambda layer, x, states: layer.weight_ih_l0,
        lambda layer, x, states: layer.bias_hh_l0,
    ):
        right_or_refused(expected, replaced, which)


@point
def incoming_gradients_that_are_subclasses(cell: str) -> None:
    layer = make(cell)
    x, states = tensors(layer)
    found = results(layer, x, states, lengths=LENGTHS)
    wanted = [x, *states, *layer.parameters()]
    for k, result in enumerate(found):
        pulled = torch.randn_like(result)
        expected = torch.autograd.grad(result, wanted, pulled, retain_graph=True, allow_unused=True)
        for wrap in (two, negated, lambda g: g.movedim(0, 1).contiguous().movedim(0, 1)):
            own = torch.autograd.grad(result, wanted, wrap(pulled), retain_graph=True, allow_unused=True)
            for a, b in zip(own, expected, strict=True):
                assert (a is None) == (b is None), k
                if b is not None:
                    assert_near([a], [b])
        own = torch.autograd.grad(result, wanted, zero_tensor(pulled), retain_graph=True, allow_unused=True)
        assert all(g is None or g.eq(0).all() for g in own)


@point
def the_callers_tensors_changed_before_backward(cell: str) -> None:
    for backend in BACKENDS:
        for name in ("sorted_indices", "unsorted_indices", "batch_sizes", "offsets", "lengths", "mask", "resets"):
            for change in (lambda t: t.copy_(t.flip(0)), lambda t: t.fill_(True if t.dtype == torch.bool else 10**7)):
                expected, found = (_changed(cell, backend, name, c) for c in (None, change))
                if found is not None:
                    assert expected is not None
                    assert_near(found, expected)


def _changed(cell: str, backend: str, name: str, change: Any) -> list[Tensor] | None:
    """Returns the gradients, or None if autograd noticed the change."""
    layer = make(cell, backend, bidirectional=True)
    x, states = tensors(layer)
    x = x.detach()
    lengths = torch.tensor(LENGTHS)
    mask = torch.arange(STEPS) < lengths.view(-1, 1)
    given: dict[str, Any] = {"lengths": lengths, "mask": mask, "resets": torch.rand(mask.shape) < 0.3}
    input: Any = x
    if name.endswith(("indices", "sizes")):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, False)
        data = packed.data.detach().requires_grad_()
        input = PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        found, changed = results(layer, input, states), getattr(packed, name)
    elif name == "offsets":
        data, changed = x[mask].requires_grad_(), nn.functional.pad(lengths.cumsum(0), (1, 0))
        found = results(layer, torch.nested.nested_tensor_from_jagged(data, changed), states)
    else:
        data, changed = x.requires_grad_(), given[name]
        found = results(layer, x, states, **{name: changed})
    if change is not None:
        change(changed)
    loss = sum(r.square().sum() for r in found)
    try:
        return list(torch.autograd.grad(loss, [data, *states, *layer.parameters()]))  # type: ignore[arg-type]
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return None


# Memory that was freed or never allocated, or that holds other values than the tensor


@point
def storage_that_was_freed(cell: str) -> None:
    x = torch.randn(BATCH, STEPS, INPUT)
    for left, learns in product((0, 4), (True, False)):
        with torch.set_grad_enabled(learns):
            for name in dict(make(cell).named_parameters()):
                layer = make(cell)
                free(getattr(layer, name), left)
                raises(RuntimeError, "", layer, x, lengths=LENGTHS)
            layer = make(cell)
            states = random_states(layer, BATCH, torch.float32)
            raises(RuntimeError, "", layer, free(x.clone(), left), lengths=LENGTHS)
            for k in range(len(states)):
                given = [free(h.clone(), left) if k == j else h for j, h in enumerate(states)]
                raises(RuntimeError, "", layer, x, as_hx(given), lengths=LENGTHS)
    saved: list[Callable[..., Tensor]] = [lambda layer, x, states: layer.weight_hh_l0, lambda layer, x, states: x]
    for left, chosen in product((0, 4), saved):
        raises(RuntimeError, "", gradient, make(cell), lambda *given, of=chosen, left=left: free(of(*given), left))


@point
def marks_whose_storage_was_freed(cell: str) -> None:
    """PyTorch's own ops would read the freed memory."""
    x = torch.randn(BATCH, STEPS, INPUT)
    marks = torch.ones(BATCH, STEPS, dtype=torch.bool)
    for backend in (*BACKENDS, "auto"):
        layer = make(cell, backend)
        for steps in (STEPS, 1):
            for dtype in (torch.int64, torch.int32):
                lengths = free(torch.ones(BATCH, dtype=dtype))
                raises(RuntimeError, "storage", layer, x[:, :steps], lengths=lengths)
            for name in ("mask", "resets"):
                given = {name: free(marks[:, :steps].clone())}
                raises(RuntimeError, "storage", layer, x[:, :steps], **given)
        for k in (1, 2):
            packed: list[Any] = list(nn.utils.rnn.pack_padded_sequence(x, torch.tensor(LENGTHS), True, False))
            packed[k] = free(packed[k].clone())
            raises(RuntimeError, "storage", layer, PackedSequence(*packed))


@point
def values_by_the_negative_bit(cell: str) -> None:
    for backend in (*BACKENDS, "auto"):
        layer = make(cell, backend)
        x, states = (lambda x, states: (x.detach(), [h.detach() for h in states]))(*tensors(layer))
        lengths = torch.tensor(LENGTHS)
        expected = results(layer, x, states, lengths=lengths)
        assert_near(results(layer, x, states, lengths=negated(lengths)), expected)
        assert_near(results(layer, x, states, lengths=negated(lengths.int())), expected)
        assert_near(results(layer, negated(x), [negated(h) for h in states], lengths=lengths), expected)
        assert_near(
            results(layer, x[:, :1], states, lengths=negated((lengths > 9).long())),
            results(layer, x[:, :1], states, lengths=(lengths > 9).long()),
        )
        given = {name: negated(p.detach()) for name, p in layer.named_parameters()}
        own = torch.func.functional_call(layer, given, (x, as_hx(states)), {"lengths": lengths})
        assert_near([own[0], *as_tuple(own[1])], expected)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, False)
        parts = (packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        expected = results(layer, packed, states)
        assert_near(results(layer, PackedSequence(packed.data, *map(negated, parts)), states), expected)
        mask = torch.arange(STEPS) < lengths.view(-1, 1)
        offsets = nn.functional.pad(lengths.cumsum(0), (1, 0))
        expected = results(layer, torch.nested.nested_tensor_from_jagged(x[mask], offsets), states)
        nested = torch.nested.nested_tensor_from_jagged(x[mask], negated(offsets))
        assert_near(results(layer, nested, states), expected)


@point
def zero_tensors(cell: str) -> None:
    for backend in (*BACKENDS, "auto"):
        for steps in (STEPS, 1):
            layer = make(cell, backend)
            x, states = tensors(layer)
            x, states = x.detach()[:, :steps], [h.detach() for h in states]
            with torch.no_grad():
                marks = torch.zeros(BATCH, steps, dtype=torch.bool)
                lengths = torch.zeros(BATCH, dtype=torch.int64)
                for given in ({"lengths": lengths}, {"mask": marks}, {"resets": marks}):
                    ((name, value),) = given.items()
                    own = results(layer, x, states, **{name: zero_tensor(value)})
                    assert_near(own, results(layer, x, states, **given))
                zeros = [torch.zeros_like(t) for t in (x, *states)]
                expected = results(layer, zeros[0], zeros[1:])
                assert_near(results(layer, zeros[0], [zero_tensor(h) for h in states]), expected)
                if cell == "lstm" and backend not in ("bptt", "scan"):
                    continue  # nn.LSTM's kernel reads memory that was never allocated
                assert_near(results(layer, zero_tensor(x), zeros[1:]), expected)
                for name, weight in layer.named_parameters():
                    own, truth = (
                        torch.func.functional_call(layer, {name: zero}, (x, as_hx(states)))
                        for zero in (zero_tensor(weight), torch.zeros_like(weight))
                    )
                    assert_near([own[0], *as_tuple(own[1])], [truth[0], *as_tuple(truth[1])])


def check_point(case: tuple[str, str]) -> None:
    name, cell = case
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        POINTS[name](cell)


@pytest.fixture(scope="module")
def faults(request: pytest.FixtureRequest) -> dict[tuple[str, str], str]:
    """Returns the faults of the cases that this run has selected."""
    values = [item.callspec.params for item in request.session.items if "faults" in getattr(item, "fixturenames", ())]
    cases = [(chosen["name"], chosen["cell"]) for chosen in values]
    return {cases[k]: fault for k, fault in run_each(check_point, cases, deaths=len(cases)).items()}


@pytest.mark.slow_but_each(1)
@pytest.mark.parametrize("name", POINTS)
def test_unusual_tensors_give_right_values_or_errors(name: str, cell: str, faults: dict[tuple[str, str], str]) -> None:
    fault = faults.get((name, cell))
    assert fault is None, fault


# Guard pages

GUARDED = guarded.random_cases(90, seed=0)


@pytest.fixture(scope="module")
def trespasses() -> dict[int, str]:
    return run_each(guarded.check_case, GUARDED)


def test_memory_beside_tensors_is_not_touched(cell: str, trespasses: dict[int, str]) -> None:
    """The loops of `bptt` stay within their own tensors and the caller's. Their values are those of `scan`."""
    mine = {k: case for k, case in enumerate(GUARDED) if case["cell"] == cell}
    faults = {k: (case, trespasses[k]) for k, case in mine.items() if k in trespasses}
    assert not faults, faults


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("side", guarded.SIDES)
@pytest.mark.parametrize(("how", "dtype"), [("read", torch.float32), ("write", torch.bool)])
def test_guard_page_ends_process_on_trespass(how: str, dtype: torch.dtype, side: str) -> None:
    """A read or write of one number beside a tensor ends the process."""
    child = os.fork()
    if not child:
        faulthandler.disable()
        guarded.trespass(how, dtype, side)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_guarded_cases_cover_cells_forms_and_sides() -> None:
    """Every combination of cell, form and side occurs."""
    met = Counter((case["cell"], case["form"], case["side"]) for case in GUARDED)
    assert set(met.values()) == {1}
    assert len(met) == len(CELLS) * len(guarded.FORMS) * len(guarded.SIDES)
