"""What the documents print can be typed: files they link exist, verbs, options and recipes they name exist."""

import re
import shlex
import textwrap
from pathlib import Path

import pytest
import yaml
from import_graph import sources

from lightspan.cli.commands.verbs import VERBS, verb_of
from lightspan.cli.config.resolve import ANY_KIND, resolve
from lightspan.cli.main import parser_of

ROOT = Path(__file__).parents[1]
READMES = [ROOT / folder / "README.md" for folder in ("docker", "evidence")]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("notebooks/*.ipynb"), *READMES])

FAMILIES = "|".join(sorted({path.parent.name for path in (ROOT / "recipes").glob("*/*.yaml")}))


def commands() -> list[str]:
    """Every `lightspan ...` line of the fenced shell blocks."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```(?:sh|bash|shell)\n(.*?)```", document.read_text(), re.DOTALL):
            lines = [line.strip().removeprefix("srun ") for line in block.replace("\\\n", " ").splitlines()]
            found += [line for line in lines if line.startswith("lightspan ")]
    return sorted(set(found))


COMMANDS = commands()


def test_the_documents_show_commands() -> None:
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    missing = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)", document.read_text()):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            missing.append(link)
    assert not missing


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def unknown(command: str) -> list[str]:
    """Options and recipes of a command line that do not exist."""
    arguments = shlex.split(command, comments=True)[1:]
    verb = verb_of(arguments)
    assert verb is not None, command
    options = parser_of(verb)._option_string_actions
    wrong = []
    for argument in arguments:
        if argument.startswith("-"):
            name = argument.partition("=")[0]
            wrong += [argument] if "." not in name and name not in options else []
        elif re.fullmatch(rf"({FAMILIES})/\w+", argument):
            wrong += [] if (ROOT / "recipes" / f"{argument}.yaml").is_file() else [argument]
    return wrong


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_use_options_and_recipes_that_exist(command: str) -> None:
    assert unknown(command) == []


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("lightspan fit language/quickstart --re auto", ["--re"]),
        ("lightspan fit language/quickstarts", ["language/quickstarts"]),
        ("lightspan fit subspace/nothing -c scale/fsdp3", ["subspace/nothing", "scale/fsdp3"]),
        ("lightspan fit language/quickstart -c scale/ddp --trainer.max_steps 3 --run runs/mine", []),
        ("lightspan data pack photos --out shards --no-such", ["--no-such"]),
    ],
)
def test_what_does_not_exist_is_found(command: str, wrong: list[str]) -> None:
    assert unknown(command) == wrong


SOURCES = dict(sources())


def is_there(name: str) -> bool:
    """Whether `a.b.Name` is a module below lightspan, its package, or a word in the module `a.b`; a name may leave out
    the first packages.
    """
    where, _, last = name.rpartition(".")
    if any(f".{module}".endswith(f".{name}") or f".{name}." in f".{module}." for module in SOURCES):
        return True
    within = [file for module, file in SOURCES.items() if f".{module}".endswith((f".{where}", f".{where}.__init__"))]
    return any(re.search(rf"\b{last}\b", file.read_text()) for file in within)


OF_OTHERS = {"torch", "nn", "timm", "lightning", "transformers", "spt"}


def test_parts_that_documents_name_exist() -> None:
    checked = 0
    for document in DOCUMENTS:
        text = document.read_text()
        names = set(re.findall(r"(?<![\w./-])lightspan\.((?:\w+\.)+\w+)", text))
        names |= set(re.findall(r"`((?:[a-z]\w*\.)+[A-Z]\w*[a-z]\w*)[`(]", text))
        names = {name for name in names if name.split(".")[0] not in OF_OTHERS}
        checked += len(names)
        assert not [name for name in names if not is_there(name.removeprefix("lightspan."))], document
    assert checked > 300


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("optim.low_rank.optimizer.LowRank", True),
        ("low_rank.optimizer.LowRank", True),
        ("optim.low_rank", True),
        ("optim.low_rank.LowRank", False),
        ("rank.optimizer.LowRank", False),
        ("optim.low_rank.optimizer.HighRank", False),
    ],
)
def test_a_part_is_there_if_its_module_has_it(name: str, there: bool) -> None:
    assert is_there(name) == there


def test_decisions_name_only_what_the_project_has() -> None:
    files = [*SOURCES.values(), ROOT / "setup.py", ROOT / "Makefile"]
    words = {word for file in files for word in re.findall(r"\w+", file.read_text())}
    named = re.findall(r"`([A-Za-z_.]+)`", (ROOT / "docs" / "decisions.md").read_text())
    assert len(named) > 50
    assert {name for name in named if name.rpartition(".")[2] not in words} == set()


def test_every_recipe_of_a_document_exists() -> None:
    for document in DOCUMENTS:
        named = re.findall(rf"`((?:{FAMILIES})/\w+)`", document.read_text())
        assert not [name for name in named if not (ROOT / "recipes" / f"{name}.yaml").is_file()], document


def test_verbs_that_sources_and_recipes_name_exist() -> None:
    folders = ("framework", "datamodules", "callbacks", "recipes")
    files = [path for folder in folders for ending in ("py", "yaml") for path in (ROOT / folder).rglob(f"*.{ending}")]
    named = {(path, verb) for path in files for verb in re.findall(r"`lightspan ([a-z][a-z-]+)", path.read_text())}
    assert len(named) > 30
    assert not [(str(path), verb) for path, verb in named if not any(verb == known.words[0] for known in VERBS)]


def examples() -> list[tuple[str, str, str]]:
    """(page and name, the recipe below or "", text) of the YAML blocks headed `# my_NAME.yaml:  lightspan ...`."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"^ *```yaml\n(.*?)^ *```", document.read_text(), re.DOTALL | re.MULTILINE):
            text = textwrap.dedent(block)
            if head := re.match(r"# (my_\w+|six)\.yaml:.*?lightspan (?:fit|run) ([\w./]+)", text):
                found.append((f"{document.name} {head[1]}", "" if head[2].endswith(".yaml") else head[2], text))
    return found


