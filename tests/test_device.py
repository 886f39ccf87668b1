"""Tests on a device that is not the CPU: results, and ops that wait for the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from support.batch import HOLES, LENGTHS, RESETS, STEPS
from support.oracle import (
    BACKENDS,
    INPUT,
    ON_CUDNN,
    ONE_STATE_AND_TWO,
    Run,
    as_tuple,
    assert_same,
    call,
    cotangents,
    held_refuses_hx,
    masked,
    oracle,
    plain,
    prefix_mask,
    random_states,
)
from support.simulated_device import DEVICE, FUSED, HOST, SimulatedTensor, watching
from support.strict_kernel import with_cudnn
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from masked_rnn import _dispatch, _torch
from masked_rnn._backends import padded as padded_backend
from masked_rnn._backends import scan
from masked_rnn._call import context
from masked_rnn._capture import custom_op

FORMS: dict[str, dict[str, Any]] = {
    "list": {"lengths": LENGTHS},
    "array": {"lengths": np.array(LENGTHS, dtype=np.int32)},
    "host": {"lengths": torch.tensor(LENGTHS)},
    "device": {"lengths": torch.tensor(LENGTHS).to(DEVICE)},
    "device-int32": {"lengths": torch.tensor(LENGTHS, dtype=torch.int32).to(DEVICE)},
    "host-mask": {"mask": HOLES},
    "device-mask": {"mask": HOLES.to(DEVICE)},
    "neither": {},
}
WITH_RESETS: dict[str, dict[str, Any]] = {
    "host-resets": {"lengths": LENGTHS, "resets": RESETS},
    "host-resets-mask": {"mask": HOLES, "resets": RESETS},
    "device-resets": {"lengths": torch.tensor(LENGTHS).to(DEVICE), "resets": RESETS.to(DEVICE)},
    "device-resets-mask": {"mask": HOLES.to(DEVICE), "resets": RESETS.to(DEVICE)},
    "device-resets-alone": {"resets": RESETS.to(DEVICE)},
}
CALLS = [  # the form, num_layers, bidirectional, batch_first, hx
    ("list", 1, False, True, "flat"),
    ("array", 2, True, False, "none"),
    ("host", 1, True, True, "whole"),
    ("device", 2, True, False, "whole"),
    ("device-int32", 1, False, True, "none"),
    ("host-mask", 1, True, False, "flat"),
    ("device-mask", 2, True, True, "whole"),
    ("neither", 2, True, True, "flat"),
    ("host-resets", 2, True, False, "flat"),
    ("host-resets-mask", 1, True, True, "whole"),
    ("device-resets", 2, True, True, "whole"),
    ("device-resets-mask", 1, False, False, "flat"),
    ("device-resets-alone", 1, True, True, "whole"),
]
UP = ["upload"]
WAITS = {  # for lengths on the host, a mask on the host, and either on the device
    "auto": (2 * UP, UP, []),
    # A mask is copied to the device and back.
    "packed": (2 * UP, [*UP, "_to_copy", *2 * UP], ["_to_copy", *2 * UP]),
    "padded": (UP, UP, []),
    "scan": (UP, UP, []),
}


def see_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cudnn(monkeypatch, lambda x: isinstance(x, SimulatedTensor))


@pytest.fixture(
    params=[
        *(pytest.param(("fused", name), marks=pytest.mark.slow) for name in ("auto", "packed", "padded")),
        *(("own", name) for name in ("bptt", "scan")),
        *(("cudnn", name) for name in ON_CUDNN),
    ],
    ids="-".join,
)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A layer's `backend`, with the kernels that it calls: ATen's fused cells, cuDNN or its own."""
    kernels, name = request.param
    if kernels == "cudnn":
        see_cudnn(monkeypatch)
    return str(name)


def to(device: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return {name: to(device, v) for name, v in value.items()}
    if isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value):
        return [to(device, v) for v in value]
    return value.to(device) if isinstance(value, Tensor) else value


def home(run: Run) -> Run:
    """Moves a run to the CPU. All of it has to be on the device."""
    tensors = [run.output, *run.states, *run.gradients.values()]
    assert all(isinstance(t, SimulatedTensor) for t in tensors)
    return Run(run.output.cpu(), tuple(to("cpu", run.states)), to("cpu", run.gradients))


