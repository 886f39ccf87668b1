"""Classifies nine speakers by their voice, from the last hidden state: the same model with lengths and without.

The data are 640 real utterances of two vowels, /ae/, by nine men: 12 LPC cepstrum coefficients a frame, 7 to 29
frames an utterance. (JapaneseVowels: 270 for training, 370 for testing. The package aeon contains it; nothing is
downloaded.) Utterances are zero-padded to the longest of their batch, as is usual. One model gets their lengths, the
other does not.

Both learn the task. Then the test batch is padded by more frames, as happens when a batch contains one long utterance.
The model with lengths answers exactly as before. The other one has learned to expect a certain amount of padding.

    python -m pip install -e ".[examples]"
    python examples/classify_speakers.py

This prints both accuracies and draws examples/output/classify_speakers.png. `--short` is a quick trial of a few epochs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from aeon.datasets import load_japanese_vowels
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence

from masked_rnn import MaskedGRU

PLOT = Path(__file__).parent / "output" / "classify_speakers.png"
EXTRA_FRAMES = (0, 5, 10, 20, 30, 50, 100)
REQUIRED_ACCURACY = 0.95
Data = tuple[list[Tensor], Tensor]
"""Utterances, each (frames, 12), and the speaker of each, 0 to 8."""


class SpeakerClassifier(nn.Module):
    def __init__(self, hidden_size: int = 64) -> None:
        super().__init__()
        self.gru = MaskedGRU(12, hidden_size, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(2 * hidden_size, 9))

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        _, last_hidden = self.gru(x, lengths=lengths)  # (N, 2H): forward at the last real frame, backward at the first
        return self.head(last_hidden)


def main() -> None:
    parser = argparse.ArgumentParser(description="Classify speakers with lengths and without.")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--short", action="store_true", help="4 epochs, and no accuracy demanded")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    epochs = 4 if args.short else args.epochs

    # The matrices are too small for a second thread to help.
    torch.set_num_threads(1)
    train, test = load()
    models: dict[str, SpeakerClassifier] = {}
    curves: dict[str, list[float]] = {}
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("test accuracy {task.fields[accuracy]:.1%}")) as progress:
        for name in ("with lengths", "without lengths"):
            task = progress.add_task(name, total=epochs, accuracy=0.0)
            torch.manual_seed(args.seed)  # the same initial weights and the same batches for both
            model = models[name] = SpeakerClassifier()
            curve = curves[name] = []
            for _ in train_epochs(model, train, epochs, use_lengths=name == "with lengths"):
                curve.append(accuracy(predict(model, test, use_lengths=name == "with lengths"), test))
                progress.update(task, advance=1, accuracy=curve[-1])

    answers = {
        name: [predict(model, test, name == "with lengths", extra) for extra in EXTRA_FRAMES]
        for name, model in models.items()
    }
    padding = {name: [accuracy(answer, test) for answer in row] for name, row in answers.items()}
    report(padding)
    plot(curves, padding)

    same = all(torch.equal(answer, answers["with lengths"][0]) for answer in answers["with lengths"])
    assert same, "with lengths, more padding should change no answer"
    reached = padding["with lengths"][0]
    if not args.short:
        assert reached >= REQUIRED_ACCURACY, f"{reached:.1%} with lengths, expected at least {REQUIRED_ACCURACY:.0%}"


def load() -> tuple[Data, Data]:
    """Returns the standard split, each coefficient normalized by its mean and deviation over the training frames."""
    data = []
    for split in ("train", "test"):
        utterances, speakers = load_japanese_vowels(split=split)
        data.append(
            (
                [torch.tensor(u.T, dtype=torch.float32) for u in utterances],
                torch.tensor([int(s) - 1 for s in speakers]),
            )
        )
    (train, train_speakers), (test, test_speakers) = data
    frames = torch.cat(train)
    mean, deviation = frames.mean(0), frames.std(0)
    return (
        ([(u - mean) / deviation for u in train], train_speakers),
        ([(u - mean) / deviation for u in test], test_speakers),
    )


def train_epochs(model: SpeakerClassifier, data: Data, epochs: int, use_lengths: bool) -> Iterator[None]:
    """Trains a model, and yields after each epoch."""
    utterances, speakers = data
    batch_size, peak = 32, 5e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak)
    steps = epochs * -(-len(utterances) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps)
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(utterances)).split(batch_size):
            noisy = [utterances[i] + 0.3 * torch.randn_like(utterances[i]) for i in rows]
            x, lengths = batch(noisy)
            loss = cross_entropy(model(x, lengths if use_lengths else None), speakers[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        yield


def batch(utterances: list[Tensor], extra_frames: int = 0) -> tuple[Tensor, Tensor]:
    """Returns utterances zero-padded to the longest and by some more frames, (N, T, 12), and their lengths (N,)."""
    x = pad_sequence(utterances, batch_first=True)
    return pad(x, (0, 0, 0, extra_frames)), torch.tensor([len(u) for u in utterances])


@torch.no_grad()
def predict(model: SpeakerClassifier, data: Data, use_lengths: bool, extra_frames: int = 0) -> Tensor:
    """Returns the predicted speaker of each utterance. All utterances run in one batch."""
    x, lengths = batch(data[0], extra_frames)
    return model.eval()(x, lengths if use_lengths else None).argmax(1)


def accuracy(answer: Tensor, data: Data) -> float:
    return (answer == data[1]).float().mean().item()


def report(padding: dict[str, list[float]]) -> None:
    table = Table("frames of padding added", *map(str, EXTRA_FRAMES), title="Test accuracy")
    for name, row in padding.items():
        table.add_row(name, *(f"{a:.1%}" for a in row))
    Console(width=100).print(table)


def plot(curves: dict[str, list[float]], padding: dict[str, list[float]]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for (name, curve), style in zip(curves.items(), ("-", "--"), strict=True):
        left.plot(range(1, len(curve) + 1), curve, style, label=name)
        right.plot(EXTRA_FRAMES, padding[name], style, marker="o", label=name)
    left.set(xlabel="epoch", ylabel="test accuracy", title="Training", ylim=(0, 1.02))
    right.set(xlabel="frames of padding added to the test batch", title="More padding, the same utterances")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend(loc="lower left")
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=150)
    print(f"Plot: {PLOT.relative_to(Path.cwd()) if PLOT.is_relative_to(Path.cwd()) else PLOT}")


if __name__ == "__main__":
    main()
