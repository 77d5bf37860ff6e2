"""The Trainer of measured runs."""

from evidence.quiet import quiet_trainer


def test_it_writes_and_says_nothing_and_validates_only_if_it_is_told_to() -> None:
    trainer = quiet_trainer(max_steps=3)
    assert (trainer.max_steps, trainer.limit_val_batches) == (3, 0)
    assert not any([trainer.loggers, trainer.checkpoint_callbacks, trainer.progress_bar_callback])
    assert quiet_trainer(max_steps=3, limit_val_batches=1.0).limit_val_batches == 1.0
