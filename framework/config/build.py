"""Builds trainer, model and data from a checked configuration: the only module that uses jsonargparse.

Import it freely: torch, Lightning and jsonargparse are loaded by `build`, not by the import.
"""

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightspan.config import allow
from lightspan.config.blame import blame, deepest_cause, first_cause
from lightspan.config.resolve import (
    RESOLVED_FILE,
    Resolved,
    load_resolved,
    refuse,
    resolve,
    with_layer,
    with_lists,
    with_run_folder,
)
from lightspan.config.tree import wrap
from lightspan.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

__all__ = ["RESOLVED_FILE", "Built", "Resolved", "build", "load_resolved", "resolve", "with_layer"]

# What Lightning says on every start, whatever the run: adverts, and hardware that the run summary records.
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
    r".*The dirpath has changed from .*",  # a checkpoint was taken along into another run folder
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*GPU available but not used.*",
    r".*The `srun` command is available on your system but is not used.*",
    r"[\s\S]*JsonargparseDeprecationWarning",
    r"[\s\S]*was deprecated in v4[\s\S]*removed in v5",  # jsonargparse: LightningCLI still calls what it deprecates
    r".*You are using `torch.load` with `weights_only=.*",
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
        run_dir: fills in `${run}`. None is for looking only: paths then point to a folder that is never made.
    Raises: UserError for whatever the configuration's author can mend.
    """
    calm()
    # Asked again, for a Resolved need not come from `resolve`.
    refuse(allow.gate(wrap(resolved.config, resolved.name), resolved.allow_modules), resolved.name)
    folder = run_dir if run_dir is not None else Path(tempfile.gettempdir()) / "lightspan-unwritten"
    config = with_run_folder(with_lists(resolved.config), folder)
    with _closed_imports(allow.importable(wrap(config, ""), resolved.allow_modules)):
        return _instantiate(config, resolved)


def calm() -> None:
    """Silences adverts and warnings that no user of a recipe can act on; everything else is still said."""
    for name in _CHATTER:
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in _HARMLESS:
        warnings.filterwarnings("ignore", message=pattern)


def _instantiate(config: dict[str, Any], resolved: Resolved) -> Built:
    import argparse

    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.strategies import DDPStrategy

    from lightspan.strategies import DDP, register_ddp

    register_ddp()
    refused: list[tuple[type, Exception]] = []

    def construct(constructed: type, *arguments: Any, **settings: Any) -> Any:
        try:
            # However a recipe writes DDP, a resumed run has to sum as the straight one did.
            return (DDP if constructed is DDPStrategy else constructed)(*arguments, **settings)
        except Exception as error:
            refused.append((constructed, error))  # jsonargparse would bury it in the complaints of a union
            raise

    class Builder(LightningCLI):
        """LightningCLI on one dict: no command line, no environment, no configuration file of its own."""

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            self.config = parser.parse_object(args)

        def before_instantiate_classes(self) -> None:
            for message in allow.foreign(self.config, resolved.allow_modules):
                raise UserError(f"{resolved.name} does not build: {message}")
            self.parser.add_instantiator(construct, object, subclasses=True)

    try:
        builder = Builder(
            args=config,
            run=False,
            auto_configure_optimizers=False,
            save_config_callback=None,
            load_from_checkpoint_support=False,  # it would put class paths into checkpoints
            seed_everything_default=False,
            parser_kwargs={"exit_on_error": False},
        )
    except argparse.ArgumentError as error:
        raise UserError(f"{resolved.name} does not build: {deepest_cause(str(error), resolved)}") from error
    except Exception as error:
        if refused:
            raise UserError(blame(*refused[0], resolved)) from error
        if isinstance(error, UserError) or not isinstance(error, ValueError | TypeError | MisconfigurationException):
            raise
        if isinstance(first := first_cause(error), UserError):  # of a function, which is called without `construct`
            raise UserError(f"{resolved.name} does not build: {first}") from error
        raise UserError(f"the Trainer refuses its settings: {error}") from error
    return Built(builder.trainer, builder.model, builder.datamodule)


@contextlib.contextmanager
def _closed_imports(names: set[str]) -> Iterator[None]:
    """Has jsonargparse import these alone: a second lock behind the gate.

    It compares an imported object's own module and name with the list too, and builds no class where the type says
    nothing of one.
    """
    from jsonargparse import _common, set_parsing_settings

    before = dict(_common.parsing_settings)  # a caller's own; there is no public way back from a setting
    set_parsing_settings(
        import_path_denylist=["*"], import_path_allowlist=sorted(names), instantiate_subclass_spec_in_any=False
    )
    try:
        yield
    finally:
        _common.parsing_settings.update(before)
