"""Restoring entry by entry: each is compared with what it is restored into, and no failure is left unexplained.

Lightning hands the entries of a checkpoint to the data, the model, the callbacks, the loops and the optimisers, and
each believes what it is given. `guard` stands in front of these steps.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightspan.callbacks.checkpoint_content import state_fault
from lightspan.callbacks.checkpoint_shards import first_line
from lightspan.errors import UserError

Fault = str | None


def guard(trainer: Trainer) -> None:
    """From now on the trainer refuses, with a UserError, an entry of a checkpoint that it cannot take."""
    connector = trainer._checkpoint_connector
    steps: dict[str, tuple[str, Callable[[Trainer, dict[str, Any]], Fault] | None]] = {
        "resume_start": ("pytorch-lightning_version", None),
        "restore_datamodule": (type(trainer.datamodule).__qualname__, None),
        "restore_model": ("state_dict", None),
        "restore_callbacks": ("callbacks", _progress_fault),
        "restore_precision_plugin_state": (type(trainer.precision_plugin).__qualname__, None),
        "restore_loops": ("loops", None),
        "restore_optimizers_and_schedulers": ("optimizer_states or lr_schedulers", _optimizers_fault),
    }
    for name, (entry, check) in steps.items():
        setattr(connector, name, _guarded(trainer, getattr(type(connector), name).__get__(connector), entry, check))
    loop = trainer.fit_loop
    of_data = type(loop)._load_combined_loader_states.__get__(loop)
    setattr(  # noqa: B010
        loop, "_load_combined_loader_states", _guarded(trainer, of_data, "loops.fit_loop", _position_fault)
    )


@contextlib.contextmanager
def explained_restoring(path: object, entry: str) -> Iterator[None]:
    """Turns what an entry of the wrong kind raises in whoever takes it into a UserError that names the entry.

    What they refuse in words of their own passes, and so do errors about this machine.
    """
    try:
        yield
    except (UserError, MisconfigurationException, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        what = "has no such key" if isinstance(error, KeyError) else type(error).__name__
        raise UserError(
            f"checkpoint {path} cannot be used: its entry {entry} cannot be restored ({what}: {first_line(error)})"
        ) from error


def _guarded(
    trainer: Trainer,
    step: Callable[..., None],
    entry: str,
    check: Callable[[Trainer, dict[str, Any]], Fault] | None,
) -> Callable[..., None]:
    def run(*args: Any, **kwargs: Any) -> None:
        loaded = trainer._checkpoint_connector._loaded_checkpoint
        path = trainer.ckpt_path or (args[0] if args else "")
        with explained_restoring(path, entry):
            resumes = loaded or trainer.fit_loop._combined_loader_states_to_load
            if check and resumes and (fault := check(trainer, loaded)):
                raise UserError(f"checkpoint {path} cannot be used: its entry {fault}")
            step(*args, **kwargs)

    return run


def _progress_fault(trainer: Trainer, loaded: dict[str, Any]) -> Fault:
    """Of callbacks and loops together: callbacks look at the loops' progress too."""
    states = loaded.get("callbacks") or {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # a connector of the trainer sets it
        try:
            now = callback.state_dict()
        except Exception:
            continue  # one that has a state only after the fit has begun
        if fault := state_fault(states.get(callback.state_key), now, f"callbacks.{callback.state_key}"):
            return fault
    return _loops_fault(trainer, loaded)


def _loops_fault(trainer: Trainer, loaded: dict[str, Any]) -> Fault:
    training = trainer.state.fn == TrainerFn.FITTING
    if training and "global_step" not in loaded:
        return "global_step is missing"
    loops = {
        TrainerFn.FITTING: ("fit_loop", trainer.fit_loop),
        TrainerFn.VALIDATING: ("validate_loop", trainer.validate_loop),
        TrainerFn.TESTING: ("test_loop", trainer.test_loop),
        TrainerFn.PREDICTING: ("predict_loop", trainer.predict_loop),
    }
    fn = trainer.state.fn
    if fn is None or "loops" not in loaded:
        return "loops is missing" if training else None
    name, loop = loops[fn]
    stored, now = loaded["loops"].get(name), loop.state_dict()
    if stored is None:
        return f"loops.{name} is missing"
    progress = [key for key in now if key.endswith("progress")]
    if missing := next((key for key in progress if key not in stored), None):
        return f"loops.{name}.{missing} is missing"
    negative = (_negative(stored[key], f"loops.{name}.{key}") for key in progress)
    return state_fault(stored, now, f"loops.{name}") or next((fault for fault in negative if fault), None)


def _negative(value: Any, entry: str) -> Fault:
    if isinstance(value, dict):
        return next((fault for key, child in value.items() if (fault := _negative(child, f"{entry}.{key}"))), None)
    return f"{entry} is {value}, not a count" if isinstance(value, int | float) and not value >= 0 else None


def _optimizers_fault(trainer: Trainer, loaded: dict[str, Any]) -> Fault:
    """Lightning pairs states with optimisers and schedules, and leaves those without a partner fresh."""
    restores = trainer.strategy.lightning_restore_optimizer
    now: dict[str, list[Any]] = {"lr_schedulers": [config.scheduler for config in trainer.lr_scheduler_configs]}
    if restores:
        now["optimizer_states"] = trainer.optimizers
    for name, owners in now.items():
        if name not in loaded:
            return f"{name} is missing: it was saved with weights only, which can be evaluated and exported"
        stored = loaded[name]
        if len(stored) != len(owners):
            return f"{name} holds {len(stored)} states, and this run has {len(owners)} of them"
        for i, (state, owner) in enumerate(zip(stored, owners, strict=True)):
            if fault := state_fault(state, owner.state_dict(), f"{name}[{i}]"):
                return fault
            if name == "optimizer_states" and (fault := _moments_fault(state, owner, f"{name}[{i}]")):
                return fault
    return None


def _moments_fault(state: dict[str, Any], optimizer: torch.optim.Optimizer, entry: str) -> Fault:
    """torch casts moments to their parameter's dtype, and drops the imaginary part of complex ones on the way."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, moments in state["state"].items():
        if not isinstance(number, int) or not isinstance(moments, dict):
            continue
        if not 0 <= number < len(parameters):
            return f"{entry}.state is of parameter {number}, and this run has {len(parameters)}"
        for name, moment in moments.items():
            if isinstance(moment, torch.Tensor) and moment.is_complex() and not parameters[number].is_complex():
                return f"{entry}.state.{number}.{name} is a complex tensor of a real parameter"
    return None


def _position_fault(trainer: Trainer, loaded: dict[str, Any]) -> Fault:
    loop = trainer.fit_loop
    states, loader = loop._combined_loader_states_to_load, loop._combined_loader
    if loader is None:
        return None
    now = [part.state_dict() for part in loader.flattened if hasattr(part, "state_dict")]
    return state_fault(states, now, "loops.fit_loop.state_dict.combined_loader")
