"""Run folders as `lightspan fit` leaves them, small and made on the spot."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MakeRun = Callable[..., Path]


def rows_of(steps: int, offset: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(steps):
        loss = 1.5 + offset + 4 * math.exp(-step / 20)
        row = {"step": step, "time_s": 0.1 * step, "epoch": 0, "train/loss_nats": loss, "lr-AdamW/matrices": 1e-3}
        rows.append(row)
        if step % 10 == 9:
            rows.append({"step": step, "time_s": 0.1 * step, "val/loss_nats": loss, "val/bits_per_byte": 1.4 * loss})
    return rows


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """make_run(name, offset=0.0, rows=..., summary=..., config=..., provenance=..., samples=...) -> folder."""

    def make(name: str, offset: float = 0.0, **files: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        rows = files.get("rows", rows_of(50, offset))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        summary = {"val_loss_nats": 1.5 + offset, "optimizer_state_mib": 16.0, "steps": 50, "finished": True}
        if (content := files.get("summary", summary)) is not None:
            (folder / "summary.json").write_text(json.dumps(content))
        for file in ("resolved.yaml", "provenance.json"):
            if (content := files.get(file.split(".")[0])) is not None:
                (folder / file).write_text(json.dumps(content))  # JSON is YAML too
        if (content := files.get("samples")) is not None:
            (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in content))
        return folder

    return make
