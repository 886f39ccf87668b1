"""The reference for every backend: `torch.nn`'s layer on each sequence alone, in float64.

Everything here is batch-first: x (N, T, I), mask (N, T), True at real steps; states (L·D, N, P).
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import masked_rnn
from masked_rnn import _dispatch, _lean

BACKENDS = ("packed", "padded", "bptt", "scan")
"""Those that run on every device"""
ON_CUDNN = ("auto", "packed", "padded", "held")
"""What a layer's `backend` can be on a GPU, if it is to call cuDNN. `held` runs nowhere else."""
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
    "lstm-proj": ("LSTM", {"proj_size": 2}),
    "rnn-tanh": ("RNN", {}),
    "rnn-relu": ("RNN", {"nonlinearity": "relu"}),
}
ONE_STATE_AND_TWO = ("gru", "lstm-proj")
"""One cell with one state, and one with two. Code that runs before a cell distinguishes cells only by their states."""
INPUT, HIDDEN = 4, 3


def torch_before(version: str) -> bool:
    """Returns whether torch is older than the given release."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split("+")[0].split(".")[:2]]

    return numbers(torch.__version__) < numbers(version)


def needs_torch(version: str, what: str) -> Any:
    """Skips a test if torch is too old. docs/versions.md lists what needs a newer release."""
    return pytest.mark.skipif(torch_before(version), reason=f"{what} needs torch {version}")


def raised_in_graph(words: str) -> str:
    """Returns the words of an error that is raised while Dynamo traces. torch 2.6 does not repeat them."""
    return "Observed exception" if torch_before("2.7") else words


def masked(cell: str, *args: Any, **kwargs: Any) -> Any:
    name, more = CELLS[cell]
    return getattr(masked_rnn, f"Masked{name}")(*(args or (INPUT, HIDDEN)), **more, **kwargs)


def plain(cell: str, *args: Any, **kwargs: Any) -> Any:
    name, more = CELLS[cell]
    return getattr(nn, name)(*(args or (INPUT, HIDDEN)), **more, **kwargs)


def as_tuple(states: Any) -> tuple[Tensor, ...]:
    return tuple(states) if isinstance(states, tuple) else (states,)


def as_hx(states: Sequence[Tensor]) -> Any:
    return states[0] if len(states) == 1 else tuple(states)


def prefix_mask(lengths: Sequence[int], steps: int) -> Tensor:
    return torch.arange(steps) < torch.tensor(lengths, dtype=torch.int64).view(-1, 1)


@dataclass
class Run:
    output: Tensor
    states: tuple[Tensor, ...]
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def pull_back(self, cotangents: Sequence[Tensor], wanted: dict[str, Tensor]) -> Run:
        pairs = [(o, c) for o, c in zip((self.output, *self.states), cotangents, strict=True) if o.requires_grad]
        outputs, pulled = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, list(wanted.values()), pulled, allow_unused=True)
        self.gradients = {
            name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(wanted.items(), found, strict=True)
        }
        return self


def state_shapes(layer: Any, batch: int) -> list[tuple[int, int, int]]:
    stacked = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = [layer.proj_size or layer.hidden_size] + ([layer.hidden_size] if layer.mode == "LSTM" else [])
    return [(stacked, batch, w) for w in widths]


def random_states(layer: Any, batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, dtype=dtype) for shape in state_shapes(layer, batch))


def held_refuses_hx(layer: Any) -> bool:
    """Returns whether `held` refuses an initial state over padding."""
    return layer.backend == "held" and layer.mode != "GRU" and layer.bidirectional


def cotangents(layer: Any, batch: int, steps: int) -> list[Tensor]:
    width = (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
    shapes: list[tuple[int, ...]] = [(batch, steps, width), *state_shapes(layer, batch)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def oracle(
    layer: Any,
    x: Tensor,
    mask: Tensor,
    states: Sequence[Tensor],
    pulled: Sequence[Tensor],
    resets: Tensor | None = None,
) -> Run:
    """Runs each sequence alone: cuts out its masked steps and puts its outputs back in place. If resets cut a sequence,
    each segment runs alone. Results are cached by layer and tensors, because a test asks once for each backend."""
    given = (*layer.parameters(), x, mask, *states, *pulled, *([] if resets is None else [resets]))
    facts = (layer.mode, layer.num_layers, layer.bidirectional, layer.bias, layer.proj_size, len(states), len(given))
    key = digest(facts, given)
    known = _known.get(key)
    if known is None:
        known = _known[key] = _each_alone(layer, x, mask, states, pulled, resets)
    return Run(known.output, known.states, dict(known.gradients))


_known: dict[bytes, Run] = {}


def digest(facts: object, tensors: Sequence[Tensor]) -> bytes:
    """Returns a key for what is computed from the tensors."""
    key = hashlib.sha256(repr(facts).encode())
    for t in tensors:
        key.update(f"{t.dtype}{tuple(t.shape)}{t.requires_grad}".encode())
        key.update(t.detach().contiguous().view(torch.uint8).numpy() if t.numel() else b"")
    return key.digest()


def _each_alone(
    layer: Any, x: Tensor, mask: Tensor, states: Sequence[Tensor], pulled: Sequence[Tensor], resets: Tensor | None
) -> Run:
    alone = _plain_wide(layer)
    x = wide(x.detach()).requires_grad_()
    states = [wide(h.detach()).requires_grad_() for h in states]
    outputs, lasts = [], []
    for n in range(x.size(0)):
        own = tuple(h[:, n : n + 1] for h in states)
        output = x.new_zeros(1, x.size(1), pulled[0].size(-1))
        ends = []
        segments = cut(mask[n], None if resets is None else resets[n])
        for k, (times, anew) in enumerate(segments):
            starts = (k == 0 and not anew, k == len(segments) - 1)
            ran, end = alone(x[n : n + 1, times], as_hx(_of_directions(layer, own, starts)))
            output = output.index_copy(1, times, ran)
            ends.append(as_tuple(end))
        if ends:
            # The last segment leaves the forward state, the first segment the backward state.
            forwards = _of_directions(layer, ends[-1], (True, False))
            backwards = _of_directions(layer, ends[0], (False, True))
            own = tuple(a + b for a, b in zip(forwards, backwards, strict=True))
        outputs.append(output)
        lasts.append(own)
    run = Run(torch.cat(outputs), tuple(torch.cat(h, 1) for h in zip(*lasts, strict=True)))
    wanted = {"x": x, **{f"hx[{s}]": h for s, h in enumerate(states)}, **dict(alone.named_parameters())}
    return run.pull_back([wide(c) for c in pulled], wanted)


def cut(mask: Tensor, resets: Tensor | None) -> list[tuple[Tensor, bool]]:
    """Returns the times of each segment's real steps (T,), and whether a reset stands before the segment."""
    segments: list[tuple[list[int], bool]] = []
    anew = False
    for t, real in enumerate(mask.tolist()):
        anew = anew or (resets is not None and bool(resets[t]))
        if real:
            if anew or not segments:
                segments.append(([], anew))
            segments[-1][0].append(t)
            anew = False
    return [(torch.tensor(times), anew) for times, anew in segments]


