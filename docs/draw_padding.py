"""Draws docs/images/padding.svg: a GRU's state over a padded batch, without lengths and with them.

Run it by `python docs/draw_padding.py`, with matplotlib installed.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import nn

from masked_rnn import MaskedGRU

GREY, WRONG, RIGHT = "#7f7f7f", "#c0392b", "#2e7fc2"
LENGTHS, STEPS = (16, 9, 4), 16


def main() -> None:
    torch.manual_seed(4)
    x = torch.randn(len(LENGTHS), STEPS, 3)
    for n, length in enumerate(LENGTHS):
        x[n, length:] = 0
    gru = nn.GRU(3, 1, batch_first=True)
    with torch.no_grad():
        for parameter in gru.parameters():
            parameter.mul_(1.6)
        without, _ = gru(x)
        with_lengths, _ = MaskedGRU.from_gru(gru)(x, lengths=LENGTHS)

    mpl.rcParams.update({"text.color": GREY, "axes.labelcolor": GREY, "svg.hashsalt": "masked_rnn", "font.size": 11})
    mpl.rcParams["svg.fonttype"] = "none"  # text stays text, in the reader's fonts
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    columns = figure.subplots(len(LENGTHS), 2, sharex=True, sharey=True)
    titles = ("nn.GRU(x):\nthe state runs on through padding", "MaskedGRU(x, lengths=[16, 9, 4]):\nit stops")
    for column, (title, output) in enumerate(zip(titles, (without, with_lengths), strict=True)):
        columns[0, column].set_title(title, color=GREY, fontsize=11)
        for n, length in enumerate(LENGTHS):
            axes = columns[n, column]
            axes.axvspan(length - 0.5, STEPS - 0.5, color=GREY, alpha=0.2, linewidth=0)
            axes.axhline(0, color=GREY, linewidth=0.5)
            axes.plot(range(length), output[n, :length, 0], color=RIGHT, marker=".")
            axes.plot(range(length, STEPS), output[n, length:, 0], color=WRONG if column == 0 else RIGHT, marker=".")
            last = length - 1 if column else STEPS - 1
            axes.plot(last, output[n, last, 0], "o", color=WRONG if column == 0 and length < STEPS else RIGHT, ms=9)
            axes.margins(y=0.2)
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
    figure.supxlabel("time; shaded: padding; large dot: the last state that is returned", color=GREY, fontsize=11)
    path = Path(__file__).parent / "images" / "padding.svg"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None})
    print(path)


if __name__ == "__main__":
    main()