@pytest.mark.parametrize(("name", "recipe", "text"), examples(), ids=lambda part: part if len(part) < 60 else "")
def test_recipes_for_data_of_your_own_have_no_mistake(name: str, recipe: str, text: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(text)
    resolve(recipe or str(mine), [str(mine)] if recipe else [], [], kinds=ANY_KIND)


def test_every_promise_names_tests_that_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", (ROOT / "docs" / "guarantees.md").read_text())
    assert len(named) > 30
    assert not [f"{file}::{test}" for file, test in named if f"def {test}(" not in (ROOT / file).read_text()]


def outside_code(text: str) -> list[str]:
    """The lines of a document; those in fenced blocks are empty."""
    return re.sub(
        r"^ *```.*?^ *```", lambda code: "\n" * code[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE
    ).split("\n")


def read_in_two_ways(text: str) -> list[str]:
    """Lines that GitHub and the site show differently: blocks in an item of a list that are indented by fewer than four
    spaces, and lists and tables that follow a paragraph without a blank line.
    """
    fences = re.findall(r"^ {1,3}```.*$", text, re.MULTILINE)
    lines = outside_code(text)
    wrong = []
    for before, line in zip(["", *lines], lines, strict=False):
        nested = re.match(r" {1,3}(- |\d+\. )", line) or (not before and re.match(r" {1,3}\S", line))
        list_begins = re.match(r"- |1\. ", line) and not re.match(r" |- |\d+\. |$", before)
        table_begins = line.startswith("|") and not re.match(r"\||<!--|$", before)
        wrong += [line] if nested or list_begins or table_begins else []
    return fences + wrong


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_read_alike_on_github_and_on_the_site(document: Path) -> None:
    assert read_in_two_ways(document.read_text()) == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("- a\n  b\n- c\n", []),
        ("- a\n\n    b\n    - c\n", []),
        ("- a\n\n  b\n", ["  b"]),
        ("- a\n  - b\n", ["  - b"]),
        ("- a\n\n  ```py\n  b\n  ```\n", ["  ```py", "  ```"]),
        ("a\n- b\n", ["- b"]),
        ("a\n| b |\n|---|\n", ["| b |"]),
        ("```\na\n- b\n```\n", []),
    ],
)
def test_what_is_read_in_two_ways_is_found(text: str, wrong: list[str]) -> None:
    assert read_in_two_ways(text) == wrong


def test_the_site_and_the_index_have_every_document() -> None:
    def pages(nav: str | list) -> list[str]:
        if isinstance(nav, str):
            return [nav]
        return [
            page for entry in nav for page in pages(entry if isinstance(entry, str) else next(iter(entry.values())))
        ]

    documents = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    made = {"gallery.md", "project/notebooks.md"}  # by tools/site
    assert sorted({*pages(config["nav"])} - made) == documents
    linked = re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "index.md").read_text())
    assert sorted({*linked, "index.md"}) == documents


def links(page: Path) -> set[Path]:
    """The files of the project that a page links to."""
    found = re.findall(r"\]\((?!\w+:)([^)\s#]+)", page.read_text())
    return {(page.parent / link).resolve() for link in found}


def test_the_index_of_evidence_links_every_page_of_it() -> None:
    assert set((ROOT / "docs" / "evidence").glob("*.md")) <= links(ROOT / "docs" / "evidence.md")


@pytest.mark.parametrize(
    ("source", "equation"),
    [
        ("framework/optim/reference/galore.py", "R = G Q"),
        ("framework/optim/reference/muon.py", "N_ij = O_ij / "),  # FactoredMuon
        ("framework/methods/distillation/dino.py", "-sum_k P_t(x)_k log P_s(x')_k"),
    ],
)
def test_equations_are_two_clicks_from_the_readme(source: str, equation: str) -> None:
    assert equation in (ROOT / source).read_text()
    pages = {page for page in links(ROOT / "README.md") if page.suffix == ".md" and page.stem != "methods"}
    assert [page for page in pages if ROOT / source in links(page)]


def test_figures_of_the_decision_page_stand_on_the_pages_that_it_links() -> None:
    page = ROOT / "docs" / "which-method.md"
    checked = 0
    for line in page.read_text().split("\n"):
        for cell in line.split(" | "):
            linked = [page.parent / link for link in re.findall(r"\]\(([\w/-]+\.md)", cell)]
            known = {
                f"{float(number):.{digits}f}"
                for path in linked
                for number in re.findall(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?", path.read_text())
                for digits in range(1, 5)
            }
            text = re.sub(r"\[[^]]*\]\([^)]*\)|`[^`]*`", "", cell)
            figures = re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)", text)
            assert {figure for figure in figures if figure not in known} == set(), cell
            checked += len(figures)
    assert checked > 50
