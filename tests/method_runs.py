"""Short runs on batches that are given, for tests of methods with a teacher or with prototypes."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rank_processes
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightspan.method import Method
from lightspan.nn.teachers.centring import Centre
from lightspan.strategies import DDP, FSDP2

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


class Flat(nn.Module):
    """A backbone of 8 x 8 pixels whose rows do not see one another: parts of a batch give what all of it gives."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh())

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.layers(x_BCHW)


class Pooled(nn.Module):
    """The same for views of any size."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 8, kernel_size=3)

    def forward(self, image: Tensor) -> Tensor:
        return self.layer(image).tanh().mean(dim=(2, 3))


@torch.no_grad()
def moved(model: Any) -> Any:
    """With a teacher and centres that are not those of the first step."""
    torch.manual_seed(1)
    for parameter in model.teacher.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    for part in model.modules():
        if isinstance(part, Centre):
            part.centre_K.copy_(0.2 * torch.randn_like(part.centre_K))
    return model


def stays_finite(model: Method, batches: Sequence[dict[str, Any]], folder: Path, **options: Any) -> None:
    """Losses and weights do."""
    assert torch.tensor(fit(model, batches, folder, **options)).isfinite().all()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def resumes(make: Callable[[], Any], given: dict[str, Any], folder: Path, step: int = 2, **options: Any) -> Any:
    """The model of a straight run, which one that resumes after `step` steps equals bit for bit.

    Args:
        given: every batch: a plain loader does not know where it was.
        options: `count` of these in an epoch, 4, and those of `fit`.
    """
    straight, resumed, same = make(), make(), [given] * options.pop("count", 4)
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(straight, same, folder, callbacks=[saves], enable_checkpointing=True, **options)
    fit(resumed, same, folder, ckpt_path=folder / f"step={step}.ckpt", **options)
    for (name, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    return straight


def taught(
    model: Any, batches: Sequence[dict[str, Any]], folder: Path, kept: Callable[[], Tensor]
) -> tuple[list[float], list[bool]]:
    """Trains. The momentum with which the teacher follows each step, and whether `kept` is still what it was."""
    momenta, unchanged, before, follow = list[float](), list[bool](), kept().detach().clone(), model.teacher.follow

    def watched(student: nn.Module, momentum: float) -> None:
        momenta.append(momentum)
        unchanged.append(torch.equal(kept(), before))
        follow(student, momentum)

    model.teacher.follow = watched
    fit(model, batches, folder)
    return momenta, unchanged


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


def an_overflow_leaves_nothing(make: Callable[[], Method], batches: Sequence[dict[str, Any]], folder: Path) -> None:
    """With 16-mixed and a batch that float16 cannot hold, whose step is skipped, the state is that without the batch.

    Args:
        make: a method without norms, whose running statistics see every batch, and without schedules, which count it.
        batches: three or more, of other images each; the last one gives the images of the batch that is skipped.
    """

    def trained(given: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        model, scaler = make(), torch.amp.GradScaler("cpu", init_scale=1.0)
        fit(model, given, folder, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        return model.state_dict()

    *held, last = batches
    huge = last | {"views": [torch.full_like(view, 1e30) for view in last["views"]]}
    expected = trained(held)
    for name, tensor in trained([held[0], huge, *held[1:]]).items():
        assert tensor.isfinite().all(), name
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5, msg=lambda text, n=name: n + text)  # type: ignore[misc]


def _ranks_train(rank: int, make: Callable[[], Method], batches: list[dict[str, Any]], folder: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    half = len(batches[0]["index"]) // 2
    own = in_float64(batches, slice(half * rank, half * rank + half))
    expected = torch.load(f"{folder}/alone.pt")
    for strategy in (DDP(), FSDP2()):
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
