"""Short runs on batches that are given, for tests of methods with a teacher or with prototypes."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rank_processes
import torch
from lightning import Callback, Trainer
from torch.utils.data import DataLoader

from lightspan.method import Method
from lightspan.strategies import FSDP2

SILENT: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen.append(float(args[2]["loss"]))


def batch(rows: int = 6, seed: int = 1, locals_: int = 3, side: int = 8) -> dict[str, Any]:
    """Two global views and `locals_` of half their side."""
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(rows, 1, side, side, generator=generator) for _ in range(2)]
    views += [torch.randn(rows, 1, side // 2, side // 2, generator=generator) for _ in range(locals_)]
    return {"views": views, "label": torch.zeros(rows, dtype=torch.int64), "index": torch.arange(rows) + 10 * seed}


def degenerate(kind: str) -> dict[str, Any]:
    """One of `DEGENERATE`."""
    given = batch(rows=1 if kind == "one image" else 4, locals_=0 if kind == "no local views" else 2)
    if kind == "equal images":
        given["views"] = [view[:1].expand_as(view).contiguous() for view in given["views"]]
    if kind == "black":
        given["views"] = [torch.zeros_like(view) for view in given["views"]]
    return given


DEGENERATE = ("one image", "equal images", "black", "no local views")


def fit(model: Method, batches: Sequence[dict[str, Any]], folder: Path, **options: Any) -> list[float]:
    """The losses of one pass over the batches, in float32 on this processor unless `options` say otherwise."""
    losses, resume = Losses(), options.pop("ckpt_path", None)
    callbacks = [losses, *options.pop("callbacks", [])]
    options = SILENT | {"enable_checkpointing": False, "accelerator": "cpu", "max_epochs": 1} | options
    trainer = Trainer(default_root_dir=folder, callbacks=callbacks, **options)
    trainer.fit(model, DataLoader(batches, batch_size=None), ckpt_path=resume, weights_only=True)  # type: ignore[arg-type]
    return losses.seen


def in_float64(batches: Sequence[dict[str, Any]], part: slice) -> list[dict[str, Any]]:
    """These rows of all batches: rounding grows with each step, and float32 would hide a mistake in it."""
    return [
        {"views": [view[part].double() for view in of["views"]], "label": of["label"][part], "index": of["index"][part]}
        for of in batches
    ]


def accumulated_halves_train_as_one(
    make: Callable[[], Method], batches: Sequence[dict[str, Any]], folder: Path
) -> None:
    """Two micro-batches a step leave the state that the whole batches do."""
    half, one, two = len(batches[0]["index"]) // 2, make().double(), make().double()
    parts = [part for of in batches for slot in (slice(0, half), slice(half, None)) for part in in_float64([of], slot)]
    fit(one, in_float64(batches, slice(None)), folder)
    fit(two, parts, folder, accumulate_grad_batches=2)
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")  # type: ignore[misc]


def _ranks_train(rank: int, make: Callable[[], Method], batches: list[dict[str, Any]], folder: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    half = len(batches[0]["index"]) // 2
    own = in_float64(batches, slice(half * rank, half * rank + half))
    expected = torch.load(f"{folder}/alone.pt")
    for strategy in ("ddp", FSDP2()):
        model = make().double()
        fit(model, own, Path(folder), strategy=strategy, devices=2, use_distributed_sampler=False)
        for name, tensor in model.state_dict().items():
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            torch.testing.assert_close(whole, expected[name], rtol=1e-7, atol=1e-10, msg=lambda text, n=name: n + text)


def two_ranks_train_as_one(make: Callable[[], Method], batches: list[dict[str, Any]], folder: Path) -> None:
    """Under DDP and FSDP2, in float64; `make` is a function of a module, and its optimiser has to be linear in the
    gradient.
    """
    alone = make().double()
    fit(alone, in_float64(batches, slice(None)), folder)
    torch.save(alone.state_dict(), folder / "alone.pt")
    rank_processes.start(_ranks_train, 2, make, batches, str(folder), rank_processes.free_port())
