"""Warnings of a run: on the console, and kept with its figures, where the report and the summary find them."""

from lightning.pytorch import Trainer

from lightspan.core.errors import WarningNote, print_notes
from lightspan.training.loggers.jsonl import JsonlLogger


def warn(trainer: Trainer, text: str) -> None:
    """Prints a warning on the first rank, as one readable line, and records it."""
    if trainer.is_global_zero:
        print_notes([WarningNote(text)])
    record(trainer, text)


def record(trainer: Trainer, text: str) -> None:
    """Puts a warning into metrics.jsonl, in a line of the step that has just ended. For what is said elsewhere."""
    stepped = trainer.fit_loop.epoch_loop._batches_that_stepped  # at the end of an epoch one more than within it
    for logger in trainer.loggers:
        if isinstance(logger, JsonlLogger):
            logger.log_warning(text, min(stepped, max(0, trainer.global_step - 1)))


def warnings_of(trainer: Trainer) -> list[str]:
    """What the run was warned of so far, earlier starts included."""
    return [text for logger in trainer.loggers if isinstance(logger, JsonlLogger) for text in logger.warnings()]
