"""Draws docs/images/semantics-*.svg, the pictures of docs/semantics.md, from what the layer computes.

Run it by `python docs/draw_semantics.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from masked_rnn import MaskedRNN

GREY, BLUE, RED = "#7f7f7f", "#2e7fc2", "#c0392b"
WIDTH, HEIGHT, GAP, TOP = 56, 44, 6, 22
OUTLINED, SHADED = 'fill="none"', f'fill="{GREY}" fill-opacity="0.2" stroke-opacity="0"'
DASHED, THICK = 'fill="none" stroke-dasharray="3 3"', 'fill="none" stroke-width="2"'


def text(x: float, y: float, what: object, color: str, size: int) -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{color}" font-size="{size}" text-anchor="middle">{what}</text>'


def corner(column: int, row: int) -> tuple[int, int]:
    return GAP + column * (WIDTH + GAP), TOP + row * (HEIGHT + GAP)


def cell(column: int, row: int, number: float, color: str, style: str) -> list[str]:
    x, y = corner(column, row)
    edge = BLUE if style == THICK else GREY
    return [
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="4" stroke="{edge}" {style}/>',
        text(x + WIDTH / 2, y + HEIGHT / 2 + 6, f"{number:g}", color, 17),
    ]


def drawn(titles: list[str], rows: int, parts: list[str]) -> str:
    width, height = corner(len(titles), rows)
    head = [text(corner(k, 0)[0] + WIDTH / 2, 15, title, GREY, 11) for k, title in enumerate(titles)]
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
    return "\n".join([svg, *head, *parts, "</svg>", ""])


def steps(x: Tensor, mask: Tensor, hx: Tensor | None = None, resets: Tensor | None = None) -> str:
    """Draws a row for each sequence: its initial state, if there is one, its steps and its last state."""
    counting = MaskedRNN(1, 1, nonlinearity="relu", bias=False, batch_first=True)
    for weight in counting.parameters():
        nn.init.ones_(weight)
    with torch.no_grad():
        output, last = counting(x.unsqueeze(-1), hx, mask=mask, resets=resets)
    N, T = x.shape
    before = 0 if hx is None else 1
    parts = []
    for n in range(N):
        if hx is not None:
            parts += cell(0, n, hx[n].item(), GREY, DASHED)
        for t in range(T):
            real = bool(mask[n, t])
            parts += cell(before + t, n, output[n, t].item(), BLUE if real else GREY, OUTLINED if real else SHADED)
            left, top = corner(before + t, n)
            if real:
                parts.append(text(left + 8, top + 13, f"{x[n, t]:g}", GREY, 11))
            if resets is not None and resets[n, t]:
                parts.append(f'<path d="M{left - GAP // 2} {top}v{HEIGHT}" stroke="{RED}" stroke-width="4"/>')
        parts += cell(before + T, n, last[n].item(), BLUE, THICK)
    return drawn(["hx"] * before + [f"t = {t}" for t in range(T)] + ["last"], N, parts)


def layout() -> str:
    """Draws a row for each sequence: the states of its layers and directions, side by side."""
    h_0 = torch.tensor([[[10.0 * n + k] for n in range(3)] for k in range(4)])
    layer = MaskedRNN(1, 1, num_layers=2, bidirectional=True, batch_first=True)
    with torch.no_grad():
        _, last = layer(torch.zeros(3, 1, 1), h_0, lengths=[0, 0, 0])
    parts = []
    for n, row in enumerate(last.tolist()):
        for k, state in enumerate(row):
            parts += cell(k, n, state, *((GREY, OUTLINED) if k < 2 else (BLUE, THICK)))
    return drawn(["layer 0 →", "layer 0 ←", "layer 1 →", "layer 1 ←"], 3, parts)


def pictures() -> dict[str, str]:
    x = torch.tensor([[1.0, 2, 3], [4, 5, 0], [0, 0, 0]])
    prefix = torch.arange(3) < torch.tensor([[3], [2], [0]])
    with_holes = torch.tensor([[1.0, 2, 3], [0, 4, 5], [6, 0, 7]])
    resets = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)
    return {
        "padding": steps(x, prefix, torch.tensor([[10.0], [20], [30]])),
        "mask": steps(with_holes, with_holes != 0),
        "resets": steps(x[:1].expand(3, 3), torch.ones_like(resets), torch.full((3, 1), 10.0), resets),
        "layout": layout(),
    }


def main() -> None:
    for name, picture in pictures().items():
        path = Path(__file__).parent / "images" / f"semantics-{name}.svg"
        path.write_text(picture)
        print(path)


if __name__ == "__main__":
    main()
