import pytest

from lightspan.config.identity import differences
from lightspan.config.provenance import redacted

CONFIG = {
    "seed_everything": 0,
    "trainer": {"max_steps": 10, "devices": 1, "precision": 32, "callbacks": {"a": 1}},
    "model": {"class_path": "a.B", "init_args": {"lr": 0.1}},
    "data": {"class_path": "a.D", "init_args": {"num_workers": 0, "batch_size": 4}},
}


def changed(key: str, value: object) -> dict:
    def copy(node, parts):
        return {**node, parts[0]: value if len(parts) == 1 else copy(node.get(parts[0], {}), parts[1:])}

    return copy(CONFIG, key.split("."))


@pytest.mark.parametrize(
    "key",
    [
        "trainer.max_steps",
        "trainer.max_time",
        "trainer.devices",
        "trainer.callbacks.b",
        "trainer.logger.jsonl",
        "data.init_args.num_workers",
        "about.title",
    ],
)
def test_length_devices_and_reports_may_change(key):
    assert differences(CONFIG, changed(key, 99)) == []


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("seed_everything", "seed_everything: 0 -> 99"),
        ("trainer.precision", "trainer.precision: 32 -> 99"),
        ("model.init_args.lr", "model.init_args.lr: 0.1 -> 99"),
        ("model.class_path", "model.class_path: 'a.B' -> 99"),
        ("data.init_args.batch_size", "data.init_args.batch_size: 4 -> 99"),
        ("trainer.gradient_clip_val", "trainer.gradient_clip_val: not set -> 99"),
    ],
)
def test_everything_that_alters_the_steps_is_a_difference(key, line):
    assert differences(CONFIG, changed(key, 99)) == [line]


def test_a_setting_left_out_is_a_difference_too():
    assert differences(CONFIG, {**CONFIG, "data": {"class_path": "a.D"}}) == ["data.init_args.batch_size: 4 -> not set"]


def test_secrets_are_hidden_from_the_recorded_command_line():
    arguments = [
        "fit",
        "x",
        "--wandb_api_key",
        "abc",
        "logger.api_key=abc",
        "note=hf_abcdefghijkl",
        "trainer.max_steps=3",
    ]
    assert redacted(arguments) == [
        *("fit", "x", "--wandb_api_key", "***", "logger.api_key=***", "note=***", "trainer.max_steps=3")
    ]
