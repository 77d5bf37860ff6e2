"""csv/metrics.csv: metrics.jsonl as one table, for spreadsheets and pandas.

It is made from the whole metrics.jsonl whenever training ends or stops: a table that grows line by line cannot know the
columns that appear later, and one logger's file per start would lose the curve before a resume.
"""

import csv
from pathlib import Path

from lightspan.cli.runs.json_lines import json_lines
from lightspan.core.files.atomic import atomic_path
from lightspan.core.files.runs import CSV_FOLDER, METRICS

CSV_FILE = Path(CSV_FOLDER) / "metrics.csv"


def write_csv(run_dir: Path) -> None:
    """Writes csv/metrics.csv beside metrics.jsonl, with its columns in order of appearance, empty where a line has no
    such metric; nothing if there is no metrics.jsonl. Damaged lines are left out.
    """
    metrics = run_dir / METRICS
    if not metrics.is_file():
        return
    columns = dict.fromkeys(key for row in json_lines(metrics, skip_damaged=True) for key in row)
    with (
        atomic_path(run_dir / CSV_FILE) as temporary,
        temporary.open("w", encoding="utf-8", errors="replace", newline="") as file,
    ):
        writer = csv.DictWriter(file, list(columns), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(json_lines(metrics, skip_damaged=True))
