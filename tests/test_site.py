"""The built site: whole, closed, and without anything that a browser would fetch from elsewhere."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path, PurePosixPath
from posixpath import normpath
from types import ModuleType
from urllib.parse import unquote

import pytest

pytest.importorskip("material")
pytest.importorskip("mkdocstrings_handlers.python")

pytestmark = pytest.mark.runs

ROOT = Path(__file__).parents[1]


WITH_API = {
    "framework/optim/low_rank/optimizer.py",
    "framework/optim/reference/__init__.py",
    "framework/training/method.py",
}
WITH_API |= {"callbacks/training/subspace_projection.py", "framework/__init__.py"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with the API of a few modules: the others, which are empty here, would take half a minute more."""
    root = tmp_path_factory.mktemp("project") / "lightspan"
    left_out = {".git", ".venv", "build", "dist", "runs"}
    shutil.copytree(ROOT, root, ignore=lambda at, names: left_out & set(names) if Path(at) == ROOT else set())
    for folder in ("framework", "callbacks", "datamodules", "triton_kernels"):
        for module in (root / folder).rglob("*.py"):
            if module.relative_to(root).as_posix() not in WITH_API:
                module.write_text("")
    return root


@pytest.fixture(scope="module")
def site(project: Path) -> Path:
    """The site, built as `make docs` builds it."""
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet"],
        cwd=project,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (built.returncode, built.stdout + built.stderr) == (0, "")
    return project / "build" / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, str]:
    """{path in the site: HTML}."""
    return {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}


@pytest.fixture
def linked_files(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "site"))
    return importlib.import_module("linked_files")


@pytest.mark.parametrize(
    ("page", "link", "leads_to"),
    [
        ("running.md", "../framework/optim/low_rank/optimizer.py", "reference/optim/low_rank/optimizer.md"),
        ("evidence/02_svfit.md", "../../recipes/clustering/swav.yaml", "../project/recipes/clustering/swav.yaml.md"),
        ("running.md", "../docker/README.md#building", "project/docker/README.md#building"),
        ("project/README.md", "docs/evidence.md#claims-that-did-not-hold", "../evidence.md#claims-that-did-not-hold"),
        ("project/docker/README.md", "../LICENSE", "../LICENSE.md"),
        ("project/README.md", "docs/quickstart.png", "../quickstart.png"),
        ("running.md", "../framework/optim/reference", "reference/optim/reference.md"),
        ("running.md", "../triton_kernels", "project/triton_kernels.md"),
        ("project/notebooks.md", "notebooks/own_method.ipynb", "notebooks/own_method.ipynb.md"),
        *(("running.md", link, link) for link in ("data.md", "#here", "https://example.org/x.md")),
        *(("running.md", link, link) for link in ("../framework/nowhere.py", "../../outside", "..")),
    ],
)
def test_links_to_files_of_the_project_lead_to_their_pages(
    linked_files: ModuleType, page: str, link: str, leads_to: str
) -> None:
    assert linked_files.pointed_to_pages(ROOT, f"![a]({link}) b", page) == f"![a]({leads_to}) b"


def test_a_notebook_is_shown_by_its_cells(linked_files: ModuleType) -> None:
    text = linked_files.text_of(ROOT, PurePosixPath("notebooks/own_method.ipynb"))
    assert text.startswith("# A method of your own\n")
    assert re.search(r"^```+python\nimport torch\n", text, re.MULTILINE)
    assert "cell_type" not in text


def test_links_in_code_are_left_alone(linked_files: ModuleType) -> None:
    code, link = "```\n[a](../LICENSE)\n```\n", "[a](../LICENSE)"
    assert linked_files.pointed_to_pages(ROOT, code + link, "running.md") == code + "[a](project/LICENSE.md)"


def test_every_document_module_and_method_has_its_place(pages: dict[str, str]) -> None:
    documents = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")]
    assert {path.as_posix() for path in documents} <= pages.keys()
    assert "LowRank" in pages["reference/optim/low_rank/optimizer.html"]
    assert (
        "step size, &gt;= 0, a float or a 0-d tensor" in pages["reference/optim/low_rank/optimizer.html"]
    )  # from its docstring
    source = unescape(re.sub(r"<[^>]+>", "", pages["reference/optim/low_rank/optimizer.html"].split('id="source"')[1]))
    assert "def initial(self, layout: Layout) -> State:" in source
    recipes = {path.stem for path in (ROOT / "recipes" / "clustering").glob("*.yaml")}
    assert {f"project/recipes/clustering/{name}.yaml.html" for name in recipes} <= pages.keys()
    assert all(f">clustering/{name}</a>" in pages["gallery.html"] for name in recipes)


def test_every_link_and_anchor_leads_somewhere(site: Path, pages: dict[str, str]) -> None:
    anchors = {page: set(re.findall(r'\b(?:id|name)="([^"]+)"', html)) for page, html in pages.items()}
    missing, followed = set(), 0
    for page, html in pages.items():
        for link in set(re.findall(r'\b(?:href|src)="([^"]+)"', html)):
            path, _, anchor = unquote(link).partition("#")
            if re.match(r"[a-z]+:|//", link) or (page == "404.html" and link.startswith("/")):
                continue
            target = normpath(PurePosixPath(page).parent / path) if path else page
            followed += 1
            if not (site / target).exists() or (anchor and anchor not in anchors.get(target, {anchor})):
                missing.add(f"{page}: {link}")
    assert followed > 1000
    assert not missing


def test_pages_load_without_a_network(site: Path, pages: dict[str, str]) -> None:
    loaded = r'<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc="([^"]+)"|<link\b[^>]*\bhref="([^"]+)"'
    found = {source or link for html in pages.values() for source, link in re.findall(loaded, html)}
    assert found
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    found |= set(re.findall(r"""(?:url\(|@import )["']?([^"')]+)""", styles))
    assert [name for name in found if re.match(r"(?!data:)[a-z]+:|//", name)] == []
