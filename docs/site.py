"""Hooks of the documentation site (mkdocs.yml): README and the like as pages, sources as files.

Pages link to files of the checkout by relative paths, so that the links work where the repository
is read. Here those that leave docs/ are copied into the site, under source/, and the links follow.
"""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
LINK = re.compile(r'(\]\(|(?:src|srcset)=")(?!https?:|#)([^)"#\s]+)')


def place(path: str) -> str:
    """Returns where a file of the checkout lies on the site: both paths from their roots."""
    pages = {source: page for page, source in PAGES.items()}
    inside = path.removeprefix("docs/")
    return pages.get(path) or (inside if inside != path else f"source/{path}")


def links(page: File) -> dict[str, str]:
    """Returns the relative links of a page, each with the file of the checkout that it names."""
    base = PurePosixPath(PAGES.get(page.src_uri, f"docs/{page.src_uri}")).parent
    found = {link for _, link in LINK.findall(page.content_string)}
    return {link: os.path.normpath(base / link) for link in found}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie outside docs/, and every file outside it that a page links to."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for page in list(files.documentation_pages()):
        for path in links(page).values() if page.src_uri.endswith(".md") else ():
            uri = place(path)
            if uri.startswith("source/") and (ROOT / path).is_file() and uri not in files.src_uris:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lets the links of a page follow the files."""
    if not page.file.src_uri.endswith(".md"):
        return markdown
    base = PurePosixPath(page.file.src_uri).parent
    named = links(page.file)

    def follow(found: re.Match[str]) -> str:
        before, link = found.groups()
        return before + os.path.relpath(place(named[link]), base) if link in named else found[0]

    return LINK.sub(follow, markdown)
