"""The layer in place of torch.nn's: module protocol, weights, checkpoints, subclassing, threads."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args, get_overloads, get_type_hints

import pytest
import torch
from support.oracle import CELLS, INPUT, ONE_STATE_AND_TWO, as_tuple, every, masked, plain
from torch import Tensor, nn
from torch.nn.utils import prune

import masked_rnn
from masked_rnn import MaskedGRU, MaskedLSTM, MaskedRNN
from masked_rnn._dispatch import BACKENDS

X = torch.randn(3, 6, INPUT, generator=torch.Generator().manual_seed(1))
LENGTHS = [2, 6, 0]


def same(a: Any, b: Any) -> bool:
    (x, h), (y, g) = a, b
    return torch.equal(x, y) and all(torch.equal(s, t) for s, t in zip(as_tuple(h), as_tuple(g), strict=True))


def test_layer_is_instance_of_torch_layer(cell: str) -> None:
    assert isinstance(masked(cell), type(plain(cell)))


@pytest.mark.slow_but_each(1)
@pytest.mark.parametrize(
    "options",
    every(num_layers=[1, 2], bias=[False, True], bidirectional=[False, True], batch_first=[False, True]),
    ids=str,
)
def test_layer_without_lengths_equals_torch_bit_for_bit(cell: str, options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    theirs = plain(cell, **options)
    torch.manual_seed(3)
    ours = masked(cell, flatten_hidden=False, backend="packed", **options)
    assert all(torch.equal(p, q) for p, q in zip(theirs.parameters(), ours.parameters(), strict=True))
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert same(ours(X), theirs(X))
    assert same(ours(X[0]), theirs(X[0]))
    packed = nn.utils.rnn.pack_sequence([X[0], X[1, :4], X[2, :1]])
    (a, h), (b, g) = ours(packed), theirs(packed)
    assert same((a.data, h), (b.data, g))
    for results, layer in ((ours(X), ours), (theirs(X), theirs)):
        sum(t.square().sum() for t in (results[0], *as_tuple(results[1]))).backward()
        layer.gradients = [p.grad for p in layer.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(ours.gradients, theirs.gradients, strict=True))


def test_layer_without_lengths_is_close_to_torch(cell: str, backend: str) -> None:
    ours, theirs = masked(cell, flatten_hidden=False, backend=backend), plain(cell)
    ours.load_state_dict(theirs.state_dict())
    (a, h), (b, g) = ours(X), theirs(X)
    torch.testing.assert_close(a, b)
    for s, t in zip(as_tuple(h), as_tuple(g), strict=True):
        torch.testing.assert_close(s, t)


def test_positional_arguments_match_torch() -> None:
    a, b = MaskedGRU(4, 3, 2, False, True, 0.5, True), nn.GRU(4, 3, 2, False, True, 0.5, True)
    assert repr(a) == repr(b).replace("GRU", "MaskedGRU", 1)
    a, b = MaskedLSTM(4, 3, 2, False, True, 0.5, True, 2), nn.LSTM(4, 3, 2, False, True, 0.5, True, 2)
    assert repr(a) == repr(b).replace("LSTM", "MaskedLSTM", 1)
    a, b = MaskedRNN(4, 3, 2, "relu"), nn.RNN(4, 3, 2, "relu")
    assert a.mode == b.mode == "RNN_RELU"


@pytest.mark.parametrize("backend", ["auto", "packed", "padded", "bptt", "scan"])
def test_number_says_whether_layer_is_bidirectional(backend: str) -> None:
    layer, other = (masked("gru", bidirectional=both, backend=backend) for both in (1, True))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 2, INPUT)
    assert same(layer(x, lengths=[5, 2]), other(x, lengths=[5, 2]))


def test_repr_names_only_changed_options() -> None:
    assert repr(MaskedGRU(4, 3)) == "MaskedGRU(4, 3)"
    assert repr(MaskedRNN(4, 3)) == "MaskedRNN(4, 3)"
    assert repr(MaskedRNN(4, 3, nonlinearity="relu")) == "MaskedRNN(4, 3, nonlinearity='relu')"
    text = repr(MaskedGRU(4, 3, bidirectional=True, enforce_sorted=True, flatten_hidden=False, backend="scan"))
    assert text == "MaskedGRU(4, 3, bidirectional=True, enforce_sorted=True, flatten_hidden=False, backend='scan')"


def test_checkpoints_load_strictly_both_ways(cell: str, tmp_path: Any) -> None:
    theirs, ours = plain(cell, num_layers=2, bidirectional=True), masked(cell, num_layers=2, bidirectional=True)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    ours.load_state_dict(torch.load(tmp_path / "theirs.pt"), strict=True)
    again = plain(cell, num_layers=2, bidirectional=True)
    again.load_state_dict(ours.state_dict(), strict=True)
    assert all(torch.equal(p, q) for p, q in zip(theirs.parameters(), again.parameters(), strict=True))


def test_copies_behave_alike_and_share_no_weights(cell: str, backend: str) -> None:
    layer = masked(cell, backend=backend, enforce_sorted=False, flatten_hidden=False, num_layers=2)
    layer(X)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert repr(other) == repr(layer)
        assert same(other(X, lengths=[1, 0, 3, 2, 3, 3][: X.size(1)]), layer(X, lengths=[1, 0, 3, 2, 3, 3]))
        with torch.no_grad():
            next(other.parameters()).add_(1)
        assert not torch.equal(other(X)[0], layer(X)[0])


FROM = {"GRU": MaskedGRU.from_gru, "LSTM": MaskedLSTM.from_lstm, "RNN": MaskedRNN.from_rnn}


def test_converted_layer_shares_parameters(cell: str) -> None:
    theirs = plain(cell, num_layers=2, bidirectional=True, batch_first=True, dropout=0.5).double().eval()
    theirs.weight_hh_l0.requires_grad_(False)
    ours = FROM[CELLS[cell][0]](theirs, backend="packed")
    assert all(p is q for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not ours.training
    assert same(ours(X.double()), theirs(X.double()))
    with torch.no_grad():
        theirs.weight_ih_l0.zero_()
    assert same(ours(X.double()), theirs(X.double()))
    assert repr(ours).startswith(repr(theirs).replace(CELLS[cell][0], f"Masked{CELLS[cell][0]}")[:-1])


def test_converted_layer_keeps_h_n_layout(cell: str) -> None:
    """`h_n[-1]` stays the top layer's state, as in torch.nn's layer. If flattened, it would be the last sequence's."""
    theirs = plain(cell, num_layers=2, batch_first=True)
    ours = FROM[CELLS[cell][0]](theirs)
    assert ours.flatten_hidden is False
    assert same(ours(X), theirs(X)) or all(
        torch.allclose(a, b) for a, b in zip(as_tuple(ours(X)[1]), as_tuple(theirs(X)[1]), strict=True)
    )
    assert as_tuple(ours(X)[1])[0][-1].shape[0] == 3
    assert FROM[CELLS[cell][0]](theirs, flatten_hidden=True).flatten_hidden is True


