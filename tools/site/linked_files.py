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
    """The page that shows a file: the same document, the API of a module, or its text. That of a folder of modules is
    the API of the package, or the list of all modules.
    """
    if file.parts[0] == "docs":
        return file.relative_to("docs").as_posix()
    if (root / file).is_dir():
        return reference.page_of(root, file / "__init__.py") or "reference/index.md"
    shown_as_it_is = file.suffix in {".md", *PICTURES}
    return reference.page_of(root, file) or (f"project/{file}" if shown_as_it_is else f"project/{file}.md")


def target(root: Path, link: str, uri: str) -> PurePosixPath | None:
    """The file of the project, or its folder of modules, that a link of a page leads to; None if there is none."""
    file = PurePosixPath(posixpath.normpath(origin_of(uri).parent / link))
    if ".." in file.parts:
        return None
    of_modules = (root / file).is_dir() and file.parts[:1] in {(folder,) for folder in reference.folders(root).values()}
    return file if of_modules or (root / file).is_file() else None


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
