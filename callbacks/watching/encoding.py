"""Features and labels of the bank and of validation samples, as a model makes them while it trains.

Shapes: B samples of a batch, N samples of all ranks, T tokens, D features.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightspan.callbacks.watching.detached import features_of, of_all_ranks
from lightspan.core.errors import UserError
from lightspan.evaluation.features.features import Features
from lightspan.nn.tokens import Tokens

Read = tuple[int | None, bool]
"""(layer, or None for what `features` gives; whether its tokens)."""


@dataclass(frozen=True)
class Columns:
    """Of one split: columns [N ...] in the order of the samples' index, fields of the batches [N ...] by name, and the
    grid of each layer's tokens.
    """

    columns: dict[Read, Tensor]
    fields: dict[str, Tensor]
    grids: dict[int | None, tuple[int, ...] | None]

    @property
    def layers(self) -> list[int | None]:
        return list(dict.fromkeys(layer for layer, _ in self.columns))

    def of(self, layer: int | None, tokens: bool = False) -> Features:
        """[N D], or with tokens [N T D]; the field "label" is the labels."""
        fields = {name: field for name, field in self.fields.items() if name != "label"}
        return Features(
            self.columns[layer, tokens],
            self.fields.get("label"),
            grid=self.grids.get(layer) if tokens else None,
            fields=fields,
        )


class Encoding:
    """Reads features of each sample of `bank_dataloader()` or `val_dataloader()` of the datamodule.

    Args:
        layers: as in `OnlineProbes`; None reads `features`.
        tokens: also the tokens, prefix tokens before the others: of each layer, or without layers of the last one.
        samples: of each split, at most so many, evenly spaced; None takes all.
        fields: of the batches, by split.
    """

    def __init__(
        self,
        layers: list[int] | None,
        tokens: bool,
        samples: Mapping[str, int | None],
        fields: Mapping[str, Sequence[str]],
    ) -> None:
        self.layers, self.tokens, self.samples, self.fields = layers, tokens, samples, fields

    def require(self, trainer: Trainer, module: LightningModule) -> None:
        """Raises: UserError for a module or datamodule without what is read."""
        needed = ["features"] if self.layers is None else []
        for name in [*needed, *(["token_features"] if self.layers is not None or self.tokens else [])]:
            if not callable(getattr(module, name, None)):
                what = "returns float [B, D]" if name == "features" else "returns lightspan.nn.tokens.Tokens by layer"
                raise UserError(
                    f"{type(module).__name__} has no {name}(batch), which OnlineProbes reads; add a method that "
                    f"{what}, or remove the callback"
                )
        for name in (f"{split}_dataloader" for split in self.fields):
            if not callable(getattr(trainer.datamodule, name, None)):  # type: ignore[attr-defined]
                raise UserError(
                    f"OnlineProbes reads {name}() of the datamodule, but "
                    f"{type(trainer.datamodule).__name__ if trainer.datamodule else 'this run'} has none; "  # type: ignore[attr-defined]
                    "train with a datamodule that has it, or remove the callback"
                )

    def first(self, trainer: Trainer, module: LightningModule, split: str) -> Columns:
        """Of this rank's first batch. Raises: UserError if there is none."""
        for columns, _ in self._batches(trainer, module, split):
            return columns
        raise UserError(
            f"OnlineProbes reads {split}_dataloader() of the datamodule, which gives no batch; give it samples (with "
            "shards: data.init_args.val_shards), or remove the callback"
        )

    def all(self, trainer: Trainer, module: LightningModule, split: str) -> Columns:
        """Of all ranks' samples, in the order of their index, each once. Raises: UserError as `first`."""
        parts = list(self._batches(trainer, module, split))
        if not parts:
            self.first(trainer, module, split)
        read, first = [columns for columns, _ in parts], parts[0][0]
        own = [torch.cat([one.columns[name] for one in read]) for name in first.columns]
        own += [_joined(name, [one.fields[name] for one in read]) for name in first.fields]
        gathered = iter(of_all_ranks(trainer, own, torch.cat([index for _, index in parts])))
        columns = {name: next(gathered) for name in first.columns}
        return Columns(columns, {name: next(gathered) for name in first.fields}, first.grids)

    def _batches(self, trainer: Trainer, module: LightningModule, split: str) -> Iterator[tuple[Columns, Tensor]]:
        """(what is read, index) of each batch of this rank."""
        loader = getattr(trainer.datamodule, f"{split}_dataloader")()  # type: ignore[attr-defined]
        if (samples := self.samples[split]) is not None:
            if not callable(getattr(loader, "some", None)):
                raise UserError(
                    f"OnlineProbes {split}_samples={samples}: {type(loader).__name__} has no some(count), which takes "
                    f"samples evenly; let {split}_dataloader() give fewer samples, and leave {split}_samples out"
                )
            loader = loader.some(samples)
        for batch in loader:
            batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), module.device)
            columns = self._read(trainer, module, batch)
            missing = [name for name in (*self.fields[split], "index") if name not in batch]
            if missing:
                raise UserError(
                    f"a batch for the probes has no {' and no '.join(missing)}: it contains {sorted(batch)}"
                )
            yield replace(columns, fields={name: batch[name] for name in self.fields[split]}), batch["index"]

    def _read(self, trainer: Trainer, module: LightningModule, batch: Any) -> Columns:
        columns: dict[Read, Tensor] = {}
        grids: dict[int | None, tuple[int, ...] | None] = {}
        if self.layers is None:
            columns[None, False] = features_of(trainer, module, batch)
        if self.layers is None and not self.tokens:
            return Columns(columns, {}, grids)
        with trainer.precision_plugin.forward_context():
            found: list[Tokens] = module.token_features(batch, self.layers or [-1])  # type: ignore[operator]
        layers: list[int | None] = [None] if self.layers is None else [*self.layers]
        for layer, tokens in zip(layers, found, strict=True):
            grids[layer] = tokens.grid
            if layer is not None:
                columns[layer, False] = tokens.pooled()
            if self.tokens:
                prefix = [] if tokens.prefix_BPD is None else [tokens.prefix_BPD]
                columns[layer, True] = torch.cat([*prefix, tokens.tokens_BTD], dim=1).float()
        return Columns(columns, {}, grids)


def _joined(name: str, parts: Sequence[Tensor]) -> Tensor:
    """Raises: UserError for batches whose maps differ in size."""
    sizes = {part.shape[1:] for part in parts}
    if len(sizes) > 1:
        raise UserError(
            f"{name} of the batches for the probes has the sizes {sorted(list(size) for size in sizes)}; bring all "
            "samples of a split to one size"
        )
    return torch.cat(list(parts))