def _of_directions(layer: Any, states: Sequence[Tensor], kept: tuple[bool, bool]) -> tuple[Tensor, ...]:
    """Returns states (L·D, 1, P), zero in the directions that are not kept."""
    D = 2 if layer.bidirectional else 1
    keep = torch.tensor(kept[:D]).repeat(layer.num_layers).view(-1, 1, 1)
    return tuple(torch.where(keep, h, torch.zeros_like(h)) for h in states)


def wide(t: Tensor) -> Tensor:
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


def _plain_wide(layer: Any) -> Any:
    kind = next(k for k in (nn.GRU, nn.LSTM, nn.RNN) if isinstance(layer, k))
    more = {"proj_size": layer.proj_size} if layer.mode == "LSTM" else {}
    if layer.mode.startswith("RNN"):
        more = {"nonlinearity": layer.nonlinearity}
    alone = kind(
        layer.input_size,
        layer.hidden_size,
        layer.num_layers,
        bias=layer.bias,
        batch_first=True,
        bidirectional=layer.bidirectional,
        **more,
    ).to(wide(layer.weight_ih_l0).dtype)
    alone.load_state_dict(copy.deepcopy(layer.state_dict()))
    return alone


def call(layer: Any, x: Tensor, states: Sequence[Tensor] | None, pulled: Sequence[Tensor], **given: Any) -> Run:
    """Runs the layer under test in its own layout, and returns batch-first results."""
    x = x.detach().clone().requires_grad_()
    leaves = [] if states is None else [h.detach().clone().to(x.dtype).requires_grad_() for h in states]
    if not layer.batch_first:
        given.update({name: given[name].t() for name in ("mask", "resets") if name in given})
    output, last = layer(x if layer.batch_first else x.transpose(0, 1), as_hx(leaves) if leaves else None, **given)
    output = output if layer.batch_first else output.transpose(0, 1)
    lasts = as_tuple(last)
    if layer.flatten_hidden:
        lasts = tuple(
            h.unflatten(1, (shape[0], shape[2])).transpose(0, 1)
            for h, shape in zip(lasts, state_shapes(layer, x.size(0)), strict=True)
        )
    wanted = {"x": x, **{f"hx[{s}]": h for s, h in enumerate(leaves)}, **dict(layer.named_parameters())}
    return Run(output, lasts).pull_back([c.to(x.dtype) for c in pulled], wanted)


def assert_same(found: Run, expected: Run, atol: float = 1e-10, note: object = "") -> None:
    _assert_close(found.output, expected.output, atol, "output", note)
    for s, (a, b) in enumerate(zip(found.states, expected.states, strict=True)):
        _assert_close(a, b, atol, f"last state {s}", note)
    for name, gradient in found.gradients.items():
        _assert_close(gradient, expected.gradients[name], atol, f"gradient of {name}", note)


def _assert_close(found: Tensor, expected: Tensor, atol: float, what: str, note: object) -> None:
    found = wide(found)
    if found.shape == expected.shape and bool(((found - expected).abs() <= atol).all()):
        return  # torch.testing.assert_close takes ten times as long
    torch.testing.assert_close(found, expected, rtol=0, atol=atol, msg=_told(what, note))


def _told(what: str, note: object) -> Callable[[str], str]:
    return lambda message: f"{what} {note}: {message}"


def every(**options: Sequence[Any]) -> list[dict[str, Any]]:
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def which_ran(monkeypatch: Any) -> list[str]:
    """Returns a list to which each backend that runs from here on adds its name."""
    names: list[str] = []
    run = _dispatch._run

    def noting(name: str, call: Any) -> Any:
        names.append(name)
        return run(name, call)

    def noting_lean(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            results = function(*given)
            names.append(name)
            return results

        return call

    monkeypatch.setattr(_dispatch, "_run", noting)
    monkeypatch.setattr(_lean, "run_job", noting_lean("bptt", _lean.run_job))
    monkeypatch.setattr(_lean, "_run_kernel", noting_lean("padded", _lean._run_kernel))
    return names
