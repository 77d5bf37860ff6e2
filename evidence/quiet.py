"""The Trainer of runs that are measured from outside."""

from typing import Any

from lightning import Trainer


def quiet_trainer(**settings: Any) -> Trainer:
    """On the processor, without logs, checkpoints, bar and summary, and without validation unless `settings` has it."""
    quiet: dict[str, Any] = {"accelerator": "cpu", "limit_val_batches": 0, "logger": False}
    quiet |= {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(**quiet | settings)
