"""torch.func and forward-mode differentiation: per-sample gradients, ensembles, jvp, hessian, jacobians."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.oracle import INPUT, as_tuple, masked
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

LENGTHS = torch.tensor([3, 0, 5, 1])


@pytest.fixture(params=["auto", "scan"])
def layer(cell: str, request: pytest.FixtureRequest) -> Any:
    return masked(cell, num_layers=2, bidirectional=True, batch_first=True, backend=request.param).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 5, INPUT, dtype=torch.float64)


def score(results: Any) -> Tensor:
    output, last = results
    return output.square().sum() + sum(h.sin().sum() for h in as_tuple(last))


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("batched", [False, True])
def test_per_sample_gradients_match_each_sample_alone(layer: Any, x: Tensor, batched: bool) -> None:
    """Lengths are vmapped too. Garbage in padding must not reach the gradients."""
    weights = dict(layer.named_parameters())
    dirty = torch.where(torch.arange(5).unsqueeze(1) < LENGTHS.view(-1, 1, 1), x, torch.nan)

    def loss(weights: dict[str, Tensor], x: Tensor, length: Tensor) -> Tensor:
        if batched:
            x, length = x.unsqueeze(0), length.unsqueeze(0)
        return score(functional_call(layer, weights, (x,), {"lengths": length}))

    found = vmap(grad(loss), (None, 0, 0))(weights, dirty, LENGTHS)
    for n in range(4):
        layer.zero_grad()
        score(layer(x[n : n + 1], lengths=LENGTHS[n : n + 1])).backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(found[name][n], parameter.grad, msg=name)


@pytest.mark.slow_but_each(1)
def test_per_sample_gradients_work_with_resets(layer: Any, x: Tensor) -> None:
    weights = dict(layer.named_parameters())
    resets, mask = torch.rand(4, 5) < 0.4, torch.rand(4, 5) < 0.7

    def loss(weights: dict[str, Tensor], x: Tensor, mask: Tensor, resets: Tensor) -> Tensor:
        return score(functional_call(layer, weights, (x,), {"mask": mask, "resets": resets}))

    found = vmap(grad(loss), (None, 0, 0, 0))(weights, x, mask, resets)
    for n in range(4):
        layer.zero_grad()
        score(layer(x[n], mask=mask[n], resets=resets[n])).backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(found[name][n], parameter.grad, msg=name)


def test_vmapped_step_takes_resets(layer: Any, x: Tensor) -> None:
    """An ensemble that acts step by step makes such calls."""
    _, state = layer(x)
    resets = torch.tensor([True, False, True, False])

    def act(x: Tensor, resets: Tensor, *state: Tensor) -> Any:
        return layer(x, state[0] if len(state) == 1 else state, resets=resets)

    output, _ = vmap(act)(x[:, :1], resets.unsqueeze(1), *as_tuple(state))
    expected, _ = layer(x[:, :1], state, resets=resets.unsqueeze(1))
    torch.testing.assert_close(output, expected)


def test_vmapped_masks_match_batched_call(layer: Any, x: Tensor) -> None:
    mask = torch.rand(4, 5) > 0.4
    output, last = vmap(lambda x, m: layer(x, mask=m))(x, mask)
    expected, expected_last = layer(x, mask=mask)
    torch.testing.assert_close(output, expected)
    for a, b in zip(as_tuple(last), as_tuple(expected_last), strict=True):
        torch.testing.assert_close(a, b)


def test_stacked_weights_run_as_ensemble(cell: str, x: Tensor) -> None:
    members = [masked(cell, bidirectional=True, batch_first=True).double() for _ in range(3)]
    weights, buffers = stack_module_state(members)

    def run(weights: Any, buffers: Any) -> Any:
        return functional_call(members[0], (weights, buffers), (x,), {"lengths": LENGTHS})

    output, last = vmap(run)(weights, buffers)
    for k, member in enumerate(members):
        expected, expected_last = member(x, lengths=LENGTHS)
        torch.testing.assert_close(output[k], expected)
        for a, b in zip(as_tuple(last), as_tuple(expected_last), strict=True):
            torch.testing.assert_close(a[k], b)


@pytest.mark.slow_but_each(1)
def test_jvp_agrees_with_gradient(layer: Any, x: Tensor) -> None:
    direction = torch.randn_like(x)

    def loss(x: Tensor) -> Tensor:
        return score(layer(x, lengths=LENGTHS))

    _, forward = jvp(loss, (x,), (direction,))
    torch.testing.assert_close(forward, (grad(loss)(x) * direction).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        tangent = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
    torch.testing.assert_close(tangent, forward)


def test_hessian_and_jacobians_match_autograd(cell: str) -> None:
    layer = masked(cell, 2, 3, batch_first=True).double()
    x = torch.randn(2, 3, 2, dtype=torch.float64)
    lengths = torch.tensor([3, 2])

    def outputs(x: Tensor) -> Tensor:
        return layer(x, lengths=lengths)[0]

    def loss(x: Tensor) -> Tensor:
        return score(layer(x, lengths=lengths))

    expected = torch.autograd.functional.jacobian(outputs, x)
    torch.testing.assert_close(jacrev(outputs)(x), expected)
    torch.testing.assert_close(jacfwd(outputs)(x), expected)
    torch.testing.assert_close(hessian(loss)(x), torch.autograd.functional.hessian(loss, x))


def test_nested_rows_without_steps_return_zeros(cell: str, x: Tensor) -> None:
    layer = masked(cell, bidirectional=True).double()
    nested = torch.nested.nested_tensor_from_jagged(x.new_zeros(0, INPUT), torch.tensor([0, 0, 0]))
    with torch.autograd.forward_ad.dual_level():
        output, last = layer(nested)
    assert output.values().shape == (0, 2 * (layer.proj_size or 3))
    assert all(h.eq(0).all() for h in as_tuple(last))


def test_wrong_lengths_are_refused_under_vmap(layer: Any, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected 1 length, .*, got 3"):
        vmap(lambda x: layer(x, lengths=[1, 2, 3])[0])(x)
