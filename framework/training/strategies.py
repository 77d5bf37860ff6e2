"""Strategies for any LightningModule: DDP that sums equally in every process, and FSDP2 with hybrid sharding.

Under the strategy `FSDP2`, `shard(module)` splits a module block by block, then the rest of it. Under every other
strategy it does nothing, so a module calls it in `configure_model` whatever its strategy; `Method` does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    StrategyRegistry,
)
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from lightspan.core.blocks import blocks, compile_in_place, innermost_blocks, recompute_activations
from lightspan.core.devices import widest_float
from lightspan.core.distributed import broadcast_first_rank, replicated_buffers
from lightspan.core.errors import UserError
from lightspan.optim.groups import declared_kinds
from lightspan.optim.matrices.shapes import is_wide

FORWARD_METHODS = (
    *("training_step", "validation_step", "test_step", "predict_step"),
    *("features", "embeddings", "assignments"),
)
"""What is called on a LightningModule from outside instead of `forward`."""


class FixedBuckets(DistributedDataParallel):
    """DistributedDataParallel whose buckets are the same in the first step of a process and in all later ones.

    The place of a gradient in its bucket decides in which order three or more ranks are summed. torch starts with one
    bucket in the order of registration, and forms others after the first step, in the order in which gradients arrived:
    a resumed process would take its first step with other last bits than an uninterrupted process. Here the
    buckets are formed once, when the module is wrapped, from the parameters in reverse order of registration. That is
    about the order in which gradients arrive, so buckets are still sent during the backward pass.

    Before each forward pass torch sends all buffers from rank 0: a queue, a memory of the data. Here those that are
    equal on all ranks anyway (`lightspan.core.distributed.register_replicated`) are sent once, when the module is
    wrapped.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        # Instead of the gradients of a first step. With find_unused_parameters torch never forms new buckets.
        self.reducer._push_all_rebuilt_params()
        self.reducer._rebuild_buckets()

    def _build_params_for_reducer(self) -> tuple[list[nn.Parameter], list[bool]]:
        parameters, sparse = super()._build_params_for_reducer()
        # torch itself reverses the buckets that are formed at the start and kept.
        return (parameters, sparse) if self.find_unused_parameters else (parameters[::-1], sparse[::-1])

    def _assign_modules_buffers(self) -> None:
        super()._assign_modules_buffers()
        equal = replicated_buffers(self.module)
        self.named_module_buffers = {n: buffer for n, buffer in self.named_module_buffers.items() if n not in equal}
        self.modules_buffers = list(self.named_module_buffers.values())


class ExactMeans:
    """For strategies: means over ranks of whole numbers, which Lightning rounds down.

    It divides a logged sum by the mean number of samples per rank. On two ranks with 5 and 4 samples that would be 4,
    and every validation figure 9/8 of its value.
    """

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if isinstance(tensor, Tensor) and not tensor.is_floating_point() and reduce_op in ("mean", "avg"):
            tensor = tensor.to(widest_float(tensor.device))  # float32 counts up to 2^24
        return super().reduce(tensor, group, reduce_op)  # type: ignore[misc]


class DDP(ExactMeans, DDPStrategy):
    """Lightning's DDPStrategy, with its arguments, around `FixedBuckets`: a run that is resumed on the same number of
    ranks, three or more included, takes the same steps bit for bit.
    """

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        device_ids = self.determine_ddp_device_ids()
        # A separate stream, as in the method that this one replaces: torch requires it if steps are captured.
        with nullcontext() if device_ids is None else torch.cuda.stream(torch.cuda.Stream()):
            return FixedBuckets(model, device_ids=device_ids, **self._ddp_kwargs)


def register_ddp() -> None:
    """Makes the names of Lightning's DDPStrategy, such as "ddp", mean `DDP`."""
    for entry in StrategyRegistry.values():
        if entry["strategy"] is DDPStrategy:
            entry["strategy"] = DDP