def test_converted_masked_layer_keeps_options(cell: str) -> None:
    for flatten_hidden in (True, False):
        layer = masked(cell, enforce_sorted=True, flatten_hidden=flatten_hidden, backend="scan")
        other = FROM[CELLS[cell][0]](layer)
        assert repr(other) == repr(layer)
        assert FROM[CELLS[cell][0]](layer, backend="padded").backend == "padded"
        assert other.flatten_hidden is flatten_hidden


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(layer: nn.Module, how: str) -> None:
    names = [name for name, _ in layer.named_parameters()]
    if how == "weight_norm":
        nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    elif how == "all":
        for name in names:
            nn.utils.parametrize.register_parametrization(layer, name, Doubled())
    elif how == "older weight_norm":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(layer, "weight_hh_l0")
    else:
        prune.random_unstructured(layer, "weight_ih_l0", 0.5)


@pytest.mark.slow_but_each(1)
@pytest.mark.parametrize("how", ["weight_norm", "all", "older weight_norm", "pruned"])
def test_converted_layer_keeps_computed_weights(cell: str, how: str) -> None:
    theirs = plain(cell, num_layers=2, batch_first=True)
    parametrized(theirs, how)
    ours = FROM[CELLS[cell][0]](theirs)
    assert {id(p) for p in ours.parameters()} == {id(p) for p in theirs.parameters()}
    for backend in ("auto", "packed", "padded", "bptt", "scan"):
        ours.backend = backend
        for change in (0.0, 0.1):
            with torch.no_grad():
                for parameter in theirs.parameters():
                    parameter.add_(change)
            expected, found = theirs(X)[0], ours(X)[0]
            torch.testing.assert_close(found, expected)
            wanted = [p for p in theirs.parameters() if p.requires_grad]
            for a, b in zip(
                torch.autograd.grad(found.square().sum(), wanted),
                torch.autograd.grad(expected.square().sum(), wanted),
                strict=True,
            ):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_converted_pruned_layer_leaves_out_extra_module() -> None:
    """The other module holds no weight of the recurrence."""
    theirs = nn.GRU(INPUT, 3, batch_first=True)
    theirs.extra = nn.BatchNorm1d(2)
    prune.random_unstructured(theirs, "weight_ih_l0", 0.5)
    ours = MaskedGRU.from_gru(theirs)
    torch.testing.assert_close(ours(X)[0], theirs(X)[0])
    assert {*dict(ours.named_parameters())} == {n for n, _ in theirs.named_parameters() if not n.startswith("extra")}


