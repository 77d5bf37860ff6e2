"""Restoring entry by entry: each is compared with what it is restored into, and no failure is left unexplained.

Lightning passes the entries of a checkpoint to the data, the model, the callbacks, the loops and the optimisers, and
each trusts what it is given. `guard` checks before each of these steps.
"""

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightspan.core.errors import UserError
from lightspan.training.checkpoints.content import counts_fault, described, state_fault
from lightspan.training.checkpoints.names import OwnFiles
from lightspan.training.checkpoints.shards import cause_of

Fault = str | None
_GLOO = "gloo/transport/"  # gloo raises plain RuntimeErrors whose text begins with the place in its source
_SWA_ENDS = (
    "Lightning's StochasticWeightAveraging exchanges the run's schedule and restores neither that nor its averages; "
    "WeightAveraging and EMAWeightAveraging of lightning.pytorch.callbacks can be resumed"
)
_OF_PARAMETER = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}  # moments of torch's own optimisers


def guard(trainer: Trainer) -> None:
    """From now on the trainer refuses, with a UserError, an entry of a checkpoint that it cannot take."""
    connector, loop = trainer._checkpoint_connector, trainer.fit_loop
    for owner, name, entry, check in (
        (connector, "resume_start", "pytorch-lightning_version", None),
        (connector, "restore_datamodule", type(getattr(trainer, "datamodule", None)).__qualname__, None),
        (connector, "restore_model", "state_dict", None),
        (connector, "restore_callbacks", "callbacks", _progress_fault),
        (connector, "restore_precision_plugin_state", type(trainer.precision_plugin).__qualname__, None),
        (connector, "restore_loops", "loops", None),
        (connector, "restore_optimizers_and_schedulers", "optimizer_states or lr_schedulers", _optimizers_fault),
        (connector, "resume_end", "optimizer_states", _settings_fault),
        (loop, "_load_combined_loader_states", "loops.fit_loop", _position_fault),
    ):
        step = getattr(type(owner), name).__get__(owner)
        setattr(owner, name, _guarded(trainer, step, entry, check))


