"""Tables of one's own: what becomes of columns, gaps, groups and times, and how files that are none are refused."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightspan.core.errors import UserError
from lightspan.datamodules.table.columns import read_columns
from lightspan.datamodules.table.file import TableFile
from lightspan.datamodules.table.rows import RowViews

PEOPLE = "name,age,city,paid\n" + "".join(
    f"p{number},{20 + number},{('Rome', 'Oslo')[number % 2]},{number / 2}\n" for number in range(10)
)


@pytest.fixture
def made(tmp_path: Path) -> Any:
    def make(content: str | bytes = PEOPLE, **settings: Any) -> TableFile:
        file = tmp_path / "rows.csv"
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return TableFile(str(file), **settings)

    return make


def everything(data: TableFile) -> tuple[np.ndarray, np.ndarray]:
    """All rows and answers as they are loaded."""
    return data.load()


def test_numbers_stay_numbers_and_text_becomes_a_column_for_each_value(made: Any) -> None:
    data = made(target="paid", without=["name"])
    table, target = everything(data)
    assert data.own.names == ("age", "city=Oslo", "city=Rome")
    assert table[:2].tolist() == [[20, 0, 1], [21, 1, 0]]
    assert target.tolist() == [number / 2 for number in range(10)]
    table, _ = everything(made(target="paid", features=["city"], categories="index"))
    assert table.ravel().tolist() == [1, 0] * 5


def test_classes_are_sorted_and_numbers_as_numbers(made: Any) -> None:
    data = made(target="city", without=["name"])
    assert everything(data)[1].tolist() == [1, 0] * 5
    assert data.own.classes == ("Oslo", "Rome")
    data = made("x,y\n1,10\n2,9\n3,10\n", target="y", target_kind="class")
    assert everything(data)[1].tolist() == [1, 0, 1]
    assert data.own.classes == ("9", "10")
    assert everything(made("x,y\n1,a\n2,a\n", target="y"))[1].tolist() == [0, 0]  # one class
    assert everything(made("x\n1\n2\n"))[1].tolist() == [0, 0]  # no target


def test_columns_of_numbers_that_are_categories_are_named(made: Any) -> None:
    data = made("zip,y\n10115,1\n20095,2\n10115,3\n", target="y", categorical=["zip"])
    assert everything(data)[0].tolist() == [[1, 0], [0, 1], [1, 0]]
    assert data.own.names == ("zip=10115", "zip=20095")


def test_what_is_standardised_and_imputed_follows_from_the_training_rows_alone(made: Any) -> None:
    rows = [f"{number},{number},{'ab'[number % 2]}" for number in range(10)]
    rows[9], rows[0] = "9,,b", "0,1000,"  # the latest row tests; both lack a value
    data = made("t,x,c\n" + "\n".join(rows) + "\n", time="t", missing="impute")
    parts = data.parts()
    np.testing.assert_allclose(parts.train.table.mean(axis=0), 0, atol=1e-6)
    assert parts.test.table[0, 0] == 0  # the training mean
    assert not parts.train.table[-1, 1:].any()  # of the first row: the shares of both categories
    x = np.array([1000, *range(1, 7)])  # row 7 validates
    np.testing.assert_allclose(parts.test.table[1, 0], (8 - x.mean()) / x.std(), rtol=1e-5)


def test_gaps_are_refused_counted_dropped_or_filled(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    gappy = "x,c,y\n1,a,1\n,a,2\n3,NA,3\n4,b,\n5,b,5\n6,a,6\n7,b,7\n"
    with pytest.raises(
        UserError,
        match=r"'x' \(1\), 'c' \(1\), 'y' \(1\), first in row 2; set data.init_args.missing .*data.init_args.without",
    ):
        made(gappy, target="y").setup()
    for missing, left in (("drop", 4), ("impute", 6)):
        data = made(gappy, target="y", missing=missing)
        data.setup()
        assert len(data.train) + len(data.val) + len(data.test) == left
        assert f"{7 - left} of 7 rows are left out" in capsys.readouterr().out
    assert len(everything(made(gappy, target="y", features=["c"], missing="drop"))[0]) == 5
    with pytest.raises(UserError, match="missing=drop leaves no row"):
        made("x,y\n,1\n2,\n", target="y", missing="drop").setup()
    assert everything(made("x,y\n?,1\n2,2\n", missing="impute", missing_values=["?"]))[0].shape == (2, 2)


def test_groups_that_leave_no_row_to_train_on_are_counted(made: Any) -> None:
    with pytest.raises(UserError, match="of 10, of which 2 groups each stay together"):
        made(target="paid", group="city").setup()


def test_text_among_numbers_is_named_since_each_number_becomes_a_category(
    made: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = "x,y\n" + "".join(f"{number},{number}\n" if number != 4 else '"1,5",4\n' for number in range(9))
    warning = "categories.*'x' \\('1,5' in row 5\\).*missing_values"
    for settings, is_said in (({}, True), ({"categorical": ["x"]}, False), ({"missing_values": ["1,5"]}, False)):
        data = made(mixed, target="y", missing="impute", **settings)
        data.setup()
        assert bool(re.search(warning, capsys.readouterr().out)) == is_said, settings
        assert len(data.own.names) == (1 if "missing_values" in settings else 9)
    with pytest.raises(UserError, match=r"'x' has 9 .*'1,5' in row 5.*missing_values"):
        made(mixed, target="y", max_categories=8).setup()
    with pytest.raises(UserError, match=r"target=x .*'1,5' in row 5.*missing_values"):
        made(mixed, target="x", target_kind="number").setup()
    made(mixed, target="x").setup()
    assert "'1,5' in row 5" in capsys.readouterr().out
    made("x,y\n" + "0,1\na,2\n1,3\nb,4\n", target="y", val_size=1).setup()  # as many words as numbers are meant
    assert "in row" not in capsys.readouterr().out


def test_groups_and_equal_times_are_never_separated_and_the_latest_rows_test(made: Any) -> None:
    rng = np.random.default_rng(0)
    content = "x,who,day\n" + "".join(
        f"{number},g{rng.integers(12)},2024-01-{1 + number // 7:02}\n" for number in range(100)
    )
    who = [line.split(",")[1] for line in content.splitlines()[1:]]
    for seed in range(3):
        data = made(content, target="x", group="who", val_size=20, split_seed=seed)
        parts = [{who[int(number)] for number in part.target} for part in data.parts()]
        assert sum(map(len, parts)) == len(set.union(*parts))
        assert min(map(len, parts)) >= 1
    data = made(content, target="x", time="day", val_size=20)
    train, val, test = ({int(number) // 7 for number in part.target} for part in data.parts())
    assert max(train) < min(val)
    assert max(val) < min(test)


def test_batches_have_labels_or_targets_with_views_or_without(made: Any) -> None:
    for settings, fields in (
        ({"target": "paid"}, {"table", "target", "index"}),
        ({"target": "city"}, {"table", "label", "index"}),
        ({"target": "paid", "views": RowViews()}, {"views", "target", "index"}),
        ({"target": "city", "views": RowViews()}, {"views", "label", "index"}),
    ):
        data = made(batch_size=2, without=["name"], **settings)
        data.setup()
        assert next(iter(data.train_dataloader())).keys() == fields


def test_a_run_goes_on_only_with_the_same_training_rows(made: Any) -> None:
    contents = set()
    for content in (PEOPLE, PEOPLE, PEOPLE.replace("Rome", "Bern", 1)):
        data = made(content, target="paid")
        data.setup()
        contents.add(data.training_content())
    assert len(contents) == 2


def test_csv_as_programs_write_it(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    for content, columns in (
        ("\ufeffa,b\r\n1,x\r\n", {"a": [1.0], "b": ["x"]}),  # Excel
        ("a;b\n1;x, y\n", {"a": [1.0], "b": ["x, y"]}),
        ("a\tb\n1\tx\n", {"a": [1.0], "b": ["x"]}),
        (",a\n0,1\n1,2\n", {"a": [1.0, 2.0]}),  # pandas' index
        ('a,b\n"1","two\nlines, ""quoted"""\n\n2,x\n', {"a": [1.0, 2.0], "b": ['two\nlines, "quoted"', "x"]}),
        ("a\n1\n1_000\n", {"a": ["1", "1_000"]}),
        ("a\n-1e-3\n+.5\n7.\n", {"a": [-0.001, 0.5, 7.0]}),
        ("a,b\n 1 , x \n", {"a": [1.0], "b": ["x"]}),
    ):
        file.write_bytes(content.encode())
        assert {name: list(cells) for name, cells in read_columns(file).items()} == columns


