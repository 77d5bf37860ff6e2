"""docs/from-*.md: what each page says you can type runs as it is printed, from nothing but the package."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import HANG_S

from lightspan.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("from-*.md"))
# Packages that an example imports and the extra `dev` does not bring.
NEEDS = {"from-nnssl": "nibabel", "from-hf-trainer": "accelerate"}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def section(page: Path, title: str) -> str:
    """What stands below a heading of the second level; "" if there is none."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return found[1] if found else ""


def typed(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each block of the worked example, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", section(page, "A worked example"), re.DOTALL | re.MULTILINE)


def test_there_is_a_page_for_each_of_the_six() -> None:
    names = ("hf-trainer", "lightly", "nnssl", "peft", "stable-pretraining", "torchtitan")
    assert [page.stem for page in PAGES] == [f"from-{name}" for name in names]


@every_page
def test_a_page_compares_shows_and_says_what_does_not_carry_over(page: Path) -> None:
    before, _, _ = page.read_text(encoding="utf-8").partition("## A worked example")
    rows = [line for line in before.splitlines() if line.startswith("| ")]
    assert len(rows) > 9
    assert {line.replace("\\|", "").count("|") for line in rows} == {4}
    assert {language for language, _ in typed(page)} <= {"python", "sh", "yaml"}
    assert section(page, "What does not carry over").count("\n- **") >= 4


@pytest.mark.runs
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.smoke] if page.stem == "from-peft" else []) for page in PAGES],
    ids=lambda page: page.stem,
)
def test_the_worked_example_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    names: dict[str, object] = {"__name__": "example"}
    for language, text in typed(page):
        if language == "python":
            exec(text, names)
        elif language == "yaml":
            Path(re.match(r"# (\S+\.yaml)", text)[1]).write_text(text)
        else:
            for line in text.replace("\\\n", " ").splitlines():
                program, *arguments = shlex.split(line)
                assert program == "lightspan", line
                if "trainer.devices=2" in arguments:  # the second rank starts the command of this process again
                    command = [sys.executable, "-m", "lightspan", *arguments]
                    subprocess.run(command, check=True, timeout=HANG_S)
                else:
                    assert main(arguments) == 0, line
