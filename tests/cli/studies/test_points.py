"""Points: what the words of a command line run through, exactly, and that every text reads back to the same thing."""

import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightspan.cli.config.tree import parse, plain
from lightspan.cli.studies.sweeps.points import (
    Choices,
    Range,
    axes_of,
    axis_from,
    drawn,
    flags_of,
    grid,
    read_axis,
    written,
)
from lightspan.core.errors import UserError


def test_a_range_of_logarithms_has_round_values_and_exact_ends() -> None:
    assert Range(1e-4, 1e-1, True, 4).grid() == (1e-4, 1e-3, 1e-2, 1e-1)
    assert Range(3e-4, 3e-1, True, 7).grid() == (3e-4, 9.48683e-4, 3e-3, 9.48683e-3, 3e-2, 9.48683e-2, 3e-1)


def test_whole_ends_give_whole_numbers_and_others_do_not() -> None:
    assert Range(8, 128, True, 5).grid() == (8, 16, 32, 64, 128)
    assert Range(1, 2, False, 2).grid() == (1, 2)
    assert all(isinstance(value, int) for value in Range(1, 9, False, 5).grid())
    assert Range(0.0, 1.0, False, 5).grid() == (0.0, 0.25, 0.5, 0.75, 1.0)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.1,1e-3", (0.1, 1e-3)),
        ("a, b", ("a", "b")),
        ("[1, 2],[3, 4]", ([1, 2], [3, 4])),
        ("{a: 1, b: 2},null", ({"a": 1, "b": 2}, None)),
        ("'a,b',\"c,d\"", ("a,b", "c,d")),
        ("true,false,null", (True, False, None)),
        ("1,1.0,'1',true", (1, 1.0, "1", True)),
        ("it's,its", ("it's", "its")),
        ("a.b.C,a.b.D", ("a.b.C", "a.b.D")),
        ("2024-01-01,on", ("2024-01-01", "on")),
    ],
)
def test_a_list_is_split_where_nothing_is_open_and_read_as_flags_are(text: str, values: tuple) -> None:
    axis = read_axis("k", text)
    assert axis == Choices(values)
    assert [type(one) for one in axis.grid()] == [type(one) for one in values]


