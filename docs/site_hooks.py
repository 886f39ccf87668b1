"""Hooks of mkdocs, which add pages that are files outside of docs/, and change links that leave docs/."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = {
    "index.md": "README.md",
    "examples.md": "examples/README.md",
    "measuring.md": "benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""The source file of each page."""
CODE = re.compile(r"(?<=<code>)[^<]*(?=</code>)")
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:)([^)#]*)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for page in PAGES:
        files.append(File.generated(config, page, content=text_of(page, config.repo_url)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    name = page.file.src_uri
    return markdown if name in PAGES else with_links(markdown, f"docs/{name}", config.repo_url)


def on_page_content(html: str, **_: Any) -> str:
    """Allows line breaks inside long names in tables, at dots, slashes and underscores. A browser would allow none."""
    return re.sub(r"<t[dh][ >].*?</t[dh]>", lambda cell: CODE.sub(with_breaks, cell[0]), html, flags=re.DOTALL)


def with_breaks(code: re.Match[str]) -> str:
    return re.sub(r"\S{16,}", lambda name: re.sub(r"(::|[_/.,(=])(?=\w)", r"\1<wbr>", name[0]), code[0])


def text_of(page: str, repository: str | None = None) -> str:
    """Returns the text of a page in PAGES."""
    source = PAGES[page]
    return with_links((ROOT / source).read_text(), source, repository)


def lines(text: str) -> list[tuple[str, bool]]:
    """Returns each line, and whether it belongs to a fenced block of code."""
    found, is_code = [], False
    for line in text.splitlines(keepends=True):
        is_fence = line.startswith("```")
        found.append((line, is_code or is_fence))
        is_code ^= is_fence
    return found


def with_links(text: str, source: str, repository: str | None) -> str:
    """Changes the links of a file of the repository so that they work on the site."""

    def replaced(link: re.Match[str]) -> str:
        image, label, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target)) if target else source
        if path.startswith("docs/"):
            return f"{image}[{label}]({path.removeprefix('docs/')}{anchor or ''})"
        if path in PAGES.values():
            page = next(page for page, source in PAGES.items() if source == path)
            return f"[{label}]({page}{anchor or ''})"
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{source} points at {path}")
        # It is in the repository only.
        return f"[{label}]({repository.rstrip('/')}/blob/main/{path})" if repository else f"`{path}`"

    return "".join(line if is_code else LINK.sub(replaced, with_pipes(line)) for line, is_code in lines(text))


def with_pipes(line: str) -> str:
    r"""Replaces \| within code of a table. GitHub needs the backslash; Python's Markdown would print it."""
    return re.sub(r"`[^`]*`", lambda code: code[0].replace(r"\|", "|"), line) if line.startswith("|") else line
