"""What mkdocs asks while it builds the site: pages that other files own, and links that leave docs/.

A page in PAGES has no file in docs/. Its text is that of files in the repository, or of some of their sections.
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
"""From which files each page comes, and which of their sections; "" is what stands before the first."""
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
    """Long names in tables may be broken at their joints; the browser breaks them nowhere else."""
    return re.sub(r"<t[dh][ >].*?</t[dh]>", lambda cell: CODE.sub(with_breaks, cell[0]), html, flags=re.DOTALL)


def with_breaks(code: re.Match[str]) -> str:
    return re.sub(r"\S{16,}", lambda name: re.sub(r"(::|[_/.,(=])(?=\w)", r"\1<wbr>", name[0]), code[0])


def text_of(page: str, repository: str | None = None) -> str:
    """A page in PAGES. Its first heading is of level 1; what comes from further files stands below it."""
    parts = []
    for source, wanted in PAGES[page]:
        found = sections((ROOT / source).read_text())
        for title in found if wanted is WHOLE else wanted:
            parts.append(with_links(at_level(found[title], 2 if parts else 1), source, repository))
    return "\n".join(parts)


def sections(text: str) -> dict[str, str]:
    """The text of each section of level 2 by its heading. What comes before the first has the name ""."""
    found = {"": ""}
    title = ""
    for line, is_code in lines(text):
        if line.startswith("## ") and not is_code:
            title = line[3:].strip()
            found[title] = ""
        found[title] += line
    return found


def at_level(text: str, level: int) -> str:
    """The same section with its first heading, and those below it, moved to a level."""
    first = next((line for line, is_code in lines(text) if is_heading(line, is_code)), "# ")
    by = level - len(first.split(" ")[0])
    return "".join(
        ("#" * by + line)[max(0, -by) :] if is_heading(line, is_code) else line for line, is_code in lines(text)
    )


def is_heading(line: str, is_code: bool) -> bool:
    return not is_code and re.match(r"#+ ", line) is not None


def lines(text: str) -> list[tuple[str, bool]]:
    """Each line, and whether it stands in a fence of code."""
    found, is_code = [], False
    for line in text.splitlines(keepends=True):
        is_fence = line.startswith("```")
        found.append((line, is_code or is_fence))
        is_code ^= is_fence
    return found


def with_links(text: str, source: str, repository: str | None) -> str:
    """Links of a file of the repository, made to work on the site."""

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
    r"""In a table GitHub needs \| within code; Python's Markdown would print the backslash."""
    return re.sub(r"`[^`]*`", lambda code: code[0].replace(r"\|", "|"), line) if line.startswith("|") else line


def page_of(path: str, anchor: str | None) -> str | None:
    """The page of a file that holds a heading. If none does it is the file's first page, where mkdocs will miss it."""
    pages = [(page, wanted) for page, parts in PAGES.items() for source, wanted in parts if source == path]
    for page, wanted in pages:
        for title, text in sections((ROOT / path).read_text()).items():
            if wanted is WHOLE or title in wanted:
                headings = [line.lstrip("#").strip() for line, is_code in lines(text) if is_heading(line, is_code)]
                if anchor is None or anchor[1:] in map(anchor_of, headings):
                    return page
    return pages[0][0] if pages else None


def anchor_of(heading: str) -> str:
    """As GitHub makes it, and the site's table of contents."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
