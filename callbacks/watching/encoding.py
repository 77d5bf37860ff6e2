"""Features and labels of the bank and of validation samples, as a model makes them while it trains.

Shapes: B samples of a batch, N samples of all ranks, T tokens, D features.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightspan.callbacks.watching.detached import features_of, of_all_ranks
from lightspan.errors import UserError
from lightspan.features.features import Features
from lightspan.nn.tokens import Tokens

Read = tuple[int | None, bool]
"""(layer, or None for what `features` gives; whether its tokens)."""


@dataclass(frozen=True)
class Columns:
    """Of one split: columns [N ...] in the order of the samples' index, and labels [N ...]."""

    columns: dict[Read, Tensor]
    labels: Tensor

    @property
    def layers(self) -> list[int | None]:
        return list(dict.fromkeys(layer for layer, _ in self.columns))

    def of(self, layer: int | None, tokens: bool = False) -> Features:
        """[N D], or with tokens [N T D]."""
        return Features(self.columns[layer, tokens], self.labels)


class Encoding:
    """Reads features of each sample of `bank_dataloader()` or `val_dataloader()` of the datamodule.

    Args:
        layers: as in `OnlineProbes`; None reads `features`.
        tokens: also the tokens, prefix tokens before the others: of each layer, or without layers of the last one.
        bank_samples: as in `OnlineProbes`.
    """

    def __init__(self, layers: list[int] | None, tokens: bool, bank_samples: int | None) -> None:
        self.layers, self.tokens, self.bank_samples = layers, tokens, bank_samples

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
        for name in ("bank_dataloader", "val_dataloader"):
            if not callable(getattr(trainer.datamodule, name, None)):  # type: ignore[attr-defined]
                raise UserError(
                    f"OnlineProbes reads {name}() of the datamodule, but "
                    f"{type(trainer.datamodule).__name__ if trainer.datamodule else 'this run'} has none; "  # type: ignore[attr-defined]
                    "train with a datamodule that has it, or remove the callback"
                )

    def first(self, trainer: Trainer, module: LightningModule, split: str) -> tuple[dict[Read, Tensor], Tensor, Tensor]:
        """(columns, labels, index) of this rank's first batch. Raises: UserError if there is none."""
        for batch in self._batches(trainer, module, split):
            return batch
        raise UserError(
            f"OnlineProbes reads {split}_dataloader() of the datamodule, which gives no batch; give it samples (with "
            "shards: data.init_args.val_shards), or remove the callback"
        )

    def all(self, trainer: Trainer, module: LightningModule, split: str) -> Columns:
        """Of all ranks' samples, in the order of their index, each once. Raises: UserError as `first`."""
        parts = list(self._batches(trainer, module, split))
        if not parts:
            self.first(trainer, module, split)
        read, labels_of_parts, index_of_parts = zip(*parts, strict=True)
        names = list(read[0])
        own = [torch.cat([columns[name] for columns in read]) for name in names]
        *columns, labels = of_all_ranks(trainer, [*own, torch.cat(labels_of_parts)], torch.cat(index_of_parts))
        return Columns(dict(zip(names, columns, strict=True)), labels)

    def _batches(
        self, trainer: Trainer, module: LightningModule, split: str
    ) -> Iterator[tuple[dict[Read, Tensor], Tensor, Tensor]]:
        loader = getattr(trainer.datamodule, f"{split}_dataloader")()  # type: ignore[attr-defined]
        if split == "bank" and self.bank_samples is not None:
            if not callable(getattr(loader, "some", None)):
                raise UserError(
                    f"OnlineProbes bank_samples={self.bank_samples}: {type(loader).__name__} has no some(count), which "
                    "takes samples evenly; let bank_dataloader() give fewer samples, and leave bank_samples out"
                )
            loader = loader.some(self.bank_samples)
        for batch in loader:
            batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), module.device)
            columns = self._read(trainer, module, batch)
            missing = [name for name in ("label", "index") if name not in batch]
            if missing:
                raise UserError(
                    f"a batch for the probes has no {' and no '.join(missing)}: it contains {sorted(batch)}"
                )
            yield columns, batch["label"], batch["index"]

    def _read(self, trainer: Trainer, module: LightningModule, batch: Any) -> dict[Read, Tensor]:
        columns: dict[Read, Tensor] = {}
        if self.layers is None:
            columns[None, False] = features_of(trainer, module, batch)
        if self.layers is None and not self.tokens:
            return columns
        with trainer.precision_plugin.forward_context():
            found: list[Tokens] = module.token_features(batch, self.layers or [-1])  # type: ignore[operator]
        layers: list[int | None] = [None] if self.layers is None else [*self.layers]
        for layer, tokens in zip(layers, found, strict=True):
            if layer is not None:
                columns[layer, False] = tokens.pooled()
            if self.tokens:
                prefix = [] if tokens.prefix_BPD is None else [tokens.prefix_BPD]
                columns[layer, True] = torch.cat([*prefix, tokens.tokens_BTD], dim=1).float()
        return columns