@pytest.mark.parametrize(
    "text", ["1", "", "a b", "[1, 2]", "{a: 1, b: 2}", "'a,b'", "log", "f(x)", "it's", "[1", "a(1"]
)
def test_one_value_is_an_ordinary_flag(text: str) -> None:
    assert read_axis("k", text) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1,", "a value between two commas, or at an end, is empty; write null for nothing"),
        ("1,,2", "is empty"),
        ("1,1", "1 is given twice"),
        ("0.1,1e-1", "0.1 is given twice"),
        ("1,[2", "'k=1,[2: ] is missing'"),
        ("1,'2", "' is missing"),
        (".inf,1", "finite values only"),
        ("logspace(1,2,3)", "a range is log(low,high,points) or lin(low,high,points)"),
        ("log(1e-3)", "a range has two ends"),
        ("log(1,2,3,4)", "a range has two ends"),
        ("log(0,1,3)", "the ends of log() must be above 0; lin() takes any"),
        ("log(2,1,3)", "the first end must be below the second"),
        ("lin(1,1,3)", "the first end must be below the second"),
        ("lin(a,b,3)", "the ends of a range are finite numbers"),
        ("lin(0,.inf,3)", "the ends of a range are finite numbers"),
        pytest.param(f"lin(0,1{'0' * 400},3)", "the ends of a range are finite numbers", id="beyond floats"),
        ("lin(false,true,2)", "the ends of a range are finite numbers"),
        ("lin(0,1,1)", "the number of points must be a whole number from 2 to 100,000"),
        ("lin(0,1,2.5)", "the number of points must be a whole number"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        read_axis("k", text)
    assert said.strip("'") in str(error.value)
    assert f"k={text}" in str(error.value)


def test_a_range_needs_points_for_a_grid_only_and_different_ones() -> None:
    with pytest.raises(UserError, match=r"log\(0.001,1\) has no number of points.*write log\(0.001,1,5\)"):
        grid({"k": Range(1e-3, 1, True)})
    with pytest.raises(UserError, match=r"lin\(1,3,9\) gives the same value twice"):
        Range(1, 3, False, 9).grid()


def test_keys_are_separated_from_flags_and_may_come_once() -> None:
    axes, rest = axes_of(["a.b=1,2", "c=3", "d=log(1,8,2)"])
    assert axes == {"a.b": Choices((1, 2)), "d": Range(1, 8, True, 2)}
    assert rest == ["c=3"]
    for twice in (["a=1,2", "a=3"], ["a=1", "a=2,3"], ["a=1,2", "a=3,4"], ["a=1,2", "a=1,2"]):
        with pytest.raises(UserError, match="a is given twice"):
            axes_of(twice)


def test_a_grid_is_every_combination_the_last_key_fastest() -> None:
    assert grid({"a": Choices((1, 2)), "b": Choices(("x", "y"))}) == [
        *({"a": 1, "b": "x"}, {"a": 1, "b": "y"}),
        *({"a": 2, "b": "x"}, {"a": 2, "b": "y"}),
    ]
    assert grid({}) == [{}]
    with pytest.raises(UserError, match=r"100,000,000 points, and at most 100,000"):
        grid({"a": Range(0.0, 1.0, False, 10_000), "b": Range(0.0, 1.0, False, 10_000)})


AXES = {
    "lr": Range(1e-4, 1.0, True),
    "drop": Range(0.0, 0.5, False),
    "width": Choices((8, 16, 32)),
    "depth": Range(1, 4, False),
}


def test_random_points_are_a_function_of_seed_number_and_key() -> None:
    points = drawn(AXES, 0, 6)
    assert drawn(AXES, 0, 3) == points[:3]  # more points only add to them
    assert drawn(AXES, 1, 6) != points
    alone = drawn({"lr": AXES["lr"]}, 0, 6)
    assert [point["lr"] for point in alone] == [
        point["lr"] for point in points
    ]  # another key moves no draw of this one
    assert points[0] == {"lr": 0.00478781, "drop": 0.376482, "width": 16, "depth": 2}


def test_random_points_fill_their_ranges_evenly() -> None:
    points = drawn(AXES, 7, 2000)
    assert all(1e-4 <= point["lr"] <= 1 and 0 <= point["drop"] <= 0.5 for point in points)
    below = sum(point["lr"] < 1e-2 for point in points) / 2000
    assert abs(below - 0.5) < 0.05  # half of the logarithms
    for value in (1, 2, 3, 4):
        assert abs(sum(point["depth"] == value for point in points) / 2000 - 0.25) < 0.05


def test_random_points_differ_and_end_where_there_are_no_more() -> None:
    axes = {"a": Choices((1, 2)), "b": Range(0, 2, False)}
    points = drawn(axes, 3, 6)
    assert sorted((point["a"], point["b"]) for point in points) == [(a, b) for a in (1, 2) for b in (0, 1, 2)]
    with pytest.raises(UserError, match="--trials 7: these keys have only 6 different points"):
        drawn(axes, 3, 7)


@pytest.mark.parametrize(
    ("low", "high", "most"), [(0.1, 0.1000021, 3), (-0.1000021, -0.1, 3), (0.999999, 1.00001, 3), (0.1, 0.1 + 1e-12, 1)]
)
def test_a_range_of_few_six_digit_numbers_has_no_more_points_than_these(low: float, high: float, most: int) -> None:
    axes = {"a": Range(low, high, False)}
    with pytest.raises(UserError, match=f"--trials 9: these keys have only {most} different points"):
        drawn(axes, 0, 9)
    assert len(drawn(axes, 0, most)) == most


def test_a_point_that_chance_never_meets_is_not_waited_for() -> None:
    with pytest.raises(UserError, match="--trials 2: after 1 different points none comes; lower it"):
        drawn({"a": Range(0.10000049999999, 0.1000006, False)}, 0, 2)


plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60)
@given(plain_values)
@example("\x7f\x00\u2028\U0001f600")
@example(["it's", "a: b", "#", "1e3", "", " "])
def test_a_value_is_written_so_that_a_flag_reads_it_back(value: object) -> None:
    found = plain(parse(written(value), "x", line_numbers=False))
    assert found == value
    assert type(found) is type(value)


@settings(max_examples=60)
@given(st.lists(plain_values, min_size=2, max_size=4, unique_by=json.dumps))
def test_a_list_is_written_so_that_a_sweep_reads_it_back(values: list) -> None:
    axis = Choices(tuple(values))
    assert read_axis("k", axis.text()) == axis
    assert axis_from("k", axis.record()) == axis


ends = st.floats(1e-6, 1e6) | st.integers(1, 10**6)


@settings(max_examples=60)
@given(ends, ends, st.booleans(), st.none() | st.integers(2, 5), st.floats(0, 1, exclude_max=True))
def test_a_range_reads_back_and_stays_inside(
    low: float, high: float, log: bool, points: int | None, share: float
) -> None:
    if not low * 1.1 + 10 < high:
        return
    axis = Range(low, high, log, points)
    assert read_axis("k", axis.text()) == axis
    assert axis_from("k", axis.record()) == axis
    assert low <= axis.at(share) <= high
    if axis.whole:
        assert isinstance(axis.at(share), int)
    if points is not None:
        assert axis.at(share) in axis.grid()


@pytest.mark.parametrize(
    "record", [None, 3, {}, {"values": 3}, {"values": [1]}, {"log": [1]}, {"log": ["a", 2]}, {"uniform": [2, 1]}]
)
def test_what_is_no_axis_in_a_file_is_refused(record: object) -> None:
    with pytest.raises(UserError, match="k: "):
        axis_from("k", record)


def test_flags_say_what_a_point_sets() -> None:
    assert flags_of({"a.b": 1e-5, "c": "x y", "d": [1, None]}) == ["a.b=1e-05", "c=x y", "d=[1, null]"]
    assert math.isclose(plain(parse("1e-05", "x")), 1e-5)
