"""What mergers that weigh models by data need of each: the diagonal of its Fisher matrix, and Grams of layers' inputs.

The result's tensors are named as the network's parameters, and `lightspan run` writes them as result.safetensors, which
`lightspan.merging.fisher.FisherAverage` and `lightspan.merging.regmean.RegMean` read.

Shapes: B samples of a batch, C classes, O I outputs and inputs of a linear layer.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lightspan.core.distributed import all_reduce_sums
from lightspan.core.errors import UserError
from lightspan.core.results import Figure, Result
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.features.input import Input
from lightspan.evaluation.features.store import FeatureStore


@dataclass(frozen=True)
class NetworkOnData:
    """A network that answers one field of a batch with logits [B C], and what gives the batches."""

    network: nn.Module
    batches: Any
    field: str
    device: torch.device

    @contextlib.contextmanager
    def at_work(self) -> Iterator[Iterator[Tensor]]:
        """The inputs, batch by batch, with the network in evaluation mode; its modes come back afterwards."""
        modes = [(part, part.training) for part in self.network.modules()]
        self.network.to(self.device).eval()
        try:
            yield (self._inputs(batch).to(self.device) for batch in self.batches)
        finally:
            for part, training in modes:
                part.training = training

    def _inputs(self, batch: Any) -> Tensor:
        if self.field not in batch:
            raise UserError(f"a batch of these data has {', '.join(batch)}, and no {self.field!r}; set field to one")
        return batch[self.field]


class NetworkAndData(Input):
    """Args:
    network: its weights as they are to be looked at, see `lightspan.backbones.weights.with_weights`.
    data: the network's own.
    split: "bank" (training samples without augmentation), "val" or "test".
    field: of the batch.
    """

    def __init__(
        self,
        network: nn.Module,
        data: LightningDataModule,
        split: Literal["bank", "val", "test"] = "bank",
        field: str = "image",
    ) -> None:
        self.network, self.data, self.split, self.field = network, data, split, field

    def load(self, store: FeatureStore) -> NetworkOnData:
        """Raises: UserError for data without that split."""
        if (make := getattr(self.data, f"{self.split}_dataloader", None)) is None:
            raise UserError(f"{type(self.data).__name__} has no {self.split}_dataloader(); choose another split")
        self.data.prepare_data()
        self.data.setup("test" if self.split == "test" else "fit")
        return NetworkOnData(self.network, make(), self.field, store.device)


@dataclass(frozen=True)
class MergingStatistics(Result):
    """How many samples were looked at, and of how many tensors there are numbers."""

    samples: int
    named: int

    def figures(self) -> tuple[Figure, ...]:
        return (Figure("samples", self.samples), Figure("tensors", self.named))


class DiagonalFisher(Estimator):
    """The diagonal of the Fisher information of each parameter, the mean over samples of
    E_{y ~ p(y|x)} (d log p(y|x) / d theta)^2, the expectation over all classes (arXiv 2111.09832, its section 2).

    Args:
        most: samples that are looked at on each rank; the work grows with samples times classes.
        prefix: put before the parameters' names, as the checkpoints have it.
    """

    def __init__(self, most: int = 1024, prefix: str = "") -> None:
        if most < 1:
            raise UserError(f"DiagonalFisher most={most} must be at least 1")
        self.most, self.prefix = most, prefix

    def fit(self, network: NetworkOnData) -> MergingStatistics:
        """Raises: UserError for a network that gives no logits [B C], or data without a sample."""
        model = network.network

        def log_p(theta: dict[str, Tensor], state: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
            logits_C = functional_call(model, {**theta, **state}, (x[None],))[0]
            return logits_C.log_softmax(dim=0).gather(0, label[None])[0]

        per_sample = vmap(grad(log_p), in_dims=(None, None, 0, None))
        seen = 0
        with network.at_work() as inputs:
            # Taken here and not before: a network that moves to another device gets other tensors.
            parameters = {name: p.detach() for name, p in model.named_parameters() if p.is_floating_point()}
            state = {name: b.detach() for name, b in model.named_buffers()}
            sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
            for x in inputs:
                x = x[: self.most - seen]
                if not len(x):
                    break
                with torch.no_grad():
                    logits = model(x)
                if logits.ndim != 2:
                    raise UserError(f"DiagonalFisher needs logits [samples, classes], and got {list(logits.shape)}")
                p_BC = logits.double().softmax(dim=1)
                for label in range(p_BC.shape[1]):
                    gradients = per_sample(parameters, state, x, torch.tensor(label, device=x.device))
                    for name, gradient in gradients.items():
                        weight = p_BC[:, label].view(-1, *[1] * (gradient.ndim - 1))
                        sums[name] += (weight * gradient.double().square()).sum(dim=0)
                seen += len(x)
        count, totals = _over_ranks("DiagonalFisher", seen, sums)
        return _statistics(count, {name: (total / count).float() for name, total in totals.items()}, self.prefix)


class InputGrams(Estimator):
    """G = X' X of the inputs of each linear layer, over all samples and positions (arXiv 2212.09849), in float64: to
    RegMean, rounding to float32 would look like inputs in directions that have none.

    Args:
        most: samples that are looked at on each rank.
        prefix: put before the weights' names, as the checkpoints have it.
    """

    def __init__(self, most: int = 1024, prefix: str = "") -> None:
        if most < 1:
            raise UserError(f"InputGrams most={most} must be at least 1")
        self.most, self.prefix = most, prefix

    @torch.no_grad()
    def fit(self, network: NetworkOnData) -> MergingStatistics:
        """Raises: UserError for a network without a linear layer, or data without a sample."""
        layers = {name: part for name, part in network.network.named_modules() if isinstance(part, nn.Linear)}
        if not layers:
            raise UserError(f"InputGrams: {type(network.network).__name__} has no nn.Linear")
        # A weight that layers share has one G, of all their inputs, under the name that it has first.
        first = {id(parameter): name for name, parameter in network.network.named_parameters()}
        sums: dict[str, Tensor] = {}
        seen, handles = 0, []
        for name, layer in layers.items():
            key, width = first.get(id(layer.weight), f"{name}.weight".removeprefix(".")), layer.in_features
            sums.setdefault(key, torch.zeros(width, width, dtype=torch.float64, device=network.device))

            def add(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], key: str = key) -> None:
                x = torch.atleast_2d(arguments[0] if arguments else named["input"]).double().flatten(end_dim=-2)
                sums[key] += x.mT @ x

            handles.append(layer.register_forward_pre_hook(add, with_kwargs=True))
        try:
            with network.at_work() as inputs:
                for x in inputs:
                    x = x[: self.most - seen]
                    if not len(x):
                        break
                    network.network(x)
                    seen += len(x)
        finally:
            for handle in handles:
                handle.remove()
        count, totals = _over_ranks("InputGrams", seen, sums)
        return _statistics(count, totals, self.prefix)


def _over_ranks(estimator: str, seen: int, sums: dict[str, Tensor]) -> tuple[int, dict[str, Tensor]]:
    """Samples and sums of all ranks, on the CPU, where ranks of `lightspan run` exchange what they have."""
    here = [total.cpu() for total in sums.values()]
    count, *totals = all_reduce_sums(torch.tensor(float(seen), dtype=torch.float64), *here)
    if not count:
        raise UserError(f"{estimator} got no sample; give it a split that has some")
    return int(count), dict(zip(sums, totals, strict=True))


def _statistics(samples: int, found: dict[str, Tensor], prefix: str) -> MergingStatistics:
    tensors = {prefix + name: tensor for name, tensor in found.items()}
    if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(f"the statistics of {wrong[0]} are not finite; look at the weights and the data")
    return MergingStatistics(samples, len(tensors), tensors=tensors)
