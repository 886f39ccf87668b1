"""First and second derivatives, batched gradients, and promises that autograd makes for every op."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.native_loops import use_loops_of_ops
from support.oracle import (
    BACKENDS,
    CELLS,
    INPUT,
    ONE_STATE_AND_TWO,
    as_hx,
    as_tuple,
    every,
    masked,
    plain,
    random_states,
)
from support.strict_kernel import with_cudnn
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from masked_rnn import MaskedGRU
from masked_rnn._backends import bptt, cudnn


def functional(layer: Any, batch: int, steps: int, **given: Any) -> tuple[Any, list[Tensor]]:
    """Returns the call as a function of x, the states and the parameters, and some values of them."""
    parameters = dict(layer.named_parameters())
    states = random_states(layer, batch)
    inputs = [torch.randn(batch, steps, INPUT, dtype=torch.float64), *states, *parameters.values()]
    inputs = [t.detach().clone().requires_grad_() for t in inputs]

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        own, weights = rest[: len(states)], dict(zip(parameters, rest[len(states) :], strict=True))
        output, last = torch.func.functional_call(layer, weights, (x, as_hx(own)), given)
        return output, *as_tuple(last)

    return run, inputs


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize(
    ("options", "given"), [({"bidirectional": True}, {"lengths": [2, 0, 3]}), ({"bias": False}, {})], ids=str
)
def test_first_derivatives_pass_gradcheck(
    cell: str, backend: str, options: dict[str, Any], given: dict[str, Any]
) -> None:
    layer = masked(cell, 2, 2, backend=backend, batch_first=True, **options) if cell != "lstm-proj" else None
    layer = (layer or masked(cell, 2, 3, backend=backend, batch_first=True, **options)).double()
    layer.input_size = 2
    run, inputs = _small(layer, **given)
    assert gradcheck(run, inputs, check_batched_grad=True, fast_mode=True)


def _small(layer: Any, **given: Any) -> tuple[Any, list[Tensor]]:
    run, inputs = functional(layer, 3, 3, **given)
    inputs[0] = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    return run, inputs


@pytest.mark.slow_but("bptt")
@pytest.mark.parametrize(
    ("cell", "bidirectional", "given"),
    [*((cell, True, {"lengths": [2, 0, 3]}) for cell in CELLS), *((cell, False, {}) for cell in ONE_STATE_AND_TWO)],
    ids=str,
)
def test_second_derivatives_pass_gradgradcheck(
    cell: str, backend: str, bidirectional: bool, given: dict[str, Any]
) -> None:
    layer = masked(cell, 2, 3, backend=backend, batch_first=True, bidirectional=bidirectional).double()
    run, inputs = _small(layer, **given)
    assert gradgradcheck(run, inputs, check_batched_grad=cell == "gru", fast_mode=True)


def test_gradient_penalty_matches_scan(cell: str, backend: str) -> None:
    """In a gradient penalty, the loss contains a gradient, and is differentiated by the weights."""
    layer = masked(cell, num_layers=2, bidirectional=True, backend="scan", batch_first=True).double()
    x = torch.randn(3, 4, INPUT, dtype=torch.float64, requires_grad=True)

    def penalty(which: str) -> list[Tensor]:
        layer.backend = which
        output, last = layer(x, lengths=[3, 0, 4])
        score = output.square().sum() + sum(h.sin().sum() for h in as_tuple(last))
        (dx,) = torch.autograd.grad(score, x, create_graph=True)
        loss = score + (dx.square().sum() - 1).square()
        return list(torch.autograd.grad(loss, [x, *layer.parameters()]))

    for found, expected in zip(penalty(backend), penalty("scan"), strict=True):
        torch.testing.assert_close(found, expected)


def test_gradient_counts_once_if_input_depends_on_weight(backend: str) -> None:
    """The input is computed from a weight, whose gradient must count once along each of its paths."""
    layer = MaskedGRU(3, 3, backend=backend).double()
    base = torch.randn(4, 2, 3, dtype=torch.float64)

    def loss(w: Tensor) -> Tensor:
        weights = dict(layer.named_parameters(), weight_ih_l0=w)
        return torch.func.functional_call(layer, weights, (base @ w[:3],), {"lengths": [4, 2]})[0].sin().sum()

    w = layer.weight_ih_l0.detach().clone().requires_grad_()
    (once,) = torch.autograd.grad(loss(w), w)
    (again,) = torch.autograd.grad(loss(w), w, create_graph=True)
    torch.testing.assert_close(again, once)
    assert gradgradcheck(loss, [w])


def test_batched_gradients_match_single_ones(cell: str, backend: str) -> None:
    layer = masked(cell, num_layers=2, bidirectional=True, backend=backend, batch_first=True).double()
    x = torch.randn(3, 4, INPUT, dtype=torch.float64, requires_grad=True)
    output, _ = layer(x, lengths=[3, 0, 4])
    directions = torch.randn(5, *output.shape, dtype=torch.float64)
    inputs = [x, *layer.parameters()]
    together = torch.autograd.grad(output, inputs, directions, is_grads_batched=True, retain_graph=True)
    for k, direction in enumerate(directions):
        alone = torch.autograd.grad(output, inputs, direction, retain_graph=True)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[k], b)


def test_retained_graph_gives_same_gradients_twice(cell: str, backend: str) -> None:
    layer = masked(cell, num_layers=2, bidirectional=True, backend=backend)
    output, last = layer(torch.randn(5, 3, INPUT), lengths=[5, 0, 2])
    loss = output.square().sum() + sum(h.sum() for h in as_tuple(last))
    first = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(layer.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("what", ["weight_ih_l0", "weight_hh_l0", "x"])
def test_inplace_change_of_saved_tensor_is_refused(cell: str, backend: str, what: str) -> None:
    layer = masked(cell, backend=backend)
    x = torch.randn(5, 3, INPUT, requires_grad=True)
    output, _ = layer(x, lengths=None)
    with torch.no_grad():
        (x if what == "x" else getattr(layer, what)).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# Without lengths, `packed` and `padded` are torch.nn's kernel itself, and some kernels save the output they return.
@pytest.mark.parametrize(
    ("backend", "given"),
    [(name, {"lengths": [5, 1, 3]}) for name in BACKENDS] + [("bptt", {}), ("scan", {})],
)
def test_inplace_output_change_keeps_gradient(cell: str, backend: str, given: dict[str, Any]) -> None:
    layer = masked(cell, backend=backend)
    x = torch.randn(5, 3, INPUT)
    expected = torch.autograd.grad(layer(x, **given)[0].mul(2).sum(), list(layer.parameters()))
    found = torch.autograd.grad(layer(x, **given)[0].mul_(2).sum(), list(layer.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_inplace_output_change_keeps_gradient_of_pytorchs_ops(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the output has the same rows as the saved states."""
    use_loops_of_ops(monkeypatch)
    test_inplace_output_change_keeps_gradient(cell, "bptt", {})


