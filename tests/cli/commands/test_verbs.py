"""What `lightspan VERB --help` shows can be typed."""

import shlex

import pytest

from lightspan.cli.commands.verbs import VERBS, Verb, verb_of
from lightspan.cli.config.recipes import find
from lightspan.cli.config.resolve import ANY_KIND, TRAINED, resolve
from lightspan.cli.main import main, parse
from lightspan.cli.studies.sweeps.points import axes_of, flags_of, grid
from lightspan.core.errors import UserError

TAKE_ANY_KIND = ("show", "check", "run")

every_verb = pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)


@every_verb
def test_help_ends_with_two_different_examples(verb: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb.words, "--help"]) == 0
    head, *examples = capsys.readouterr().out.splitlines()[-3:]
    assert head == "examples:"
    assert examples == [f"  {example}" for example in verb.examples]
    assert len({*examples}) == 2


@every_verb
def test_an_example_is_a_command_line_of_its_verb_with_recipes_overlays_and_settings_that_exist(verb: Verb) -> None:
    for example in verb.examples:
        program, *words = shlex.split(example)
        assert program == "lightspan"
        assert verb_of(words) is verb
        args = parse(verb, words[len(verb.words) :])
        if verb.flags and hasattr(args, "recipe"):
            kinds = ANY_KIND if verb.name in TAKE_ANY_KIND else TRAINED
            axes, flags = axes_of(args.flags)
            assert bool(axes) == (verb.name == "sweep")
            for point in grid(axes):
                resolve(args.recipe, args.overlays, [*flags, *flags_of(point)], args.allow_modules, kinds)
        elif verb.name == "copy":
            find(args.recipe)
        elif verb.name == "merge":
            find(f"merging/{args.method}")


def test_an_example_with_a_mistake_would_be_found() -> None:
    fit = next(verb for verb in VERBS if verb.name == "fit")
    for wrong in (["language/quickstart", "--rum", "DIR"], []):
        with pytest.raises(UserError, match=r"lightspan fit --help"):
            parse(fit, wrong)
