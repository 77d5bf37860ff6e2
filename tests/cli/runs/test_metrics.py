"""Whoever reads metrics.jsonl reads the same: whole lines, in their order, in bounded memory."""

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightspan.cli.runs import json_lines as module
from lightspan.cli.runs.json_lines import json_lines
from lightspan.cli.runs.metrics import last_step, last_values, read_logged
from lightspan.cli.runs.metrics_csv import write_csv
from lightspan.core.errors import UserError

NAMES = ("val/loss", "a", 'a "quoted" one', "maß", "val/loss_nats", "back\\slash")
NUMBERS = st.none() | st.floats() | st.integers(-(10**30), 10**30)


@pytest.mark.parametrize(
    ("content", "values"),
    [
        ('{"step": 0, "a": 1}\n{"step": 1, "b": 2.5}\n{"step": 2, "a": 3}\n', {"a": 3.0, "b": 2.5}),
        ('{"step": 0, "a": 1}\n{"step": 1, "a": nul', {"a": 1.0}),
        ('{"step": 0, "time_s": 3, "epoch": 1, "flag": true, "text": "x", "list": [1]}\n', {}),
        ('[1]\n3\n\n"a"\n\x00\n{"a": 7}\n', {"a": 7.0}),
        ('{"a": 1' + "0" * 400 + "}\n", {"a": math.inf}),
        ("", {}),
    ],
)
def test_last_values_are_those_of_whole_lines_with_numbers(content: str, values: dict, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    assert last_values(tmp_path / "metrics.jsonl") == values
    assert last_values(tmp_path / "none") == {}


def test_null_is_a_value_that_was_not_finite(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "a": 1}\n{"step": 1, "a": null}\n')
    assert math.isnan(last_values(tmp_path / "metrics.jsonl")["a"])


def test_the_last_step_is_read_from_the_end_of_the_file_alone(tmp_path: Path) -> None:
    assert last_step(tmp_path / "metrics.jsonl") is None
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "a": 0.123456789}}\n' for step in range(5000)))
    assert last_step(tmp_path / "metrics.jsonl") == 5000
    (tmp_path / "metrics.jsonl").write_text('{"step": 4}\n{"step": 5, "a"')
    assert last_step(tmp_path / "metrics.jsonl") == 5


def test_a_file_above_the_limit_and_a_line_without_end_give_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for size in (2**24 + 2**20, 2**40):  # without bytes on the disk
        with path.open("wb") as file:
            file.truncate(size)
        tracemalloc.start()
        assert read_logged(path, ["a"]).values == {}
        assert last_step(path) is None
        assert tracemalloc.get_traced_memory()[1] < 2**22
        tracemalloc.stop()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.dictionaries(st.sampled_from(NAMES), NUMBERS), max_size=6),
    st.booleans(),
    st.sampled_from(["", "\n", '\n{"a": 1', '\n{"maß']),
)
def test_a_value_found_by_its_name_is_the_one_that_parsing_finds(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], ascii_: bool, end: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "metrics.jsonl"
    lines = [json.dumps({"step": at, **row}, ensure_ascii=ascii_) for at, row in enumerate(rows)]
    path.write_text("\n".join(lines) + end * bool(lines), encoding="utf-8")
    parsed, found = last_values(path), read_logged(path, NAMES)
    assert set(found.values) == set(parsed)
    for name, value in parsed.items():
        assert found.values[name].last == (value if math.isfinite(value) else None)
    assert found.steps == last_step(path) == (len(rows) or None)


def test_a_torn_last_line_is_left_out_and_any_other_is_named_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n\n{oops\n{"a": 2}\n{"a": 3')
    assert [*json_lines(path, skip_damaged=True)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(UserError, match=r"metrics.jsonl:3 is not JSON .*'\{oops'; fix or remove it"):
        [*json_lines(path)]
    path.write_text('{"a": 1}\n{"a": 3')
    assert [*json_lines(path)] == [{"a": 1}]
    path.write_text('{"a": 1}\n{"a": 3}')  # whole, though its line break is missing
    assert [*json_lines(path)] == [{"a": 1}, {"a": 3}]
    assert read_logged(path, ["a"]).values["a"].last == 3


@pytest.mark.parametrize(("last", "first"), [(8, 10), (9, 9), (17, 9), (18, 8), (19, 8), (90, 0), (91, 0)])
def test_the_end_of_a_file_begins_with_a_whole_line(tmp_path: Path, last: int, first: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"a": {at}}}\n' for at in range(10)))  # of 9 bytes each
    assert [row["a"] for row in json_lines(path, last=last)] == [*range(first, 10)]


def test_a_line_without_end_costs_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST", 2**12)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a": "' + "x" * 2**22 + '"}\n{"a": 2}\n')
    tracemalloc.start()
    assert [*json_lines(path, skip_damaged=True)] == [{"a": 1}, {"a": 2}]
    assert tracemalloc.get_traced_memory()[1] < 2**18
    tracemalloc.stop()
    with pytest.raises(UserError, match=r"metrics.jsonl:2 has more than 4,096 bytes in one line"):
        [*json_lines(path)]


def test_a_table_of_many_lines_costs_no_memory(tmp_path: Path) -> None:
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.writelines(f'{{"step": {at}, "a": 0.123456789}}\n' for at in range(4000))
    tracemalloc.start()
    write_csv(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**18
    tracemalloc.stop()
    assert len((tmp_path / "csv" / "metrics.csv").read_text().splitlines()) == 4001