def test_gradient_through_last_state_matches_scan(cell: str, backend: str) -> None:
    layer = masked(cell, num_layers=2, bidirectional=True, backend=backend).double()
    scan = masked(cell, num_layers=2, bidirectional=True, backend="scan").double()
    scan.load_state_dict(layer.state_dict())
    x = torch.randn(5, 3, INPUT, dtype=torch.float64)
    for found, expected in zip(
        *(
            torch.autograd.grad(
                as_tuple(m(x, lengths=[5, 0, 2])[1])[-1].sin().sum(),
                list(m.parameters()),
                allow_unused=True,
                materialize_grads=True,
            )
            for m in (layer, scan)
        ),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_no_grad_call_records_no_graph(cell: str, backend: str) -> None:
    layer = masked(cell, backend=backend)
    x = torch.randn(5, 3, INPUT, requires_grad=True)
    with torch.no_grad():
        output, last = layer(x, lengths=[5, 0, 2])
    assert output.grad_fn is None
    assert all(h.grad_fn is None for h in as_tuple(last))
    with torch.inference_mode():
        assert torch.equal(layer(x, lengths=[5, 0, 2])[0], output)


def test_checkpoint_gives_same_gradients(cell: str, backend: str) -> None:
    from torch.utils.checkpoint import checkpoint

    layer = masked(cell, num_layers=2, backend=backend)
    x = torch.randn(5, 3, INPUT)
    whole = torch.autograd.grad(layer(x, lengths=[5, 0, 2])[0].square().sum(), list(layer.parameters()))
    again = checkpoint(lambda x: layer(x, lengths=[5, 0, 2])[0], x, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again.square().sum(), list(layer.parameters())), whole, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize(
    ("backend", "sizes"),
    [(name, (4, 6, 3)) for name in ("auto", *BACKENDS)] + [("auto", (64, 6, 64)), ("auto", (100, 6, 64))],
)
@pytest.mark.parametrize(
    ("given", "frozen"), [("lengths", False), ("mask", False), ("neither", False), ("lengths", True)]
)
@pytest.mark.parametrize("cell", ["gru", "lstm", "lstm-proj"])  # the choice of a backend depends on oneDNN's LSTM
def test_reentrant_checkpoint_draws_same_dropout(
    cell: str, backend: str, sizes: tuple[int, int, int], given: str, frozen: bool
) -> None:
    """The first pass runs without gradients, the second with them. Both must choose and draw the same."""
    from torch.utils.checkpoint import checkpoint

    batch, steps, hidden = sizes
    layer = masked(cell, INPUT, hidden, num_layers=2, batch_first=True, dropout=0.5, backend=backend)
    if frozen:
        layer.requires_grad_(False)
    x = torch.randn(batch, steps, INPUT, requires_grad=True)
    lengths = torch.arange(batch) % (steps + 1)
    more: dict[str, Any] = {"lengths": lengths} if given == "lengths" else {}
    if given == "mask":
        more = {"mask": torch.arange(steps) < lengths.unsqueeze(1)}
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    torch.manual_seed(3)
    output = layer(x, **more)[0]
    expected = torch.autograd.grad(output.square().sum(), wanted)
    torch.manual_seed(3)
    again = checkpoint(lambda x: layer(x, **more)[0], x, use_reentrant=True)
    torch.testing.assert_close(again, output, msg=f"{given}: another draw without gradients")
    for t in wanted:
        t.grad = None
    again.square().sum().backward()
    for found, own in zip((t.grad for t in wanted), expected, strict=True):
        torch.testing.assert_close(found, own)


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("given", ["neither", "full", "lengths", "mask"])
@pytest.mark.parametrize("options", every(bidirectional=[False, True], batch_first=[False, True]), ids=str)
@pytest.mark.parametrize("cell", [*ONE_STATE_AND_TWO, "lstm"])  # each has kernels of its own
def test_results_and_gradients_are_contiguous_like_torchs(cell: str, given: str, options: dict[str, Any]) -> None:
    """They are contiguous wherever torch.nn's are, so that `view` works wherever it worked."""
    lengths: dict[str, Any] = {"lengths": torch.tensor([2, 0, 5])}
    lengths = {"full": {"lengths": [5, 5, 5]}, "lengths": lengths, "neither": {}}.get(given, {})
    if given == "mask":
        mask = torch.rand(3, 5) > 0.4
        lengths = {"mask": mask if options["batch_first"] else mask.t()}

    def run(layer: Any, **more: Any) -> dict[str, Tensor]:
        x = torch.randn(3, 5, INPUT).requires_grad_()
        leaves = [h.requires_grad_() for h in random_states(layer, 3, torch.float32)]
        output, last = layer(x if layer.batch_first else x.transpose(0, 1).contiguous(), as_hx(leaves), **more)
        results = [output, *as_tuple(last)]
        inputs = {"x": x, **{f"hx[{s}]": h for s, h in enumerate(leaves)}, **dict(layer.named_parameters())}
        gradients = torch.autograd.grad(results, list(inputs.values()), [torch.ones(r.shape) for r in results])
        names = ["output", *(f"last[{s}]" for s in range(len(leaves)))]
        return {**dict(zip(names, results, strict=True)), **dict(zip(inputs, gradients, strict=True))}

    theirs = run(plain(cell, num_layers=2, **options))
    for backend in ("auto", *BACKENDS):
        for flatten_hidden in (False, True):
            ours = masked(cell, num_layers=2, backend=backend, flatten_hidden=flatten_hidden, **options)
            for name, found in run(ours, **lengths).items():
                assert found.is_contiguous() or not theirs[name].is_contiguous(), (backend, name, found.stride())


def assert_gradients_have_strides(layer: Any, leaves: Sequence[Tensor], given: dict[str, Any], x: Tensor) -> None:
    output, last = layer(x, as_hx(leaves), **given)
    (output.sum() + sum(h.sum() for h in as_tuple(last))).backward()
    for name, p in (*layer.named_parameters(), *((f"hx[{s}]", h) for s, h in enumerate(leaves))):
        assert p.grad is not None
        assert p.grad.stride() == p.stride(), (layer, name, list(given), tuple(p.shape), p.grad.stride())


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradient_has_strides_of_its_parameter(cell: str, backend: str, bidirectional: bool) -> None:
    """Sizes of 1 have strides too. DistributedDataParallel warns of other strides, and copies such gradients."""
    T = 3
    for inputs, hidden, batch in ((1, 1, 1), (1, 1, 2), (2, 1, 2), (1, 3, 2)):
        hidden = 3 if cell == "lstm-proj" else hidden
        mask = torch.tensor([[True], [False], [True]]).repeat(1, batch)
        for given in ({}, {"lengths": [1, T][:batch]}, {"mask": mask}, {"resets": mask}):
            layer = masked(cell, inputs, hidden, num_layers=2, bidirectional=bidirectional, backend=backend)
            leaves = [h.requires_grad_() for h in random_states(layer, batch, torch.float32)]
            assert_gradients_have_strides(layer, leaves, given, torch.randn(T, batch, inputs))


def test_gradient_holds_under_allow_mutation_on_saved_tensors(cell: str, backend: str) -> None:
    layer = masked(cell, num_layers=2, bidirectional=True, backend=backend)
    x = torch.randn(5, 3, INPUT)
    expected = torch.autograd.grad(layer(x, lengths=[5, 1, 3])[0].square().sum(), list(layer.parameters()))
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        output, _ = layer(x, lengths=[5, 1, 3])
        found = torch.autograd.grad(output.square().sum(), list(layer.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("kernel", ["packed", "padded"])
@pytest.mark.parametrize("given", [{}, {"lengths": [3, 0, 4]}], ids=str)
def test_kernel_without_double_backward_has_second_derivatives(
    cell: str, kernel: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like cuDNN, the kernel has a backward that can't be differentiated, and it is as strict."""
    layer = masked(cell, num_layers=2, bidirectional=True, backend=kernel, batch_first=True, dropout=0.0).double()
    x = torch.randn(3, 4, INPUT, dtype=torch.float64, requires_grad=True)

    def first_and_second() -> list[Tensor]:
        output, last = layer(x, **given)
        score = output.square().sum() + sum(h.sin().sum() for h in as_tuple(last))
        first = torch.autograd.grad(score, [x, *layer.parameters()], retain_graph=True)
        (dx,) = torch.autograd.grad(score, x, create_graph=True)
        second = torch.autograd.grad(
            dx.square().sum(), [x, *layer.parameters()], allow_unused=True, materialize_grads=True
        )
        return [*first, *second]

    expected = first_and_second()
    with_cudnn(monkeypatch)
    for a, b in zip(first_and_second(), expected, strict=True):
        torch.testing.assert_close(a, b)
    layer.dropout = 0.5
    torch.manual_seed(1)
    noisy = layer(x, **given)[0]
    torch.manual_seed(1)
    assert torch.equal(layer(x, **given)[0], noisy)
    assert not torch.equal(layer(x, **given)[0], noisy)
    torch.manual_seed(1)
    with torch.no_grad():
        assert torch.equal(layer(x, **given)[0], noisy)
    time_first = copy.deepcopy(layer)
    time_first.batch_first = False
    torch.manual_seed(1)
    torch.testing.assert_close(time_first(x.transpose(0, 1), **given)[0].transpose(0, 1), noisy)
    (dx,) = torch.autograd.grad(noisy.square().sum(), x, create_graph=True)
    dx.square().sum().backward()


class Elements(TorchDispatchMode):
    """Counts the elements that ops return."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.total += sum(t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor))
        return result


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("backend", ["padded", "bptt", "scan"])  # the work of torch's packed kernel grows as the square
@pytest.mark.parametrize("given", [{}, {"lengths": True}, {"mask": True}, {"resets": True}], ids=str)
@pytest.mark.parametrize("cell", ONE_STATE_AND_TWO)
def test_work_grows_linearly_with_steps(cell: str, backend: str, given: dict[str, Any]) -> None:
    layer = masked(cell, bidirectional=True, backend=backend)

    def work(steps: int) -> int:
        values = {"lengths": torch.tensor([steps, 1, steps // 2]), "mask": torch.ones(steps, 3, dtype=torch.bool)}
        values["resets"] = torch.arange(3 * steps).view(steps, 3) % 8 == 0
        x = torch.randn(steps, 3, INPUT, requires_grad=True)
        with Elements() as elements:
            layer(x, **{name: values[name] for name in given})[0].square().sum().backward()
        return elements.total

    assert work(64) < 5 * work(16)


@pytest.mark.parametrize("bias", [True, False])
def test_flattened_weights_form_one_chunk(cell: str, bias: bool) -> None:
    """cuDNN wants a layer's weights in this order: matrices, then biases, from the start of their memory on."""
    layer = masked(cell, bidirectional=True, bias=bias)
    own = list(layer.parameters())
    chunk = cudnn.in_one_chunk(own)
    inside = [p for p in chunk if p.dim() == 2] + [p for p in chunk if p.dim() == 1]
    offset = 0
    for p in inside:
        assert p.is_contiguous()
        assert p.storage_offset() == offset
        offset += p.numel()
    assert len({p.untyped_storage().data_ptr() for p in chunk}) == 1
    assert all(torch.equal(a, b) for a, b in zip(chunk, own, strict=True))
    assert cudnn.in_one_chunk(chunk) is chunk
    half = len(chunk) // 2
    for part in (chunk[:half], chunk[half:]):  # their memory goes on, or began before
        again = cudnn.in_one_chunk(part)
        assert again[0].storage_offset() == 0
        assert again is not part
        if not bias:
            memory = torch.empty(0).set_(again[0].untyped_storage())
            assert not memory[sum(p.numel() for p in part) :].any()
            assert memory.numel() == sum(p.numel() + p.size(0) for p in part)
    parts = torch.randn(1 + offset).split([1, *(p.numel() for p in inside)])[1:]
    later = [part.view(p.shape) for part, p in zip(parts, inside, strict=True)]  # one after the other, but not first
    assert [p.storage_offset() for p in cudnn.in_one_chunk(later)] == [p.storage_offset() for p in inside]
    for g in torch.autograd.grad(sum(p.sum() for p in chunk), own):
        assert torch.equal(g, torch.ones_like(g))


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize(("batch_first", "dtype"), [(False, torch.float64), (True, torch.float32)])
@pytest.mark.parametrize("given", [{}, {"lengths": [5, 2, 0]}, {"lengths": [5, 5, 5]}], ids=str)
def test_inplace_output_change_is_right_or_refused(
    cell: str, backend: str, batch_first: bool, dtype: torch.dtype, given: dict[str, Any]
) -> None:
    """The gradient is right, or autograd raises an error. No saved value may change unnoticed."""
    layer = masked(cell, batch_first=batch_first, backend=backend).to(dtype)
    x = torch.randn(3, 5, INPUT, dtype=dtype) if batch_first else torch.randn(5, 3, INPUT, dtype=dtype)

    def gradients(in_place: bool) -> list[Tensor]:
        output, _ = layer(x, **given)
        doubled = output.mul_(2).add_(1) if in_place else output * 2 + 1
        return list(torch.autograd.grad((doubled**2).sum(), layer.parameters()))

    expected = gradients(False)
    try:
        found = gradients(True)
    except RuntimeError:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(True)
    else:
        torch.testing.assert_close(found, expected)


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("steps", [1, 4, 9])
@pytest.mark.parametrize("given", [{}, {"lengths": [1, 1, 0]}, {"lengths": "full"}, {"mask": True}], ids=str)
def test_auto_returns_no_view_on_cpu(cell: str, batch_first: bool, steps: int, given: dict[str, Any]) -> None:
    """fully_shard loses the gradients of a view that is changed in place. Only where nn.LSTM returns one, this may."""
    layer = masked(cell, batch_first=batch_first)
    x = torch.randn(3, steps, INPUT) if batch_first else torch.randn(steps, 3, INPUT)
    if "mask" in given:
        given = {"mask": torch.rand(x.shape[:2]) < 0.7}
    elif given.get("lengths") == "full":
        given = {"lengths": [steps] * 3}
    output, _ = layer(x, **given)
    assert output._is_view() <= (cell.startswith("lstm") and batch_first)


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
@pytest.mark.parametrize("marks", ["lengths", "mask"])
def test_state_of_empty_row_stays_isolated(cell: str, backend: str, marks: str, garbage: float) -> None:
    """The state comes out unchanged."""
    layer = masked(cell, num_layers=2, bidirectional=True, flatten_hidden=False, backend=backend)
    lengths = torch.tensor([5, 0, 2])
    given = {"lengths": lengths} if marks == "lengths" else {"mask": torch.arange(5).unsqueeze(1) < lengths}
    x, found = torch.randn(5, 3, INPUT), []
    states = random_states(layer, 3, torch.float32)
    for value in (0.0, garbage):
        for h in states:
            h[:, 1] = value
        output, last = layer(x, as_hx([h.clone() for h in states]), **given)
        for new, h in zip(as_tuple(last), states, strict=True):
            assert torch.equal(new[:, 1].nan_to_num(), h[:, 1].nan_to_num())
        score = output.sum() + sum(h[:, ::2].sum() for h in as_tuple(last))
        found.append([output, *torch.autograd.grad(score, list(layer.parameters()))])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("frozen", ["weights", "input", "nothing"])
def test_unneeded_gradients_are_not_computed(cell: str, frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = masked(cell, backend="bptt").double().requires_grad_(frozen != "weights")
    x = torch.randn(5, 3, INPUT, dtype=torch.float64, requires_grad=frozen != "input")
    wanted = []

    backward = bptt.autograd.passes.backward
    monkeypatch.setattr(bptt.autograd.passes, "backward", lambda *given: wanted.append(given[-2:]) or backward(*given))
    states = [h.requires_grad_() for h in random_states(layer, 3)]
    layer(x, as_hx(states))[0].sum().backward()
    assert wanted == [(frozen != "input", frozen != "weights")]


def test_gradient_of_input_has_no_larger_storage(cell: str, backend: str) -> None:
    """A view of a buffer of both directions would keep twice the memory."""
    layer, x = masked(cell, bidirectional=True, backend=backend), torch.randn(5, 3, INPUT, requires_grad=True)
    layer(x, lengths=[5, 0, 2])[0].sum().backward()
    assert x.grad is not None
    assert x.grad.untyped_storage().nbytes() == x.numel() * x.element_size()
