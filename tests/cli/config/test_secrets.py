import pytest

from lightspan.cli.config.secrets import find_secrets_and_placeholders, redacted
from lightspan.cli.config.tree import wrap

TOKEN = "hf_abcdefghijklmnopqrst"


def test_secrets_are_hidden_from_the_recorded_command_line():
    arguments = [
        "fit",
        "x",
        "--wandb_api_key",
        "abc",
        "logger.api_key=abc",
        "note=hf_abcdefghijklmnopq",
        "trainer.max_steps=3",
    ]
    assert redacted(arguments) == [
        *("fit", "x", "--wandb_api_key", "***", "logger.api_key=***", "note=***", "trainer.max_steps=3")
    ]


@pytest.mark.parametrize(
    "argument",
    ["data.init_args.num_tokens=64", "model.keyframes=4", "x.pad_token=<pad>", "--keyring", "tokenizer=risk-averse"],
)
def test_plain_settings_are_recorded_as_they_are(argument):
    assert redacted([argument, "next"]) == [argument, "next"]


@pytest.mark.parametrize("text", [TOKEN, f"a project {TOKEN}", "wandb_v1_abcdefghijklmnopqrst", "AKIAABCDEFGHIJKLMNOP"])
def test_what_is_hidden_on_the_command_line_is_refused_in_a_configuration(text):
    """So a job script or a record that is made from a configuration has no secret to show."""
    assert "***" in redacted([f"x.project={text}"])[0]
    (problem,) = find_secrets_and_placeholders(wrap({"x": {"project": text}}, "command line"))
    assert text not in str(problem)


def test_a_commit_is_no_secret():
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert find_secrets_and_placeholders(wrap({"revision": commit}, "r.yaml:1")) == []
    assert redacted([f"revision={commit}"]) == ["revision=***"]  # it may still be an old key
