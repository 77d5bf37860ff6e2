from pathlib import Path

import pytest

from lightspan.cli.runs.metrics_csv import write_csv


@pytest.mark.parametrize(
    ("lines", "table"),
    [
        ('{"step": 0, "a": 1.5}\n{"step": 1, "b": null}\n', "step,a,b\n0,1.5,\n1,,\n"),
        ('{"step": 0, "a": NaN}\n{"step": 1, "a": -Infinity}\n', "step,a\n0,nan\n1,-inf\n"),
        ('{"step": 0, "a": 1}\n{"step": 1, "a"', "step,a\n0,1\n"),  # the last line of a killed run
        ('[1]\n{"step": 0, "a": 1}\n', "step,a\n0,1\n"),
    ],
)
def test_columns_appear_in_order_gaps_stay_empty_and_what_is_no_line_is_left_out(
    tmp_path: Path, lines: str, table: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines)
    write_csv(tmp_path)
    assert (tmp_path / "csv" / "metrics.csv").read_text() == table


def test_a_folder_without_metrics_gets_no_table(tmp_path: Path) -> None:
    write_csv(tmp_path)
    assert list(tmp_path.iterdir()) == []
