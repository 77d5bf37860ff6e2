"""Checkpoints of sharded models: a folder that all ranks write together, and that any number of ranks reads.

The folder is torch's distributed form (DCP) as Lightning writes it: `__RANK_N.distcp` with the shards of weights and
optimiser states, `.metadata` with the place of each shard, `meta.pt` with everything else, and our COMPLETE.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import explained_os_errors, replace_folder, require_regular_file, temporary_path
from lightspan.training.checkpoints.background import Background, staged
from lightspan.training.checkpoints.bytes import HashingWriter, causes_kept, torch_save
from lightspan.training.checkpoints.content import content_fault
from lightspan.training.checkpoints.manifest import header, packed_fault, seal_folder, summed
from lightspan.training.checkpoints.readable import readable
from lightspan.training.checkpoints.shards import (
    SafePlanner,
    SafeReader,
    explained_reading,
    read_parts,
    stored_weights,
)

REST = "meta.pt"  # Lightning's name for everything except weights and optimiser states


class FolderCheckpoints:
    """Saves and loads for a ModelParallelStrategy instead of its own two functions, which bypass every CheckpointIO.

    Those write straight into the final folder, and read with an unpickler that runs any code.

    Args:
        background: writes there and returns once the shards are copied to CPU memory.
        check: called with a checkpoint whose weights are only shapes and dtypes, before anything is loaded;
            raises if it does not fit.
        refuse: raises a UserError for a path that is not whole; called only on the first rank.
        outline: reads a checkpoint file with its tensors left on disk; called only on the first rank.
    """

    def __init__(
        self,
        strategy: ModelParallelStrategy,
        background: Background | None,
        check: Callable[[dict[str, Any], Path], None],
        refuse: Callable[[Path], None],
        outline: Callable[[Path], dict[str, Any]],
    ) -> None:
        self._strategy, self._background = strategy, background
        self._check, self._refuse, self._outline = check, refuse, outline
        self._group: dist.ProcessGroup | None = None

    def save(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Raises: UserError for what could not be read back, and on every rank if one of them cannot write; what
        was at `filepath` is then unchanged.
        """
        if storage_options is not None:
            raise UserError(
                f"storage_options={storage_options!r}: checkpoints go to local files, which have none; omit it"
            )
        if self._group is None:
            # A separate group: a background save communicates during training. gloo, since file names need no GPU.
            self._group = dist.new_group(backend="gloo")
        path = Path(self._strategy.broadcast(filepath))
        shards = {"state_dict": checkpoint.pop("state_dict")}
        shards |= {f"optimizer_{i}": state for i, state in enumerate(checkpoint.pop("optimizer_states", []))}
        checkpoint = readable(checkpoint)
        if self._background is None:
            write_folder(shards, checkpoint, path, self._group)
        else:
            copy = staged({"shards": shards, "rest": checkpoint})
            self._background.submit(path, partial(write_folder, copy["shards"], copy["rest"], path, self._group))

    def load(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Fills the model and the optimisers of the strategy, on any number of ranks; returns the rest.

        Raises: UserError on every rank if the checkpoint is torn or belongs to another model.
        """
        strategy = self._strategy
        path = Path(strategy.broadcast(checkpoint_path))
        verdict = None
        if strategy.global_rank == 0:  # everything is read here, once, and not by every rank
            verdict = error_message(partial(self._look_at, path))
        if verdict := strategy.broadcast(verdict):
            raise UserError(verdict)
        if path.is_file():
            return type(strategy).load_checkpoint(strategy, path, weights_only=True)
        module, lightning_module = strategy.model, strategy.lightning_module
        assert module is not None
        assert lightning_module is not None
        reader = SafeReader(path)
        outline = read_outline(path)
        self._check(outline, path)
        rest = {name: entry for name, entry in outline.items() if name != "state_dict"}
        with explained_reading(path):
            weights = {"state_dict": get_model_state_dict(module)}
            dcp.load(weights, storage_reader=reader, planner=SafePlanner())
            module.load_state_dict(weights["state_dict"], strict=lightning_module.strict_loading)
            for i, optimizer in enumerate(strategy.optimizers):
                state = {f"optimizer_{i}": get_optimizer_state_dict(module, optimizer)}
                dcp.load(state, storage_reader=reader, planner=SafePlanner())
                set_optimizer_state_dict(
                    module, optimizer, state[f"optimizer_{i}"], options=StateDictOptions(cpu_offload=True)
                )
        return rest

    def _look_at(self, path: Path) -> None:
        self._refuse(path)
        if path.is_file():  # Lightning reads it, and trusts it
            self._check(self._outline(path), path)

    def close(self) -> None:
        """Ends the group of ranks that saves used."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None


def write_folder(
    shards: dict[str, Any], rest: dict[str, Any], path: Path, group: dist.ProcessGroup | None = None
) -> None:
    """Writes a checkpoint folder, all ranks of `group` together: each its shards, the first one the rest and the
    manifest.

    Raises: UserError, the same on every rank.
    """
    rank = dist.get_rank(group)
    temporary = temporary_path(path, "ranks")  # the same on every rank
    try:
        with explained_os_errors(path):
            temporary.mkdir(parents=True, exist_ok=True)
            dcp.save(shards, storage_writer=_Writer(temporary), process_group=group)
    except CheckpointException as failed:
        where, (cause, _) = next(iter(failed.failures.items()))
        with explained_os_errors(path):
            if isinstance(cause, OSError) or not isinstance(cause, Exception):
                raise cause from None
        raise UserError(f"cannot write {path}: rank {where}: {cause!r}") from failed
    sums: list[Any] = [None] * dist.get_world_size(group)
    mine = [file.name for file in temporary.glob(f"__{rank}_*")]
    dist.all_gather_object(sums, summed(temporary, mine), group)
    verdict = [error_message(partial(_publish, rest, temporary, path, sums)) if rank == 0 else None]
    dist.broadcast_object_list(verdict, 0, group)
    if verdict[0]:
        raise UserError(verdict[0])


def _publish(rest: dict[str, Any], temporary: Path, path: Path, sums: list[dict[str, Any]]) -> None:
    with explained_os_errors(path):
        with (temporary / REST).open("wb") as file:
            torch_save(rest, file)
        known = {name: entry for of_rank in sums for name, entry in of_rank.items()}
        seal_folder(temporary, {**header(rest), "ranks": len(sums)}, known)
        replace_folder(temporary, path)


def read_rest(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint folder except weights and optimiser states. Raises: UserError."""
    require_regular_file(path / REST)
    with explained_reading(path):
        with (path / REST).open("rb") as file:
            if packed := packed_fault(file):
                raise UserError(f"checkpoint {path} cannot be used: {REST} {packed}")
        rest = torch.load(path / REST, map_location="cpu", weights_only=True)
    if not isinstance(rest, dict):
        raise UserError(f"checkpoint {path} is not a checkpoint: {REST} contains {type(rest).__name__}")
    return rest


def read_outline(path: Path) -> dict[str, Any]:
    """A checkpoint folder without optimiser states, its weights only as shapes and dtypes.

    Raises: UserError, also for content that no checkpoint has.
    """
    outline = {**read_rest(path), "state_dict": stored_weights(SafeReader(path))}
    if found := content_fault(outline):
        raise UserError(f"checkpoint {path} {found}")
    return outline


def read_folder(path: Path, optimizers: bool = True) -> dict[str, Any]:
    """A checkpoint folder as one checkpoint in CPU memory, with whole tensors; works without a process group.

    Optimiser states are numbered as in `Optimizer.state_dict`. Raises: UserError.
    """

    def wanted(name: str) -> bool:
        return name.startswith("state_dict.") or (optimizers and name.startswith("optimizer_"))

    content = read_parts(SafeReader(path), wanted)
    checkpoint = {**read_rest(path), "state_dict": content.pop("state_dict", {})}
    if optimizers:
        with explained_reading(path):
            checkpoint["optimizer_states"] = [_numbered(content[f"optimizer_{i}"]) for i in range(len(content))]
    return checkpoint


def _numbered(state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state by the numbers of its parameters; DCP keeps it by their names."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    number = {name: i for i, name in enumerate(names)}
    return {
        "state": {number[name]: entries for name, entries in state.get("state", {}).items()},
        "param_groups": [
            {**group, "params": [number[name] for name in group["params"]]} for group in state["param_groups"]
        ],
    }


class _Files(filesystem.FileSystem):
    """Files whose failed writes keep their cause, which torch's zip writer would replace."""

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as file:
            stream = HashingWriter(file)
            with causes_kept(stream):
                yield stream


class _Writer(dcp.FileSystemWriter):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.fs = _Files()


def error_message(function: Callable[[], object]) -> str | None:
    """The message of what `function` raises, to be raised again on every rank as a UserError; None without one."""
    try:
        function()
    except Exception as error:  # of any kind: the other ranks wait for an answer
        return str(error) or type(error).__name__
    return None
