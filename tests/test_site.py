"""The site has every page, and shows what the repository says. `mkdocs build --strict` in .ci/run finds dead links."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = script("site_hooks")


def test_navigation_lists_every_page() -> None:
    listed = re.findall(r"^ +- [^:\n]*: (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    written = [path.name for path in (ROOT / "docs").glob("*.md")]
    assert sorted(listed) == sorted([*written, *hooks.PAGES])


def test_page_has_one_title() -> None:
    for page in hooks.PAGES:
        headings = [line for line, is_code in hooks.lines(hooks.text_of(page)) if not is_code and line.startswith("#")]
        assert [line.startswith("# ") for line in headings] == [True] + [False] * (len(headings) - 1)


def test_links_work_on_the_site() -> None:
    def linked(link: str, source: str = "README.md", repository: str | None = None) -> str:
        return str(hooks.with_links(link, source, repository))

    assert linked("[how](docs/capture.md#onnx)") == "[how](capture.md#onnx)"
    assert linked("![a](docs/images/padding.svg)") == "![a](images/padding.svg)"
    assert linked("[a](#classify)") == "[a](index.md#classify)"
    assert linked("[a](../README.md#speed)", "docs/resets.md") == "[a](index.md#speed)"
    assert linked("[a](../benchmarks/plot.py)", "docs/bptt.md") == "`benchmarks/plot.py`"
    assert linked("[a](LICENSE)", repository="https://host/a/") == "[a](https://host/a/blob/main/LICENSE)"
    assert linked("[a](#nowhere)") == "[a](index.md#nowhere)"  # mkdocs refuses it
    with pytest.raises(FileNotFoundError, match="README"):
        linked("[a](nothing.py)")
    assert linked("[a](https://b/c.md)") == "[a](https://b/c.md)"
    assert linked("```\n[a](b.md)\n```\n") == "```\n[a](b.md)\n```\n"


def test_link_texts_to_pages_are_words() -> None:
    sources = [*(ROOT / "docs").glob("*.md"), *(ROOT / source for source in hooks.PAGES.values())]
    for source in sources:
        assert not re.search(r"\[[^\]]*\.md[^\]]*\]\(", source.read_text()), f"{source.name}: a path is no title"


def test_long_names_in_tables_may_break() -> None:
    def cell(code: str) -> str:
        return str(hooks.on_page_content(f"<table><tr><td><code>{code}</code></td></tr></table>"))

    assert "<wbr>" not in cell("enforce_sorted")
    assert "<code>tests/<wbr>test_<wbr>compile.<wbr>py::<wbr>test_<wbr>as_<wbr>it</code>" in cell(
        "tests/test_compile.py::test_as_it"
    )
    assert hooks.on_page_content("<p><code>torch._dynamo.config.allow_rnn</code></p>").count("<wbr>") == 0


def test_semantics_pictures_match_the_layer() -> None:
    for name, picture in script("draw_semantics").pictures().items():
        assert (ROOT / "docs" / "images" / f"semantics-{name}.svg").read_text() == picture
