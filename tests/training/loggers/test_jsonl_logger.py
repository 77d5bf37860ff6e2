import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from lightspan.callbacks.resilience.checkpoint import Checkpoint
from lightspan.core.errors import UserError
from lightspan.training.loggers.jsonl import JsonlLogger


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_call_is_a_line_that_can_be_read_at_once(tmp_path):
    logger = JsonlLogger(str(tmp_path / "new"))
    logger.log_metrics({"train/loss_nats": 1.5, "lr-AdamW": np.float32(0.25), "n": torch.tensor(3.0)}, step=4)
    (line,) = lines(tmp_path / "new")
    assert line.pop("time_s") >= 0
    assert line == {"step": 4, "train/loss_nats": 1.5, "lr-AdamW": 0.25, "n": 3.0}
    logger.log_metrics({"train/loss_nats": 1.25}, step=5)
    assert [line["step"] for line in lines(tmp_path / "new")] == [4, 5]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, torch.tensor(math.nan)])
def test_what_json_cannot_say_is_null(tmp_path, value):
    JsonlLogger(str(tmp_path)).log_metrics({"loss": value, "other": 1}, step=0)
    (line,) = lines(tmp_path)
    assert line["loss"] is None
    assert line["other"] == 1


def test_rewinding_drops_later_and_torn_lines_and_time_goes_on(tmp_path):
    entries = [{"step": step, "time_s": 10.0 * step, "loss": 1.0} for step in range(6)]
    torn = '{"step": 6, "ti'
    (tmp_path / "metrics.jsonl").write_text("\n".join([*map(json.dumps, entries), torn]))
    logger = JsonlLogger(str(tmp_path))
    _ = logger.experiment  # Lightning opens the file before it loads the checkpoint
    logger.rewind(4)
    assert lines(tmp_path) == entries[:4]
    logger.log_metrics({"loss": 0.5}, step=4)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4]
    assert 30.0 <= lines(tmp_path)[-1]["time_s"] < 32.0


def test_rewinding_without_a_file_does_nothing(tmp_path):
    JsonlLogger(str(tmp_path)).rewind(4)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_stopped_and_resumed_fit_reads_as_one_straight_run(make_trainer, net, batches, tmp_path):
    def fit(folder: Path, steps: int, ckpt_path=None) -> None:
        trainer = make_trainer(
            max_steps=steps,
            logger=JsonlLogger(str(folder)),
            enable_checkpointing=True,
            callbacks=[Checkpoint(dirpath=str(folder / "checkpoints"), every_n_train_steps=3, save_top_k=-1)],
            val_check_interval=2,
        )
        trainer.fit(net(), batches(5), batches(2), ckpt_path=ckpt_path)

    fit(tmp_path / "straight", 8)
    fit(tmp_path / "resumed", 5)
    fit(tmp_path / "resumed", 8, ckpt_path=tmp_path / "resumed" / "checkpoints" / "step=3.ckpt")

    def keys(folder: Path) -> list[tuple]:
        return [(line["step"], *sorted(line)) for line in lines(folder)]

    assert keys(tmp_path / "resumed") == keys(tmp_path / "straight")
    times = [line["time_s"] for line in lines(tmp_path / "resumed")]
    assert times == sorted(times)
    assert any("val/loss_nats" in line for line in lines(tmp_path / "resumed"))


def test_only_rank_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = JsonlLogger(str(tmp_path))
    logger.log_metrics({"a": 1}, 0)
    logger.rewind(0)
    logger.finalize("success")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_one_is_refused_when_fit_begins(make_trainer, net, batches, tmp_path):
    (tmp_path / "taken").write_text("")
    trainer = make_trainer(max_steps=1, logger=JsonlLogger(str(tmp_path / "taken")))
    with pytest.raises(UserError, match=r"cannot write .*taken/metrics.jsonl"):
        trainer.fit(net(), batches(5))
