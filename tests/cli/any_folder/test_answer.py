"""Which recipe a folder gets and why, and the command that does the same: printed, asked about and run."""

import argparse
import inspect
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from graph_files import rings
from picture_files import write_pictures
from point_files import bricks

from lightspan.cli.any_folder.answer import SEGMENT_S, answer
from lightspan.cli.any_folder.choices import CHOICES, FEW_LABELS, as_markdown, choice
from lightspan.cli.any_folder.kinds import KINDS
from lightspan.cli.commands import asking, fit
from lightspan.cli.commands.verbs import VERBS
from lightspan.cli.config.recipes import load
from lightspan.cli.config.resolve import Resolved
from lightspan.cli.main import main, parse
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded
from lightspan.datamodules.audio.data import AudioData

ROOT = Path(__file__).parents[3]


def lines_file(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_page_has_the_table_of_choices() -> None:
    assert "\n".join(as_markdown()) in (ROOT / "docs" / "which-method.md").read_text()


def test_each_choice_is_a_recipe_for_such_data_and_names_others_that_exist() -> None:
    assert {one.modality for one in CHOICES} == {one.modality for one in KINDS}
    for one in CHOICES:
        assert load(one.recipe).about["modality"] == one.modality
        named = [word for word in one.instead.split("`")[1::2] if "/" in word]
        assert all(load(name).about["modality"] == one.modality for name in named)
        assert (ROOT / "docs" / one.page).is_file()
    with pytest.raises(UserError, match="no recipe is chosen"):
        choice("table", form="a kind that is none")


def test_images_are_classified_where_there_are_labels_enough(tmp_path: Path) -> None:
    few, many, none = tmp_path / "few", tmp_path / "many", tmp_path / "none"
    write_pictures(few, {"a": FEW_LABELS, "b": FEW_LABELS - 1})
    write_pictures(many, {"a": FEW_LABELS + 1, "b": FEW_LABELS - 1})
    write_pictures(none, {"a": 2 * FEW_LABELS})
    recipes = [answer(place).words[0] for place in (few, many, none)]
    assert recipes == ["contrastive/simclr", "supervised/linear", "contrastive/simclr"]
    found = answer(many)
    assert found.words == ["supervised/linear", "--images", str(many)]
    assert found.lines[0].startswith(f"{many}: 48 pictures")
    assert any(line.startswith("takes supervised/linear: there are labels") for line in found.lines)
    assert not any("`" in line for line in found.lines)


def test_graphs_and_points_go_to_their_options_and_a_recipe_of_ones_own_is_taken(tmp_path: Path) -> None:
    rings(tmp_path / "graphs", 2)
    bricks(tmp_path / "bricks", 2)
    assert answer(tmp_path / "graphs").words == ["masked/attribute_masking", "--graphs", str(tmp_path / "graphs")]
    own = answer(tmp_path / "bricks", recipe="supervised/p2p")
    assert own.words == ["supervised/p2p", "--points", str(tmp_path / "bricks")]
    assert "takes supervised/p2p, as you say" in own.lines


def test_short_recordings_are_not_padded_to_long_segments(tmp_path: Path) -> None:
    pytest.importorskip("soundfile", reason="the extra `audio` is not installed")
    from sound_files import write_recordings

    assert inspect.signature(AudioData).parameters["seconds"].default == SEGMENT_S
    for name, seconds, words in (("short", 1.2, ["data.init_args.seconds=2"]), ("long", 15.5, [])):
        write_recordings(tmp_path / name, {"": 2}, seconds=seconds)
        assert answer(tmp_path / name).words == ["masked/tera", "--recordings", str(tmp_path / name), *words]


@pytest.mark.parametrize("name", ["-n", "~mine", "a b\n"])
def test_a_folder_may_be_called_like_an_option_or_a_home_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(Path(name, "pictures"), {"a": 4, "b": 4})
    found = answer(Path(name, "pictures"))
    assert "\n" not in found.lines[0]
    args = parse(next(verb for verb in VERBS if verb.name == "fit"), found.words)
    assert args.images.absolute() == tmp_path / name / "pictures"
    Path(name, "texts").mkdir()
    for number in range(3):
        Path(name, "texts", f"{number}.txt").write_text("A text of a few words.")
    (path,) = json.loads(answer(Path(name, "texts")).words[-1].partition("=")[2])
    assert expanded(path, "data.init_args.paths").absolute() == tmp_path / name / "texts"


def test_a_folder_that_is_called_like_the_run_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its name would be replaced in every setting that has it."""
    monkeypatch.chdir(tmp_path)
    write_pictures(Path("${run}"), {"a": 4, "b": 4})
    for given in (["--data", "${run}"], ["contrastive/simclr", "--images", "${run}"]):
        assert main(["fit", *given, "--dry-run"]) == 2
        assert "stands for the folder of the run" in capsys.readouterr().err


def test_a_single_sample_is_too_few_unless_it_may_hold_many(tmp_path: Path) -> None:
    bricks(tmp_path / "bricks", 1)
    with pytest.raises(UserError, match="1 cloud, 12 triangles, and some are held out"):
        answer(tmp_path / "bricks")
    rings(tmp_path / "graphs", 1)
    assert answer(tmp_path / "graphs").words[1] == "--graphs"


@pytest.mark.parametrize(
    ("values", "recipe"),
    [
        (["1.5", "2.5", "3.5"], "supervised/table_regression"),
        (["0", "1", "1"], "supervised/table_classification"),
        (["red", "red", ""], "supervised/table_classification"),
        ([str(number) for number in range(11)], "supervised/table_regression"),
    ],
)
def test_a_target_of_text_or_of_few_whole_numbers_is_one_of_classes(
    values: Sequence[str], recipe: str, tmp_path: Path
) -> None:
    path = tmp_path / "in" / "rows.csv"
    path.parent.mkdir()
    path.write_text("size,what\n" + "".join(f"{number},{value}\n" for number, value in enumerate(values)))
    expected = [recipe, "--table", str(path), "--target", "what"]
    assert answer(path, "what").words == answer(path.parent, "what").words == expected
    with pytest.raises(UserError, match="name the column to predict with --target: size, what"):
        answer(path)
    with pytest.raises(UserError, match="--target wath is no column"):
        answer(path, "wath")
    (path.parent / "more.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="2 tables, and one is read"):
        answer(path.parent, "what")


def test_texts_are_told_apart_by_the_first_line_of_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts = lines_file(tmp_path / "texts.jsonl", {"text": "a"}, {"text": "b"})
    assert answer(texts).words == ["masked/ul2", f'data.init_args.paths=["{texts}"]']
    chat = lines_file(tmp_path / "chat.jsonl", {"messages": []})
    found = answer(chat)
    assert found.words == ["adaptation/lora_chat", f'data.init_args.path="{chat}"']
    assert "in the folder `model`" in found.needs
    (tmp_path / "model").mkdir()
    assert not answer(chat).needs
    labelled = lines_file(tmp_path / "labelled.jsonl", {"text": "a", "label": 1})
    with pytest.raises(UserError, match=r"have texts with labels.*LabelledTextFiles"):
        answer(labelled)
    (tmp_path / "none.jsonl").write_text("text\n")
    with pytest.raises(UserError, match="have no JSON object first"):
        answer(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="of several forms"):
        answer(tmp_path)


def test_one_text_is_cut_and_several_are_a_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("To be")
    for place in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(UserError, match=r"is one text.*cut it"):
            answer(place)
    (tmp_path / "b.txt").write_text("or not")
    assert answer(tmp_path).words == ["masked/ul2", f'data.init_args.paths=["{tmp_path}"]']


@pytest.mark.parametrize(
    ("name", "said"), [("a.png", "is one picture; name the folder"), ("a.xyz", "of no kind"), ("none", "not exist")]
)
def test_a_file_alone_and_nothing_at_all_are_refused(name: str, said: str, tmp_path: Path) -> None:
    if name != "none":
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=said):
        answer(tmp_path / name)


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_pictures(Path("my pictures"), {"a": 4, "b": 4})
    return "my pictures"


def test_nobody_to_ask_starts_nothing_and_says_the_command(
    pictures: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["fit", "--data", pictures, "trainer.max_steps=1"]) == 2
    said = capsys.readouterr()
    assert "\nlightspan fit contrastive/simclr --images 'my pictures' trainer.max_steps=1\n" in said.out
    assert "say it with --yes" in said.err
    monkeypatch.setattr(fit, "agreed", lambda question: False)
    assert main(["fit", "--data", pictures]) == 0
    assert capsys.readouterr().out.endswith("nothing was started\n")
    assert not Path("runs").exists()


def test_a_yes_at_a_terminal_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for said, expected in (("y", True), ("Yes ", True), ("", False), ("no", False)):
        monkeypatch.setattr("builtins.input", lambda question, said=said: said)
        assert asking.agreed("run it?") is expected


@pytest.mark.parametrize("recipe", [None, "contrastive/vicreg"])
def test_after_a_yes_the_printed_command_is_what_runs(
    recipe: str | None, pictures: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = list[tuple[argparse.Namespace, Resolved]]()
    monkeypatch.setattr(fit, "_fit", lambda args, resolved, run_dir: ran.append((args, resolved)) or 0)
    given = ["--run", recipe or "out", "trainer.max_steps=1", "--image-size", "16", "--seed-key=data.init_args.seed"]
    first = [] if recipe is None else [recipe]
    assert main(["fit", *first, "--yes", *given, "--data", pictures]) == 0
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("lightspan fit"))
    expected = [recipe or "contrastive/simclr", "--images", pictures, *given]
    assert shlex.split(printed) == ["lightspan", "fit", *expected]
    assert main(shlex.split(printed)[1:]) == 0
    (chosen, of_chosen), (typed, of_typed) = ran
    assert vars(chosen) == vars(typed)
    assert of_chosen == of_typed
    assert chosen.command_line == ["lightspan", "fit", *expected]  # as it is recorded with the run


def test_what_contradicts_data_is_refused(pictures: str, capsys: pytest.CaptureFixture[str]) -> None:
    for given, said in (
        (["--data", pictures, "--images", pictures], "--data finds out what --images says"),
        (["--data", pictures, "--target", "x"], "--target is a column of a table"),
        (["--data", "", "--yes"], "the name of the folder is empty"),
        (["language/quickstart", "--yes"], "--yes answers what --data FOLDER asks"),
        ([], "arguments are required: RECIPE"),
        (["masked/point_mae", "--data", pictures, "--yes"], "is a recipe for data of modality points"),
    ):
        assert main(["fit", *given]) == 2
        assert said in capsys.readouterr().err


def test_conversations_without_a_model_print_the_command_and_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines_file(Path("chat.jsonl"), {"prompt": "a", "completion": "b"})
    assert main(["fit", "--data", "chat.jsonl", "--yes"]) == 2
    said = capsys.readouterr()
    assert """lightspan fit adaptation/lora_chat 'data.init_args.path="chat.jsonl"'""" in said.out
    assert "also needs a causal language model" in said.err
