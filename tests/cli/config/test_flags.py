import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightspan.cli.config.flags import flag_layer, split_flags
from lightspan.cli.config.tree import MAX_DEPTH, plain
from lightspan.core.errors import UserError


@pytest.mark.parametrize("spelling", [["a.b.c=3"], ["--a.b.c=3"], ["--a.b.c", "3"]])
def test_three_spellings_are_one_flag(spelling):
    flags, rest = split_flags(["name", *spelling, "-c", "x.yaml"])
    assert flags == ["a.b.c=3"]
    assert rest == ["name", "-c", "x.yaml"]
    assert plain(flag_layer(flags)) == {"a": {"b": {"c": 3}}}


@given(st.permutations(["language/quickstart", "-c=o.yaml", "trainer.max_steps=7", "--model.x=1", "--dry-run"]))
def test_flags_may_stand_anywhere(arguments):
    flags, rest = split_flags(list(arguments))
    assert sorted(flags) == ["model.x=1", "trainer.max_steps=7"]
    assert sorted(rest) == ["--dry-run", "-c=o.yaml", "language/quickstart"]


def test_the_value_of_a_flag_is_never_taken_for_the_recipe():
    assert split_flags(["--trainer.max_steps", "200", "my.yaml"]) == (["trainer.max_steps=200"], ["my.yaml"])
    assert split_flags(["--m.x", "-1", "my.yaml"]) == (["m.x=-1"], ["my.yaml"])


def test_the_value_of_an_option_is_never_taken_for_a_flag():
    assert split_flags(["r", "--run", "lr=0.1", "a=1"], {"--run"}) == (["a=1"], ["r", "--run", "lr=0.1"])
    assert split_flags(["r", "--run"], {"--run"}) == ([], ["r", "--run"])
    assert split_flags(["--x.y", "--run"], {"--x.y"}) == ([], ["--x.y", "--run"])


def test_paths_and_options_are_no_flags():
    arguments = ["runs/a=b/last.ckpt", "--run", "out", "--resume=never", "recipes/x.yaml"]
    assert split_flags(arguments) == ([], arguments)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("[1, 2]", [1, 2]), ("{k: v}", {"k": "v"}), ("null", None), ("a=b", "a=b"), ("", None)],
)
def test_values_are_yaml(text, value):
    assert plain(flag_layer([f"x={text}"])) == {"x": value}


def test_of_two_flags_for_one_key_the_later_wins():
    assert plain(flag_layer(["a.b=1", "a.c=2", "a.b=3"])) == {"a": {"b": 3, "c": 2}}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_flags(["--trainer.max_steps"]), "--trainer.max_steps has no value"),
        (lambda: split_flags(["--trainer.max_steps", "--debug"]), "write --trainer.max_steps VALUE"),
        (lambda: flag_layer(["a=1", "a.b=2"]), "'a' was already set to 1 by an earlier flag"),
        (lambda: flag_layer(["x=[1"]), "command line: not YAML"),
    ],
)
def test_bad_flags_say_what_is_wrong(call, message):
    with pytest.raises(UserError) as error:
        call()
    assert message in str(error.value)


def test_a_flag_of_too_many_levels_is_refused() -> None:
    assert flag_layer([".".join("a" * MAX_DEPTH) + "=1"]).value
    with pytest.raises(UserError, match=f"5,001 levels, and the limit is {MAX_DEPTH}"):
        flag_layer(["a." * 5_000 + "a=1"])
