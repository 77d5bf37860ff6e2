"""What Tab offers, asked directly and in real shells."""

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import HANG_S, wait_until

from lightspan.cli.commands.completion import SHELLS, completion
from lightspan.cli.commands.verbs import VERBS
from lightspan.cli.config.recipes import catalogue_names
from lightspan.cli.main import main
from lightspan.core.errors import UserError


def offered(*words: str) -> list[str]:
    return [candidate.word for candidate in completion(words).candidates]


def test_the_first_word_is_a_verb() -> None:
    assert offered("") == [*(verb.name for verb in VERBS if " " not in verb.name), "--help", "--version"]


def test_behind_the_first_word_of_longer_verbs_come_their_second_words() -> None:
    assert offered("runs", "") == ["tag", "note", "clean"]
    assert offered("runs", "clean", "--y") == ["--yes"]
    assert offered("comp") == ["completion"]
    assert dict(completion(["fi"]).candidates) == {"fit": "train"}
    assert completion([]) == completion([""])


def test_behind_a_verb_come_its_own_options() -> None:
    assert offered("fit", "--res") == ["--resume"]
    assert "--to" in offered("submit", "language/quickstart", "--")
    assert "--to" not in offered("fit", "language/quickstart", "--")
    assert {"--debug", "--help", "-h"} <= {*offered("doctor", "-")}


def test_recipes_and_overlays_are_those_of_the_catalogue_or_files() -> None:
    assert offered("fit", "") == catalogue_names()
    assert offered("fit", "masked/i_") == ["masked/i_jepa", "masked/i_jepa_imagenet"]
    assert offered("fit", "language/quickstart", "-c", "") == catalogue_names(overlays=True)
    assert offered("check", "--config", "scale/fs") == ["scale/fsdp2"]
    assert completion(["copy", "./mi"]) == ([], "files")


def test_a_recipe_is_followed_by_its_settings_one_level_at_a_time() -> None:
    assert offered("fit", "language/quickstart", "tra") == ["trainer."]
    assert dict(completion(["fit", "language/quickstart", "trainer.max_s"]).candidates) == {
        "trainer.max_steps=": "now 300"
    }
    assert offered("fit", "--run", "runs/x", "a.b=1", "language/quickstart", "--wandb", "data.cl") == [
        "data.class_path="
    ]
    assert offered("fit", "language/quickstart", "trainer.max_steps.") == []
    assert offered("fit", "language/quickstart", "trainer.max_steps=3") == []
    assert offered("copy", "language/quickstart", "tra") == []


def test_an_overlay_adds_its_settings(tmp_path: Path) -> None:
    (overlay := tmp_path / "over.yaml").write_text("trainer: {callbacks: {mine: {class_path: a.B}}}\n")
    begun = "trainer.callbacks.min"
    assert offered("fit", "language/quickstart", begun) == []
    assert offered("fit", "language/quickstart", "-c", str(overlay), begun) == ["trainer.callbacks.mine."]


def test_arguments_with_few_values_offer_them() -> None:
    assert offered("export", "runs/mine", "--to", "") == [
        "safetensors",
        "huggingface",
        "peft",
        "timm",
        "torch-export",
        "onnx",
    ]
    assert offered("data", "") == ["pack", "verify", "index", "tokenizer"]
    assert offered("completion", "") == [*SHELLS]


@pytest.mark.parametrize(
    ("words", "places"),
    [
        (["fit", "--run", ""], "folders"),
        (["report", "one", "two", ""], "folders"),
        (["audit", "one", ""], "files"),
        (["validate", "language/quickstart", "--ckpt", ""], "files"),
        (["data", "pack", ""], "files"),
        (["plan", "--memory", ""], "nothing"),
        (["no-such-verb", ""], "nothing"),
        (["doctor", ""], "nothing"),
    ],
)
def test_files_and_folders_are_left_to_the_shell(words: list[str], places: str) -> None:
    assert completion(words) == ([], places)


def test_what_cannot_be_read_offers_nothing_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "no/such", "trainer."]
    with pytest.raises(UserError):
        completion(words)
    assert main(["completion", "bash", "--words", *words]) == 0
    assert capsys.readouterr() == ("nothing\n", "")


