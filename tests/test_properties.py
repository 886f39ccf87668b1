"""Changes that must not matter: more padding, another order of the batch, garbage in padding, splitting the batch."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracle import BACKENDS, CELLS, INPUT, as_tuple, masked
from torch import Tensor

SETTINGS = settings(max_examples=40, derandomize=True)


@st.composite
def cases(draw: st.DrawFn, layers: Any = st.integers(1, 2), both_ways: Any = st.booleans()) -> Any:  # noqa: B008
    layer = masked(
        draw(st.sampled_from(list(CELLS))),
        num_layers=draw(layers),
        bidirectional=draw(both_ways),
        bias=draw(st.booleans()),
        batch_first=True,
        backend=draw(st.sampled_from(["auto", *BACKENDS])),
    ).double()
    steps = draw(st.integers(1, 9))
    lengths = draw(st.lists(st.integers(0, steps), min_size=1, max_size=6))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    return layer, torch.randn(len(lengths), steps, INPUT, dtype=torch.float64), torch.tensor(lengths)


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a[0], b[0])
    for s, t in zip(as_tuple(a[1]), as_tuple(b[1]), strict=True):
        torch.testing.assert_close(s, t)


def map_states(last: Any, change: Any) -> Any:
    return tuple(change(h) for h in as_tuple(last))


@SETTINGS
@given(cases(), st.integers(1, 7))
def test_more_padding_changes_nothing(case: tuple[Any, Tensor, Tensor], more: int) -> None:
    layer, x, lengths = case
    output, last = layer(x, lengths=lengths)
    padding = torch.full((x.size(0), more, INPUT), torch.nan, dtype=x.dtype)
    longer, same = layer(torch.cat([x, padding], 1), lengths=lengths)
    close((longer[:, : x.size(1)], same), (output, last))
    assert longer[:, x.size(1) :].eq(0).all()


@SETTINGS
@given(cases(), st.randoms(use_true_random=False))
def test_batch_order_does_not_matter(case: tuple[Any, Tensor, Tensor], random: Any) -> None:
    layer, x, lengths = case
    order = list(range(x.size(0)))
    random.shuffle(order)
    output, last = layer(x, lengths=lengths)
    close(layer(x[order], lengths=lengths[order]), (output[order], map_states(last, lambda h: h[order])))


@SETTINGS
@given(cases(), st.integers(0, 6))
def test_split_batch_gives_same_results(case: tuple[Any, Tensor, Tensor], at: int) -> None:
    layer, x, lengths = case
    halves = [layer(x[part], lengths=lengths[part]) for part in (slice(at), slice(at, None)) if len(lengths[part])]
    outputs, lasts = zip(*halves, strict=True)
    joined = tuple(torch.cat(h) for h in zip(*(as_tuple(last) for last in lasts), strict=True))
    close(layer(x, lengths=lengths), (torch.cat(outputs), joined))


@SETTINGS
@given(cases(), st.sampled_from([torch.nan, torch.inf, -torch.inf, 0.0]))
def test_garbage_in_padding_changes_nothing(case: tuple[Any, Tensor, Tensor], garbage: float) -> None:
    layer, x, lengths = case
    mask = torch.arange(x.size(1)) < lengths.unsqueeze(1)
    close(layer(torch.where(mask.unsqueeze(-1), x, garbage), lengths=lengths), layer(x, lengths=lengths))


@SETTINGS
@given(cases())
def test_prefix_mask_equals_lengths(case: tuple[Any, Tensor, Tensor]) -> None:
    layer, x, lengths = case
    mask = torch.arange(x.size(1)) < lengths.unsqueeze(1)
    close(layer(x, mask=mask), layer(x, lengths=lengths))


@SETTINGS
@given(cases(layers=st.just(1), both_ways=st.just(True)))
def test_reversed_sequences_swap_directions(case: tuple[Any, Tensor, Tensor]) -> None:
    """If sequences are reversed and the directions' weights exchanged, the outputs are reversed and exchanged."""
    layer, x, lengths = case
    swapped = masked_like(layer)
    turned = x.clone()
    for n, length in enumerate(lengths.tolist()):
        turned[n, :length] = x[n, :length].flip(0)
    output, _ = layer(x, lengths=lengths)
    other, _ = swapped(turned, lengths=lengths)
    P = layer.proj_size or layer.hidden_size
    for n, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(other[n, :length].flip(0), output[n, :length].roll(P, -1))


def masked_like(layer: Any) -> Any:
    import copy

    other = copy.deepcopy(layer)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            twin = name.removesuffix("_reverse") if name.endswith("_reverse") else f"{name}_reverse"
            getattr(other, twin).copy_(parameter)
    return other
