"""Builds trainer, model and data from a checked configuration: the only module that uses jsonargparse.

Import it freely: torch, Lightning and jsonargparse are loaded by `build`, not by the import.
"""

import contextlib
import logging
import secrets
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightspan.cli.config import allow
from lightspan.cli.config.blame import blame, deepest_cause, duplicate_callbacks, first_user_error, own_line
from lightspan.cli.config.places import RUN
from lightspan.cli.config.resolve import (
    TRAINED,
    Resolved,
    load_resolved,
    refuse,
    refuse_kind,
    resolve,
    with_layer,
    with_lists,
    with_run_folder,
)
from lightspan.cli.config.tree import wrap
from lightspan.core.absent import MissingFile
from lightspan.core.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

__all__ = ["Built", "Resolved", "build", "build_parts", "load_resolved", "resolve", "with_layer"]

# What Lightning says at every start of any run: adverts, and hardware that the run summary records.
_CHATTER = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "lightning.fabric.utilities.distributed",
)
_HARMLESS = (
    r".*does not have many workers which may be a bottleneck.*",
    r".*The number of training batches .* is smaller than the logging interval.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*The dirpath has changed from .*",  # a checkpoint from another run folder
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*GPU available but not used.*",
    r".*The `srun` command is available on your system but is not used.*",
    r"[\s\S]*JsonargparseDeprecationWarning",
    r"[\s\S]*was deprecated in v4[\s\S]*removed in v5",  # jsonargparse: LightningCLI still calls what it deprecates
    r".*You are using `torch.load` with `weights_only=.*",
    r"Total length of `list` across ranks is zero.*",  # the empty list of loaders of data without validation
)


@dataclass(frozen=True)
class Built:
    """The objects of a run, seeded and ready."""

    trainer: "Trainer"
    model: "LightningModule"
    datamodule: "LightningDataModule | None"


def build(resolved: Resolved, run_dir: Path | None = None) -> Built:
    """Seeds, then types and instantiates the configuration. Importing the named classes happens here.

    Args:
        resolved: what `resolve` or `load_resolved` returned.
        run_dir: fills in `${run}`. None is for checks only: paths then point to a folder that is never made.
    Raises: UserError for whatever the configuration's author can fix.
    """
    refuse_kind(resolved.kind, TRAINED, resolved.name)
    config = with_lists(resolved.config)
    config["trainer"]["default_root_dir"] = config["trainer"].get("default_root_dir") or RUN  # else the current folder
    with _gated(resolved, config, run_dir) as config:
        return _instantiate(config, resolved)


def build_parts(resolved: Resolved, run_dir: Path | None = None) -> dict[str, Any]:
    """Seeds, with 0 if the recipe gives no seed, then types and instantiates a recipe that trains nothing.

    Returns: `estimator` and `inputs`, the latter by name; or `merger` and `checkpoints`, paths by name.
    Raises: UserError as `build`.
    """
    with _gated(resolved, resolved.config, run_dir) as config:
        return _instantiate_parts(config, resolved)


@contextlib.contextmanager
def _gated(resolved: Resolved, config: dict[str, Any], run_dir: Path | None) -> Iterator[dict[str, Any]]:
    """The configuration with its run folder filled in; inside, only what it may name can be imported."""
    quiet()
    # Checked again, because a Resolved need not come from `resolve`.
    refuse(allow.gate(resolved.located(), resolved.allow_modules), resolved.name)
    nowhere = Path(tempfile.gettempdir()) / f"lightspan-unwritten-{secrets.token_hex(8)}"
    folder = run_dir if run_dir is not None else nowhere
    config = with_run_folder(config, folder)
    with _closed_imports(allow.importable(wrap(config, ""), resolved.allow_modules)):
        yield config


def quiet() -> None:
    """Silences adverts and warnings that no user of a recipe can act on; everything else is still shown."""
    for name in _CHATTER:
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in _HARMLESS:
        warnings.filterwarnings("ignore", message=pattern)


