"""Files that releases wrote load in this one: whole layers, by pickle and as weights only, and state dicts.

`python tests/test_saved.py` writes the files of the release that it imports. Those in tests/saved/ were written so by
their releases, with torch 2.13. 1.1.0 moved the classes before its last commit: its file is from before.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import masked_rnn
from masked_rnn import MaskedGRU, MaskedLSTM, MaskedRNN

SAVED = Path(__file__).parent / "saved"
KINDS = {"GRU": MaskedGRU, "LSTM": MaskedLSTM, "RNN": MaskedRNN}
MODULES = {
    "1.0.0": "masked_rnn._modules",
    "1.1.0": "masked_rnn._modules",
    "1.2.0": "masked_rnn._layers.{}",
    "1.6.0": "masked_rnn._layers.{}",
    "2.0.0": "masked_rnn",
}
"""The module that a release's pickles name, by the kind of layer"""
OPTIONS: dict[str, Any] = {"batch_first": True, "flatten_hidden": False, "backend": "packed"}


def write(folder: Path) -> None:
    torch.manual_seed(0)
    layers: dict[str, Any] = {name: kind(2, 3, **OPTIONS) for name, kind in KINDS.items()}
    torch.save(layers, folder / f"layers-{masked_rnn.__version__}.pt")
    states = {name: layer.state_dict() for name, layer in layers.items()}
    torch.save(states, folder / f"weights-{masked_rnn.__version__}.pt")


@pytest.mark.parametrize("release", MODULES)
@pytest.mark.parametrize("weights_only", [False, True])
def test_layer_that_a_release_saved_loads(release: str, weights_only: bool) -> None:
    weights = torch.load(SAVED / f"weights-{release}.pt", weights_only=True)
    allowed: list[Any] = []
    for name, kind in KINDS.items():
        path = f"{MODULES[release].format(name.lower())}.Masked{name}"
        allowed.append(kind if path == f"masked_rnn.Masked{name}" else (kind, path))
    with torch.serialization.safe_globals(allowed if weights_only else []):
        layers = torch.load(SAVED / f"layers-{release}.pt", weights_only=weights_only)
    x, lengths = torch.randn(3, 5, 2), [4, 0, 5]
    for name, kind in KINDS.items():
        layer, expected = layers[name], kind(2, 3, **OPTIONS)
        expected.load_state_dict(weights[name], strict=True)
        assert type(layer) is kind
        assert repr(layer) == repr(expected)
        for found, wanted in zip(layer.parameters(), expected.parameters(), strict=True):
            assert torch.equal(found, wanted)
        assert torch.equal(layer(x, lengths=lengths)[0], expected(x, lengths=lengths)[0])
        plain = getattr(nn, name)(2, 3, batch_first=True)
        plain.load_state_dict(weights[name], strict=True)
        torch.testing.assert_close(layer(x)[0], plain(x)[0])


def test_files_of_this_release_are_kept() -> None:
    assert masked_rnn.__version__ in MODULES


@pytest.mark.parametrize("name", [name for name in masked_rnn.__all__ if isinstance(getattr(masked_rnn, name), type)])
def test_public_class_is_pickled_by_its_public_name(name: str) -> None:
    """A pickle names the module of a class, and must not break when the class moves."""
    kind = getattr(masked_rnn, name)
    assert kind.__module__ == "masked_rnn"
    assert pickle.dumps(kind, protocol=0) == f"cmasked_rnn\n{name}\np0\n.".encode()


if __name__ == "__main__":
    SAVED.mkdir(exist_ok=True)
    write(SAVED)
