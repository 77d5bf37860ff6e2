"""What the documents print can be typed: files they link exist, verbs, options and recipes they name exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "docker" / "README.md"])


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
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", document.read_text())
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


@pytest.fixture(scope="module")
def help_of() -> dict[str, str]:
    """Verb -> its help text."""
    verbs = {shlex.split(command, comments=True)[1] for command in COMMANDS}
    run = [sys.executable, "-m", "lightspan"]
    return {verb: subprocess.run([*run, verb, "--help"], capture_output=True, text=True).stdout for verb in verbs}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_use_options_and_recipes_that_exist(command: str, help_of: dict[str, str]) -> None:
    _, verb, *arguments = shlex.split(command, comments=True)
    for argument in arguments:
        if argument.startswith("-") and "." not in argument:
            assert argument.partition("=")[0] in help_of[verb]
    recipes = [a for a in arguments if re.fullmatch(r"(language|contrastive)/\w+", a)]
    assert not [name for name in recipes if not (ROOT / "recipes" / f"{name}.yaml").is_file()]


def test_every_promise_names_tests_that_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", (ROOT / "docs" / "guarantees.md").read_text())
    assert len(named) > 30
    assert not [f"{file}::{test}" for file, test in named if f"def {test}(" not in (ROOT / file).read_text()]
