"""A hook of MkDocs: the repository's own Markdown as pages, and the files that pages link to.

Pages in docs/ link to the rest of the repository as it lies, so that they read the same there as
on the site. Here such a link becomes one to a page of the site or to a copy of the file; one that
leads nowhere stays, and MkDocs refuses it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "RELEASING.md": "releasing.md",
    "benchmarks/results/README.md": "results.md",
}
_LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages outside docs/, and every file that a page links to."""
    pages = {ROOT / name: uri for name, uri in PAGES.items()}
    for path, uri in pages.items():
        files.append(File.generated(config, uri, content=path.read_text()))
    pages |= {path: path.name for path in (ROOT / "docs").glob("*.md")}
    for path in pages:
        for _, link, _ in _LINK.findall(path.read_text()):
            target = (path.parent / link).resolve()
            if target.is_file() and _uri(target) not in files.src_uris:
                files.append(File.generated(config, _uri(target), abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page with its links as the site has them."""
    uri = page.file.src_uri
    sources = {page: ROOT / name for name, page in PAGES.items()}
    folder = sources.get(uri, ROOT / "docs" / uri).parent

    def moved(match: re.Match[str]) -> str:
        start, link, end = match.groups()
        target = (folder / link).resolve()
        if not target.exists():
            return match.group()
        return start + os.path.relpath(_uri(target), os.path.dirname(uri) or ".") + end

    return _LINK.sub(moved, markdown)


def _uri(target: Path) -> str:
    """Where the site has a file of the repository."""
    name = target.relative_to(ROOT).as_posix()
    return PAGES.get(name) or (
        name.removeprefix("docs/") if name.startswith("docs/") else f"files/{name}"
    )