@pytest.fixture(params=["fused", "cudnn"])
def waits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`WAITS` of each backend, with ATen's fused cells and with cuDNN."""
    if request.param == "fused":
        return WAITS
    see_cudnn(monkeypatch)
    return {**WAITS, "held": WAITS["padded"]}


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("case", CALLS, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("cell", [*ONE_STATE_AND_TWO, "rnn-tanh"])
def test_every_call_form_matches_oracle(cell: str, backend: str, case: Any) -> None:
    form, layers, bidirectional, batch_first, hx = case
    options = {"num_layers": layers, "bidirectional": bidirectional, "batch_first": batch_first}
    layer = masked(cell, backend=backend, **options).double()
    given = {**FORMS, **WITH_RESETS}[form]
    mask = HOLES if "mask" in given else prefix_mask(LENGTHS if "lengths" in given else [STEPS] * 4, STEPS)
    x = torch.randn(4, STEPS, INPUT, dtype=torch.float64).masked_fill(~mask.unsqueeze(-1), torch.nan)
    states, pulled = random_states(layer, 4), cotangents(layer, 4, STEPS)
    if hx == "none":
        states = tuple(map(torch.zeros_like, states))
    expected = oracle(layer, x.nan_to_num(), mask, states, pulled, RESETS if "resets" in given else None)
    own: Any = None if hx == "none" else states
    if hx == "flat":
        own = [h.transpose(0, 1).flatten(1) for h in states]
        for s in range(len(own)):
            expected.gradients[f"hx[{s}]"] = expected.gradients[f"hx[{s}]"].transpose(0, 1).flatten(1)
    called = layer.to(DEVICE), x.to(DEVICE), to(DEVICE, own), to(DEVICE, pulled)
    if held_refuses_hx(layer) and own is not None and form != "neither":
        with pytest.raises(ValueError, match="can't hold hx"):
            call(*called, **given)
        return
    found = home(call(*called, **given))
    assert_same(found, expected)
    for padded in (found.output, found.gradients["x"]):
        assert not padded[~mask].any()


EDGES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "unbatched": ((STEPS, INPUT), {}),
    "unbatched, int": ((STEPS, INPUT), {"lengths": 3}),
    "unbatched, tensor": ((STEPS, INPUT), {"lengths": torch.tensor(3)}),
    "unbatched, mask": ((STEPS, INPUT), {"mask": HOLES[1]}),
    "empty rows, list": ((2, STEPS, INPUT), {"lengths": [0, 0]}),
    "empty rows, tensor": ((2, STEPS, INPUT), {"lengths": torch.tensor([0, 0])}),
    "empty rows, mask": ((2, STEPS, INPUT), {"mask": torch.zeros(2, STEPS, dtype=torch.bool)}),
    "no rows": ((0, STEPS, INPUT), {"lengths": torch.zeros(0, dtype=torch.int64)}),
    "no rows, mask": ((0, STEPS, INPUT), {"mask": torch.zeros(0, STEPS, dtype=torch.bool)}),
    "no steps": ((2, 0, INPUT), {"lengths": torch.tensor([0, 0])}),
}


def outcome(layer: Any, x: Any, leaf: Tensor, **given: Any) -> list[Tensor]:
    """Returns the output, last states and gradients on the CPU. All of them have to be on the leaf's device."""
    output, last = layer(x, **given)
    if isinstance(output, PackedSequence):
        output, _ = pad_packed_sequence(output, layer.batch_first)
    elif output.is_nested:
        output = output.values()
    results = [output, *as_tuple(last)]
    loss = sum(((t + 1) ** 3).sum() for t in results)
    wanted = [leaf, *layer.parameters()]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    results += [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, gradients, strict=True)]
    assert {t.device for t in results} == {leaf.device}
    return to("cpu", results)


def assert_agree(found: list[Tensor], expected: list[Tensor], note: str = "") -> None:
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a, b, msg=lambda told, k=k: f"{note}, result {k}: {told}")


@pytest.fixture
def layer(cell: str) -> Any:
    return masked(cell, bidirectional=True, num_layers=2, batch_first=True).double()


@pytest.fixture
def there(layer: Any, backend: str) -> Any:
    """The same layer on the device. It runs by `backend`."""
    moved = copy.deepcopy(layer).to(DEVICE)
    moved.backend = backend
    return moved


@pytest.mark.slow_but_each(1)
@pytest.mark.parametrize("cell", ONE_STATE_AND_TWO)
def test_unbatched_and_empty_input_match_cpu(layer: Any, there: Any) -> None:
    for name, (shape, given) in EDGES.items():
        x = torch.randn(shape, dtype=torch.float64)
        found, expected = (
            outcome(own, leaf, leaf, **to(device, given))
            for own, device in ((there, DEVICE), (layer, "cpu"))
            for leaf in [x.to(device).requires_grad_()]
        )
        assert_agree(found, expected, name)