def test_functional_call_accepts_weights_of_other_dtype(cell: str, backend: str) -> None:
    layer = masked(cell, num_layers=2, backend=backend)
    weights = {name: p.double() for name, p in layer.named_parameters()}
    found, _ = torch.func.functional_call(layer, weights, (X.double(),), {"lengths": [1, 0, 3, 2, 3, 3]})
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), layer(X, lengths=[1, 0, 3, 2, 3, 3])[0])
    with pytest.raises(ValueError, match=r"(?=.*torch\.float32).*torch\.float64"):
        torch.func.functional_call(layer, weights, (X,))


def test_conversion_refuses_other_layer_kinds() -> None:
    with pytest.raises(TypeError, match=r"expected an nn\.GRU, got LSTM\. Use MaskedLSTM\.from_lstm\.$"):
        MaskedGRU.from_gru(nn.LSTM(4, 3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected an nn\.RNN, got MaskedGRU\. Use MaskedGRU\.from_gru\.$"):
        MaskedRNN.from_rnn(MaskedGRU(4, 3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected an nn\.LSTM, got Linear\.$"):
        MaskedLSTM.from_lstm(nn.Linear(4, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["batch_first", "flatten_hiden", "device", "num_layers", "dtype"])
def test_conversion_names_its_options(option: str) -> None:
    given: Any = {option: True}
    words = f"unexpected option {option}: the options are enforce_sorted, flatten_hidden and backend"
    with pytest.raises(TypeError, match=words):
        MaskedGRU.from_gru(nn.GRU(4, 3), **given)
    if option != "device":
        with pytest.raises(TypeError, match=words):
            MaskedGRU.from_keras(None, **given)


def test_conversion_to_a_subclass_takes_its_options() -> None:
    class Named(MaskedGRU):
        def __init__(self, *args: Any, name: str = "", **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.name = name

    options: Any = {"name": "a", "backend": "scan"}
    layer = Named.from_gru(nn.GRU(4, 3), **options)
    assert (layer.name, layer.backend) == ("a", "scan")


def test_frozen_parameters_get_no_gradient(cell: str, backend: str) -> None:
    layer = masked(cell, num_layers=2, bidirectional=True, backend=backend)
    free = masked(cell, num_layers=2, bidirectional=True, backend=backend)
    free.load_state_dict(layer.state_dict())
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("weight_hh" not in name and "l1" not in name)
    for one in (layer, free):
        output, last = one(X, lengths=[1, 0, 3, 2, 3, 3])
        (output.square().sum() + sum(h.square().sum() for h in as_tuple(last))).backward()
    for (name, p), q in zip(layer.named_parameters(), free.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad)
        else:
            assert p.grad is None, name


def test_frozen_layer_still_passes_gradient_to_input(cell: str, backend: str) -> None:
    layer = masked(cell, backend=backend).requires_grad_(False)
    assert not layer(X, lengths=[1, 0, 3, 2, 3, 3])[0].requires_grad
    x = X.clone().requires_grad_()
    layer(x, lengths=[1, 0, 3, 2, 3, 3])[0].sum().backward()
    assert x.grad is not None
    assert x.grad.ne(0).any()


class Tagger(MaskedGRU):
    """A model that subclasses the layer, with a forward of its own."""

    def __init__(self, classes: int) -> None:
        super().__init__(INPUT, 3, batch_first=True, bidirectional=True)
        self.head = nn.Linear(6, classes)

    def forward(self, input: Tensor, lengths: Any) -> Tensor:  # type: ignore[override]
        _, last = super().forward(input, lengths=lengths)
        return self.head(last)


def test_subclass_with_own_forward_trains_and_copies() -> None:
    model = Tagger(5)
    scores = model(X, LENGTHS)
    assert scores.shape == (3, 5)
    scores.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert same_scores(pickle.loads(pickle.dumps(model)), model)
    assert same_scores(copy.deepcopy(model), model)


def same_scores(a: nn.Module, b: nn.Module) -> bool:
    return torch.equal(a(X, LENGTHS), b(X, LENGTHS))


def test_layer_is_found_by_initialising_code() -> None:
    model = nn.Sequential(nn.Linear(4, 4), MaskedGRU(4, 3))
    found = [m for m in model.modules() if isinstance(m, nn.GRU)]
    for module in found:
        nn.init.orthogonal_(module.weight_hh_l0)
    assert len(found) == 1


@pytest.mark.slow_but_each(1)
def test_concurrent_threads_give_same_results(cell: str, backend: str) -> None:
    layer = masked(cell, num_layers=2, bidirectional=True, backend=backend)
    lengths = [[1 + (k + n) % 4 for n in range(6)] for k in range(8)]
    inputs = [torch.randn(4, 6, INPUT) for _ in lengths]

    def work(k: int) -> tuple[Any, list[Tensor]]:
        output, last = layer(inputs[k], lengths=lengths[k])
        loss = output.square().sum() + sum(h.sum() for h in as_tuple(last))
        return (output, last), list(torch.autograd.grad(loss, list(layer.parameters())))

    expected = [work(k) for k in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for (found, gradients), (alone, own) in zip(pool.map(work, range(8)), expected, strict=True):
            assert same(found, alone)
            assert all(torch.equal(a, b) for a, b in zip(gradients, own, strict=True))


def test_call_changes_no_module_attribute(cell: str, backend: str) -> None:
    layer = masked(cell, backend=backend)

    def state() -> dict[str, Any]:
        return {k: id(v) if isinstance(v, list | dict) else v for k, v in vars(layer).items()}

    before = state()
    layer(X, lengths=[1, 0, 3, 2, 3, 3])[0].sum().backward()
    assert state() == before


@pytest.mark.slow_but_each(1)
@pytest.mark.parametrize("cell", ONE_STATE_AND_TWO)
def test_meta_device_gives_shapes(cell: str, backend: str) -> None:
    layer = masked(cell, num_layers=2, bidirectional=True, device="meta", backend=backend)
    output, _ = layer(torch.empty(6, 3, INPUT, device="meta"), lengths=[3, 1, 6])
    assert output.shape[:2] == (6, 3)
    assert output.device.type == "meta"


def test_meta_layer_moves_to_cpu(cell: str) -> None:
    layer = masked(cell, num_layers=2, bidirectional=True, device="meta")
    output, _ = layer(torch.empty(6, 3, INPUT, device="meta"), lengths=[3, 1, 6])
    assert output.shape[:2] == (6, 3)
    assert output.device.type == "meta"
    real = layer.to_empty(device="cpu").double()
    for parameter in real.parameters():
        nn.init.uniform_(parameter)
    assert real(X.double())[0].dtype == torch.float64


def test_parametrized_weights_are_used() -> None:
    layer, bare = MaskedGRU(INPUT, 3), MaskedGRU(INPUT, 3)
    bare.load_state_dict(layer.state_dict())
    nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    layer.parametrizations.weight_hh_l0.original0.data.mul_(2)
    with torch.no_grad():
        bare.weight_hh_l0.mul_(2)
    torch.testing.assert_close(layer(X)[0], bare(X)[0])


def test_dropout_acts_only_between_layers(cell: str, backend: str) -> None:
    """Kept values are scaled, as in torch.nn. There is no dropout before the first layer or after the last."""
    layer = masked(cell, num_layers=2, dropout=0.5, backend=backend, batch_first=True)
    lengths = [2, 6, 0]
    torch.manual_seed(5)
    once = layer(X, lengths=lengths)
    torch.manual_seed(5)
    again = layer(X, lengths=lengths)
    other = layer(X, lengths=lengths)
    assert same(once, again)
    assert not torch.equal(once[0], other[0])
    quiet = layer.eval()(X, lengths=lengths)
    P = layer.proj_size or layer.hidden_size
    for noisy, still in zip(as_tuple(once[1]), as_tuple(quiet[1]), strict=True):
        assert torch.equal(noisy[:, : still.size(1) // 2], still[:, : still.size(1) // 2])
    layer.train()
    layer.dropout = 1.0
    zeroed = layer(X, lengths=lengths)[0]
    top = masked(cell, P, 3, batch_first=True, backend=backend)
    with torch.no_grad():
        for name, parameter in top.named_parameters():
            parameter.copy_(getattr(layer, name.replace("l0", "l1")))
    torch.testing.assert_close(zeroed, top(torch.zeros(3, 6, P), lengths=lengths)[0])


def test_dropout_keeps_the_mean(backend: str) -> None:
    """Over many draws, the second layer's input keeps its mean."""
    layer = MaskedRNN(1, 1, 2, nonlinearity="relu", dropout=0.25, bias=False, backend=backend)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(1.0 if parameter is not layer.weight_hh_l0 and parameter is not layer.weight_hh_l1 else 0.0)
    output, _ = layer(torch.ones(1, 20_000, 1), lengths=torch.ones(20_000, dtype=torch.int64))
    values = output.flatten()
    assert values.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert values.mean().item() == pytest.approx(1.0, abs=0.02)


def test_package_exports_public_names() -> None:
    assert sorted(masked_rnn.__all__) == ["MaskedGRU", "MaskedLSTM", "MaskedRNN", "SlowLoopsWarning", "get_env_info"]


@pytest.mark.parametrize("kind", [MaskedGRU, MaskedLSTM, MaskedRNN])
def test_signature_adds_three_options_to_torchs(kind: Any) -> None:
    _, *documented = inspect.signature(get_overloads(kind._torch_layer.__init__)[0]).parameters.values()
    expected = [(p.name, p.default, p.kind) for p in documented]
    for name, default in (("enforce_sorted", False), ("flatten_hidden", True), ("backend", "auto")):
        expected.append((name, default, inspect.Parameter.KEYWORD_ONLY))
    assert [(p.name, p.default, p.kind) for p in inspect.signature(kind).parameters.values()] == expected
    types = get_type_hints(kind.__init__)
    for p in documented:
        assert p.annotation in (types[p.name], inspect.Parameter.empty), p.name
    assert get_args(types["backend"]) == ("auto", *BACKENDS)


def test_device_and_dtype_keep_documented_positions() -> None:
    """In a GRU or an RNN, torch.nn reads a positional `device` as `proj_size`."""
    for layer in (
        MaskedGRU(4, 3, 2, True, False, 0.0, True, "meta", torch.float64),
        MaskedLSTM(4, 3, 2, True, False, 0.0, True, 2, "meta", torch.float64),
        MaskedRNN(4, 3, 2, "relu", True, False, 0.0, True, "meta", torch.float64),
    ):
        assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}


@pytest.mark.parametrize("kind", [MaskedGRU, MaskedLSTM, MaskedRNN])
@pytest.mark.parametrize(
    "wrong",
    [
        {"proj_size": 3},
        {"proj_size": -1},
        {"nonlinearity": "sine"},
        {"hidden": 4},
        {"hidden_size": 0},
        {"num_layers": 0},
        {"dropout": 2.0},
        {"input_size": "4"},
    ],
    ids=str,
)
def test_constructor_refuses_arguments_in_torchs_words(kind: Any, wrong: dict[str, Any]) -> None:
    arguments = {"input_size": 4, "hidden_size": 3, **wrong}
    with pytest.raises((TypeError, ValueError)) as torchs:
        kind._torch_layer(**arguments)
    with pytest.raises(torchs.type) as own:
        kind(**arguments)
    assert str(own.value) == str(torchs.value)