class FSDP2(ExactMeans, ModelParallelStrategy):
    """Fully sharded data parallelism: weights, gradients and optimiser state are divided among the ranks.

    Every rank works on its own samples, as with DDP. A block's weights are gathered before it runs and released after
    it. Unlike Lightning's class, whose defaults split a model only over the nodes, it uses all ranks.

    Args:
        replicas: copies of the model, >= 1, each split over (ranks / replicas) neighbouring ranks: hybrid sharding
            (HSDP), where weights are sent only within a copy and gradients between copies once per step. "nodes" keeps
            one copy on each node.
        activation_checkpointing: whether activations inside a block are recomputed in the backward pass instead of
            kept.
        compile: whether blocks are compiled by torch.compile.
        save_distributed_checkpoint: whether a checkpoint is a folder to which every rank writes its part; otherwise
            rank 0 gathers everything and writes one file.
        process_group_backend: as in ModelParallelStrategy.
    Raises: UserError when training starts, if `replicas` does not divide the number of ranks, or for a module that
        never calls `shard`.
    """

    def __init__(
        self,
        replicas: int | Literal["nodes"] = 1,
        activation_checkpointing: bool = False,
        compile: bool = False,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint, process_group_backend=process_group_backend
        )
        if replicas != "nodes" and replicas < 1:
            raise UserError(f"FSDP2 replicas={replicas} must be at least 1, or 'nodes' for one on each node")
        self.replicas = replicas
        self.activation_checkpointing = activation_checkpointing
        self.compile = compile
        self.mesh: DeviceMesh | None = None

    def setup_environment(self) -> None:
        ranks = self.num_nodes * self.num_processes
        replicas = self.num_nodes if self.replicas == "nodes" else self.replicas
        if ranks % replicas:
            divisors = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
            raise UserError(
                f"FSDP2 replicas={replicas} does not divide the {ranks} ranks ({self.num_nodes} nodes of "
                f"{self.num_processes}); choose one of {divisors}"
            )
        self._data_parallel_size, self._tensor_parallel_size = ranks, 1
        super().setup_environment()
        if replicas == 1:
            self.mesh = self.device_mesh["data_parallel"]
        else:
            sizes, names = (replicas, ranks // replicas), ("replica", "shard")
            self.mesh = init_device_mesh(self.root_device.type, sizes, mesh_dim_names=names)

    def setup(self, trainer: Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        if not is_overridden("configure_model", module) or not isinstance(module, FSDPModule):
            raise UserError(
                f"{type(module).__name__} was not sharded: let its configure_model(self) call "
                "lightspan.training.strategies.shard(self), or train with trainer.strategy=ddp"
            )
        super().setup(trainer)

    def shard(self, module: LightningModule) -> None:
        """Splits a module over `mesh`; does nothing to one that is already split."""
        if isinstance(module, FSDPModule):
            return
        assert self.mesh is not None
        for block in innermost_blocks(module):
            if self.activation_checkpointing:
                recompute_activations(block)
            if self.compile:
                compile_in_place(block)
        shard_blocks(module, self.mesh)
        for name in FORWARD_METHODS:
            if hasattr(module, name):
                register_fsdp_forward_method(module, name)


def require_whole(module: LightningModule, why: str) -> None:
    """Raises: UserError under a strategy that splits parameters. For a method that writes within whole ones.

    Args:
        why: what the method does, such as "moves coordinates within whole parameters".
    """
    strategy = module._trainer.strategy if module._trainer is not None else None
    if isinstance(strategy, ModelParallelStrategy | FSDPStrategy | DeepSpeedStrategy):
        raise UserError(
            f"{type(module).__name__} {why}, which {type(strategy).__name__} splits; train with --config scale/ddp"
        )


def shard(module: LightningModule) -> None:
    """For `configure_model`: splits the module if it has a Trainer whose strategy is `FSDP2`."""
    if module._trainer is not None and isinstance(strategy := module._trainer.strategy, FSDP2):
        strategy.shard(module)


def shard_blocks(module: nn.Module, mesh: DeviceMesh) -> None:
    """Splits the blocks of a module, then the module, over a mesh [shards] or [replicas, shards].

    All ranks start from rank 0's weights and buffers. Matrices with fewer rows than columns are split along their
    columns if these divide evenly, all others along their rows: that is the longer side, which a low-rank optimiser
    steps row by row. Frames, as modules declare them in `parameter_kinds`, are split along their first axis: each stays
    whole, since its columns are orthonormal together.
    """
    for part in (*blocks(module), module):
        tensors = [t for t in (*part.parameters(), *part.buffers()) if not isinstance(t, DTensor) and not t.is_meta]
        for tensor in tensors:
            tensor.data = tensor.data.to(_device(mesh))
        broadcast_first_rank(tensors)
        fully_shard(part, mesh=mesh, shard_placement_fn=_placements(part, mesh.size(mesh.ndim - 1)))


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, parts of a sharded module can be called by themselves, without a step of the whole module. All
    ranks must enter and call the same; does nothing to a module that is not sharded.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def _placements(part: nn.Module, ranks: int) -> Callable[[nn.Parameter], Shard | None]:
    kinds = declared_kinds(part)

    def placement(parameter: Tensor) -> Shard | None:
        # FSDP2 can split an axis other than the first only evenly.
        wide = parameter.ndim > 1 and is_wide(parameter) and parameter.shape[1] % ranks == 0
        return Shard(1) if wide and kinds.get(id(parameter)) != "frames" else None

    return placement


def _device(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)