@pytest.mark.slow_but_each(1)
@pytest.mark.parametrize("cell", ONE_STATE_AND_TWO)
def test_packed_and_nested_input_match_cpu(layer: Any, there: Any) -> None:
    lengths, x = torch.tensor([3, 5, 1, 4]), torch.randn(4, STEPS, INPUT, dtype=torch.float64)

    def run(own: Any, device: Any, form: str) -> list[Tensor]:
        leaf = x.to(device).requires_grad_()
        if form == "packed":
            return outcome(own, pack_padded_sequence(leaf, lengths, batch_first=True, enforce_sorted=False), leaf)
        offsets = torch.tensor([0, 5, 7, 12, 20]).to(device)
        own_lengths = torch.tensor([0, 0, 0, 0] if form == "empty" else [3, 0, 5, 8]).to(device)
        rows = leaf.flatten(0, 1)
        nested = torch.nested.nested_tensor_from_jagged(rows, offsets, None if form == "nested" else own_lengths)
        return outcome(own, nested, leaf)

    for form in ("packed", "nested", "nested with room", "empty"):
        assert_agree(run(there, DEVICE, form), run(layer, "cpu", form), form)


@pytest.mark.slow_but_each(1)
@pytest.mark.parametrize("cell", ONE_STATE_AND_TWO)
def test_second_derivatives_match_cpu(layer: Any, there: Any) -> None:
    x, lengths = torch.randn(2, 3, INPUT, dtype=torch.float64), torch.tensor([3, 1])

    def run(own: Any, device: Any) -> list[Tensor]:
        leaf = x.to(device).requires_grad_()
        (dx,) = torch.autograd.grad(own(leaf, lengths=lengths.to(device))[0].square().sum(), leaf, create_graph=True)
        return to("cpu", torch.autograd.grad(dx.square().sum(), [leaf, own.weight_ih_l0, own.weight_hh_l1_reverse]))

    assert_agree(run(there, DEVICE), run(layer, "cpu"))


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", ["lstm-proj", "rnn-relu"])  # `padded` has code for these alone
def test_device_ops_wait_only_where_documented(cell: str, form: str, waits: dict[str, Any]) -> None:
    """No op waits, forward or backward, except in `packed`, which has to read lengths that are on the device.

    Lengths or a mask on the host are copied to the device, or the two indices that `packed` makes of them. The copy
    waits too, but only for itself.
    """
    for backend in waits:
        layer = masked(cell, num_layers=2, bidirectional=True, batch_first=True, backend=backend).to(DEVICE)
        x = torch.randn(4, STEPS, INPUT).to(DEVICE).requires_grad_()
        with watching() as noted:
            output, last = layer(x, **FORMS[form])
            (output.sum() + sum(h.sum() for h in as_tuple(last))).backward()
        place = 2 if form.startswith("device") else int(form == "host-mask")
        is_small = "held" in waits and not layer.proj_size  # cuDNN runs all steps of a padded batch at once
        expected = waits["padded" if backend == "auto" and is_small else backend]
        assert noted == (expected[place] if FORMS[form] else []), backend


@pytest.mark.slow_but_each(1)
@pytest.mark.parametrize("form", WITH_RESETS)
@pytest.mark.parametrize("cell", ONE_STATE_AND_TWO)
def test_resets_wait_only_where_documented(cell: str, form: str, ran: list[str]) -> None:
    """`auto` cuts rows at their resets on the host, which has to read tensors of the device. `scan` reads nothing."""
    for backend in ("auto", "scan"):
        layer = masked(cell, num_layers=2, bidirectional=True, batch_first=True, backend=backend).to(DEVICE)
        x = torch.randn(4, STEPS, INPUT).to(DEVICE).requires_grad_()
        with watching() as waits:
            output, last = layer(x, **WITH_RESETS[form])
            (output.sum() + sum(h.sum() for h in as_tuple(last))).backward()
        # A mask is copied to the device first.
        assert ("_to_copy" in waits) == (
            backend == "auto" and (form.startswith("device") or form == "host-resets-mask")
        )
        if backend == "scan" and form.startswith("device"):
            assert not waits
    assert ran == ["packed", "scan"]