def _instantiate(config: dict[str, Any], resolved: Resolved) -> Built:
    import torch
    from lightning.pytorch import LightningDataModule
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.strategies import DDPStrategy

    from lightspan.training.strategies import DDP, register_ddp

    register_ddp()
    refused: list[tuple[type, Exception]] = []
    # However the recipe names it: a resumed run sums as an uninterrupted one does.
    make = _constructor(refused, {DDPStrategy: DDP})

    def construct(constructed: type, *arguments: Any, **settings: Any) -> Any:
        # Samples have numbers, also where the network is built on the meta device.
        with torch.device("cpu") if issubclass(constructed, LightningDataModule) else contextlib.nullcontext():
            return make(constructed, *arguments, **settings)

    class Builder(LightningCLI):
        """LightningCLI on one dict: without its own command line, environment or configuration file."""

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            self.config = parser.parse_object(args)

        def before_instantiate_classes(self) -> None:
            for message in allow.foreign(self.config, resolved.allow_modules):
                raise UserError(f"{resolved.name} does not build: {message}")
            self.parser.add_instantiator(construct, object, subclasses=True)

    with _blamed(resolved, refused, "the Trainer refuses its settings"):
        builder = Builder(
            args=config,
            run=False,
            auto_configure_optimizers=False,
            save_config_callback=None,
            load_from_checkpoint_support=False,  # it would put class paths into checkpoints
            seed_everything_default=False,
            parser_kwargs={"exit_on_error": False},
        )
    return Built(builder.trainer, builder.model, builder.datamodule)


def _instantiate_parts(config: dict[str, Any], resolved: Resolved) -> dict[str, Any]:
    """Each part starts from the seed, so that inputs that describe the same encoder get the same random weights."""
    from lightspan.evaluation.estimator import Estimator
    from lightspan.evaluation.features.input import Input
    from lightspan.merging.merger import Merger

    parts: dict[str, Any] = {}
    for key, kind in {"estimator": Estimator, "merger": Merger}.items():
        if key in config:
            parts[key] = _instantiate_part(key, kind, config[key], resolved)
    for name, value in (config.get("inputs") or {}).items():
        parts.setdefault("inputs", {})[name] = _instantiate_part(f"inputs.{name}", Input, value, resolved)
    return parts | {key: config[key] for key in ("checkpoints",) if key in config}


def _instantiate_part(key: str, kind: type, value: dict[str, Any], resolved: Resolved) -> Any:
    from jsonargparse import ArgumentParser
    from lightning.fabric.utilities.seed import seed_everything

    seed_everything(int(resolved.config.get("seed_everything", 0)), verbose=False)
    refused: list[tuple[type, Exception]] = []
    with _blamed(resolved, refused, f"{resolved.name} does not build"):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument(f"--{key}", type=kind)
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        parsed = parser.parse_object(nested)
        for message in allow.foreign(parsed, resolved.allow_modules):
            raise UserError(f"{resolved.name} does not build: {message}")
        parser.add_instantiator(_constructor(refused, {}), object, subclasses=True)
        return parser.instantiate_classes(parsed)[key]


def _constructor(refused: list[tuple[type, Exception]], instead: dict[type, type]) -> Callable[..., Any]:
    """How a parser makes objects: replaces some classes by others, and adds what a constructor raises to `refused`."""

    def construct(constructed: type, *arguments: Any, **settings: Any) -> Any:
        try:
            return instead.get(constructed, constructed)(*arguments, **settings)
        except Exception as error:
            refused.append((constructed, error))  # jsonargparse would bury it among the complaints of a union
            raise

    return construct


@contextlib.contextmanager
def _blamed(resolved: Resolved, refused: list[tuple[type, Exception]], complaint: str) -> Iterator[None]:
    """Turns what a typed builder raises into one UserError that names the key it comes from."""
    import argparse

    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except argparse.ArgumentError as error:
        said = f"{deepest_cause(str(error), resolved)}{own_line(error)}"
        raise UserError(f"{resolved.name} does not build: {said}") from error
    except Exception as error:
        kind = MissingFile if isinstance(first_user_error(error), MissingFile) else UserError
        if refused:
            raise kind(blame(*refused[0], resolved)) from error
        if message := duplicate_callbacks(error, resolved):
            raise UserError(f"{resolved.name} does not build: {message}") from error
        if isinstance(error, UserError) or not isinstance(error, ValueError | TypeError | MisconfigurationException):
            raise
        if (first := first_user_error(error)) is not None:  # from a function, which is called without `construct`
            raise kind(f"{resolved.name} does not build: {first}") from error
        raise UserError(f"{complaint}: {error}") from error


@contextlib.contextmanager
def _closed_imports(names: set[str]) -> Iterator[None]:
    """Lets jsonargparse import only these: a second lock behind the gate.

    It compares an imported object's own module and name with the list too, and builds no class if the type says
    nothing of a class.
    """
    from jsonargparse import _common, set_parsing_settings

    before = dict(_common.parsing_settings)  # the caller's own; there is no public way to restore a setting
    set_parsing_settings(
        import_path_denylist=["*"], import_path_allowlist=sorted(names), instantiate_subclass_spec_in_any=False
    )
    try:
        yield
    finally:
        _common.parsing_settings.update(before)
