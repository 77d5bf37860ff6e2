"""Keys in the environment are used and never written down: not by the run, and not by Weights & Biases beside it."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rank_processes import PROJECT

from lightspan.cli.main import main

PLANTED = {
    "WANDB_API_KEY": "feedc0de00112233445566778899aabbccddeeff",
    "HF_TOKEN": "hf_PlantedPlantedPlantedPlantedPlant",
    "AWS_SECRET_ACCESS_KEY": "planted/secret/access/key/0123456789abcd",
}


def tracked_fit(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Two steps of the tiny project with --wandb, in a home and a temporary folder of its own below `folder`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    for place in ("home", "tmp"):
        (folder / place).mkdir()
    own = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "PYTHONPATH": str(PROJECT)}
    run = [str(PROJECT / "tiny.yaml"), "--allow-module", "tiny_lab", "--run", "run", "--wandb", "trainer.max_steps=2"]
    command = [sys.executable, "-m", "lightspan", "fit", *run, "trainer.log_every_n_steps=1"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**clean, **own, **environment})


def wandb_records(path: Path) -> Iterator[Any]:
    """What wandb wrote of a run, in order: a header of 7 bytes, then LevelDB's log format, blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, whole = path.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while at + 7 <= len(content):
        if (room := 2**15 - at % 2**15) < 7:
            at += room
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        whole, at = whole + content[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # a record, or the last part of one
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def values(items: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.runs
def test_planted_keys_are_nowhere_after_a_tracked_run(tmp_path: Path) -> None:
    done = tracked_fit(tmp_path, **PLANTED, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    records = list(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))
    assert len(records) == 1
    assert b"train/loss" in records[0].read_bytes()  # its records are searchable
    for name, key in PLANTED.items():
        assert key not in done.stdout + done.stderr, name
        assert not [path for path in files_of(tmp_path) if key.encode() in path.read_bytes()], name


@pytest.mark.runs
def test_without_a_key_the_tracker_stays_offline_and_keeps_the_recipe_and_every_figure(tmp_path: Path) -> None:
    done = tracked_fit(tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("run/wandb/offline-run-*/*.wandb")
    records = list(wandb_records(path))
    config: dict[str, Any] = {}
    for record in records:
        config |= values(record.config.update) | values(record.run.config.update)
    recipe = yaml.safe_load((tmp_path / "run/resolved.yaml").read_text())
    assert {key: config[key] for key in ("model", "data", "seed_everything")} == {
        key: recipe[key] for key in ("model", "data", "seed_everything")
    }
    rows = [values(record.history.item) for record in records if record.HasField("history")]
    tracked = [(row["trainer/global_step"], row["train/loss"]) for row in rows if "train/loss" in row]
    own = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert tracked == [(row["step"], row["train/loss"]) for row in own if "train/loss" in row]
    assert len(tracked) == 2
    assert not list(tmp_path.glob("run/wandb/run-*"))


@pytest.mark.parametrize("key", PLANTED.values(), ids=PLANTED)
def test_a_key_on_the_command_line_is_refused_without_being_repeated(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["submit", str(PROJECT / "tiny.yaml"), "--allow-module", "tiny_lab", "--to", "slurm", "--print"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(PROJECT)
    assert main([*given, f"model.init_args.api_key={key}"]) == 2
    said = capsys.readouterr()
    assert "looks like a secret" in said.err
    assert key not in said.out + said.err
