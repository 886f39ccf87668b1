"""Hooks of mkdocs, which add pages made from files outside of docs/, and change links that leave docs/.

A page in PAGES has no file in docs/. Its text comes from files in the repository, or from some of their sections.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WHOLE = None
PAGES: dict[str, list[tuple[str, list[str] | None]]] = {
    "index.md": [("README.md", ["", "Before and after", "Options", "Recipes"])],
    "examples.md": [("examples/README.md", WHOLE)],
    "speed.md": [("README.md", ["Speed"]), ("benchmarks/README.md", WHOLE)],
    "contributing.md": [("CONTRIBUTING.md", WHOLE)],
    "changelog.md": [("CHANGELOG.md", WHOLE)],
}
"""For each page, its source files and the sections it takes from them. "" is the text before the first section."""
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
    """Returns the text of a page in PAGES. Its first heading has level 1; further parts are sections below it."""
    parts = []
    for source, wanted in PAGES[page]:
        found = sections((ROOT / source).read_text())
        for title in found if wanted is WHOLE else wanted:
            parts.append(with_links(at_level(found[title], 2 if parts else 1), source, repository))
    return "\n".join(parts)


def sections(text: str) -> dict[str, str]:
    """Returns the text of each section of level 2 by its heading. The text before the first has the name ""."""
    found = {"": ""}
    title = ""
    for line, is_code in lines(text):
        if line.startswith("## ") and not is_code:
            title = line[3:].strip()
            found[title] = ""
        found[title] += line
    return found


def at_level(text: str, level: int) -> str:
    """Returns a section with its first heading moved to a level, and those below it by as much."""
    first = next((line for line, is_code in lines(text) if is_heading(line, is_code)), "# ")
    by = level - len(first.split(" ")[0])
    return "".join(
        ("#" * by + line)[max(0, -by) :] if is_heading(line, is_code) else line for line, is_code in lines(text)
    )


def is_heading(line: str, is_code: bool) -> bool:
    return not is_code and re.match(r"#+ ", line) is not None


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
        page = page_of(path, anchor)
        if page:
            return f"[{label}]({page}{anchor or ''})"
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{source} points at {path}")
        # It is in the repository only.
        return f"[{label}]({repository.rstrip('/')}/blob/main/{path})" if repository else f"`{path}`"

    return "".join(line if is_code else LINK.sub(replaced, with_pipes(line)) for line, is_code in lines(text))


def with_pipes(line: str) -> str:
    r"""Replaces \| within code of a table. GitHub needs the backslash; Python's Markdown would print it."""
    return re.sub(r"`[^`]*`", lambda code: code[0].replace(r"\|", "|"), line) if line.startswith("|") else line


def page_of(path: str, anchor: str | None) -> str | None:
    """Returns the page that holds a heading of a file. If none does, returns the file's first page.

    mkdocs then reports the missing heading.
    """
    pages = [(page, wanted) for page, parts in PAGES.items() for source, wanted in parts if source == path]
    for page, wanted in pages:
        for title, text in sections((ROOT / path).read_text()).items():
            if wanted is WHOLE or title in wanted:
                headings = [line.lstrip("#").strip() for line, is_code in lines(text) if is_heading(line, is_code)]
                if anchor is None or anchor[1:] in map(anchor_of, headings):
                    return page
    return pages[0][0] if pages else None


def anchor_of(heading: str) -> str:
    """Returns the anchor that GitHub and the site's table of contents make of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