def test_what_is_no_table_is_refused_by_its_line(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for content, message in (
        ("", "it is empty"),
        ("\n\n", "it is empty"),
        ("a,b\n", "no rows"),
        (",\n1,2\n", "no column with a name"),
        ("1,2\n3,4\n", "first line has numbers alone"),
        ("a,b,a\n1,2,3\n", "two of its columns are called 'a'"),
        ("a,b\n1,2\n3\n", "line 3 has 1 fields, and the first line names 2"),
        ('a,b\n1,"x\ny"\n1,2,3\n', "line 4 has 3 fields"),
        ('a,b\n1,2\n3,"open\n4,5\n', "line 3: unexpected end of data"),
        (f"a,b\n1,{'x' * 200_000}\n", "line 2: field larger than field limit"),
        ("a,b\n1,1e39\n", "'b' has 1e[+]39 in row 1, too large"),
        (b"a,b\n1,\xff\n", "not UTF-8"),
        (b"PK\x03\x04\x00", "it has no rows"),  # a spreadsheet
    ):
        with pytest.raises(UserError, match=rf"path=.*rows.csv cannot be read as a table: .*{message}"):
            made(content).setup()
    with pytest.raises(UserError, match="leave no training row of 1"):
        made("a,b\n1,2\n").setup()
    monkeypatch.setenv("LIGHTSPAN_MAX_CELLS", "39")
    with pytest.raises(UserError, match=r"has 40 cells, .* LIGHTSPAN_MAX_CELLS"):
        made().setup()
    monkeypatch.setenv("LIGHTSPAN_MAX_CELLS", "3")
    with pytest.raises(UserError, match=r"has 4 cells, .* LIGHTSPAN_MAX_CELLS"):
        made(",,,,").setup()  # a line of any number of names


def test_columns_that_do_not_fit_are_named(made: Any) -> None:
    for settings, message in (
        ({"target": "payed"}, "target: the file has no column 'payed'; did you mean 'paid'"),
        ({"without": ["zzz"]}, "without: the file has no column 'zzz'; it has name, age, city, paid"),
        ({"target": "paid", "features": ["paid"]}, "features has the target"),
        ({"target": "city", "target_kind": "number"}, "target=city has text.* train a classifier"),
        (
            {"max_categories": 9},
            "column 'name' has 10 categories, such as 'p0', and max_categories=9; .*data.init_args.without",
        ),
        ({"without": ["name", "age", "city", "paid"]}, "no column is left"),
        ({"max_categories": 0}, "max_categories=0"),
        ({"target": "name", "max_categories": 9}, "target=name has 10 different values in .* max_categories=9"),
        ({"group": "name", "time": "age"}, "group=name or by time=age"),
        ({"delimiter": ", "}, "delimiter=', '"),
    ):
        with pytest.raises(UserError, match=message):
            made(**settings).setup()


def test_parquet_gives_what_csv_gives(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the extra `tables` is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    import datetime as dt
    from decimal import Decimal

    file = tmp_path / "rows.parquet"
    table = arrow.table(
        {
            "a": arrow.array([1, None, 3], arrow.int64()),
            "b": arrow.array([True, None, False]),
            "c": arrow.array(["x", None, " NA "]).dictionary_encode(),
            "d": [Decimal("1.5"), None, Decimal("-2")],
            "e": [1.0, float("nan"), None],
            "f": [dt.date(1970, 1, 2), None, dt.date(1970, 1, 3)],
            "g": arrow.array([dt.datetime(1970, 1, 1, 0, 0, 1), None, None], arrow.timestamp("ms")),
        }
    )
    parquet.write_table(table, file)
    columns = read_columns(file)
    for name, cells in (
        ("a", [1, np.nan, 3]),
        ("b", [1, np.nan, 0]),
        ("d", [1.5, np.nan, -2]),
        ("e", [1, np.nan, np.nan]),
        ("f", [1, np.nan, 2]),
        ("g", [1000, np.nan, np.nan]),
    ):
        np.testing.assert_array_equal(columns[name], cells, err_msg=name)
    assert list(columns["c"]) == ["x", None, None]
    for broken, message in ((b"", "it is no Parquet file"), (file.read_bytes()[:-9], "it is no Parquet file")):
        (tmp_path / "broken.parquet").write_bytes(broken)
        with pytest.raises(UserError, match=message):
            TableFile(str(tmp_path / "broken.parquet")).setup()
    parquet.write_table(arrow.table({"a": [[1], [2]]}), file)
    with pytest.raises(UserError, match="'a' is a column of list"):
        TableFile(str(file)).setup()
    parquet.write_table(arrow.table({"a": [1, 2]}).rename_columns(["a"]).append_column("a", [[3, 4]]), file)
    with pytest.raises(UserError, match="two of its columns are called 'a'"):
        TableFile(str(file)).setup()


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pyarrow; install it: pip install '\.\[tables\]'"):
        TableFile(str(tmp_path / "rows.parquet")).setup()


def test_long_numbers_that_are_none_take_no_longer_than_others(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,b\n" + "1" * 120_000 + "x,2\n")  # whose square is hours of looking for where a number may end
    assert read_columns(path)["a"].dtype == object


def test_a_parquet_file_takes_no_more_memory_than_its_texts_and_cells(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, count = tmp_path / "a.parquet", 2**15
    long = arrow.DictionaryArray.from_arrays(arrow.array(np.zeros(count, np.int32)), ["x" * 2**16])
    parquet.write_table(arrow.table({"a": long}), path)  # 2 GiB of text, written out
    cells = read_columns(path)["a"]
    assert len(cells) == count
    assert all(cell is cells[0] for cell in cells)
    entries = arrow.array(np.zeros(2**20, np.int64))
    parquet.write_table(arrow.table({"a": arrow.ListArray.from_arrays([0, 2**20], entries)}), path)
    with pytest.raises(ValueError, match="'a' is a column of list"):
        read_columns(path)


@pytest.mark.runs
def test_a_parquet_file_that_belies_its_size_takes_no_more_memory_than_the_limit(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"a": ["x" * 2**28]}), path, compression="zstd", write_statistics=False)
    size = parquet.ParquetFile(path).metadata.row_group(0).total_byte_size
    told = bytes((2 * size >> 7 * at & 127) | (128 if at < 4 else 0) for at in range(5))  # as Thrift writes it, zigzag
    content = path.read_bytes()
    assert told in content
    path.write_bytes(content.replace(told, b"\x82\x80\x80\x80\x00"))  # one byte, in as many
    assert parquet.ParquetFile(path).metadata.row_group(0).total_byte_size == 1
    # In a process of its own: this one still has the address space in which the file was written.
    code = (
        "import sys; from pathlib import Path; from lightspan.datamodules.table.columns import read_columns\n"
        f"try: read_columns(Path({str(path)!r}))\n"
        "except ValueError as error: sys.exit(str(error))"
    )
    limited = {**os.environ, "LIGHTSPAN_MAX_BYTES": str(2**26)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=limited, check=False)
    assert done.returncode == 1
    assert "LIGHTSPAN_MAX_BYTES" in done.stderr
