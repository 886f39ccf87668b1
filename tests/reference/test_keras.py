"""Compares from_keras with Keras itself: outputs, states, masks and refusals.

Keras 3 runs on the backend that KERAS_BACKEND names, TensorFlow by default. Skipped where Keras is missing;
MASKED_RNN_REQUIRE_TENSORFLOW=1 makes that a failure. One test needs no Keras: NumPy computes its equations.
"""

import importlib.util
import os
import warnings

import numpy as np
import pytest
import torch

from masked_rnn import MaskedGRU, MaskedLSTM, MaskedRNN

# Keras's own warnings, about functions that it calls.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LAYERS = {"GRU": MaskedGRU, "LSTM": MaskedLSTM, "SimpleRNN": MaskedRNN}
N, T, I, H = 4, 6, 3, 5  # noqa: E741
MASKS = {
    "lengths": [[1] * 6, [1] * 3 + [0] * 3, [1] + [0] * 5, [1] * 5 + [0]],
    "holes": [[0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0], [1] * 6],
    "none": None,
}


@pytest.fixture(scope="module", params=["keras", "tf_keras"])
def keras(request):
    if importlib.util.find_spec(request.param) is None:
        words = f"needs {request.param}: pip install -e '.[reference]'"
        if os.environ.get("MASKED_RNN_REQUIRE_TENSORFLOW") == "1":
            pytest.fail(f"MASKED_RNN_REQUIRE_TENSORFLOW=1, but this {words}")
        pytest.skip(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TensorFlow and its dependencies warn of each other
            yield importlib.import_module(request.param)


def built(keras, kind, bidirectional=False, features=I, **options):
    """Returns a Keras layer that returns sequences and states. Its weights and biases are random."""
    layer = getattr(keras.layers, kind)(H, return_sequences=True, return_state=True, **options)
    if bidirectional:
        layer = keras.layers.Bidirectional(layer)
    layer.build((None, None, features))
    random = np.random.default_rng(3)
    layer.set_weights([random.normal(scale=0.5, size=w.shape).astype("float32") for w in layer.get_weights()])
    return layer


def as_array(value):
    return value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def step(kind, kernel, recurrent, bias, x, h, c):
    """Returns the new states, by the equations in Keras's docs and with its order of gates."""
    if kind == "GRU":
        (z, r, new), (of_z, of_r, of_new) = (
            np.split(a, 3, -1) for a in (x @ kernel + bias[0], h @ recurrent + bias[1])
        )
        z, r = sigmoid(z + of_z), sigmoid(r + of_r)
        return z * h + (1 - z) * np.tanh(new + r * of_new), c
    a = x @ kernel + h @ recurrent + bias
    if kind == "SimpleRNN":
        return np.tanh(a), c
    i, f, new, o = np.split(a, 4, -1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(new)
    return sigmoid(o) * np.tanh(c), c


@pytest.mark.parametrize(("kind", "gates"), [("GRU", 3), ("LSTM", 4), ("SimpleRNN", 1)])
def test_weights_are_read_without_keras(kind, gates):
    random = np.random.default_rng(3)
    shapes = [(I, gates * H), (H, gates * H), (2, gates * H) if kind == "GRU" else (gates * H,)]
    weights = [random.normal(scale=0.5, size=shape) for shape in shapes]
    config = {
        "units": H,
        "use_bias": True,
        "activation": "tanh",
        "recurrent_activation": "sigmoid",
        "reset_after": True,
    }
    config |= {"go_backwards": False, "stateful": False, "dropout": 0, "recurrent_dropout": 0}
    functions = {"get_config": lambda _: config, "get_weights": lambda _: weights, "built": True}
    ours = LAYERS[kind].from_keras(type(kind, (), functions)())
    x, h, c = random.normal(size=(N, T, I)), np.zeros((N, H)), np.zeros((N, H))
    output, _ = ours(torch.from_numpy(x))
    for t in range(T):
        h, c = step(kind, *weights, x[:, t], h, c)
        np.testing.assert_allclose(as_array(output[:, t]), h, atol=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_outputs_and_states_match_keras(keras, kind, bidirectional, use_bias, mask):
    layer = built(keras, kind, bidirectional, use_bias=use_bias)
    ours = LAYERS[kind].from_keras(layer)
    x = np.random.default_rng(4).normal(size=(N, T, I)).astype("float32")
    real = None if MASKS[mask] is None else np.array(MASKS[mask], bool)
    output, *states = map(as_array, layer(x, mask=real))
    found, last = ours(torch.from_numpy(x), mask=None if real is None else torch.from_numpy(real))
    shown = np.ones((N, T), bool) if real is None else real  # Keras repeats the previous output at a masked step
    np.testing.assert_allclose(as_array(found)[shown], output[shown], atol=1e-5)
    lasts = last if isinstance(last, tuple) else (last,)
    each = len(lasts)
    for s, own in enumerate(lasts):
        expected = np.concatenate(states[s::each], -1)  # forwards, then backwards
        np.testing.assert_allclose(as_array(own), expected, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_from_keras_keeps_options_and_dtype(keras, kind):
    layer = built(keras, kind, dtype="float64")
    ours = LAYERS[kind].from_keras(layer, flatten_hidden=False, backend="scan")
    assert (ours.flatten_hidden, ours.backend, ours.batch_first) == (False, "scan", True)
    assert {p.dtype for p in ours.parameters()} == {torch.float64}
    assert all(p.requires_grad for p in ours.parameters())


def test_relu_is_taken_over(keras):
    ours = MaskedRNN.from_keras(built(keras, "SimpleRNN", activation="relu"))
    assert ours.nonlinearity == "relu"


def test_time_major_clears_batch_first():
    tf_keras = pytest.importorskip("tf_keras")
    assert not MaskedGRU.from_keras(built(tf_keras, "GRU", time_major=True)).batch_first


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("GRU", {"reset_after": False}, "reset_after=False applies the reset gate before"),
        ("GRU", {"activation": "relu"}, r"activation='relu', but torch\.nn's layer has 'tanh' only"),
        ("LSTM", {"recurrent_activation": "hard_sigmoid"}, "recurrent_activation='hard_sigmoid'"),
        ("SimpleRNN", {"activation": "sigmoid"}, "has 'tanh' or 'relu' only"),
        ("GRU", {"go_backwards": True}, "go_backwards=True reads sequences"),
        ("LSTM", {"stateful": True}, "stateful=True keeps the state"),
    ],
)
def test_unsupported_options_are_refused(keras, kind, options, words):
    layer = getattr(keras.layers, kind)(H, **options)
    layer.build((N, T, I))
    with pytest.raises(ValueError, match=words):
        LAYERS[kind].from_keras(layer)


def test_unsupported_bidirectional_is_refused(keras):
    for merge_mode in ("sum", None):
        layer = keras.layers.Bidirectional(keras.layers.GRU(H), merge_mode=merge_mode)
        layer.build((None, None, I))
        with pytest.raises(ValueError, match=f"merge_mode={merge_mode!r}, but"):
            MaskedGRU.from_keras(layer)
    halves = keras.layers.GRU(H, go_backwards=True), keras.layers.GRU(H)
    layer = keras.layers.Bidirectional(halves[0], backward_layer=halves[1])
    layer.build((None, None, I))
    with pytest.raises(ValueError, match="forward layer must run forwards"):
        MaskedGRU.from_keras(layer)
    halves = keras.layers.GRU(H), keras.layers.GRU(H, use_bias=False, go_backwards=True)
    layer = keras.layers.Bidirectional(halves[0], backward_layer=halves[1])
    layer.build((None, None, I))
    with pytest.raises(ValueError, match="halves differ: use_bias=True forwards, False backwards"):
        MaskedGRU.from_keras(layer)


def test_other_layers_are_refused(keras):
    with pytest.raises(TypeError, match=r"expected a Keras GRU, or a Bidirectional of one, got .*'s LSTM"):
        MaskedGRU.from_keras(built(keras, "LSTM"))
    with pytest.raises(TypeError, match=r"got a Bidirectional of .*'s GRU"):
        MaskedLSTM.from_keras(built(keras, "GRU", bidirectional=True))
    with pytest.raises(TypeError, match=r"got .*'s Dense"):
        MaskedRNN.from_keras(keras.layers.Dense(3))
    with pytest.raises(TypeError, match="got torch's GRU"):
        MaskedRNN.from_keras(torch.nn.GRU(3, 4))
    with pytest.raises(ValueError, match="has no weights yet"):
        MaskedGRU.from_keras(keras.layers.GRU(H))


def test_dropout_is_left_out_with_warning(keras):
    layer = built(keras, "GRU", dropout=0.2, recurrent_dropout=0.1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        MaskedGRU.from_keras(layer)
    ours = [warning for warning in told if "is left out" in str(warning.message)]
    first, second = (str(warning.message) for warning in ours)
    assert first.startswith("dropout=0.2 is left out")
    assert first.endswith("put nn.Dropout before it.")
    assert second.startswith("recurrent_dropout=0.1 is left out")
    assert {warning.filename for warning in ours} == {__file__}


def test_backward_half_is_checked_too(keras):
    def bidirectional(**options):
        halves = keras.layers.GRU(H), keras.layers.GRU(H, go_backwards=True, **options)
        layer = keras.layers.Bidirectional(halves[0], backward_layer=halves[1])
        layer.build((None, None, I))
        return layer

    with pytest.warns(UserWarning, match=r"dropout=0\.5 is left out"):
        MaskedGRU.from_keras(bidirectional(dropout=0.5))
    with pytest.raises(ValueError, match="weights of different dtypes"):
        MaskedGRU.from_keras(bidirectional(dtype="float64"))


def test_keras_subclass_is_accepted(keras):
    class Mine(keras.layers.GRU):
        pass

    layer = Mine(H)
    layer.build((None, None, I))
    assert MaskedGRU.from_keras(layer).hidden_size == H
