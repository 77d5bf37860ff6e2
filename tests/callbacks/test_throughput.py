import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from trainer_fixtures import FEATURES

from lightspan.callbacks.resilience.checkpoint import Checkpoint
from lightspan.callbacks.watching.throughput import Throughput, batch_counts
from lightspan.core.errors import UserError
from lightspan.datamodules.loading.loader import ExactLoader


@pytest.mark.parametrize(
    ("batch", "counts"),
    [
        ({"tokens": torch.zeros(3, 9, dtype=torch.int64)}, (3, 24)),
        ({"image": torch.zeros(5, 1, 2, 2), "label": torch.zeros(5)}, (5, 0)),
        ({"views": [torch.zeros(7, 3), torch.zeros(7, 3)], "label": torch.zeros(7)}, (7, 0)),
        ((torch.tensor(1.0), torch.zeros(2, 3)), (2, 0)),
        (torch.zeros(4), (4, 0)),
        ({"name": "x"}, (0, 0)),
    ],
)
def test_samples_and_tokens_of_a_batch(batch, counts):
    assert batch_counts(batch) == counts


class Rates(Callback):
    """What stands in the metrics after each batch."""

    def __init__(self) -> None:
        self.seen: list[float | None] = []

    def on_train_batch_end(self, trainer, *args) -> None:
        rate = trainer.callback_metrics.get("throughput/samples_per_s")
        self.seen.append(None if rate is None else rate.item())


class Lines(DummyLogger):
    """Steps of the lines that hold a rate."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def log_metrics(self, metrics, step=None) -> None:
        if "throughput/samples_per_s" in metrics:
            self.steps.append(step)


def test_each_window_is_one_line_at_the_same_steps_also_in_a_resumed_run(make_trainer, net, batches, tmp_path):
    def steps_of(max_steps, ckpt_path=None) -> list[int]:
        lines = Lines()
        callbacks = [Throughput(4), Checkpoint(every_n_train_steps=6)]
        options = {"max_steps": max_steps, "logger": lines, "enable_checkpointing": True, "callbacks": callbacks}
        make_trainer(**options).fit(net(), batches(20), ckpt_path=ckpt_path, weights_only=True)
        return lines.steps

    assert steps_of(6) == [3]
    assert steps_of(13, tmp_path / "checkpoints" / "last.ckpt") == [7, 11]


def test_rates_are_over_windows_and_leave_validation_out(make_trainer, net, batches, slow):
    """Batches of 4 samples take 1 s; validations take 7 s."""
    rates = Rates()
    trainer = make_trainer(max_steps=6, callbacks=[slow, Throughput(2), rates], val_check_interval=1)
    trainer.fit(net(), batches(10), batches(1))
    assert rates.seen == [None, *[4.0] * 5]
    assert trainer.callback_metrics["memory/rss_mib"] > 20
    assert "throughput/tokens_per_s" not in trainer.callback_metrics


def test_a_window_shows_how_fast_it_was(make_trainer, net, batches, clock):
    """The seconds of a batch are its number, from 1."""

    class Slower(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            clock.advance(batch_idx + 1)

    rates = Rates()
    make_trainer(max_steps=4, callbacks=[Slower(), Throughput(2), rates]).fit(net(), batches(10))
    assert rates.seen == [None, *map(pytest.approx, [8 / 3, 8 / 3, 8 / 7])]


def test_micro_batches_count_in_full(make_trainer, net, batches, slow):
    rates = Rates()
    make_trainer(max_steps=2, callbacks=[slow, Throughput(1), rates], accumulate_grad_batches=3).fit(net(), batches(6))
    assert rates.seen == [None, None, *[4.0] * 4]


def test_the_share_of_time_that_was_spent_waiting_for_data(make_trainer, net, clock, slow):
    """A step takes 1 s, a sample 0.25 s to make, a validation 7 s, which counts for nothing."""

    class Made(list):
        def sample(self, index, seed):
            clock.advance(0.25)
            return {"image": torch.randn(FEATURES), "label": torch.tensor(0)}

    loader = ExactLoader(Made(range(40)), batch_size=2)
    assert loader.waited_s == 0
    shares = []

    class Read(Callback):
        def on_train_batch_end(self, trainer, *args):
            shares.append(float(trainer.callback_metrics.get("throughput/waiting_for_data", -1)))

    trainer = make_trainer(max_steps=6, callbacks=[slow, Throughput(2), Read()], val_check_interval=1)
    trainer.fit(net(), loader, ExactLoader(Made(range(4)), batch_size=4))
    assert shares == pytest.approx([-1, *[1 / 3] * 5])
    assert loader.waited_s == 6 * 0.5


def test_no_share_is_logged_of_a_loader_that_does_not_count_it(make_trainer, net, batches):
    trainer = make_trainer(max_steps=2, callbacks=[Throughput(1)])
    trainer.fit(net(), batches(4))
    assert "throughput/waiting_for_data" not in trainer.callback_metrics


def test_a_window_has_at_least_one_step():
    with pytest.raises(UserError, match="every_n_steps=0: a window has at least 1 optimiser step"):
        Throughput(0)