@pytest.mark.parametrize("cell", ONE_STATE_AND_TWO)
def test_auto_pads_rows_unless_mostly_padding(cell: str, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are padded if a kernel runs all steps at once, unless they would be nearly all padding."""
    monkeypatch.setattr(_dispatch, "runs_all_steps_at_once", lambda *_: True)
    layer = masked(cell, num_layers=2, bidirectional=True, batch_first=True).double()
    there, x = copy.deepcopy(layer).to(DEVICE), torch.randn(16, 30, INPUT, dtype=torch.float64)
    resets = torch.zeros(16, 30, dtype=torch.bool)
    resets[1:] = True
    for packed, lengths in product((True, False), ([30] * 16, [30] + [1] * 15)):
        found, expected = (
            outcome(own, pack_padded_sequence(leaf, torch.tensor(lengths), batch_first=True), leaf)
            if packed
            else outcome(own, leaf, leaf, resets=resets if min(lengths) == 1 else resets.new_zeros(16, 30))
            for own, d in ((there, DEVICE), (layer, "cpu"))
            for leaf in [x.to(d).requires_grad_()]
        )
        assert_agree(found, expected)
    assert ran == ["padded", "bptt", "packed", "bptt", "padded", "bptt", "packed", "bptt"]


def test_wrong_lengths_on_device_raise_without_waiting(waits: dict[str, Any]) -> None:
    layer = masked("gru", batch_first=True, enforce_sorted=True).to(DEVICE)
    x = torch.randn(2, STEPS, INPUT).to(DEVICE)
    wrong = (([STEPS + 1, 1], "out of range"), ([1, -1], "out of range"), ([1, 2], "must decrease"))
    for layer.backend, (lengths, fault) in product(waits, wrong):
        with watching() as noted, pytest.raises(RuntimeError, match=fault):
            layer(x, lengths=torch.tensor(lengths).to(DEVICE))
        assert noted == ["upload"]  # of the test's own lengths
        with watching() as noted, pytest.raises(ValueError, match=r"lengths"):
            layer(x, lengths=lengths)
        assert not noted


@pytest.mark.parametrize("backend", WAITS)
def test_device_without_async_assert_reads_lengths(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on MPS and XPU, lengths are read from the device, and an error names the element."""

    def lacking(*_: Any) -> None:
        raise NotImplementedError("The operator 'aten::_assert_async.msg' is not implemented for this device")

    monkeypatch.setattr(_torch, "_assert_async", lacking)
    layer = masked("gru", batch_first=True, backend=backend, enforce_sorted=True)
    there, x = copy.deepcopy(layer).to(DEVICE), torch.randn(2, STEPS, INPUT)
    lengths = torch.tensor([3, 1])
    for with_name in (True, False):  # an old or a later release may have no such name
        if not with_name:
            monkeypatch.setattr(_torch, "_assert_async", None)
        found = there(x.to(DEVICE), lengths=lengths.to(DEVICE))[0].cpu()
        torch.testing.assert_close(found, layer(x, lengths=lengths)[0])
        for wrong, fault in (
            ([STEPS + 1, 1], r"lengths\[0\] = 6"),
            ([1, -1], r"lengths\[1\] = -1"),
            ([1, 2], r"lengths\[1\] = 2"),
        ):
            with pytest.raises(ValueError, match=fault):
                there(x.to(DEVICE), lengths=torch.tensor(wrong).to(DEVICE))


@pytest.fixture
def _captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the device record a graph. A wait, or a copy from the host, would end the recording."""
    for module in (context, _torch):
        monkeypatch.setattr(module, "is_capturing", lambda device: device.type == DEVICE.type)


@pytest.mark.slow_but_each(2)
@pytest.mark.usefixtures("_captured")
@pytest.mark.parametrize("form", [*FORMS, *WITH_RESETS])
@pytest.mark.parametrize("cell", ONE_STATE_AND_TWO)
def test_graph_capture_refuses_host_values(cell: str, backend: str, form: str) -> None:
    """A call that needs values from the host is refused with the reason. Other calls run and never wait."""
    layer = masked(cell, num_layers=2, bidirectional=True, batch_first=True)
    there, given = copy.deepcopy(layer).to(DEVICE), {**FORMS, **WITH_RESETS}[form]
    there.backend, x = backend, torch.randn(4, STEPS, INPUT)
    leaf = x.to(DEVICE).requires_grad_()
    plans = backend == "bptt" or (backend == "packed" and form != "neither")
    cuts = backend in ("padded", "held") and "resets" in form
    with watching() as noted:
        if plans or cuts or not (form.startswith("device") or form == "neither"):
            with pytest.raises(ValueError, match=r"a CUDA graph is being recorded[,:] "):
                there(leaf, **given)
            return
        output, _ = there(leaf, **given)
        output.sum().backward()
        assert not noted
    torch.testing.assert_close(output.detach().cpu(), layer(x, **to("cpu", given))[0])


@pytest.mark.parametrize("at_once", [False, True])
def test_auto_follows_the_device_of_lengths(
    at_once: bool, ran: list[str], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for no lengths. Otherwise it takes `padded` if a kernel runs all steps of a padded batch at once."""
    monkeypatch.setattr(_dispatch, "runs_all_steps_at_once", lambda *_: at_once)
    layer, x = masked("gru", batch_first=True).to(DEVICE), torch.randn(4, STEPS, INPUT).to(DEVICE)

    def taken(form: str) -> str:
        layer(x, **{**FORMS, **WITH_RESETS}[form])
        return ran[-1]

    for form in ("neither", "list", "host"):
        assert taken(form) == ("padded" if at_once else "packed")
    assert taken("device") == taken("device-mask") == "padded"
    request.getfixturevalue("_captured")
    assert taken("neither") == taken("device") == taken("device-mask") == "padded"
    assert taken("device-resets") == "scan"
    batch = pack_padded_sequence(torch.randn(4, STEPS, INPUT), torch.tensor([5, 3, 2, 2]), True)
    layer(PackedSequence(batch.data.to(DEVICE), batch.batch_sizes))
    assert ran[-1] == "packed"


@pytest.mark.usefixtures("_captured")
def test_graph_capture_takes_packed_and_refuses_nested() -> None:
    layer = masked("gru", bidirectional=True)
    there, x = copy.deepcopy(layer).to(DEVICE), torch.randn(STEPS, 3, INPUT)
    rows = pack_padded_sequence(x, torch.tensor([3, 5, 1]), enforce_sorted=False)
    moved = PackedSequence(
        rows.data.to(DEVICE), rows.batch_sizes, rows.sorted_indices.to(DEVICE), rows.unsorted_indices.to(DEVICE)
    )
    torch.testing.assert_close(there(moved)[0].data.cpu(), layer(rows)[0].data)
    for there.backend in ("padded", "scan", "bptt"):
        with pytest.raises(ValueError, match="it plans its steps on the CPU, and a CUDA graph"):
            there(moved)
    nested = torch.nested.nested_tensor_from_jagged(x[:, 0].to(DEVICE), torch.tensor([0, 2, 5]).to(DEVICE))
    for there.backend in ("auto", "padded", "packed", "scan", "bptt"):
        with pytest.raises(ValueError, match="it plans its steps on the CPU, and a CUDA graph"):
            there(nested)


def test_capture_check_asks_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] == 1)
    assert _torch.is_capturing(torch.device("cuda", 1))
    assert not _torch.is_capturing(torch.device("cuda", 0))
    assert not _torch.is_capturing(HOST)
    monkeypatch.setattr(context, "is_capturing", lambda _device: pytest.fail("there is no device to ask"))
    with FakeTensorMode():
        assert masked("gru")(torch.randn(STEPS, 2, INPUT), lengths=torch.tensor([1, 2]))[0].shape == (STEPS, 2, 3)


