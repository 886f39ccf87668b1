"""Replaces nn.GRU in existing code with a checkpoint: one line is changed, then lengths are given.

1. `Before` is a common model, built on nn.GRU. Its weights are saved to a file.
2. `After` differs only in the line that makes the layer. It loads the same file and gives the same results.
3. `AfterWithLengths` passes `lengths` to the layer. Its results differ: they no longer depend on padding.
4. `MaskedGRU.from_gru` replaces the layer of a model that is already in memory.

It needs only torch:

    python examples/replace_gru.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from masked_rnn import MaskedGRU

TOLERANCE = 1e-5  # float32 rounding is about 1e-7


class Before(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(12, 32, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * 32, 5)

    def forward(self, x: Tensor) -> Tensor:
        _, h_n = self.gru(x)
        return self.head(torch.cat([h_n[-2], h_n[-1]], dim=1))  # the top layer's two directions


class After(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = MaskedGRU(12, 32, num_layers=2, batch_first=True, bidirectional=True, flatten_hidden=False)
        self.head = nn.Linear(2 * 32, 5)

    def forward(self, x: Tensor) -> Tensor:
        _, h_n = self.gru(x)
        return self.head(torch.cat([h_n[-2], h_n[-1]], dim=1))


class AfterWithLengths(After):
    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        _, h_n = self.gru(x, lengths=lengths)
        return self.head(torch.cat([h_n[-2], h_n[-1]], dim=1))


def main() -> None:
    torch.manual_seed(0)
    sequences = [torch.randn(n, 12) for n in (20, 7, 13, 1)]
    lengths = torch.tensor([len(s) for s in sequences])
    x = pad_sequence(sequences, batch_first=True)

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model.pt"
        before = Before()
        torch.save(before.state_dict(), checkpoint)
        state = torch.load(checkpoint)

    print("1. One line changed, the same checkpoint")
    after = After()
    after.load_state_dict(state, strict=True)
    Before().load_state_dict(after.state_dict(), strict=True)  # and back
    assert isinstance(after.gru, nn.GRU)
    show("logits, largest difference", difference(after(x), before(x)), below=TOLERANCE)
    show("gradients, largest difference", gradient_difference(after, before, x), below=TOLERANCE)

    print("2. The same with backend='packed', which runs nn.GRU's own kernels")
    after.gru = MaskedGRU.from_gru(after.gru, flatten_hidden=False, backend="packed")
    assert torch.equal(after(x), before(x)), "the packed backend should give nn.GRU's logits bit for bit"
    print("   logits are equal bit for bit")

    print("3. Given lengths: each row against the same sequence alone in Before, which is the truth")
    with_lengths = AfterWithLengths()
    with_lengths.load_state_dict(state, strict=True)
    with torch.no_grad():
        alone = torch.cat([before(s[None]) for s in sequences])
        padded, masked = before(x), with_lengths(x, lengths)
    print(f"   {'length':>6}{'Before, padded':>18}{'AfterWithLengths':>20}")
    for n, truth, wrong, right in zip(lengths.tolist(), alone, padded, masked, strict=True):
        print(f"   {n:>6}{difference(wrong, truth):>18.1e}{difference(right, truth):>20.1e}")
        assert difference(right, truth) < TOLERANCE, "with lengths, padding should not matter"
        assert n == len(x[0]) or difference(wrong, truth) > 1e-3, "without lengths, padding was expected to matter"

    print("4. from_gru: a model in memory, its parameters shared and not copied")
    gru = before.gru
    before.gru = MaskedGRU.from_gru(gru, flatten_hidden=False)
    shared = dict(gru.named_parameters())
    assert all(p is shared[name] for name, p in before.gru.named_parameters()), "the parameters should be shared"
    show("logits, largest difference", difference(before(x), padded), below=TOLERANCE)
    print("All checks passed.")


def show(what: str, value: float, below: float) -> None:
    print(f"   {what}: {value:.1e}")
    assert value < below, f"{what} is {value}, expected less than {below}"


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def gradient_difference(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    """Returns the largest difference between the gradients of one loss, over all parameters."""
    grads = [torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (a, b)]
    return max(difference(g, h) for g, h in zip(*grads, strict=True))


if __name__ == "__main__":
    main()