@contextlib.contextmanager
def explained_restoring(path: object, entry: str) -> Iterator[None]:
    """Turns whatever the receiver of a wrong entry raises into a UserError that names the entry.

    Their own UserErrors pass unchanged, and so do errors of this machine and of the connection to other ranks.
    """
    try:
        yield
    except (UserError, MisconfigurationException, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except (torch.AcceleratorError, dist.DistError):
        raise
    except Exception as error:
        if _GLOO in str(error):
            raise
        what = "has no such key" if isinstance(error, KeyError) else type(error).__name__
        raise UserError(
            f"checkpoint {path} cannot be used: its entry {entry} cannot be restored ({what}: {cause_of(error)})"
        ) from error


def warn_of_unresumable(trainer: Trainer) -> None:
    """Warns before the first step about callbacks with which a run cannot be resumed."""
    if _of_swa(trainer) and trainer.is_global_zero:
        warnings.warn(f"{_SWA_ENDS}: once it has begun, this run cannot be resumed", stacklevel=2)


def refuse_unresumable(trainer: Trainer, loaded: dict[str, Any]) -> None:
    """Raises: UserError for a checkpoint that cannot be resumed because of the state of its callbacks, or with which
    Lightning's ModelCheckpoint would remove what is not its own.
    """
    for entry, path in _removable(trainer, loaded):
        raise UserError(
            f"checkpoint {trainer.ckpt_path} cannot be used: its entry {entry} is {path!r:.200}, which is no "
            "checkpoint in the folder of that callback, and would be removed at the next save"
        )
    for key in _of_swa(trainer):
        state = (loaded.get("callbacks") or {}).get(key)
        if isinstance(state, dict) and state.get("scheduler_state") is not None:
            raise UserError(
                f"checkpoint {trainer.ckpt_path} was written after StochasticWeightAveraging had begun; {_SWA_ENDS}; "
                "resume from an earlier checkpoint, or start a new run"
            )


def unfreeze(trainer: Trainer, module: LightningModule, trained: list[str] | None) -> None:
    """Unfreezes the parameters that were trained when the checkpoint was written, if a BaseFinetuning controls them.

    It restores the groups of the optimisers, but freezes again what it had unfrozen: the rest of such a run would
    train only the head. Called before a strategy looks at the parameters.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # a connector of the trainer sets it
    if trained is None or not any(isinstance(callback, BaseFinetuning) for callback in callbacks):
        return
    wanted = {weight: name in trained for name, weight in module.named_parameters()}
    for part in module.modules():
        own = list(part.parameters(recurse=False))
        if isinstance(part, _BatchNorm) and any(wanted[weight] and not weight.requires_grad for weight in own):
            part.track_running_stats = True  # as unfreezing does
    for weight, trains in wanted.items():
        weight.requires_grad_(trains)


def _removable(trainer: Trainer, loaded: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(entry, path) of what Lightning's ModelCheckpoint would take for its own and is not. It removes, folders too,
    what begins with the path of its folder, wherever `..` leads from there, and whatever is not local.
    """
    states = loaded.get("callbacks") or {}
    for callback in trainer.checkpoint_callbacks:
        state = states.get(callback.state_key, states.get(callback._legacy_state_key))
        if not isinstance(callback, ModelCheckpoint) or isinstance(callback, OwnFiles) or not isinstance(state, dict):
            continue
        ranked = state.get("best_k_models") or {}
        paths = [(name, state.get(name)) for name in ("best_model_path", "kth_best_model_path", "last_model_path")]
        for name, path in (*paths, *(("best_k_models", path) for path in ranked)):
            own = isinstance(path, str) and path.endswith(callback.FILE_EXTENSION)
            if path and not (own and ".." not in Path(path).parts and "://" not in path):
                yield f"callbacks.{callback.state_key}.{name}", path


def _of_swa(trainer: Trainer) -> list[str]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # a connector of the trainer sets it
    return [callback.state_key for callback in callbacks if isinstance(callback, StochasticWeightAveraging)]


def _guarded(
    trainer: Trainer, step: Callable[..., None], entry: str, check: Callable[[Trainer, dict[str, Any]], Fault] | None
) -> Callable[..., None]:
    """`step`, which restores `entry`, run only if `check` finds no fault in what was loaded."""

    def run(*args: Any, **kwargs: Any) -> None:
        loaded = trainer._checkpoint_connector._loaded_checkpoint
        path = trainer.ckpt_path or (args[0] if args else "")
        resumes = loaded or trainer.fit_loop._combined_loader_states_to_load
        with explained_restoring(path, entry):
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
            continue  # it has a state only after the fit has begun
        if not _is_of(callback, "lightspan.", "lightning."):
            continue  # only its author knows which values its state may take
        foreign = not _is_of(callback, "lightspan.")
        stored, entry = states.get(callback.state_key), f"callbacks.{callback.state_key}"
        if stored is not None and (fault := state_fault(stored, now, entry, may_lack=foreign)):
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
    if fault := state_fault(stored, now, f"loops.{name}"):
        return fault
    wrong = (counts_fault(stored[key], now[key], f"loops.{name}.{key}") for key in progress)
    return next((fault for fault in wrong if fault), None)


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
            return f"{name} contains {len(stored)} states, but this run has {len(owners)}"
        for i, (state, owner) in enumerate(zip(stored, owners, strict=True)):
            if name == "optimizer_states" and not state:
                if owner.state_dict():
                    return f"{name}[{i}].state is missing"
                continue
            known = _is_of(owner, "lightspan.", "torch.optim.")
            if known and (fault := state_fault(state, owner.state_dict(), f"{name}[{i}]")):
                return fault
            if known and name == "lr_schedulers" and "last_epoch" in owner.state_dict() and "last_epoch" not in state:
                return f"{name}[{i}].last_epoch is missing"
            if name == "optimizer_states" and (fault := _moments_fault(state, owner, f"{name}[{i}]")):
                return fault
    return None


def _moments_fault(state: dict[str, Any], optimizer: torch.optim.Optimizer, entry: str) -> Fault:
    """torch casts moments to their parameter's dtype, drops the imaginary part of complex ones, and checks no shape."""
    plain = _is_plain(optimizer)
    parameters = [(parameter, at) for at, group in enumerate(optimizer.param_groups) for parameter in group["params"]]
    of_numbers = {number: moments for number, moments in state["state"].items() if isinstance(number, int)}
    names: dict[int, set[str]] = {}  # names of moments, by group
    for number, moments in of_numbers.items():
        if not 0 <= number < len(parameters):
            return f"{entry}.state is of parameter {number}, but this run has {len(parameters)}"
        names.setdefault(parameters[number][1], set()).update(moments)
    for number, moments in of_numbers.items():
        parameter, group = parameters[number]
        for name, moment in moments.items():
            if fault := _moment_fault(name, moment, parameter, plain):
                return f"{entry}.state.{number}.{name} {fault}"
        if plain and (lacks := names[group] - set(moments)):
            return f"{entry}.state.{number}.{min(lacks)} is missing"
    return None


def _moment_fault(name: str, moment: Any, parameter: Tensor, plain: bool) -> Fault:
    shape = list(moment.shape) if isinstance(moment, Tensor) else None
    if isinstance(moment, Tensor) and moment.is_complex() and not parameter.is_complex():
        return "is a complex tensor for a real parameter"
    if not plain:
        return None
    if name in _OF_PARAMETER and shape != list(parameter.shape) and not (name == "momentum_buffer" and moment is None):
        found = described(moment) if shape is None else f"of shape {shape}"
        return f"is {found}, not a tensor of shape {list(parameter.shape)}"
    if name == "step" and not (shape == [] or type(moment) in (int, float)):
        return f"is {described(moment)}, not a number"
    return f"is {float(moment):g}, not a count" if name == "step" and not moment >= 0 else None


def _is_plain(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is one of torch's own optimisers, whose states and settings are known."""
    return _is_of(optimizer, "torch.optim.")


def _is_of(owner: object, *packages: str) -> bool:
    return type(owner).__module__.startswith(packages)


def _settings_fault(trainer: Trainer, loaded: dict[str, Any]) -> Fault:
    """What optimisers lack once they have taken what was stored: torch replaces their settings and adds those it knows.

    Called at the end of restoring.
    """
    for i, optimizer in enumerate(trainer.optimizers):
        if not _is_plain(optimizer):  # others may have groups without some of their defaults
            continue
        # Loading adds defaults that some optimisers, like LBFGS, do not accept and never had.
        own = [name for name in optimizer.defaults if name in inspect.signature(type(optimizer)).parameters]
        for j, group in enumerate(optimizer.param_groups):
            if missing := next((name for name in own if name not in group), None):
                return f"optimizer_states[{i}].param_groups[{j}].{missing} is missing"
    return None


def _position_fault(trainer: Trainer, loaded: dict[str, Any]) -> Fault:
    loop = trainer.fit_loop
    states, loader = loop._combined_loader_states_to_load, loop._combined_loader
    if loader is None:
        return None
    now = [part.state_dict() for part in loader.flattened if hasattr(part, "state_dict")]
    return state_fault(states, now, "loops.fit_loop.state_dict.combined_loader")