@pytest.mark.parametrize(("most", "more"), [(128, 192), (256, 384)])
def test_auto_uses_padded_within_cudnn_limits(
    most: int, more: int, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` takes `padded` if cuDNN runs all steps at once, by dtype, size and gradient. Dropout counts as one."""
    see_cudnn(monkeypatch)
    cell = "gru" if most == 128 else "rnn-tanh"

    def taken(hidden: int, dtype: torch.dtype = torch.float32, learns: bool = True, dropout: float = 0.0) -> str:
        layer = masked(cell, INPUT, hidden, num_layers=2, dropout=dropout).to(dtype).to(DEVICE)
        with torch.set_grad_enabled(learns):
            layer(torch.randn(3, 2, INPUT, dtype=dtype).to(DEVICE), lengths=[3, 1])
        return ran[-1]

    assert taken(most) == taken(more, learns=False) == taken(most, torch.float16) == "padded"
    assert taken(most + 1) == taken(more + 1, learns=False) == taken(more, dropout=0.5, learns=False) == "packed"
    assert taken(8, torch.float64) == taken(8, torch.float64, learns=False) == "packed"


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_lengths_follow_input_device_but_hx_does_not(backend: str) -> None:
    """Lengths and masks are moved to the input's device. The input and hx are not moved."""
    layer = masked("gru", batch_first=True, backend=backend)
    x = torch.randn(4, STEPS, INPUT)
    forms = {**FORMS, **WITH_RESETS}
    for form in ("device", "device-int32", "device-mask", "device-resets", "device-resets-mask"):
        found, expected = (
            outcome(layer, leaf, leaf, **to(d, forms[form]))
            for d in (DEVICE, "cpu")
            for leaf in [x.clone().requires_grad_()]
        )
        assert_agree(found, expected, form)
    state = torch.zeros(1, 4, 3)
    with pytest.raises(RuntimeError, match="same device"):
        layer(x, state.to(DEVICE), LENGTHS)
    layer = layer.to(DEVICE)
    with pytest.raises(RuntimeError, match="same device"):
        layer(x.to(DEVICE), state, LENGTHS)
    with pytest.raises(RuntimeError, match="same device"):
        layer(x, lengths=LENGTHS)


def test_simulated_device_refuses_mixing_and_notes_waits() -> None:
    x, i = torch.randn(3, 2), torch.tensor([0, 2])
    there, mask, at = x.to(DEVICE), (x > 0).to(DEVICE), i.to(DEVICE)
    for mixing in (
        lambda: there + x,
        lambda: x + there[0, 0],
        lambda: there @ x.t(),
        lambda: torch.cat([there, x]),
        lambda: there.index_select(0, i),
        lambda: x[at],
        lambda: torch.where(x > 0, there, 0.0),
        lambda: there.index_copy(0, at, x[:2]),
    ):
        with pytest.raises(RuntimeError, match="on the same device"):
            mixing()
    allowed = there * torch.tensor(2.0) + there[i][0] + torch.where(mask, there, torch.tensor(0.0))
    assert allowed.device == DEVICE
    for waiting in (
        lambda: there.sum().item(),
        lambda: bool(mask.all()),
        lambda: mask.nonzero(),
        lambda: there[mask],
        lambda: there.masked_select(mask),
        lambda: there.unique(),
        lambda: torch.equal(there, there),
        lambda: torch.repeat_interleave(at),
        lambda: there.cpu(),
        lambda: there.tolist(),
        lambda: torch.empty(3, 2).copy_(there),
    ):
        with watching() as waits:
            waiting()
        assert len(waits) == 1
    with watching() as waits:
        there[i] = torch.arange(2, device=DEVICE).float() + torch.repeat_interleave(at, output_size=2)[:1]
        torch.tensor([1]).to(DEVICE)
    assert waits == ["upload"]


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize("given", ["neither", "lengths", "resets"])
def test_operator_runs_forced_bptt_on_device(
    cell: str, steps: int, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` runs PyTorch's kernel there."""
    for other in (padded_backend, scan):
        monkeypatch.setattr(other, "run", lambda _call: pytest.fail("another backend ran"))
    layer = masked(cell, bidirectional=True).double()
    lengths = torch.tensor([steps, 1, 0, 1]) if given == "lengths" else None
    resets = RESETS[:, :steps].t().contiguous() if given == "resets" else None
    x, states = torch.randn(steps, 4, INPUT, dtype=torch.float64), list(random_states(layer, 4))
    tensors = (x, lengths, resets, states, [p.detach() for p in layer.parameters()])
    pulled = [c.transpose(0, 1) if k == 0 else c for k, c in enumerate(cotangents(layer, 4, steps))]

    def run(device: Any) -> list[Tensor]:
        called = (*to(device, list(tensors)), layer.mode, False, "bptt")
        *results, saved, kernel_ran = custom_op._forward(*called, True)
        gradients = custom_op._backward(*called, saved, kernel_ran, to(device, pulled), True, True)
        return to("cpu", [*results, *gradients])

    assert_agree(run(DEVICE), run("cpu"))


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_torch_layers_run_fused_cells_on_device(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for name, kernel in FUSED.items():
        monkeypatch.setitem(FUSED, name, lambda *a, name=name, kernel=kernel: (ran.append(name), kernel(*a))[1])
    for bias in (False, True):
        layer = plain(cell, bias=bias).double()
        x = torch.randn(STEPS, 2, INPUT, dtype=torch.float64)
        there = copy.deepcopy(layer).to(DEVICE)
        leaves = [x.clone().requires_grad_(), x.to(DEVICE).requires_grad_()]
        assert_agree(outcome(there, leaves[1], leaves[1]), outcome(layer, leaves[0], leaves[0]))
    assert set(ran) == {name for name in FUSED if f"_{cell}_" in name}
