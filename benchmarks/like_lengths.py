"""Times an epoch of training over random batches, and over batches of sequences of similar length.

`python -m benchmarks.like_lengths` prints the time of an epoch (forward, backward of the output) over random batches,
and how many times as long it is as over batches that are made as in docs/recipes.md. The two take turns.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from masked_rnn import MaskedGRU

from .__main__ import load, loops, processor
from .contenders import version_of
from .measure import Times, ratio
from .report import print_table

SEQUENCES, LONGEST, BATCH, POOL, WIDTH = 3200, 200, 32, 50, 128
"""A pool of POOL batches is sorted by length."""
Forward = Callable[[Tensor, Tensor], Tensor]
"""Input (N, T, I), lengths (N,) -> output."""


def random_batches(lengths: Tensor) -> list[Tensor]:
    return list(torch.randperm(len(lengths)).split(BATCH))


def like_batches(lengths: Tensor) -> list[Tensor]:
    pools = torch.randperm(len(lengths)).split(POOL * BATCH)
    return [batch for pool in pools for batch in pool[lengths[pool].argsort()].split(BATCH)]


def contenders() -> dict[str, tuple[nn.Module, Forward]]:
    masked = MaskedGRU(WIDTH, WIDTH, batch_first=True)
    plain = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def packed(x: Tensor, lengths: Tensor) -> Tensor:
        sequences = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(plain(sequences)[0], batch_first=True)[0]

    attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def attended(x: Tensor, lengths: Tensor) -> Tensor:
        output, _ = masked(x, lengths=lengths)
        padding = torch.arange(x.size(1)) >= lengths[:, None]
        found: Tensor = attention(output, output, output, key_padding_mask=padding, need_weights=False)[0]
        return found

    return {
        "masked_rnn": (masked, lambda x, lengths: masked(x, lengths=lengths)[0]),
        "masked_rnn and self-attention": (nn.ModuleList([masked, attention]), attended),
        "packing by hand": (plain, packed),
        "torch.nn over padding": (plain, lambda x, lengths: plain(x)[0]),
    }


def epoch(layer: nn.Module, forward: Forward, batches: list[Tensor]) -> float:
    """Returns the seconds that the layer takes, without the time to make its input."""
    seconds = 0.0
    for lengths in batches:
        x = torch.randn(len(lengths), int(lengths.max()), WIDTH)
        start = time.perf_counter()
        output = forward(x, lengths)
        output.backward(torch.ones_like(output))
        seconds += time.perf_counter() - start
        layer.zero_grad()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.like_lengths", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a fifth of the sequences, one round")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    busy = load()
    torch.manual_seed(0)
    lengths = torch.randint(1, LONGEST + 1, (SEQUENCES // 5 if arguments.quick else SEQUENCES,))
    kinds = {"random": random_batches(lengths), "like": like_batches(lengths)}
    of_each = {kind: [lengths[batch] for batch in batches] for kind, batches in kinds.items()}

    table = [["", "random batches, s", "times as long"]]
    for name, (layer, forward) in contenders().items():
        times: dict[str, Times] = {kind: {} for kind in kinds}
        epoch(layer, forward, of_each["like"][:2])  # a warm-up
        for k in range(1 if arguments.quick else arguments.rounds):
            for kind, batches in of_each.items():
                times[kind][k] = epoch(layer, forward, batches)
        table.append([name, f"{min(times['random'].values()):.2f}", f"{ratio(times['like'], times['random']):.2f}"])
    print(f"GRU, training, {len(lengths)} sequences of 1 to {LONGEST} steps, N={BATCH}, I=H={WIDTH}, float32\n")
    print_table(table)
    for kind, batches in of_each.items():
        steps = sum(len(batch) * int(batch.max()) for batch in batches)
        print(f"{kind} batches: {1 - int(lengths.sum()) / steps:.0%} of the steps are padding")
    print(f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}; load before {busy:.1f}")
    print(f"masked_rnn with {loops()}, torch {version_of('torch')}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
