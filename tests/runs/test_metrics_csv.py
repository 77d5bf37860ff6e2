from lightspan.runs.metrics_csv import as_csv, write_csv


def test_columns_appear_in_order_and_gaps_stay_empty():
    lines = '{"step": 0, "a": 1.5}\n{"step": 1, "b": null}\n'
    assert as_csv(lines) == "step,a,b\n0,1.5,\n1,,\n"


def test_a_torn_last_line_is_left_out():
    assert as_csv('{"step": 0, "a": 1}\n{"step": 1, "a"') == "step,a\n0,1\n"


def test_a_folder_without_metrics_gets_no_table(tmp_path):
    write_csv(tmp_path)
    assert list(tmp_path.iterdir()) == []