@pytest.mark.parametrize("shell", SHELLS)
def test_names_that_are_no_plain_words_are_not_offered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    """A recipe of somebody else names its settings as it likes, and a shell would obey what it completes."""
    names = r'"a\e[2Jb", "a\n$(reboot)", "x;reboot #", "`id`", "two words", "a\tb", "its\x27", "max_steps"'
    settings = ", ".join(f'{name}: "1\\n\\e[2J"' for name in names.split(", "))
    (recipe := tmp_path / "r.yaml").write_text(f"trainer: {{{settings}}}\n")
    assert main(["completion", shell, "--words", "fit", str(recipe), "trainer."]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert [line.split("\t")[0] for line in said.splitlines()] == ["nothing", "trainer.max_steps="]


@pytest.mark.parametrize(
    ("words", "first"),
    [
        (["fit", "--"], "--help"),
        (["--"], "--help"),
        (["fit", "--deb"], "--debug"),
        (["fit", "--debug"], "--debug"),
        (["fit", "--debug", "language/quickstart_ad"], "language/quickstart_adamw"),
        (["fit", "--", "language/quickstart_ad"], "language/quickstart_adamw"),
        (["completion", "--words"], "--words"),
        (["fit", "--run"], "--run"),
    ],
)
def test_words_that_are_options_of_this_command_too_are_only_words(
    capsys: pytest.CaptureFixture[str], words: list[str], first: str
) -> None:
    assert main(["completion", "bash", "--words", *words]) == 0
    assert first in capsys.readouterr().out.splitlines()[1:]


def test_meanings_are_for_shells_that_show_them(capsys: pytest.CaptureFixture[str]) -> None:
    for shell, answer in {"bash": "fit", "zsh": "fit\ttrain", "fish": "fit\ttrain"}.items():
        assert main(["completion", shell, "--words", "fit"]) == 0
        assert capsys.readouterr().out == f"nothing\n{answer}\n"


def needs(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"{shell} is not installed")


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that gets the words of the command line; a command that writes it stands for `lightspan` on the PATH."""
    (program := tmp_path / "bin" / "lightspan").parent.mkdir()
    words = tmp_path / "words"
    program.write_text(
        f'#!/bin/sh\n[ "$1" = completion ] && exec {sys.executable} -m lightspan "$@"\n'
        f"printf '%s\\n' \"$@\" > {words}.part\nmv {words}.part {words}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.chdir(tmp_path)
    return words


def press(shell: list[str], keys: str, words: Path) -> list[str]:
    """Types into an interactive shell, and returns the words of the command that it ran."""
    ours, its = pty.openpty()
    process = subprocess.Popen(shell, stdin=its, stdout=its, stderr=its, start_new_session=True)
    os.close(its)
    os.write(ours, keys.encode())
    said = []

    def has_run() -> bool:
        if select.select([ours], [], [], 0.1)[0]:
            said.append(os.read(ours, 4096))
        return words.exists()

    try:
        wait_until(has_run, f"the command; the shell said {said}")
        return words.read_text().splitlines()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(ours)


START = {
    "bash": (["bash", "--norc", "-i"], "source <(lightspan completion bash)"),
    "zsh": (["zsh", "-f", "-i"], "autoload -U compinit; compinit -u -D; source <(lightspan completion zsh)"),
}


@pytest.mark.runs
@pytest.mark.parametrize("shell", [pytest.param(name, marks=needs(name)) for name in START])
@pytest.mark.parametrize(
    ("keys", "completed"),
    [
        (
            "fi\tlanguage/quickstart_ad\ttrainer.max_st\t7 -c scale/fs\t--run fo\t",
            ["fit", "language/quickstart_adamw", "trainer.max_steps=7", "-c", "scale/fsdp2", "--run", "folder"],
        ),
        ("audit no\t", ["audit", "notes.txt"]),
    ],
)
def test_tab_completes_in_a_real_shell(shell: str, keys: str, completed: list[str], typed: Path) -> None:
    Path("folder").mkdir()
    for name in ("forest.txt", "notes.txt"):
        Path(name).touch()
    command, setup = START[shell]
    words = press(command, f"{setup}\nlightspan {keys}\n", typed)
    assert [word.removesuffix("/") for word in words] == completed


@pytest.mark.runs
@needs("fish")
@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("fi", ["fit\ttrain"]),
        ("fit language/quickstart_ad", ["language/quickstart_adamw"]),
        ("fit language/quickstart trainer.max_st", ["trainer.max_steps=\tnow 300"]),
        ("fit --run fo", ["folder/"]),
        ("audit fo", ["folder/", "forest.txt"]),
    ],
)
def test_fish_offers_the_same(line: str, answer: list[str], typed: Path) -> None:
    Path("folder").mkdir()
    Path("forest.txt").touch()
    code = f"lightspan completion fish | source; complete --do-complete 'lightspan {line}'"
    done = subprocess.run(["fish", "--no-config", "-c", code], capture_output=True, text=True, timeout=HANG_S)
    assert done.stderr == ""
    assert [entry.removesuffix("\tDirectory").removesuffix("\t") for entry in done.stdout.splitlines()] == answer
