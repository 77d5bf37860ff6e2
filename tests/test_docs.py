"""What the documents print can be typed: files they link exist, verbs, options and recipes they name exist."""

import re
import shlex
from pathlib import Path

import pytest

from lightspan.cli import parser_of
from lightspan.commands.verbs import verb_of

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


def test_every_recipe_of_a_document_exists() -> None:
    for document in DOCUMENTS:
        named = re.findall(rf"`((?:{FAMILIES})/\w+)`", document.read_text())
        assert not [name for name in named if not (ROOT / "recipes" / f"{name}.yaml").is_file()], document


def test_every_promise_names_tests_that_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", (ROOT / "docs" / "guarantees.md").read_text())
    assert len(named) > 30
    assert not [f"{file}::{test}" for file, test in named if f"def {test}(" not in (ROOT / file).read_text()]
