import contextlib
import json
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from lightspan.callbacks.resilience.checkpoint import Checkpoint
from lightspan.callbacks.watching.run_summary import RunSummary, StepTimer
from lightspan.callbacks.watching.throughput import Throughput
from lightspan.core.memory import MIB
from lightspan.training.loggers.jsonl import JsonlLogger


def fit(make_trainer, module, batches, folder: Path, steps=4, ckpt_path=None, callbacks=(), **options) -> dict:
    summary = RunSummary(str(folder / "summary.json"), print_table=options.pop("print_table", False))
    trainer = make_trainer(max_steps=steps, callbacks=[summary, *callbacks], **options)
    with contextlib.suppress(SystemExit):  # how Lightning ends on Ctrl-C
        trainer.fit(module, batches(5), batches(1), ckpt_path=ckpt_path)
    return json.loads((folder / "summary.json").read_text())


def test_it_holds_the_last_metrics_and_the_costs(make_trainer, net, batches, tmp_path):
    module = net()
    logger = JsonlLogger(str(tmp_path))
    summary = fit(
        make_trainer, module, batches, tmp_path, logger=logger, val_check_interval=2, callbacks=[Throughput(1)]
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last_validation = [line["val/loss_nats"] for line in lines if "val/loss_nats" in line][-1]
    assert summary["val_loss_nats"] == pytest.approx(last_validation)
    assert summary["train_loss_nats"] == pytest.approx(
        [line["train/loss_nats"] for line in lines if "train/loss_nats" in line][-1]
    )
    assert summary["throughput_samples_per_s"] > 0
    parameters = sum(p.numel() for p in module.parameters())
    assert summary["parameters"] == summary["trainable_parameters"] == parameters
    # Two moments of four bytes a parameter, and one float32 step count for each of the six parameters.
    assert summary["optimizer_state_mib"] * MIB == 8 * parameters + 4 * len(list(module.parameters()))
    assert summary["steps"] == 4
    assert summary["finished"] is True
    assert 20 < summary["peak_rss_mib"] < 20_000
    assert 0 < summary["step_ms_median"] / 1e3 < summary["seconds"] < 60
    assert "peak_device_mib" not in summary
    assert not any("/" in name for name in summary)


def test_frozen_parameters_are_counted_apart(make_trainer, net, batches, tmp_path):
    module = net()
    module.head.requires_grad_(False)
    summary = fit(make_trainer, module, batches, tmp_path)
    assert summary["parameters"] - summary["trainable_parameters"] == 8 * 3 + 3


def test_a_table_is_printed_at_the_end(make_trainer, net, batches, tmp_path, capsys):
    fit(make_trainer, net(), batches, tmp_path, print_table=True)
    printed = capsys.readouterr().out
    assert f"wrote {tmp_path / 'summary.json'}" in printed
    assert "optimizer_state_mib" in printed
    assert "│ train/loss_nats " in printed  # as --metric wants it


class Interrupt(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == 3:
            raise KeyboardInterrupt


def test_an_interrupted_run_says_so(make_trainer, net, batches, tmp_path):
    summary = fit(make_trainer, net(), batches, tmp_path, steps=5, callbacks=[Interrupt()])
    assert summary["finished"] is False
    assert summary["steps"] == 3


def test_seconds_add_up_over_resumes_and_steps_leave_the_rest_out(make_trainer, net, batches, tmp_path, slow):
    """A batch takes 1 s, a validation 7 s and a checkpoint 3 s; an epoch has 5 batches."""
    options = {"enable_checkpointing": True, "val_check_interval": 2}
    first = fit(make_trainer, net(), batches, tmp_path, 4, callbacks=[slow, Checkpoint(save_top_k=0)], **options)
    assert first["step_ms_median"] == 1000
    assert first["seconds"] == 4 * 1 + 2 * (7 + 3)
    last = tmp_path / "checkpoints" / "last.ckpt"
    second = fit(make_trainer, net(), batches, tmp_path, 9, last, [slow, Checkpoint(save_top_k=0)], **options)
    assert second["step_ms_median"] == 1000
    # The checkpoint was taken after the fourth step and before its validation, which is run again; it stays as it is.
    assert second["seconds"] == (4 * 1 + 7 + 3) + 7 + 5 * 1 + 2 * (7 + 3)


def test_a_step_is_the_sum_of_its_micro_batches(make_trainer, net, batches, tmp_path, slow):
    summary = fit(make_trainer, net(), batches, tmp_path, steps=2, accumulate_grad_batches=2, callbacks=[slow])
    assert summary["step_ms_median"] == 2000


def test_the_first_five_steps_are_warm_up(clock):
    timer = StepTimer()
    assert timer.median_ms() is None
    for seconds in [9, 9, 9, 9, 8, 1, 3, 1]:
        timer.start()
        clock.advance(seconds)
        timer.stop(step_done=True)
        clock.advance(50)
    assert timer.median_ms() == 1000


def test_a_diverged_metric_is_null(make_trainer, net, batches, tmp_path):
    module = net()
    module.head.weight.data.fill_(float("nan"))
    assert fit(make_trainer, module, batches, tmp_path)["train_loss_nats"] is None
