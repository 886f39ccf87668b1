"""Trains with lengths, exports to ONNX, runs the model in ONNX Runtime and compares.

A two-layer bidirectional MaskedGRU learns to classify nine speakers by their voice (JapaneseVowels, which the package
aeon contains; nothing is downloaded). The exported model has one GRU node for each layer. Batch and time are dynamic:
the model runs on batches of other sizes than it was exported with, on rows of length zero, and with NaN for padding.

    python -m pip install -e ".[examples]"
    python examples/deploy_onnx.py

This writes the model to examples/output/speakers.onnx. `--short` trains for a single epoch.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from aeon.datasets import load_japanese_vowels
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from masked_rnn import MaskedGRU

MODEL = Path(__file__).parent / "output" / "speakers.onnx"
TOLERANCE = 1e-5


class SpeakerClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = MaskedGRU(12, 32, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * 32, 9)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        _, last_hidden = self.gru(x, lengths=lengths)
        return self.head(last_hidden[:, -2 * 32 :])  # the top layer, both directions


def main() -> None:
    parser = argparse.ArgumentParser(description="Train, export to ONNX, run in ONNX Runtime.")
    parser.add_argument("--short", action="store_true", help="train for a single epoch")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)  # the matrices are too small for a second thread to help
    model = SpeakerClassifier()
    train(model, epochs=1 if args.short else 15)
    model.eval()

    export(model)
    nodes = Counter(node.op_type for node in onnx.load(MODEL).graph.node)
    print("Nodes:", ", ".join(f"{count} {kind}" for kind, count in nodes.most_common()))
    assert nodes["GRU"] == 2, "expected one GRU node a layer"
    assert not {"Loop", "Scan", "If"} & set(nodes), "expected no control flow"

    session = onnxruntime.InferenceSession(MODEL)
    utterances, speakers = load("test")
    x, lengths = batch(utterances)
    compare("the test set", model, session, x, lengths)
    compare("one utterance", model, session, utterances[0][None], lengths[:1])
    compare("lengths 0 to 200", model, session, torch.randn(201, 200, 12), torch.arange(201).flip(0))
    compare("only empty rows", model, session, torch.randn(3, 5, 12), torch.zeros(3, dtype=torch.long))
    padding = torch.arange(x.size(1)) >= lengths[:, None]
    spoilt = x.masked_fill(padding[..., None], torch.nan)
    compare("NaN for padding", model, session, spoilt, lengths)

    clean, nan = run(session, x, lengths), run(session, spoilt, lengths)
    assert np.array_equal(clean, nan), "what stands at padding should change nothing"
    accuracy = (clean.argmax(1) == speakers.numpy()).mean()
    print(f"Test accuracy in ONNX Runtime: {accuracy:.1%}. Model: {MODEL.name}, {MODEL.stat().st_size / 1024:.0f} KiB")


def train(model: SpeakerClassifier, epochs: int) -> None:
    utterances, speakers = load("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(utterances)).split(32):
            x, lengths = batch([utterances[i] for i in rows])
            loss = cross_entropy(model(x, lengths), speakers[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def export(model: SpeakerClassifier) -> None:
    """Exports the model. The sizes of the example input are arbitrary: dynamic_shapes says which axes are dynamic."""
    MODEL.parent.mkdir(exist_ok=True)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of torchvision's operators, not needed here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # from the exporter, about its own code
        torch.onnx.export(
            model,
            (torch.randn(4, 9, 12), torch.tensor([9, 3, 0, 5])),
            MODEL,
            dynamo=True,
            dynamic_shapes={"x": {0: "batch", 1: "time"}, "lengths": {0: torch.export.Dim.DYNAMIC}},
            input_names=["x", "lengths"],
            output_names=["logits"],
            external_data=False,
            verbose=False,
        )


def run(session: onnxruntime.InferenceSession, x: Tensor, lengths: Tensor) -> np.ndarray:
    (logits,) = session.run(["logits"], {"x": x.numpy(), "lengths": lengths.numpy()})
    return logits


@torch.no_grad()
def compare(
    what: str, model: SpeakerClassifier, session: onnxruntime.InferenceSession, x: Tensor, lengths: Tensor
) -> None:
    expected, got = model(x, lengths).numpy(), run(session, x, lengths)
    print(f"  {what:<18} x {tuple(x.shape)!s:<16} largest difference from PyTorch {np.abs(got - expected).max():.1e}")
    assert np.allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE), f"{what}: ONNX Runtime and PyTorch differ"


def load(split: str) -> tuple[list[Tensor], Tensor]:
    """Returns utterances, each (frames, 12), and the speaker of each, 0 to 8."""
    utterances, speakers = load_japanese_vowels(split=split)
    return (
        [torch.tensor(u.T, dtype=torch.float32) for u in utterances],
        torch.tensor([int(s) - 1 for s in speakers]),
    )


def batch(utterances: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns utterances zero-padded to the longest, (N, T, 12), and their lengths (N,)."""
    return pad_sequence(utterances, batch_first=True), torch.tensor([len(u) for u in utterances])


if __name__ == "__main__":
    main()
