"""Runs a long signal window by window. The state goes from window to window, so the result is that of the whole signal.

The signals of two sensors, of different length, run in windows through a layer of one direction. The result is compared
with that of the whole signal in one call. The processor time of a window is printed. It does not grow with the number
of windows before, and other work on the machine does not count.

    python examples/stream.py

This needs only torch. `--short` is a shorter signal.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from masked_rnn import MaskedGRU


def main() -> None:
    parser = argparse.ArgumentParser(description="Feed a long signal window by window.")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=16, help="steps in a window")
    parser.add_argument("--short", action="store_true", help="1,000 steps")
    args = parser.parse_args()
    steps = 1_000 if args.short else args.steps

    torch.manual_seed(0)
    torch.set_num_threads(1)  # processor time would count the waiting of a second thread, too
    layer = MaskedGRU(8, 64, num_layers=2, batch_first=True).eval()
    signal = torch.randn(2, steps, 8)
    lengths = torch.tensor([steps, steps * 3 // 5])  # the second sensor stops early

    with torch.no_grad():
        whole, last = layer(signal, lengths=lengths)
        output, state, seconds = stream(layer, signal, lengths, args.window)

    milliseconds = sorted(1e3 * s for s in seconds)
    tenth = len(seconds) // 10
    print(f"{len(seconds)} windows of {args.window} steps, two layers of 64 units, a batch of 2")
    print(f"processor time of a window, ms: median {statistics.median(milliseconds):.2f}, ", end="")
    print(f"99 % below {milliseconds[int(0.99 * len(milliseconds))]:.2f}")
    print(f"median of the first tenth {1e3 * statistics.median(seconds[:tenth]):.2f}, ", end="")
    print(f"of the last {1e3 * statistics.median(seconds[-tenth:]):.2f}")
    for name, found, expected in (("outputs", output, whole), ("last states", state, last)):
        difference = (found - expected).abs().max().item()
        print(f"{name}, largest difference from the whole signal at once: {difference:.1e}")
        assert difference < 1e-5, f"{name} differ by {difference}"


def stream(layer: MaskedGRU, signal: Tensor, lengths: Tensor, window: int) -> tuple[Tensor, Tensor, list[float]]:
    """Returns the outputs of all windows, concatenated, the last state, and the processor time of each window."""
    state: Tensor | None = None
    outputs, seconds = [], []
    for start in range(0, signal.size(1), window):
        part = signal[:, start : start + window]
        began = time.process_time()
        # The lengths in this window are 0 once a signal has ended; its state then does not change.
        output, state = layer(part, state, lengths=(lengths - start).clamp(0, part.size(1)))
        seconds.append(time.process_time() - began)
        outputs.append(output)
    assert state is not None
    return torch.cat(outputs, 1), state, seconds


if __name__ == "__main__":
    main()
