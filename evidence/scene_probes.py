"""What the evidence on pre-training with rendered scenes shares: frozen patches of scenes, and what maps read in them.

Shapes: N scenes, T patches on a grid H W, D width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from lightspan.datamodules.rendered.scene_data import RenderedScenes
from lightspan.evaluation.dense.dense_probes import LinearSegmentation
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.probes.probes import LinearProbe
from lightspan.optim.schedules import WarmupCosine

PENALTIES = (1.0, 10.0, 100.0)


def adamw(rate: float) -> dict[str, Callable[..., Any]]:
    """The optimiser of all arms."""
    return {
        "optimizer": partial(torch.optim.AdamW, lr=rate, weight_decay=0.05),
        "lr_scheduler": partial(WarmupCosine, warmup=0.05, final=0.0),
    }


def kept(data: RenderedScenes, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The training batches of one epoch, drawn once for all arms; pictures in half precision."""
    data.setup()
    return [
        tree_map(lambda x: x.half() if x.is_floating_point() else x, {name: batch[name] for name in fields})
        for batch in data.train_dataloader()
    ]


def served(batches: list[dict[str, Any]]) -> DataLoader:
    """In their order, in single precision."""

    def widened(batch: dict[str, Any]) -> dict[str, Any]:
        return tree_map(lambda x: x.float() if x.is_floating_point() else x, batch)

    return DataLoader(batches, batch_size=None, collate_fn=widened)  # type: ignore[arg-type]


@torch.no_grad()
def seen(backbone: nn.Module, data: RenderedScenes, part: str, fields: Sequence[str]) -> Features:
    """Patches [N T D] of the validation or the test scenes, with fields of their batches."""
    backbone.eval()
    loader: Any = getattr(data, f"{part}_dataloader")()
    tokens, found, grid = list[Tensor](), dict[str, list[Tensor]](), (0, 0)
    for batch in loader:
        grid = backbone.grid(batch["image"])  # type: ignore[operator]
        tokens.append(backbone.tokens(batch["image"])[:, backbone.num_prefix_tokens :])  # type: ignore[operator]
        for name in fields:
            found.setdefault(name, []).append(batch[name])
    return Features(torch.cat(tokens), grid=grid, fields={name: torch.cat(column) for name, column in found.items()})


def linear(bank: Features, query: Features, target: Callable[[Features], Tensor], rows: int) -> float:
    """The first score of a linear probe of the mean over patches, learned from the first so many scenes of the bank, in
    per cent: accuracy of classes, mean average precision of tags.
    """
    known, asked = (
        Features(part.x[:count].mean(dim=1), target(part)[:count])
        for part, count in ((bank, rows), (query, len(query)))
    )
    return 100 * next(iter(LinearProbe(PENALTIES).fit(known, asked).scores.values()))


def segmentation(bank: Features, query: Features, field: str = "semantic") -> float:
    """Mean IoU in per cent."""
    return 100 * LinearSegmentation(field, PENALTIES).fit(bank, query).scores["mean_iou"]
