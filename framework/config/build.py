"""Builds trainer, model and data from a checked configuration: the only module that uses jsonargparse.

Import it freely: torch, Lightning and jsonargparse are loaded by `build`, not by the import.
"""

import inspect
import logging
import re
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightspan.config.allow import SAFE_PREFIXES
from lightspan.config.resolve import (
    RESOLVED_FILE,
    Resolved,
    load_resolved,
    resolve,
    with_layer,
    with_lists,
    with_run_folder,
)
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


_PARSER_KEY = re.compile(r'^(?:error: )?(?:Parser key|Validation failed: Key) "([^"]+)":?\s*(.*)$')
_STRUCTURE = (  # lines of a jsonargparse message that say nothing about the mistake
    "Does not validate against any",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Problem with given class_path",
    "Subclass types expect",
    "Expected a <class 'NoneType'>",
    "a class path (str)",
    "a dict with",
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
    folder = run_dir if run_dir is not None else Path(tempfile.gettempdir()) / "lightspan-unwritten"
    config = with_run_folder(with_lists(resolved.config), folder)
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
    _close_imports(resolved.allow_modules)
    refused: list[tuple[type, Exception]] = []

    def construct(constructed: type, *arguments: Any, **settings: Any) -> Any:
        try:
            # However a recipe writes DDP, a resumed run has to sum as the straight one did.
            return (DDP if constructed is DDPStrategy else constructed)(*arguments, **settings)
        except (ValueError, TypeError, MisconfigurationException, OSError, ImportError) as error:
            refused.append((constructed, error))  # jsonargparse would bury it in the complaints of a union
            raise

    class Builder(LightningCLI):
        """LightningCLI on one dict: no command line, no environment, no configuration file of its own."""

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            self.config = parser.parse_object(args)

        def before_instantiate_classes(self) -> None:
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
            constructed, first = refused[0]
            name = f"{constructed.__module__}.{constructed.__qualname__}"
            raise UserError(str(first) if isinstance(first, UserError) else f"{name}: {first}") from error
        if isinstance(error, UserError) or not isinstance(error, ValueError | TypeError | MisconfigurationException):
            raise
        raise UserError(f"the Trainer refuses its settings: {error}") from error
    return Built(builder.trainer, builder.model, builder.datamodule)


def _close_imports(modules: Sequence[str]) -> None:
    """Has jsonargparse itself refuse what is outside the allowed libraries: a second lock behind the check of the tree.

    Releases that cannot do so have the first lock alone.
    """
    from jsonargparse import set_parsing_settings

    if "import_path_denylist" in inspect.signature(set_parsing_settings).parameters:
        tops = {prefix.split(".")[0] for prefix in (*SAFE_PREFIXES, *modules)}
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=sorted(tops))


def deepest_cause(text: str, resolved: Resolved) -> str:
    """The complaint of a jsonargparse message about the innermost key, with the place that key was written.

    The messages nest: a union lists the complaints of all its members, each under the key of the level above.
    """
    keys: list[tuple[int, str]] = []
    best = ((-1, False), "", text.strip())
    for line in text.splitlines():
        content = line.strip().removeprefix("- ")
        indent = len(line) - len(line.lstrip(" "))
        while keys and keys[-1][0] >= indent:
            keys.pop()
        match = _PARSER_KEY.match(content)
        if match:
            keys.append((indent, match[1]))
            content = match[2]
        rank = (len(keys), not content.startswith("Not a valid subclass"))
        if content and not content.startswith(_STRUCTURE) and rank > best[0]:
            best = (rank, ".init_args.".join(key for _, key in keys), content)
    _, key, complaint = best
    where = next((place for path, place in resolved.sources.items() if path == key or path.startswith(key + ".")), "")
    return " ".join(part for part in (where, f"{key}:" if key else "", complaint) if part)
