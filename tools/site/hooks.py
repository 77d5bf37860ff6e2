"""Hooks of MkDocs: the pages of the site that are not in docs/, and the links that lead out of docs/.

The site is docs/, the API reference, the gallery of methods, and a page for each file of the project to which one of
these links. See mkdocs.yml.
"""

import gc
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "evidence")]  # folders of scripts, not packages

import gallery  # noqa: E402
import linked_files  # noqa: E402
import reference  # noqa: E402


def on_startup(command: str, dirty: bool) -> None:
    """Lays the package out for the API reference, before the reference looks for it."""
    if command == "build":
        gc.disable()  # a quarter of the time: it would walk through the trees of all modules again and again
    reference.copy_package(ROOT)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the API reference to the navigation, and gives headings the anchors that they have on GitHub."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    assert config.nav is not None
    config.nav.append({"API": ["reference/index.md", *reference.navigation(ROOT)]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in docs/."""
    style = Path(__file__).with_name("site.css")
    files.append(File.generated(config, "assets/site.css", abs_src_path=str(style)))
    made = {**reference.pages(ROOT), "reference/index.md": reference.index(ROOT), "gallery.md": gallery.page(ROOT)}
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))
    texts = {file.src_uri: file.content_string for file in files.documentation_pages()}
    for file in linked_files.reached(ROOT, texts):
        files.append(linked_files.as_page(ROOT, file, config))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads links to files of the project to their pages."""
    return linked_files.pointed_to_pages(ROOT, markdown, page.file.src_uri)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Adds the source to the pages of modules."""
    return reference.with_source(ROOT, output)
