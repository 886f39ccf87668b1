"""Every dtype that a parameter can have, on each backend: right, or refused as torch.nn refuses it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.batch import BATCH, HOLES, LENGTHS, RESETS, STEPS
from support.oracle import (
    BACKENDS,
    INPUT,
    ONE_STATE_AND_TWO,
    as_hx,
    as_tuple,
    assert_same,
    call,
    cotangents,
    masked,
    oracle,
    plain,
    prefix_mask,
    random_states,
)
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_sequence

GIVEN: dict[str, dict[str, Any]] = {
    "neither": {},
    "lengths": {"lengths": LENGTHS},
    "mask": {"mask": HOLES},
    "resets": {"lengths": LENGTHS, "resets": RESETS},
}
DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)
QUANTIZED = ("qint8", "quint8", "qint32", "quint4x2", "quint2x4")
FLOATING = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
COMPLEX = [torch.complex128, torch.complex64]


pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{words}:UserWarning")
    for words in ("Complex modules are a new feature", "B?Complex(Half|32) support is experimental", ".*quantiz")
]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    if name_of(dtype) in QUANTIZED[:3]:
        return torch.quantize_per_tensor(t.float(), 0.1, 0, dtype)
    if name_of(dtype) in QUANTIZED:
        return torch._empty_affine_quantized(t.shape, scale=0.1, zero_point=0, dtype=dtype)
    if dtype.is_complex:
        return torch.complex(t, t.roll(1)).mul(0.4).to(dtype)  # away from the poles of tanh
    try:
        return (t if dtype.is_floating_point else t.mul(3).abs()).to(dtype)
    except RuntimeError:  # torch 2.6 raises this one, later releases NotImplementedError, a kind of it
        return torch.empty(t.shape, dtype=dtype)


def cast_layer(layer: Any, dtype: torch.dtype) -> Any:
    learns = dtype.is_floating_point or dtype.is_complex
    for name, p in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(cast(p.detach(), dtype), requires_grad=learns))
    return layer


def refusal(run: Any) -> Exception | None:
    try:
        run()
    except Exception as error:
        return error
    return None


def cure_for(mode: str, dtype: torch.dtype) -> str:
    if dtype.is_complex and mode == "RNN_RELU":
        return "."
    wide = "torch.complex64" if dtype.is_complex else "torch.float32"
    if dtype.is_floating_point or dtype.is_complex:
        return f". Convert both: layer.to({wide}), input.to({wide})."
    return f". Make the parameters and the input of dtype {wide}."


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.complex32], ids=name_of)
def test_cure_for_a_dtype_works(cell: str, dtype: torch.dtype) -> None:
    layer = cast_layer(masked(cell, batch_first=True), dtype)
    x = cast(torch.randn(BATCH, STEPS, INPUT), dtype)
    with pytest.raises(RuntimeError, match=rf"can't run in {dtype}"):
        layer(x, lengths=[3, 1, 2, 0])
    wide = torch.complex64 if dtype.is_complex else torch.float32
    if cell != "rnn-relu" or not dtype.is_complex:
        assert layer.to(wide)(x.to(wide), lengths=[3, 1, 2, 0])[0].dtype == wide


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "cell", ["gru", pytest.param("lstm-proj", marks=pytest.mark.slow), "rnn-relu"]
)  # an RNN with relu takes integers
def test_dtype_is_refused_as_torch_refuses_it(cell: str, dtype: torch.dtype, ran: list[str]) -> None:
    """Each backend and form raises torch.nn's type of error before anything runs, or takes what torch.nn takes."""
    x = cast(torch.randn(BATCH, STEPS, INPUT), dtype)
    expected = refusal(lambda: cast_layer(plain(cell, batch_first=True), dtype)(x))
    one_step = cast(torch.randn(BATCH, 1, INPUT), dtype)
    for backend in ("auto", *BACKENDS):
        ours = cast_layer(masked(cell, batch_first=True, backend=backend), dtype)
        for data, given in (*((x, g) for g in GIVEN.values()), (one_step, {}), (one_step, {"lengths": [1, 0, 1, 1]})):
            found = refusal(lambda: ours(data, **given))  # noqa: B023
            if expected is not None:
                assert type(found) is type(expected), (backend, given, found)
                assert f"{ours.mode} can't run in {dtype} on cpu: " in str(found)
                assert str(found).endswith(cure_for(ours.mode, dtype))
            elif not dtype.is_complex:
                assert found is None, (backend, given)
    assert bool(ran) == (expected is None)
    weights = list(ours.parameters())
    initial = [cast(h.float(), dtype) for h in random_states(ours, BATCH)]

    def by_operator() -> None:
        torch.ops.masked_rnn.layer(x, torch.tensor(LENGTHS), None, initial, weights, ours.mode, True, "auto", False)

    assert type(refusal(by_operator)) is type(expected)


