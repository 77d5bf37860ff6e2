"""Files and folders outside docs/ that documents link to: each has a page of the site, and the links lead there."""

import json
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
    """The file of the project that a page shows. What has no file is in docs/."""
    return PurePosixPath(uri.removeprefix("project/")) if uri.startswith("project/") else PurePosixPath("docs", uri)


def uri_of(root: Path, file: PurePosixPath) -> str:
    """The page that shows a file or a folder: the same document, the API of a module, its text, or what is in it."""
    if file.parts[0] == "docs":
        return file.relative_to("docs").as_posix()
    shown_as_it_is = file.suffix in {".md", *PICTURES}
    return reference.page_of(root, file) or (f"project/{file}" if shown_as_it_is else f"project/{file}.md")


def target(root: Path, link: str, uri: str) -> PurePosixPath | None:
    """The file or folder of the project that a link of a page leads to; None if there is none."""
    file = PurePosixPath(posixpath.normpath(origin_of(uri).parent / link))
    return file if file.parts and ".." not in file.parts and (root / file).exists() else None


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
            if file.suffix not in PICTURES:
                ahead.append((page, text_of(root, file)))
            yield file


def text_of(root: Path, file: PurePosixPath) -> str:
    """What the page of a file or folder says, in Markdown; its links are those of the file."""
    if (root / file).is_dir():
        names = sorted(path.name for path in (root / file).iterdir() if not path.name.startswith((".", "__")))
        return f"# {file.name}\n\n" + "".join(f"- [{name}]({file.name}/{name})\n" for name in names)
    text = (root / file).read_text(encoding="utf-8")
    if file.suffix == ".md":
        return text
    if file.suffix == ".ipynb":
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
        return "\n\n".join(said if kind == "markdown" else fenced(said, "python") for kind, said in cells)
    try:
        language = get_lexer_for_filename(file.name).aliases[0]
    except ClassNotFound:
        language = "text"
    return f"---\nsearch: {{exclude: true}}\n---\n\n# {file.name}\n\n`{file}`\n\n{fenced(text, language)}\n"


def fenced(text: str, language: str) -> str:
    """A block of code, between marks that it does not contain."""
    mark = "`" * (3 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{mark}{language}\n{text.rstrip()}\n{mark}"


def as_page(root: Path, file: PurePosixPath, config: MkDocsConfig) -> File:
    """The page of a file or folder, or the file itself if it is a picture."""
    uri, outside = uri_of(root, file), InclusionLevel.NOT_IN_NAV
    if file.suffix in PICTURES:
        return File.generated(config, uri, abs_src_path=str(root / file), inclusion=outside)
    return File.generated(config, uri, content=text_of(root, file), inclusion=outside)
