"""Computes one gradient for each sequence of a padded batch, by torch.func, as training with privacy needs.

DP-SGD (Abadi et al., 2016) bounds what a model can learn from any one person. It clips each sample's own gradient to a
fixed norm, averages the gradients and adds noise. The usual gradient of a batch is already a mean, so it can't be
clipped for each sample. vmap(grad(...)) gives the gradients of all samples at once. It maps over their lengths too.

Here a MaskedGRU learns to classify nine speakers by their voice (JapaneseVowels, which the package aeon contains;
nothing is downloaded). The per-sample gradients are first compared with a loop in which each utterance runs alone,
without padding. Then the model is trained by DP-SGD. A privacy accountant would compute how much privacy the noise
gives; this is not shown.

    python -m pip install -e ".[examples]"
    python examples/per_sample_gradients.py
"""

from __future__ import annotations

import time

import torch
from aeon.datasets import load_japanese_vowels
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from masked_rnn import MaskedGRU

Gradients = dict[str, Tensor]
"""A parameter's name -> its gradients, one for each sample: (N, *the parameter's shape)."""
CLIP = 1.0
NOISE = 0.5
TOLERANCE = 1e-4


class SpeakerClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = MaskedGRU(12, 32, bidirectional=True)
        self.head = nn.Linear(2 * 32, 9)

    def forward(self, x: Tensor, length: Tensor | None = None) -> Tensor:
        """One utterance, x (T, 12), and its length, a 0-d tensor -> logits (9,)."""
        _, last_hidden = self.gru(x, lengths=length)
        return self.head(last_hidden)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the matrices are too small for a second thread to help
    utterances, speakers = load("train")
    x = pad_sequence(utterances, batch_first=True)
    lengths = torch.tensor([len(u) for u in utterances])
    model = SpeakerClassifier()

    def loss(params: Gradients, x: Tensor, length: Tensor, speaker: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, params, (x, length)), speaker)

    # All samples share the parameters (None); each has its own utterance, length and speaker (0).
    per_sample = vmap(grad(loss), in_dims=(None, 0, 0, 0))
    params = {name: p.detach() for name, p in model.named_parameters()}

    per_sample(params, x, lengths, speakers)  # not timed: the first call loads modules for torch.func
    start = time.perf_counter()
    together = per_sample(params, x, lengths, speakers)
    middle = time.perf_counter()
    alone = one_by_one(model, utterances, speakers)
    end = time.perf_counter()
    differences = {name: (together[name] - alone[name]).abs().max().item() for name in alone}
    print(f"Gradients of {len(utterances)} utterances, each against the same utterance run alone:")
    for name, difference in differences.items():
        print(f"  {name:<25}{tuple(together[name].shape)!s:<15} largest difference {difference:.1e}")
    print(f"  vmap {middle - start:.3f} s, loop {end - middle:.3f} s")
    assert max(differences.values()) < TOLERANCE, "a per-sample gradient differs from the utterance's own"

    print(f"DP-SGD, each gradient clipped to norm {CLIP}, noise of {NOISE} times that norm on their sum:")
    test, test_speakers = load("test")
    velocity = {name: torch.zeros_like(p) for name, p in params.items()}
    for epoch in range(1, 31):
        norms = []
        for batch in torch.randperm(len(utterances)).split(54):
            gradients, batch_norms = clip(per_sample(params, x[batch], lengths[batch], speakers[batch]))
            norms.append(batch_norms)
            assert norm(gradients).max() <= CLIP * (1 + 1e-5), "a clipped gradient is longer than the bound"
            for name, g in gradients.items():
                noisy = (g.sum(0) + NOISE * CLIP * torch.randn_like(params[name])) / len(batch)
                velocity[name] = 0.9 * velocity[name] + noisy
                params[name] = params[name] - 0.2 * velocity[name]
        if epoch == 1 or epoch % 10 == 0:
            accuracy = evaluate(model, params, test, test_speakers)
            clipped = (torch.cat(norms) > CLIP).float().mean().item()
            print(f"  epoch {epoch:>2}: {clipped:>4.0%} of the gradients were clipped, test accuracy {accuracy:.1%}")
    assert accuracy > 0.5, f"{accuracy:.1%} after training, expected more than half"


def one_by_one(model: SpeakerClassifier, utterances: list[Tensor], speakers: Tensor) -> Gradients:
    """Returns the gradients by plain autograd, one unpadded utterance at a time."""
    names = [name for name, _ in model.named_parameters()]
    grads = [
        torch.autograd.grad(cross_entropy(model(u), s), list(model.parameters()))
        for u, s in zip(utterances, speakers, strict=True)
    ]
    return {name: torch.stack(rows) for name, rows in zip(names, zip(*grads, strict=True), strict=True)}


def norm(gradients: Gradients) -> Tensor:
    """Returns each sample's gradient norm over all parameters, (N,)."""
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1).norm(dim=1)


def clip(gradients: Gradients) -> tuple[Gradients, Tensor]:
    """Scales each sample's gradient down to norm CLIP if it is longer. Returns the gradients and the norms before."""
    norms = norm(gradients)
    scale = (CLIP / norms).clamp(max=1.0)
    return {name: torch.einsum("n,n...->n...", scale, g) for name, g in gradients.items()}, norms


@torch.no_grad()
def evaluate(model: SpeakerClassifier, params: Gradients, utterances: list[Tensor], speakers: Tensor) -> float:
    x = pad_sequence(utterances, batch_first=True)
    lengths = torch.tensor([len(u) for u in utterances])
    logits = vmap(lambda x, length: functional_call(model, params, (x, length)))(x, lengths)
    return (logits.argmax(1) == speakers).float().mean().item()


def load(split: str) -> tuple[list[Tensor], Tensor]:
    """Returns utterances, each (frames, 12), and the speaker of each, 0 to 8."""
    utterances, speakers = load_japanese_vowels(split=split)
    return (
        [torch.tensor(u.T, dtype=torch.float32) for u in utterances],
        torch.tensor([int(s) - 1 for s in speakers]),
    )


if __name__ == "__main__":
    main()
