"""Files outside docs/ that documents link to: each has a page of the site, and the links lead there."""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, InclusionLevel
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound

# A link to a file, without its anchor; blocks of code are matched as a whole and hold none.
LINK = re.compile(r"^(?P<mark>`{3,}).*?^(?P=mark)$|(?<=\]\()(?!\w+:|#)(?P<link>[^)\s#]+)", re.DOTALL | re.MULTILINE)
PICTURES = {".png", ".svg"}


def origin_of(uri: str) -> PurePosixPath:
    """The file of the project that a page shows. What has no file stands in docs/."""
    return PurePosixPath(uri.removeprefix("project/")) if uri.startswith("project/") else PurePosixPath("docs", uri)


def uri_of(root: Path, file: PurePosixPath) -> str:
    """The page that shows a file of the project: the same document, the API of a module, or its text."""
    if file.parts[0] == "docs":
        return file.relative_to("docs").as_posix()
    for module, path in reference.modules(root).items():
        if path == file:
            return reference.uri_of(module)
    return f"project/{file}" if file.suffix in {".md", *PICTURES} else f"project/{file}.md"


def target(root: Path, link: str, uri: str) -> PurePosixPath | None:
    """The file that a link of a page leads to; None if the project has none there."""
    file = PurePosixPath(posixpath.normpath(origin_of(uri).parent / link))
    return None if ".." in file.parts or not (root / file).is_file() else file


def pointed_to_pages(root: Path, text: str, uri: str) -> str:
    """A page's text with its links to files of the project led to their pages.

    Args:
        root: the project.
        text: Markdown; its links are those of the file that the page shows.
        uri: the page.
    """

    def pointed(match: re.Match[str]) -> str:
        file = target(root, match["link"], uri) if match["link"] else None
        return match[0] if file is None else posixpath.relpath(uri_of(root, file), posixpath.dirname(uri) or ".")

    return LINK.sub(pointed, text)


def reached(root: Path, texts: dict[str, str]) -> Iterator[PurePosixPath]:
    """The files that need a page of their own: those that these pages link to, and those that such files link to.

    Args:
        root: the project.
        texts: {page: its text} of all pages that the site has so far.
    """
    known, ahead = set(texts), list(texts.items())
    while ahead:
        uri, text = ahead.pop()
        for match in LINK.finditer(text):
            file = target(root, match["link"], uri) if match["link"] else None
            if file is None or (page := uri_of(root, file)) in known or not page.startswith("project/"):
                continue
            known.add(page)
            if file.suffix == ".md":
                ahead.append((page, (root / file).read_text(encoding="utf-8")))
            yield file


def as_page(root: Path, file: PurePosixPath, config: MkDocsConfig) -> File:
    """The page that shows a file, or the file itself if it is a picture or already Markdown."""
    uri = uri_of(root, file)
    if not uri.endswith(".md") or file.suffix == ".md":
        return File.generated(config, uri, abs_src_path=str(root / file), inclusion=InclusionLevel.NOT_IN_NAV)
    text = (root / file).read_text(encoding="utf-8")
    try:
        language = get_lexer_for_filename(file.name).aliases[0]
    except ClassNotFound:
        language = "text"
    fence = "`" * (3 + max((len(run) for run in re.findall("`+", text)), default=0))
    page = f"---\nsearch: {{exclude: true}}\n---\n\n# {file.name}\n\n`{file}`\n\n{fence}{language}\n{text}{fence}\n"
    return File.generated(config, uri, content=page, inclusion=InclusionLevel.NOT_IN_NAV)
