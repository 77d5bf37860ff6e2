"""What every learned merge shares: a frozen network called at weights of its task vectors' span, the tasks' heads,
accuracies, and the result as coefficients, mask and plain checkpoint.

Shapes: B batch of this rank, K merged models, S shape of a tensor, C classes of a task.
"""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.func import functional_call

from lightspan.core.devices import wide_type
from lightspan.core.distributed import all_reduce_sums, rank, register_replicated
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import atomic_path, make_folder
from lightspan.core.files.places import RunPath
from lightspan.core.files.tensors import Form, write_tensors
from lightspan.core.ties import require_ties
from lightspan.merging.arithmetic import StoredCoefficients, StoredMask, TaskArithmetic
from lightspan.merging.merger import merge
from lightspan.merging.models import BASE, Held, Models
from lightspan.merging.span import TaskSpan, difference
from lightspan.objectives.entropy import prediction_entropy
from lightspan.training.method import Method

MERGED_FROM = "merged_from"  # of a training checkpoint: the sha256 of each model
COEFFICIENTS, MASK, MERGED = "coefficients.safetensors", "mask.safetensors", "merged.safetensors"


class NetworkSpan(nn.Module):
    """A network at theta_0, frozen and in evaluation mode, its task vectors, and calls at other weights of their span.

    Memory: K + 1 times the network. Buffers, such as running statistics, stay those of theta_0. The vectors are no part
    of a state dict: they are read again when the module is made.

    Args:
        network: gets theta_0.
        models: theta_0 and the theta_i.
        prefix: of the network's names in the checkpoints.
    Raises: UserError for checkpoints of another network, or NaN inside one.
    """

    def __init__(self, network: nn.Module, models: Models, prefix: str) -> None:
        super().__init__()
        self.network, self.prefix, self.tasks = network.requires_grad_(False), prefix, list(models.tasks)
        own = Held({prefix + name: tensor for name, tensor in network.state_dict().items()}, "the network")
        self.weights = models.open(own)
        for model, weights in self.weights.items():
            require_ties(network, lambda name, of=weights: of.read(prefix + name), f"the checkpoint {model}")  # type: ignore[misc]
        self._index: dict[str, int] = {}
        self._kept: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, tensor in network.state_dict().items():
                tensor.copy_(self.weights[BASE].read(prefix + name))
            for name, parameter in network.named_parameters():
                self._index[name] = len(self._index)
                base_S = self._read(BASE, name)
                vectors = [difference(self._read(task, name), base_S) for task in self.tasks]
                stacked = torch.stack(vectors).to(wide_type(parameter.dtype))
                if not stacked.isfinite().all():
                    raise UserError(
                        f"a model differs from the base by infinity in {prefix}{name}; merge checkpoints from before "
                        "the run diverged"
                    )
                register_replicated(self, f"vectors_{self._index[name]}", stacked, persistent=False)
        self.train(False)

    def train(self, mode: bool = True) -> "NetworkSpan":
        return super().train(False)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the tensors that are merged, by their names in the network."""
        return {name: self.network.get_parameter(name).shape for name in self._index}

    def vectors(self, name: str) -> Tensor:
        """tau_1 ... tau_K of a tensor, [K S]."""
        return getattr(self, f"vectors_{self._index[name]}")

    def keep(self, chosen: Mapping[str, Tensor]) -> None:
        """Lets go of all vectors of a tensor but the chosen ones, int64 [b]; once, and from then on K is b."""
        assert not self._kept, "vectors that are gone cannot be chosen from"
        for name, chosen_b in chosen.items():
            setattr(self, f"vectors_{self._index[name]}", self.vectors(name)[chosen_b])
        self._kept = {name: chosen_b.cpu() for name, chosen_b in chosen.items()}

    @property
    def is_narrowed(self) -> bool:
        """Whether `keep` was called."""
        return bool(self._kept)

    def of_all_tasks(self, name: str, c: Tensor) -> Tensor:
        """Coefficients of a tensor with 0 for what `keep` let go, on the CPU."""
        c = c.detach().cpu()
        if name not in self._kept:
            return c
        return c.new_zeros(len(self.tasks), *c.shape[1:]).index_copy(0, self._kept[name], c)

    def merged(self, coefficients: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """theta = theta_0 + m sum_i c_i tau_i by name; gradients reach coefficients and mask."""
        theta = {}
        for name, c in coefficients.items():
            change_S = TaskSpan(self.vectors(name)).push(c)  # type: ignore[arg-type]  # a tensor is a sequence of its rows
            base_S = self.network.get_parameter(name)
            theta[name] = (base_S + (change_S if mask is None else mask[name] * change_S)).to(base_S.dtype)
        return theta

    def by_stored_name(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by the checkpoints' names, under each of a parameter that has several."""
        first = {parameter: name for name, parameter in self.network.named_parameters()}
        every = self.network.named_parameters(remove_duplicate=False)
        return {self.prefix + name: tensors[first[parameter]].detach().cpu() for name, parameter in every}

    def forward(self, theta: Mapping[str, Tensor], *inputs: Any) -> Any:
        """What the network answers at theta."""
        return functional_call(self.network, dict(theta), inputs)

    def _read(self, task: str, name: str) -> Tensor:
        tensor = self.weights[task].read(self.prefix + name)
        if tensor.isnan().any():
            raise UserError(
                f"{self.prefix}{name} of the checkpoint {task} holds NaN; merge checkpoints from before the run "
                "diverged"
            )
        return tensor.double()


