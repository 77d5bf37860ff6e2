import ast
from pathlib import Path

import pytest

from lightspan.cli.config.annotations import (
    bound_arguments,
    class_names,
    describe,
    fits,
    is_untyped,
    item_annotation,
    takes_only_plain,
)
from lightspan.core.source import Source

MODULE = """
from collections.abc import Callable
from typing import Literal, Optional, Union
import enum
import torch
Mode = Literal["min", "max"]
Size = Union[int, list[int]]
Schedule = Callable[[object, int], object]
ScheduleCallable = Callable[[object, int], object]
class Net: ...
class Colour(enum.Enum): ...
class Shade(Colour): ...
class Own(Elsewhere): ...
"""
SOURCE = Source("m", Path("m.py"), ast.parse(MODULE), False, False)


def annotation(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ("int", [0, -3], [1.5, True, "3", None, [1]]),
        ("float", [0.5, 3], [True, "1e-3", None]),
        ("bool", [True], [0, 1, "true", None]),
        ("str", ["", "x"], [3, None, True]),
        ("int | None", [3, None], ["x", 2.0]),
        ("Optional[float]", [None, 1], ["x"]),
        ("Union[int, str]", [1, "a"], [1.5, None]),
        ("Mode", ["min", "max"], ["avg", 1, None]),
        ("Literal[1, '2']", [1, "2"], [2, "1", True]),
        ("Size", [3, [1, 2]], ["3", [1.5], None]),
        ("list[float]", [[], [1, 2.5]], [3, ["a"], [1, None]]),
        ("tuple[float, float]", [[0.9, 0.95]], [0.9, "x"]),
        ("dict[str, int]", [{}], [[], 3]),
        ("'int | None'", [3, None], ["x"]),
        ("Path", ["a/b"], [3]),
        ("float | Tensor", [3, 0.5], ["x", None, [1]]),
        ("tuple[float, ...]", [[], [1, 2, 3]], [["x"], 3]),
        ("tuple[float, int]", [[0.5, 1]], [[1], [1, 0.5], [1, 1, 1]]),
        ("Schedule", [], ["x", 3, None]),
        ("int | Net", [3], [None, 0.5]),
    ],
)
def test_values_fit_or_do_not(text, good, bad):
    assert [fits(value, annotation(text), SOURCE) for value in good] == [True] * len(good)
    assert [fits(value, annotation(text), SOURCE) for value in bad] == [False] * len(bad)


def test_items_are_declared_by_position_or_key():
    def declared(text, key):
        item = item_annotation(annotation(text), SOURCE, key)
        return None if item is None else ast.unparse(item[0])

    assert declared("list[Net] | None", 3) == "Net"
    assert declared("tuple[int, Net]", 1) == "Net"
    assert declared("tuple[int, ...]", 7) == "int"
    assert declared("dict[str, Net]", "a") == "Net"
    assert declared("tuple[int]", 1) is None
    assert declared("list", 0) is None
    assert declared("dict[str, Net]", 0) is None


def test_any_is_no_type():
    assert all(is_untyped(annotation(text), SOURCE) for text in ("Any", "int | Any", "object"))
    assert not any(is_untyped(annotation(text), SOURCE) for text in ("Net", "dict[str, Any]", "int"))


def test_classes_of_an_annotation_are_known_all_or_not_at_all():
    assert class_names(annotation("Net | None"), SOURCE) == ["m.Net"]
    assert class_names(annotation("Callable[[int], Net]"), SOURCE) == ["m.Net"]
    assert class_names(annotation("Net | Unknown"), SOURCE) == []


@pytest.mark.parametrize("text", ["torch.dtype", "Any", "Unknown", "int | Unknown", "list[Unknown]", "Shade", "Own"])
def test_what_source_cannot_decide_is_neither(text):
    value = ["x"] if text.startswith("list") else "x"
    assert fits(value, annotation(text), SOURCE) is None


@pytest.mark.parametrize("text", ["Net", "int | Net", "list[Net]", "Net | None"])
def test_no_plain_value_but_a_mapping_is_an_object_of_a_class(text):
    value, mapping = (["x"], [{"a": 1}]) if text.startswith("list") else ("x", {"a": 1})
    assert fits(value, annotation(text), SOURCE) is False
    assert fits([[1]], annotation(text), SOURCE) is False
    assert fits(mapping, annotation(text), SOURCE) is None


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("str", True),
        ("str | None", True),
        ("Mode", True),
        ("list[str]", True),
        ("dict[str, int]", True),
        ("Path", True),
        ("str | Net", False),
        ("Net", False),
        ("Schedule", False),
        ("Any", False),
        ("dict", False),
        ("list[Net]", False),
    ],
)
def test_a_text_is_safe_only_where_nothing_else_could_be_made_of_it(text, plain):
    assert takes_only_plain(annotation(text), SOURCE) is plain


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("OptimizerCallable", 1),
        ("ScheduleCallable | None", 2),
        ("Callable[[int, int, int], Net]", 3),
        ("Callable[..., Net]", -1),
        ("UnreadableCallable", -1),
        ("Optional[OptimizerCallable]", 1),
        ("Net", 0),
        ("Net | None", 0),
    ],
)
def test_callers_supply_as_many_arguments_as_the_annotation_says(text, count):
    assert bound_arguments(annotation(text), SOURCE) == count


def test_a_type_is_described_in_words():
    assert describe(annotation("int | None"), SOURCE) == "a whole number or null"
    assert describe(annotation("Mode"), SOURCE) == "one of 'min', 'max'"
    assert describe(annotation("list[float]"), SOURCE) == "a list of a number"
    assert describe(annotation("tuple[float, ...]"), SOURCE) == "a list of a number"
    assert describe(annotation("tuple[float, float, float] | None"), SOURCE) == "a list of 3, each a number or null"
    assert describe(annotation("tuple[int, str]"), SOURCE) == "a list of 2, each a whole number or a text"
    assert describe(annotation("Net"), SOURCE) == "Net"
