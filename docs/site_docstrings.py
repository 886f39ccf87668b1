"""Turns docstrings into Markdown for mkdocs: they have Sphinx's marks, as torch.nn's own docstrings do.

Equations become HTML, which every browser shows without a script or an extra font.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension, Object

SYMBOLS = {"sigma": "σ", "odot": "⊙", "cdot": "·", "tanh": "tanh", "sqrt": "√", "mathcal": ""}


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    text = re.sub(r"^\.\. math::\n((?:[ ]+.*\n|\n)+)", _equation, text + "\n", flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]+)`", lambda m: f'<span class="math">{to_html(m[1])}</span>', text)
    text = re.sub(r"^\.\. warning::$", "!!! warning", text, flags=re.MULTILINE)
    text = re.sub(r":(?:class|meth):`~(?:\w+\.)*(\w+)`", r"`\1`", text)
    text = re.sub(r":(?:class|meth):`([^`]+)`", r"`\1`", text)
    text = re.sub(r"`([^`<]+) <(http[^>]+)>`_", r"[\1](\2)", text)
    text = re.sub(r"docs/(\w+)\.md", lambda m: f"[the page {m[1].replace('_', ' ')}]({m[1]}.md)", text)
    text = re.sub(r"\s+Default:\s+``[^`]*``$", "", text, flags=re.MULTILINE)  # the signature says it
    text = text.replace("Example::\n\n", "Examples:\n")
    text = re.sub(r"^(Inputs|Outputs): (.*)\n((?:[ ]+.*\n|\n)+)", _described, text, flags=re.MULTILINE)
    return re.sub(r"^(Attributes|Raises):\n((?:[ ]+.*\n)+)\n((?:[ ]+.*\n)+)", _listed, text, flags=re.MULTILINE)


def _equation(match: re.Match[str]) -> str:
    rows = re.sub(r"\\(?:begin|end)\{array\}(?:\{\w+\})?", "", match[1]).strip().split(r"\\")
    return f'<div class="math">{"".join(f"<div>{to_html(row)}</div>" for row in rows)}</div>\n\n'


def to_html(latex: str) -> str:
    """Converts the LaTeX that the docstrings use. Other LaTeX raises an error."""

    def replaced(part: re.Match[str]) -> str:
        low, high, command, letter = part.groups()
        if low or high:
            tag = "sub" if low else "sup"
            return f"<{tag}>{to_html((low or high).strip('{}'))}</{tag}>"
        return SYMBOLS[command] if command else f"<i>{letter}</i>"

    text = re.sub(r"_(\{[^}]*\}|\w)|\^(\{[^}]*\}|\w)|\\([a-z]+)|([A-Za-z])", replaced, latex.strip())
    if "\\" in text:
        raise ValueError(f"no HTML for {latex}")
    return re.sub(r"[{}]", "", text).replace("-", "−").replace(" ·", "·").replace("· ", "·")


def _described(match: re.Match[str]) -> str:
    """Makes `Inputs` or `Outputs`, which mkdocstrings does not know as a section, a heading with text below it."""
    names = ", ".join(f"`{name}`" for name in match[2].split(", "))
    return f"**{match[1]}:** {names}\n\n{textwrap.dedent(match[3])}"


def _listed(match: re.Match[str]) -> str:
    """Separates a remark below a list from the list, so that it does not become an item."""
    return f"{match[1]}:\n{match[2]}\n{textwrap.dedent(match[3])}"