class LearnedMerging(Method):
    """A network whose weights are theta_0 + m sum_i c_i tau_i; a subclass says what c and m are, and its loss.

    It trains on `TasksBatch`, whose tasks are those of `heads`, in that order, and is validated on one loader a task,
    as `lightspan.datamodules.image.variants.tasks.TaskImages` has them: val/accuracy/TASK, and val/accuracy, their
    mean. Text or another modality takes a subclass that overrides `encoded`, and batches of the same form with its own
    fields [B K ...], beside `label` where labels are used and `index`.

    Args:
        backbone: [B C H W] -> features, as the checkpoints have it; all its parameters are merged.
        models: theta_0 and the theta_i.
        heads: features -> logits [B C], of each task that data are of, frozen as they are given: of the models, with
            `lightspan.backbones.weights.with_weights`, or others. CLIP's are `lightspan.nn.heads.cosine_head`.
        prefix: of the backbone's names in the checkpoints.
        out: folder for the result, such as `${run}/merged`, or None: coefficients.safetensors and mask.safetensors, as
            `StoredCoefficients` and `StoredMask` read them, and merged.safetensors, the backbone under its names.
        optimization: `optimizer`, `lr_scheduler` and `groups`, see `Method`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        models: Models,
        heads: dict[str, nn.Module],
        prefix: str = "backbone.",
        out: RunPath | None = None,
        **optimization: Any,
    ) -> None:
        super().__init__(**optimization)
        if not heads:
            raise UserError(f"{type(self).__name__} needs the head of at least one task; name it under heads")
        self.span = NetworkSpan(backbone, models, prefix)
        self.heads = nn.ModuleDict(heads).requires_grad_(False)
        self.out = out

    @abstractmethod
    def coefficients(self) -> dict[str, Tensor]:
        """c of each tensor by its name in the network, [K] or [K S]."""

    def mask(self) -> dict[str, Tensor] | None:
        """m of each tensor [S] as it is after training; None changes every entry."""
        return None

    def merged(self) -> dict[str, Tensor]:
        """theta by name, as it is after training."""
        return self.span.merged(self.coefficients(), self.mask())

    def encoded(self, theta: Mapping[str, Tensor], batch: Mapping[str, Any]) -> Tensor:
        """[B F], what the network answers at theta to a batch of one task, without the task's axis. The one method to
        override for another modality: here it is the network of `batch["image"]`.
        """
        return self.span(theta, batch["image"])

    def logits(self, theta: Mapping[str, Tensor], task: str, batch: Mapping[str, Any]) -> Tensor:
        """[B C] of one task's head at theta."""
        return self.heads[task](self.encoded(theta, batch))

    def task_logits(self, theta: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """[B C] of each task on its part of the batch: of each field [B K ...] the task's [B ...]; fields [B], such as
        the index, belong to all. Raises: UserError for a batch of another number of tasks.
        """
        for field, x in batch.items():
            if x.ndim > 1 and x.shape[1] != len(self.heads):
                raise UserError(
                    f"{field} {list(x.shape)} of the batch is not of the {len(self.heads)} tasks "
                    f"{', '.join(self.heads)}: [batch, tasks, ...]; name the same tasks under data"
                )
        return {
            task: self.logits(theta, task, {field: x[:, i] if x.ndim > 1 else x for field, x in batch.items()})
            for i, task in enumerate(self.heads)
        }

    def entropy(self, theta: Mapping[str, Tensor], batch: Mapping[str, Any]) -> Tensor:
        """The sum over tasks of the mean entropy of predictions, in nats: what is small where no label is known."""
        return torch.stack([prediction_entropy(logits) for logits in self.task_logits(theta, batch).values()]).sum()

    def features(self, batch: Mapping[str, Any]) -> Tensor:
        """[B F] of the merged backbone."""
        return self.encoded(self.merged(), batch)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.out is not None:
            make_folder(Path(self.out), "model.init_args.out")  # what cannot be written is said before a run

    def on_validation_epoch_start(self) -> None:
        zeros = torch.zeros(len(self.heads), device=self.device)
        self._right_K, self._seen_K, self._theta = zeros, zeros.clone(), self.merged()

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        task = list(self.heads)[dataloader_idx]
        logits_BC = self.logits(self._theta, task, batch)
        self._right_K[dataloader_idx] += (logits_BC.argmax(dim=1) == batch["label"]).sum()
        self._seen_K[dataloader_idx] += len(logits_BC)

    def on_validation_epoch_end(self) -> None:
        self._log_accuracies("val")

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        self._log_accuracies("test")

    def accuracies(self) -> dict[str, float]:
        """Shares of right answers in the pass over validation or test data that just ended, over all ranks."""
        right_K, seen_K = all_reduce_sums(self._right_K, self._seen_K)
        return dict(zip(self.heads, (right_K / seen_K.clamp_min(1)).tolist(), strict=True))

    def _log_accuracies(self, stage: str) -> None:
        found = self.accuracies()
        for task, value in found.items():
            self.log(f"{stage}/accuracy/{task}", value)
        self.log(f"{stage}/accuracy", sum(found.values()) / len(found), prog_bar=True)
        del self._theta

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[MERGED_FROM] = {name: weights.origin["sha256"] for name, weights in self.span.weights.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises: UserError where a model is not the one that the checkpoint's coefficients were learned for."""
        for name, digest in checkpoint.get(MERGED_FROM, {}).items():
            own = self.span.weights.get(name)
            if own is None or own.origin["sha256"] != digest:
                raise UserError(
                    f"the checkpoint was learned with another {name} than {own.origin['path'] if own else 'there is'} "
                    "(their sha256 differ); name the models that it was learned with, or start a new run"
                )

    def on_fit_end(self) -> None:
        if self.out is not None and rank() == 0:
            self.export(Path(self.out))

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Writes the result; see `out`. Buffers keep the base's numbers, as they had in training."""
        c, mask, base = self.coefficients(), self.mask(), self.span.weights[BASE]
        fractions = [n for n, f in base.forms.items() if f.dtype.is_floating_point or f.dtype.is_complex]
        none = {n: torch.zeros(len(self.span.tasks)) for n in fractions}
        every = {name: self.span.of_all_tasks(name, of_name) for name, of_name in c.items()}
        _write(folder / COEFFICIENTS, none | self.span.by_stored_name(every))
        if mask is not None:
            ones = {n: torch.ones(base.forms[n].shape) for n in fractions}
            _write(folder / MASK, ones | self.span.by_stored_name(mask))
        merger = TaskArithmetic(
            StoredCoefficients(str(folder / COEFFICIENTS), self.span.tasks),
            None if mask is None else StoredMask(str(folder / MASK)),
            BASE,
        )
        merge(merger, self.span.weights, folder / MERGED, {"method": type(self).__name__})

    def configure_model(self) -> None:
        if self._trainer is not None and isinstance(self._trainer.strategy, ModelParallelStrategy):
            raise UserError(
                f"{type(self).__name__} calls its network at weights that it computes, which a sharded one cannot be; "
                "train with trainer.strategy=ddp"
            )


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    forms = {name: Form(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        write_tensors(temporary, forms, tensors.items(), {"format": "pt"})
