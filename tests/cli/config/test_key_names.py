"""Short names of settings."""

import pytest

from lightspan.cli.config.key_names import short_names


@pytest.mark.parametrize(
    "expected",
    [
        {"a.b.lr": "b.lr", "a.c.lr": "c.lr", "a.width": "width", "x": "x"},
        {"a.b": "a.b", "b": "b"},
        {"a.class_path": "a", "a.init_args.b": "b"},
        {"a.init_args.lr": "a.lr", "b.init_args.lr": "b.lr"},
        {"a.class_path": "a.class_path", "a.init_args": "a.init_args"},
        {"class_path": "class_path"},
        {},
    ],
)
def test_names_are_as_short_as_they_are_clear(expected: dict[str, str]) -> None:
    assert short_names(list(expected)) == expected
