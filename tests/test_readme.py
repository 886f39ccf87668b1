"""What README and docstrings show, run as shown."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest

import masked_rnn
from masked_rnn import _layers

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(code, id=f"{page.stem}-{k}")
    for page in PAGES
    for k, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("code", BLOCKS)
def test_code_in_the_docs(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


def test_docstrings() -> None:
    failed, attempted = doctest.testmod(_layers, globs={"torch": __import__("torch"), **vars(masked_rnn)})
    assert attempted > 10
    assert failed == 0


def test_links() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} points at {target}"


def test_the_first_forty_lines_serve_a_newcomer() -> None:
    head = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    for needed in ("```python", "padding.svg", "promised", "pip install -e . && python examples/", "Honest limits"):
        assert needed in head


def test_the_version_is_in_the_changelog() -> None:
    assert f"## [{masked_rnn.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
