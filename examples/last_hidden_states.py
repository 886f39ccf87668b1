"""Shows how padding changes a GRU's last hidden state, and how `lengths` prevents it.

1. One small sequence, ids 1 2 3, and the same sequence padded with a 0: without lengths and with them.
2. A batch of real sentences of unequal length, one of them empty, each compared with the same sentence run alone.

Both parts end in checks, so the command fails if a printed result is wrong. It needs only torch:

    python examples/last_hidden_states.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import pad_sequence

from masked_rnn import MaskedGRU

# Emily Dickinson, 1891, and an empty sentence, as it occurs in real data.
SENTENCES = [
    '"Hope" is the thing with feathers',
    "That perches in the soul,",
    "And sings the tune without the words,",
    "",
    "And never stops at all,",
]
TOLERANCE = 1e-5  # float32 rounding is about 1e-7


def main() -> None:
    three_runs_of_one_sequence(bidirectional=False)
    three_runs_of_one_sequence(bidirectional=True)
    a_batch_of_sentences()
    print("\nAll checks passed: with lengths, a padded batch gives what each sequence alone gives.")


@torch.no_grad()
def three_runs_of_one_sequence(bidirectional: bool) -> None:
    """Runs ids 1 2 3 as one-hot vectors, hidden size 1: unpadded; padded by id 0; padded by id 0 with lengths=[3].

    The id 0 becomes the vector [1, 0, 0, 0]. Without lengths, the layer runs padding as a step like any other.
    """
    torch.manual_seed(7)
    gru = MaskedGRU(input_size=4, hidden_size=1, batch_first=True, bidirectional=bidirectional)
    ids, padded_ids = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 3, 0]])
    x, padded = one_hot(ids, 4).float(), one_hot(padded_ids, 4).float()

    runs = {
        "no padding": gru(x),
        "padded, no lengths": gru(padded),
        "padded, lengths=[3]": gru(padded, lengths=[3]),
    }

    # Each output is (1, T, directions) and each last state (1, directions), because the hidden size is 1.
    rows = {"outputs, forward": [numbers(output[0, :, 0]) for output, _ in runs.values()]}
    if bidirectional:
        rows["outputs, backward"] = [numbers(output[0, :, 1]) for output, _ in runs.values()]
    rows["last state"] = [numbers(last[0]) for _, last in runs.values()]
    print("\nTwo directions" if bidirectional else "\nOne direction")
    print(f"  {'':<18}" + "".join(f"{name:<29}" for name in runs).rstrip())
    for name, cells in rows.items():
        print(f"  {name:<18}" + "".join(f"{cell:<29}" for cell in cells).rstrip())

    (output, last), (_, wrong_last), (right_output, right_last) = runs.values()
    assert largest_difference(right_output[:, :3], output) < TOLERANCE, "outputs differ from the unpadded ones"
    assert largest_difference(right_last, last) < TOLERANCE, "the last state differs from the unpadded one"
    assert (right_output[:, 3] == 0).all(), "the output at padding should be zero"
    assert largest_difference(wrong_last, last) > 0.01, "padding was expected to move the last state"


@torch.no_grad()
def a_batch_of_sentences() -> None:
    """Compares each sentence's last state in a batch with that of nn.GRU on the sentence alone."""
    torch.manual_seed(0)
    alphabet = sorted(set("".join(SENTENCES)))
    embed = nn.Embedding(1 + len(alphabet), 16, padding_idx=0)  # embeds padding as zeros, which still move a GRU
    gru = MaskedGRU(16, 32, num_layers=2, batch_first=True, bidirectional=True)
    plain = nn.GRU(16, 32, num_layers=2, batch_first=True, bidirectional=True)
    plain.load_state_dict(gru.state_dict())

    sequences = [torch.tensor([1 + alphabet.index(c) for c in s], dtype=torch.long) for s in SENTENCES]
    lengths = [len(s) for s in sequences]
    padded = embed(pad_sequence(sequences, batch_first=True))

    _, with_lengths = gru(padded, lengths=lengths)
    without_lengths = flatten(plain(padded)[1])

    print("\nLast states of a padded batch: largest difference from the same sentence run alone by nn.GRU\n")
    print(f"  {'sentence':<40}{'length':>6}{'nn.GRU':>12}{'MaskedGRU, lengths':>22}")
    for row, sentence in enumerate(SENTENCES):
        # nn.GRU refuses an empty sequence. Its last state must be its initial state, which is zero.
        alone = flatten(plain(embed(sequences[row])[None])[1])[0] if sentence else torch.zeros(2 * 2 * 32)
        wrong = largest_difference(without_lengths[row], alone)
        right = largest_difference(with_lengths[row], alone)
        print(f"  {sentence or '(empty)':<40}{lengths[row]:>6}{wrong:>12.1e}{right:>22.1e}")
        assert right < TOLERANCE, f"the last state of {sentence!r} is not that of the sentence alone"
        if lengths[row] < max(lengths):
            assert wrong > 0.01, f"padding was expected to move the last state of {sentence!r}"


def flatten(h_n: Tensor) -> Tensor:
    """Turns nn.GRU's last states (layers · directions, N, H) into MaskedGRU's form: (N, layers · directions · H)."""
    return h_n.transpose(0, 1).flatten(1)


def largest_difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def numbers(values: Tensor) -> str:
    return " ".join(f"{v:+.3f}" if v else "0" for v in values.tolist())


if __name__ == "__main__":
    main()
