"""csv/metrics.csv: metrics.jsonl as one table, for spreadsheets and pandas.

It is made from the whole metrics.jsonl whenever training ends or stops: a table that grows line by line cannot know the
columns that appear later, and one logger's file per start would lose the curve before a resume.
"""

import csv
import io
import json
from pathlib import Path

from lightspan.run_files import CSV_FOLDER, METRICS

CSV_FILE = Path(CSV_FOLDER) / "metrics.csv"


def write_csv(run_dir: Path) -> None:
    """Writes csv/metrics.csv beside metrics.jsonl; nothing if there is no metrics.jsonl."""
    from lightspan.files import write_atomic

    try:
        text = (run_dir / METRICS).read_text(encoding="utf-8")
    except OSError:
        return
    write_atomic(run_dir / CSV_FILE, as_csv(text))


def as_csv(text: str) -> str:
    """The lines of a metrics.jsonl as CSV: columns in order of appearance, empty if a line has no such metric."""
    rows = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # the last line of a killed run may be incomplete
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