def a_run(cell: str, dtype: torch.dtype, given: dict[str, Any], **options: Any) -> Any:
    layer = cast_layer(masked(cell, batch_first=True, **options), dtype)
    mask = HOLES if "mask" in given else prefix_mask(given.get("lengths", [STEPS] * BATCH), STEPS)
    x = cast(torch.randn(BATCH, STEPS, INPUT), dtype)
    states = [cast(h.float(), dtype) for h in random_states(layer, BATCH)]
    pulled = [cast(c.float(), dtype) for c in cotangents(layer, BATCH, STEPS)]
    return layer, x, mask, states, pulled


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("dtype", [*FLOATING, *COMPLEX], ids=name_of)
def test_floating_and_complex_dtypes_match_oracle(cell: str, dtype: torch.dtype, given: str) -> None:
    """Values and gradients are those of each sequence alone, or the backend gives the reason why it can't run."""
    if cell == "rnn-relu" and dtype.is_complex:
        return  # torch.nn refuses it
    more = GIVEN[given]
    layer, x, mask, states, pulled = a_run(cell, dtype, more, num_layers=2, bidirectional=True)
    truth = oracle(layer, x, mask, states, pulled, more.get("resets"))
    for layer.backend in ("auto", *BACKENDS) if dtype.is_complex else BACKENDS:
        if refuses_complex(layer, dtype, given):
            with pytest.raises(ValueError, match=f"backend='{layer.backend}' can't run this call: it.*complex.*'auto'"):
                layer(x, as_hx(states), **more)
            continue
        found = call(layer, torch.where(mask.unsqueeze(-1), x, torch.nan), states, pulled, **more)
        size = max(t.abs().max().item() for t in (truth.output, *truth.states, *truth.gradients.values()))
        assert_same(found, truth, 100 * torch.finfo(dtype).eps * max(size, 1), layer.backend)


def refuses_complex(layer: Any, dtype: torch.dtype, given: str) -> bool:
    padded_lstm = layer.backend == "padded" and layer.mode == "LSTM" and given != "neither"
    return dtype.is_complex and (layer.backend == "bptt" or padded_lstm)


@pytest.mark.slow_but_each(2)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=name_of)
@pytest.mark.parametrize("given", ["neither", "lengths"])
def test_integer_relu_rnn_matches_torch(backend: str, dtype: torch.dtype, given: str) -> None:
    """An RNN with relu takes integers, as torch.nn's does."""
    layer = cast_layer(masked("rnn-relu", batch_first=True, backend=backend), dtype)
    theirs = cast_layer(plain("rnn-relu", batch_first=True), dtype)
    theirs.load_state_dict(layer.state_dict())
    x = cast(torch.randn(BATCH, STEPS, INPUT), dtype)
    output, last = layer(x, **GIVEN[given])
    for n, length in enumerate(LENGTHS if given == "lengths" else [STEPS] * BATCH):
        assert not output[n, length:].any()
        if length:
            alone, end = theirs(x[n : n + 1, :length])
            assert torch.equal(output[n, :length], alone[0])
            assert torch.equal(last[n], end[0, 0])


@pytest.mark.parametrize(
    ("cell", "dtype"),
    [
        ("gru", torch.complex64),
        ("lstm-proj", torch.complex128),
        *(pytest.param(cell, torch.complex128, marks=pytest.mark.slow) for cell in ("gru", "lstm")),
    ],
)
def test_complex_layer_runs_in_every_form(cell: str, dtype: torch.dtype, ran: list[str]) -> None:
    """`auto` takes a backend that is right for one step, packed rows, no step, and a recorded graph."""
    layer, x, _, states, _ = a_run(cell, dtype, {}, bidirectional=True)
    scan = masked(cell, batch_first=True, bidirectional=True, backend="scan").to(dtype)
    scan.load_state_dict(layer.state_dict())
    one = {"lengths": [1, 0, 1, 1]}
    rows = [row[:n] for row, n in zip(x, [3, 5, 2, 1], strict=True)]
    packed = pack_sequence(rows, enforce_sorted=False)
    nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    for data, given in (
        (x[:, :1], {}),
        (x[:, :1], one),
        (x[:, :4], {}),
        (x, {"lengths": [0] * BATCH}),
        (packed, {}),
    ):
        results = []
        for own in (layer, scan):
            output, last = own(data, as_hx(states), **given)
            values = output.data if data is packed else output
            score = sum((t * (1 + 2j)).real.sin().sum() for t in (values, *as_tuple(last)))
            found = torch.autograd.grad(score, list(own.parameters()), allow_unused=True, materialize_grads=True)
            results.append([values, *as_tuple(last), *found])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert set(ran) == {"packed", "bptt", "scan"}  # `bptt` if there is no step to run
    with torch.no_grad():  # a complex nested tensor has no gradient in PyTorch
        torch.testing.assert_close(layer(nested)[0].values(), scan(nested)[0].values())
    recorded = make_fx(lambda x, n: layer(x, lengths=n)[0])(x, torch.tensor([5] * BATCH))
    torch.testing.assert_close(recorded(x, torch.tensor(LENGTHS)), layer(x, lengths=LENGTHS)[0])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x, lengths=LENGTHS)[0], scan(x, lengths=LENGTHS)[0])


@pytest.mark.slow_but("gru-resets")
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("cell", ONE_STATE_AND_TWO)
def test_complex_layer_compiles_and_matches_oracle(cell: str, given: str) -> None:
    more = {name: torch.tensor(v) if isinstance(v, list) else v for name, v in GIVEN[given].items()}
    layer, x, mask, states, pulled = a_run(cell, torch.complex128, GIVEN[given], num_layers=2, bidirectional=True)
    truth = oracle(layer, x, mask, states, pulled, more.get("resets"))
    with torch._dynamo.config.patch(allow_rnn=True):
        layer.compile(backend="aot_eager", fullgraph=True)
        assert_same(call(layer, torch.where(mask.unsqueeze(-1), x, torch.nan), states, pulled, **more), truth)
